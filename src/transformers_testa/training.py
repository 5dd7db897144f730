"""What the scripts share: model and data, optimiser and schedule, checkpoints, the training loop."""

import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import datasets
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin, load
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler

from transformers_testa.arguments import (
    COUNTS,
    DataArguments,
    ModelArguments,
    ObjectiveArguments,
    TrainingArguments,
    multiplies_bf16,
)
from transformers_testa.budgets import plan_merges
from transformers_testa.configuration_testa import TestaConfig, TestaVideoConfig
from transformers_testa.conversion import from_blip
from transformers_testa.conversion_bert import start_text_from_bert
from transformers_testa.data.annotations import Task, check_clips, load_annotations
from transformers_testa.data.augmentation import VideoAugmentation
from transformers_testa.data.benchmarks import BENCHMARKS, load_benchmark, load_hub_dataset
from transformers_testa.data.datasets import (
    BrokenVideos,
    VideoQuestionsDataset,
    VideoTextDataset,
    cache_frames,
    cache_videos,
)
from transformers_testa.data.sampling import EpochBatchSampler, distractor_rows
from transformers_testa.flops import count_video_gflops
from transformers_testa.hub import load_config
from transformers_testa.initialization import imitate_trained_attention
from transformers_testa.modeling_testa import TestaForRetrieval, TestaVideoModel, resize_time
from transformers_testa.momentum import MomentumTraining
from transformers_testa.muon import Float32Muon
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.video_processing_testa import TestaVideoProcessor


logger = logging.getLogger(__name__)


# --- Model and data ----------------------------------------------------------------------------------------------------


Model = TypeVar("Model", bound=PreTrainedModel)
Module = TypeVar("Module", bound=nn.Module)


def build_model(
    model_class: type[Model],
    model_args: ModelArguments,
    data_args: DataArguments,
    gradient_checkpointing: bool = False,
) -> tuple[Model, TestaProcessor]:
    """Load a model, or make one with new weights, and its processor, with the arguments' settings put into both.

    Weights that were trained with another number of frames get resized time embeddings.

    Raises:
        ValueError: The model can't be found, the folder holds another kind of model, or the settings don't go together.
    """
    argument = "model_name_or_path" if model_args.model_name_or_path else "config_name"
    source = getattr(model_args, argument)
    config = load_config(argument, source)
    if not isinstance(config, TestaConfig):
        raise ValueError(f"{source} holds a `{config.model_type}` model; a `testa` model is needed.")
    stored_frames = config.video_config.num_frames
    configure(config, model_args, data_args)
    if model_args.model_name_or_path:
        model = _load_model(model_class, source, config, stored_frames)
    elif model_args.init_from_blip:
        if model_class.__name__ not in BLIP_ARCHITECTURES:
            raise ValueError(
                f"init_from_blip makes no {model_class.__name__}; convert the checkpoint (python -m "
                "transformers_testa.conversion ... --from blip --architecture retrieval) and pass the folder as "
                "model_name_or_path."
            )
        blip = from_blip(model_args.init_from_blip, BLIP_ARCHITECTURES[model_class.__name__], config)
        assert isinstance(blip, model_class)
        model = blip
    else:
        model = model_class(config)
        if model_args.mimetic_initialization:
            for module in model.modules():
                if isinstance(module, TestaVideoModel):
                    imitate_trained_attention(module)
        if model_args.init_text_from_bert:
            start_text_from_bert(model, model_args.init_text_from_bert)
    if model_args.attn_implementation:
        model.set_attn_implementation(model_args.attn_implementation)
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    processor = TestaProcessor.from_pretrained(source)
    _override(processor.video_processor, data_args, "num_frames", "frame_sampling")
    _override(processor.video_processor, data_args, "decoding_time_limit", "decoding_memory_limit")
    return model, processor


BLIP_ARCHITECTURES = {
    "TestaForPreTraining": "pretraining",
    "TestaForRetrieval": "retrieval",
    "TestaForVideoQA": "videoqa",
}


def configure(config: TestaConfig, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Put the arguments' settings into a configuration. Raises ValueError where they don't go together.

    Temporal scaling, which belongs to pre-training, is left behind where frames merge or nothing attends along time.
    """
    video_config = config.video_config
    _override(video_config, data_args, "num_frames")
    if model_args.time_embeddings is not None:
        video_config.num_frames = model_args.time_embeddings
    for part in (config, video_config, config.text_config):
        _override(part, model_args, "initializer_range")
    chosen = (*COUNTS, "attention_type", "aggregation_strategy", "frame_matching", "proportional_attention")
    _override(video_config, model_args, *chosen)
    if model_args.keep_ratio is not None or model_args.max_gflops is not None:
        _plan_within_budget(video_config, model_args)
    if any(video_config.merged_frames) or video_config.attention_type != "divided_space_time":
        video_config.use_temporal_scaling = False
    video_config.validate_architecture()


def _load_model(model_class: type[Model], source: str, config: TestaConfig, stored_frames: int) -> Model:
    if config.video_config.num_frames == stored_frames:
        return model_class.from_pretrained(source, config=config, dtype=torch.float32)
    stored_config = deepcopy(config)
    # Aggregation has no weights, and may not fit the stored number of frames.
    without_merges = {"num_frames": stored_frames, "merged_frames_per_layer": 0, "merged_patches_per_layer": 0}
    for name, value in without_merges.items():
        setattr(stored_config.video_config, name, value)
    weights = model_class.from_pretrained(source, config=stored_config, dtype=torch.float32).state_dict()
    resized = {
        name: resize_time(weight, config.video_config.num_frames)
        for name, weight in weights.items()
        if name.endswith(("time_embeddings", "temporal_scaling"))
    }
    model = model_class(config)
    model.load_state_dict(weights | resized)
    return model.eval()


def _plan_within_budget(config: TestaVideoConfig, model_args: ModelArguments) -> None:
    config.use_temporal_scaling = False
    merges = plan_merges(config, model_args.keep_ratio, model_args.max_gflops, model_args.merge_schedule)
    config.merged_frames_per_layer, config.merged_patches_per_layer = merges
    logger.info(
        f"Blocks merge {merges[0]} frames and {merges[1]} patches of each frame: {count_video_gflops(config):.1f} GFLOPs "
        f"for {config.num_frames} frames, of {count_video_gflops(config, merges=([0] * len(merges[0]),) * 2):.1f}."
    )


def _override(settings: Any, arguments: Any, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            setattr(settings, name, getattr(arguments, name))


def load_split(data_args: DataArguments, split: str, task: Task = "text") -> list[datasets.Dataset]:
    """Return the annotation tables of "train", "validation" or "test", one for each source.

    Raises:
        ValueError: No source is given, or it can't be read, or it is for another task.
    """
    video_root, max_words = data_args.video_root, data_args.max_words
    columns = dict(column.split("=", 1) for column in data_args.columns or ())
    if not data_args.dataset_name:
        files = getattr(data_args, f"{split}_file")
        if not files:
            raise ValueError(f"{split}_file is missing: the annotations of the {split} split (or pass dataset_name).")
        return [load_annotations(file, video_root, max_words, task, columns) for file in files]
    folders = iter(data_args.data_dir or ())
    tables = []
    for name in data_args.dataset_name:
        if name in BENCHMARKS:
            if BENCHMARKS[name].task != task:
                raise ValueError(f"The data set {name} has no `{task}` annotations but `{BENCHMARKS[name].task}`.")
            tables.append(load_benchmark(name, next(folders), split, video_root, max_words))
        elif "/" in name or Path(name).is_dir():
            configuration = data_args.dataset_config_name
            tables.append(load_hub_dataset(name, split, columns, configuration, video_root, max_words, task))
        else:
            raise ValueError(
                f"There is no dataset `{name}`; there are {', '.join(BENCHMARKS)}, and data sets of the Hub (owner/name)."
            )
    return tables


def video_dataset(
    table: datasets.Dataset,
    video_processor: TestaVideoProcessor,
    data_args: DataArguments,
    args: TrainingArguments,
    accelerator: Accelerator,
    training: bool = False,
    questions_per_video: int | None = None,
) -> VideoTextDataset:
    """Return the data set of a table, its frames cached if asked for; in training with sampling and augmentation.

    With `questions_per_video` it is one of videos with so many of their questions each, outside training with all.
    """
    make_dataset: Callable[..., VideoTextDataset] = VideoTextDataset
    if questions_per_video:
        make_dataset = partial(
            VideoQuestionsDataset, questions_per_video=questions_per_video, all_questions=not training
        )
    video_processor = deepcopy(video_processor)
    augmentation = None
    if training:
        video_processor.frame_sampling = data_args.train_frame_sampling or video_processor.frame_sampling
        if data_args.crop_from or data_args.random_flip or data_args.rand_augment_ops:
            size = video_processor.size["height"]
            augmentation = VideoAugmentation(size, data_args.random_flip, data_args.rand_augment_ops)
            larger = data_args.crop_from or size
            video_processor.size = type(video_processor.size)(height=larger, width=larger)
    if not (data_args.cache_frames or data_args.cache_videos):
        return make_dataset(table, video_processor, augmentation=augmentation)
    cache = cache_videos if data_args.cache_videos else cache_frames
    # One process decodes while the others wait, with their workers too.
    num_workers = min(args.num_workers * accelerator.num_processes, max(args.num_workers, os.cpu_count() or 1))
    with accelerator.main_process_first():
        frames = cache(table, video_processor, num_proc=num_workers or None)
    return make_dataset(table, video_processor, frames, augmentation)


def training_set(
    processor: TestaProcessor,
    data_args: DataArguments,
    args: TrainingArguments,
    accelerator: Accelerator,
    task: Task = "text",
    questions_per_video: int | None = None,
) -> tuple[VideoTextDataset, EpochBatchSampler]:
    """Return the training split of all sources as one data set, and the order in which it is gone through."""
    sources = load_split(data_args, "train", task)
    table = join_sources(sources)
    dataset = video_dataset(
        *(table, processor.video_processor, data_args, args, accelerator),
        training=True,
        questions_per_video=questions_per_video,
    )
    sampler = EpochBatchSampler(
        len(dataset),
        args.per_device_train_batch_size * accelerator.num_processes,
        args.seed,
        hard_negatives=distractor_rows(table) if data_args.group_distractors else None,
        source_sizes=[len(set(source["video_id"][:])) if questions_per_video else len(source) for source in sources],
        source_weights=data_args.train_weights,
    )
    return dataset, sampler


def evaluation_tables(
    data_args: DataArguments, args: TrainingArguments, task: Task = "text"
) -> dict[str, datasets.Dataset]:
    """Return the annotation table of each split that is to be evaluated."""
    splits = [split for split, asked in (("validation", args.do_eval), ("test", args.do_predict)) if asked]
    return {split: join_sources(load_split(data_args, split, task)) for split in splits}


def join_sources(tables: list[datasets.Dataset]) -> datasets.Dataset:
    """Join the tables of several sources.

    Raises:
        ValueError: Questions have different numbers of choices, or a `video_id` is that of two clips.
    """
    numbers = {len(table[0]["choices"]) for table in tables if "choices" in table.column_names}
    if len(numbers) > 1:
        raise ValueError(
            f"The files of a split have {' and '.join(map(str, sorted(numbers)))} choices a question; one number is needed."
        )
    if len(tables) > 1:
        check_clips(chain.from_iterable(_clips(table, f"source {number}") for number, table in enumerate(tables, 1)))
    return datasets.concatenate_datasets(tables)


def _clips(table: datasets.Dataset, place: str) -> Iterator[tuple[str, tuple[str, float | None, float | None], str]]:
    nothing = [None] * len(table)
    times = (table[name][:] if name in table.column_names else nothing for name in ("start", "end"))
    for video_id, video, start, end in zip(table["video_id"][:], table["video"][:], *times, strict=True):
        yield video_id, (video, start, end), place


def create_objective(
    model: TestaForRetrieval, objective_args: ObjectiveArguments, args: TrainingArguments, sampler: EpochBatchSampler
) -> TestaForRetrieval | MomentumTraining:
    """Return what is trained: the model itself, or the model with a teacher and queues.

    Raises:
        ValueError: The queue is shorter than a batch over all processes.
    """
    if objective_args.momentum is None:
        return model
    if objective_args.queue_size < sampler.batch_size:
        raise ValueError(
            f"queue_size is {objective_args.queue_size}; at least a batch over all processes is needed: "
            f"{sampler.batch_size}."
        )
    return MomentumTraining(
        model,
        objective_args.queue_size,
        objective_args.momentum,
        objective_args.distillation_weight,
        round(objective_args.distillation_ramp_epochs * count_steps_per_epoch(args, sampler)),
    )


# --- Accelerator, optimiser, schedule ----------------------------------------------------------------------------------


def create_accelerator(args: TrainingArguments) -> Accelerator:
    """Return an accelerator for [`train`]: a batch is split over the processes, and accumulation crosses epochs.

    Raises:
        ValueError: The tracker in `report_to` isn't installed, or Accelerate's configuration asks for what can't work.
    """
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if args.report_to not in ("none", *trackers):
        raise ValueError(f"report_to is {args.report_to!r}; installed are {', '.join(trackers) or 'no trackers'}.")
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        # All processes change the queues of MomentumTraining alike.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if args.optimizer != "adamw" and accelerator.distributed_type in sharded:
        raise ValueError(
            f"optimizer is {args.optimizer!r}, which needs whole matrices, and Accelerate's configuration shards them "
            f"({accelerator.distributed_type.value}); use adamw."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        for name, value, needed in (
            ("fsdp_version", plugin.fsdp_version, 2),
            ("fsdp_cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, False),
        ):
            if value != needed:
                raise ValueError(f"{name} is {value} in Accelerate's configuration; {needed} is needed.")
    return accelerator


def whole_model(model: Module) -> Module:
    """Return the model itself or, where FSDP has split its weights over the processes, a copy with all of them.

    All processes have to call this together.
    """
    weights = model.state_dict()
    if not any(isinstance(weight, DTensor) for weight in weights.values()):
        return model
    whole = type(model)(model.config).eval().to(next(model.parameters()).device)
    whole.load_state_dict(
        {name: weight.full_tensor() if isinstance(weight, DTensor) else weight for name, weight in weights.items()}
    )
    return whole


def create_optimizers(model: nn.Module, args: TrainingArguments, fused: bool = True) -> list[torch.optim.Optimizer]:
    """Return the optimisers that train a model together: AdamW, with `args.optimizer` "muon" after Muon.

    Muon takes the weights of linear layers, but for those that are word embeddings as well, and AdamW the rest. Only
    the weights of linear and convolution layers decay. Both get the same learning rate: Muon's steps are as large as
    AdamW's.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    decayed = {id(layer.weight) for layer in layers}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)} - embeddings
    optimizers: list[torch.optim.Optimizer] = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.optimizer == "muon":
        of_muon = [parameter for parameter in trained if id(parameter) in matrices]
        trained = [parameter for parameter in trained if id(parameter) not in matrices]
        rate, decay = args.learning_rate, args.weight_decay
        optimizers.append(
            torch.optim.Muon(of_muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            if multiplies_bf16()
            else Float32Muon(of_muon, lr=rate, weight_decay=decay)
        )
    groups = [
        {"params": [parameter for parameter in trained if (id(parameter) in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, args.weight_decay), (False, 0.0))
    ]
    optimizers.append(torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, args.adam_beta2), fused=fused))
    return optimizers


def create_scheduler(
    optimizer: torch.optim.Optimizer, args: TrainingArguments, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a linear warm-up to `learning_rate` and a cosine from there to `min_learning_rate`."""
    start = args.warmup_start_learning_rate
    warmup_steps = math.ceil(args.warmup_ratio * num_steps) if args.warmup_steps is None else args.warmup_steps
    return get_scheduler(
        "cosine_warmup_with_min_lr",
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs={
            "min_lr_rate": args.min_learning_rate / args.learning_rate,
            "warmup_lr_rate": None if start is None else start / args.learning_rate,
        },
    )


# --- Checkpoints -------------------------------------------------------------------------------------------------------


def run_identity(model: PreTrainedModel, dataset: VideoTextDataset, *arguments: Any) -> dict[str, Any]:
    """Return what has to be equal for a run to go on from another's checkpoint.

    Args:
        model: Its configuration counts.
        dataset: The ids and texts of its rows count, where the files lie doesn't.
        arguments: Groups of arguments; those that a group lists as `free` don't count.
    """
    fixed = {
        name: value
        for group in arguments
        for name, value in dataclasses.asdict(group).items()
        if name not in group.free
    }
    config = model.config.to_dict() | {"transformers_version": None, "_name_or_path": None}
    return json.loads(json.dumps({**fixed, **_flatten(config, "config"), "training rows": dataset.digest()}))


def _flatten(settings: dict, prefix: str) -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        name = f"{prefix}.{name}"
        flat.update(_flatten(value, name) if isinstance(value, dict) else {name: value})
    return flat


@dataclass
class Progress:
    """How far a run is.

    Args:
        step: Optimizer steps done.
        batches: Training batches consumed, those skipped included: the position in the data.
        results: Metrics by split, then by moment ("before training", "step 100", "after training").
        losses: Mean losses since the entry before, by step.
        best_step: The step at which validation gave the best value so far, and
        best_value: that value.
        broken_videos: Videos that couldn't be decoded: path → reason.
    """

    step: int = 0
    batches: int = 0
    results: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    best_step: int | None = None
    best_value: float = -math.inf
    broken_videos: BrokenVideos = field(default_factory=BrokenVideos)


class Checkpoints:
    """The last two checkpoints of a run and the best, each a folder that appears under its name when it is complete.

    Args:
        accelerator: Holds what [`accelerate.Accelerator.save_state`] saves.
        output_dir: Checkpoints are its subfolders `checkpoint-<step>`.
        identity: What [`run_identity`] returns; a checkpoint with another one, or of another number of processes, is
            refused.
    """

    keep = 2

    def __init__(self, accelerator: Accelerator, output_dir: str | Path, identity: dict[str, Any]):
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.identity = {**identity, "number of processes": accelerator.num_processes}

    def folders(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        steps = {folder: folder.name.removeprefix("checkpoint-") for folder in self.output_dir.glob("checkpoint-*")}
        return sorted((folder for folder, step in steps.items() if step.isdigit()), key=lambda f: int(steps[f]))

    def folder(self, step: int | None) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.output_dir / f"checkpoint-{step}"

    def find(self, resume_from_checkpoint: str = "auto", overwrite: bool = False) -> Path | None:
        """Return the checkpoint to go on from, or None to start at step 0.

        Args:
            resume_from_checkpoint: "auto" for the newest one in `output_dir`, or a checkpoint's folder.
            overwrite: Delete the checkpoints in `output_dir` instead.

        Raises:
            ValueError: There is no checkpoint at the given folder, or it belongs to another run.
        """
        if overwrite:
            if self.accelerator.is_main_process:
                for folder in self.folders():
                    shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
        folder = Path(resume_from_checkpoint)
        if resume_from_checkpoint == "auto":
            if not self.folders():
                return None
            folder = self.folders()[-1]
        if not (folder / "progress.json").is_file():
            raise ValueError(f"resume_from_checkpoint is {resume_from_checkpoint!r}, where no checkpoint is.")
        try:
            saved = json.loads((folder / "identity.json").read_text())
        except ValueError as error:
            raise ValueError(
                f"The checkpoint {folder} is damaged; delete it, to go on from the one before."
            ) from error
        for name in {**self.identity, **saved}:
            if saved.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{folder} was made by another run: `{name}` is {saved.get(name)!r} there and "
                    f"{self.identity.get(name)!r} here. Choose another output_dir, or pass overwrite_output_dir to "
                    "delete the checkpoints and start over."
                )
        return folder

    def load(self, folder: Path) -> Progress:
        """Put weights, optimiser, schedule and random generators back to where they were, and return the progress.

        Raises:
            ValueError: A file of the checkpoint is damaged, or asks for code to be run, which is never done.
        """
        try:
            # Where it can't read them, Accelerate goes on without them, to another end.
            load(folder / f"random_states_{self.accelerator.process_index}.pkl")
            self.accelerator.load_state(str(folder))
            saved = json.loads((folder / "progress.json").read_text())
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
            raise ValueError(
                f"The checkpoint {folder} is damaged; delete it, to go on from the one before. ({error})"
            ) from error
        return Progress(**{**saved, "broken_videos": BrokenVideos(saved["broken_videos"])})

    def save(self, progress: Progress) -> None:
        """Write a checkpoint aside, rename it, and delete those before the last two, but for the best.

        Raises:
            OSError: It can't be written, for want of space for one; the checkpoints before it stay as they are.
        """
        folder = self.folder(progress.step)
        partial = folder.with_suffix(".partial")
        if self.accelerator.is_main_process:
            for leftover in (*self.output_dir.glob("checkpoint-*.partial"), folder):
                shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                (partial / "progress.json").write_text(json.dumps(dataclasses.asdict(progress), indent=2))
                (partial / "identity.json").write_text(json.dumps(self.identity, indent=2))
                partial.rename(folder)
        # What torch and safetensors make of a full disk.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = str(self.folders()[-1]) if self.folders() else "none yet"
            raise OSError(
                f"The checkpoint of step {progress.step} could not be written to {self.output_dir}: {error}. The last "
                f"whole one is {last}; make room, and give the same command again to go on from there."
            ) from error
        if self.accelerator.is_main_process:
            for old in self.folders()[: -self.keep]:
                if old != self.folder(progress.best_step):
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


# --- The loop ----------------------------------------------------------------------------------------------------------


def count_steps_per_epoch(args: TrainingArguments, sampler: EpochBatchSampler) -> int:
    """Return the optimizer steps of a pass over the training set, at least 1."""
    return max(1, sampler.batches_per_epoch // args.gradient_accumulation_steps)


def train(
    args: TrainingArguments,
    accelerator: Accelerator,
    objective: PreTrainedModel | MomentumTraining,
    dataset: VideoTextDataset,
    sampler: EpochBatchSampler,
    collate: Callable[[list[dict]], dict],
    identity: dict[str, Any],
    evaluate: Callable[[Progress, str], dict[str, float]] | None = None,
    best_by: str | None = None,
    smallest_batch: int = 1,
) -> Progress:
    """Train a model in place, or go on training it from a checkpoint as if it had never stopped.

    Args:
        args: How.
        accelerator: What [`create_accelerator`] returns.
        objective: What [`create_objective`] returns, or a model that gives an output with a `loss` for a batch.
        dataset: Gives a sample for a (row number, seed).
        sampler: The order in which its rows are gone through.
        collate: Makes samples a batch with `broken_videos`, as [`collate_training_samples`] does.
        identity: What [`run_identity`] returns.
        evaluate: From progress and the name of the moment ("before training", "step 100") to metrics of the validation
            split, which it also writes into the progress. None for a run without.
        best_by: The metric, higher being better, by which the best step is found; its weights are the model's at the
            end. None looks for none: the last ones stay, unless the run was evaluated before.
        smallest_batch: Samples that a batch needs in every process; one with fewer videos that can be decoded is left out.

    Returns:
        The progress at the end.

    Raises:
        ValueError: The training set is smaller than a batch or can't be decoded, or `output_dir` holds checkpoints of
            another run.
        FloatingPointError: A loss or a gradient is no longer finite. The samples of its batch are named; the model
            keeps the weights from before.
        OSError: A checkpoint can't be written.
    """
    if args.output_dir is None:
        raise ValueError("output_dir is missing: the folder where checkpoints go.")
    steps_per_epoch = count_steps_per_epoch(args, sampler)
    num_steps = args.max_train_steps or max(
        1, args.num_train_epochs * sampler.batches_per_epoch // args.gradient_accumulation_steps
    )
    eval_steps, save_steps = args.eval_steps or steps_per_epoch, args.save_steps or steps_per_epoch
    optimizers = create_optimizers(objective, args, fused=accelerator.device.type in ("cpu", "cuda", "mps", "xpu"))
    schedulers = [create_scheduler(optimizer, args, num_steps) for optimizer in optimizers]
    loader = create_loader(dataset, collate, args.num_workers, batch_sampler=sampler)
    prepared, loader, *rest = accelerator.prepare(objective, loader, *optimizers, *schedulers)
    optimizers, schedulers = rest[: len(optimizers)], rest[len(optimizers) :]

    checkpoints = Checkpoints(accelerator, args.output_dir, identity)
    checkpoint = checkpoints.find(args.resume_from_checkpoint, args.overwrite_output_dir)
    progress = checkpoints.load(checkpoint) if checkpoint else Progress()
    sampler.first_batch = progress.batches
    if checkpoint:
        logger.info(f"Going on from {checkpoint}, step {progress.step} of {num_steps}.")
    elif evaluate and args.eval_before_training:
        evaluate(progress, "before training")

    outputs, status, skipped, losses_of_step = [], {}, 0, {}
    bar = tqdm(total=num_steps, initial=progress.step, desc="Training", disable=not accelerator.is_main_process)
    for batch in loader if progress.step < num_steps else ():
        progress.batches += 1
        # All processes have to take part in a step.
        if not _everywhere(accelerator, progress.broken_videos.take_from(batch) >= smallest_batch):
            skipped += 1
            if skipped == 2 * sampler.batches_per_epoch:
                raise ValueError(
                    f"No batch of the training set has {smallest_batch} or more videos that can be decoded."
                )
            continue
        skipped = 0
        prepared.train()
        with accelerator.accumulate(prepared):
            output = prepared(**batch)
            accelerator.backward(output.loss)
            losses_of_step[progress.batches - 1] = output.loss.detach()
            if accelerator.sync_gradients:
                # The norm is that of all processes: they stop together.
                norm = accelerator.clip_grad_norm_(prepared.parameters(), args.max_grad_norm)
                if not _is_finite(norm):
                    raise FloatingPointError(
                        _name_samples(losses_of_step, progress.step + 1, accelerator, dataset, sampler)
                        + " The weights are those from before this step, as are all checkpoints. Look at these samples, "
                        "lower learning_rate, or train with mixed_precision no."
                    )
                losses_of_step = {}
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        outputs.append({name: value.detach() for name, value in output.items() if name.startswith("loss")})
        if not accelerator.sync_gradients:
            continue

        if isinstance(objective, MomentumTraining):
            objective.after_optimizer_step()
        progress.step += 1
        bar.update()
        finished = progress.step == num_steps
        save = finished or progress.step % save_steps == 0
        if save or progress.step % args.logging_steps == 0:
            losses = progress.losses[str(progress.step)] = _mean_losses(accelerator, outputs, progress.step)
            accelerator.log({**losses, "learning_rate": schedulers[0].get_last_lr()[0]}, step=progress.step)
            status["loss"], outputs = f"{losses['loss']:.3f}", []
        if evaluate and args.do_eval and (finished or progress.step % eval_steps == 0):
            metrics = evaluate(progress, f"step {progress.step}")
            accelerator.log(metrics, step=progress.step)
            if best_by:
                status[best_by] = f"{metrics[best_by]:.1f}"
                if metrics[best_by] > progress.best_value:
                    progress.best_step, progress.best_value, save = progress.step, metrics[best_by], True
        bar.set_postfix(status, refresh=False)
        if save:
            checkpoints.save(progress)
        if finished:
            break
    bar.close()
    if progress.best_step not in (None, progress.step):
        logger.info(f"Taking the weights of step {progress.best_step}, best by validation: {progress.best_value:.2f}.")
        accelerator.load_state(str(checkpoints.folder(progress.best_step)))
    return progress


def create_loader(dataset: Dataset, collate: Callable[[list], dict], num_workers: int, **kwargs: Any) -> DataLoader:
    """Return a loader that takes no random number from torch's global generator; `kwargs` are the loader's own."""
    return DataLoader(dataset, collate_fn=collate, num_workers=num_workers, generator=torch.Generator(), **kwargs)


def _everywhere(accelerator: Accelerator, condition: bool) -> bool:
    if accelerator.num_processes == 1:
        return condition
    return bool(accelerator.gather(torch.tensor([condition], device=accelerator.device)).all())


def _is_finite(norm: torch.Tensor | float | None) -> bool:
    """Return whether a norm of gradients is finite, or DeepSpeed keeps it for itself."""
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm is None or math.isfinite(norm)


def _name_samples(
    losses: dict[int, torch.Tensor],
    step: int,
    accelerator: Accelerator,
    dataset: VideoTextDataset,
    sampler: EpochBatchSampler,
) -> str:
    """Say which batches of a step (by number, with their losses) went wrong, and which videos this process had of them."""
    wrong = {number: loss.item() for number, loss in losses.items() if not math.isfinite(loss)}
    found = f"The gradient isn't finite at step {step}, though the loss is (in this process)"
    if wrong:
        found = f"The loss is {next(iter(wrong.values()))} at step {step}"
    share = sampler.batch_size // accelerator.num_processes
    own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    rows = [row for number in wrong or losses for row, _ in sampler.batch(number)[own]]
    return f"{found}, where the batch has the videos {', '.join(map(str, dataset.video_ids(rows)))}."


def _mean_losses(accelerator: Accelerator, outputs: list[dict[str, torch.Tensor]], step: int) -> dict[str, float]:
    """Return the mean of each loss over outputs and processes. Raises FloatingPointError where the total isn't finite."""
    means = torch.stack([torch.stack([output[name].float() for output in outputs]).mean() for name in outputs[0]])
    losses = dict(zip(outputs[0], accelerator.reduce(means, reduction="mean").tolist(), strict=True))
    if not math.isfinite(losses["loss"]):
        raise FloatingPointError(
            f"The loss is {losses['loss']} at step {step}; lower learning_rate, or train with mixed_precision no. "
            "The last checkpoint is from before."
        )
    return losses
