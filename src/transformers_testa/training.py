"""What the scripts share: optimiser and schedule, checkpoints, the training loop, model cards."""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin
from huggingface_hub import ModelCardData
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, get_scheduler

from transformers_testa.arguments import DataArguments, ModelArguments, TrainingArguments
from transformers_testa.data.annotations import load_annotations, load_benchmark
from transformers_testa.data.datasets import BrokenVideos, EpochBatchSampler, VideoTextDataset, cache_frames
from transformers_testa.flops import count_video_gflops
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.video_processing_testa import TestaVideoProcessor


logger = logging.getLogger(__name__)


# --- Model and data ----------------------------------------------------------------------------------------------------


def build_model(
    model_class: type[PreTrainedModel], model_args: ModelArguments, data_args: DataArguments
) -> tuple[PreTrainedModel, TestaProcessor]:
    """Load a model, or make one with new weights, and its processor, with the arguments' settings put into both.

    Raises:
        ValueError: The folder holds another kind of model, or the settings don't go together.
    """
    source = model_args.model_name_or_path or model_args.config_name
    config = AutoConfig.from_pretrained(source)
    if config.model_type != "testa":
        raise ValueError(f"{source} holds a `{config.model_type}` model; a `testa` model is needed.")
    _override(config.video_config, model_args, "merged_frames_per_layer", "merged_patches_per_layer")
    config.video_config.validate_architecture()
    if model_args.model_name_or_path:
        model = model_class.from_pretrained(source, config=config, dtype=torch.float32)
    else:
        model = model_class(config)
    if model_args.attn_implementation:
        model.set_attn_implementation(model_args.attn_implementation)
    processor = TestaProcessor.from_pretrained(source)
    _override(processor.video_processor, data_args, "num_frames", "frame_sampling")
    return model, processor


def _override(settings: Any, arguments: Any, *names: str):
    for name in names:
        if getattr(arguments, name) is not None:
            setattr(settings, name, getattr(arguments, name))


def load_split(data_args: DataArguments, split: str) -> datasets.Dataset:
    """Return the annotation table of "train", "validation" or "test". Raises ValueError where no file is given."""
    settings = {"video_root": data_args.video_root, "max_words": data_args.max_words}
    if data_args.dataset_name:
        return load_benchmark(data_args.dataset_name, data_args.data_dir, split, **settings)
    file = getattr(data_args, f"{split}_file")
    if file is None:
        raise ValueError(f"{split}_file is missing: the annotations of the {split} split (or pass dataset_name).")
    return load_annotations(file, **settings)


def video_dataset(
    table: datasets.Dataset,
    video_processor: TestaVideoProcessor,
    data_args: DataArguments,
    args: TrainingArguments,
    accelerator: Accelerator,
    frame_sampling: str | None = None,
) -> VideoTextDataset:
    """Return the data set of a table, its frames cached if asked for; `frame_sampling` overrides the processor's."""
    video_processor = deepcopy(video_processor)
    video_processor.frame_sampling = frame_sampling or video_processor.frame_sampling
    if not data_args.cache_frames:
        return VideoTextDataset(table, video_processor)
    with accelerator.main_process_first():
        frames = cache_frames(table, video_processor, num_proc=args.num_workers or None)
    return VideoTextDataset(table, video_processor, frames)


# --- Accelerator, optimiser, schedule ----------------------------------------------------------------------------------


def create_accelerator(args: TrainingArguments) -> Accelerator:
    """Return an accelerator for [`train`]: a batch is split over the processes, and accumulation crosses epochs.

    Raises:
        ValueError: The tracker in `report_to` isn't installed.
    """
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if args.report_to not in ("none", *trackers):
        raise ValueError(f"report_to is {args.report_to!r}; installed are {', '.join(trackers) or 'no trackers'}.")
    return Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
    )


def create_optimizer(model: nn.Module, args: TrainingArguments, fused: bool = True) -> torch.optim.AdamW:
    """Return AdamW that decays the weights of linear and convolution layers, and nothing else."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    decayed = {id(layer.weight) for layer in layers}
    groups = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in decayed].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": args.weight_decay}, {"params": groups[False], "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, args.adam_beta2),
        fused=fused,
    )


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


def run_identity(model: PreTrainedModel, dataset: Dataset, *arguments: Any) -> dict[str, Any]:
    """Return what has to be equal for a run to go on from another's checkpoint.

    Args:
        model: Its configuration counts.
        dataset: A [`VideoTextDataset`]; the ids and texts of its rows count, where the files lie doesn't.
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
        results: Metrics by split, then by moment ("before training", "after training", "step 100").
        broken_videos: Videos that couldn't be decoded: path → reason.
    """

    step: int = 0
    batches: int = 0
    results: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    broken_videos: BrokenVideos = field(default_factory=BrokenVideos)


class Checkpoints:
    """The last two checkpoints of a run, each a folder that appears under its name only when it is complete.

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
        saved = json.loads((folder / "identity.json").read_text())
        for name in {**self.identity, **saved}:
            if saved.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{folder} was made by another run: `{name}` is {saved.get(name)!r} there and "
                    f"{self.identity.get(name)!r} here. Choose another output_dir, or pass overwrite_output_dir to "
                    "delete the checkpoints and start over."
                )
        return folder

    def load(self, folder: Path) -> Progress:
        """Put weights, optimiser, schedule and random generators back to where they were, and return the progress."""
        self.accelerator.load_state(str(folder))
        saved = json.loads((folder / "progress.json").read_text())
        return Progress(**{**saved, "broken_videos": BrokenVideos(saved["broken_videos"])})

    def save(self, progress: Progress):
        """Write a checkpoint aside, rename it, and delete those before the last two."""
        folder = self.output_dir / f"checkpoint-{progress.step}"
        partial = folder.with_suffix(".partial")
        if self.accelerator.is_main_process:
            for leftover in (*self.output_dir.glob("checkpoint-*.partial"), folder):
                shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (partial / "progress.json").write_text(json.dumps(dataclasses.asdict(progress), indent=2))
            (partial / "identity.json").write_text(json.dumps(self.identity, indent=2))
            partial.rename(folder)
            for old in self.folders()[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


# --- The loop ----------------------------------------------------------------------------------------------------------


def train(
    args: TrainingArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    dataset: Dataset,
    collate: Callable[[list[dict]], dict],
    identity: dict[str, Any],
    evaluate: Callable[[Progress, str], dict[str, float]] | None,
    headline: str,
    hard_negatives: list[list[int]] | None = None,
) -> Progress:
    """Train a model in place, or go on training it from a checkpoint as if it had never stopped.

    Args:
        args: How.
        accelerator: What [`create_accelerator`] returns.
        model: Gives an output with a `loss` for a batch.
        dataset: Gives a sample for a (row number, seed).
        collate: Makes samples a batch with `broken_videos`, as [`collate_training_samples`] does.
        identity: What [`run_identity`] returns.
        evaluate: From progress and the name of the moment ("before training", "step 100", "after training") to metrics,
            which it also writes into the progress. None for a run without.
        headline: The metric that the progress bar shows.
        hard_negatives: See [`EpochBatchSampler`].

    Returns:
        The progress at the end.

    Raises:
        ValueError: The training set is smaller than a batch or can't be decoded, or `output_dir` holds checkpoints of
            another run.
        FloatingPointError: The loss is no longer a finite number.
    """
    batch_size = args.per_device_train_batch_size * accelerator.num_processes
    sampler = EpochBatchSampler(len(dataset), batch_size, args.seed, hard_negatives)
    num_batches = args.num_train_epochs * sampler.batches_per_epoch
    num_steps = args.max_train_steps or max(1, num_batches // args.gradient_accumulation_steps)
    steps_per_epoch = max(1, sampler.batches_per_epoch // args.gradient_accumulation_steps)
    eval_steps, save_steps = args.eval_steps or steps_per_epoch, args.save_steps or steps_per_epoch
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = create_optimizer(model, args, fused=accelerator.device.type in ("cpu", "cuda", "mps", "xpu"))
    scheduler = create_scheduler(optimizer, args, num_steps)
    loader = create_loader(dataset, collate, args.num_workers, batch_sampler=sampler)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    checkpoints = Checkpoints(accelerator, args.output_dir, identity)
    checkpoint = checkpoints.find(args.resume_from_checkpoint, args.overwrite_output_dir)
    progress = checkpoints.load(checkpoint) if checkpoint else Progress()
    sampler.first_batch = progress.batches
    if checkpoint:
        logger.info(f"Going on from {checkpoint}, step {progress.step} of {num_steps}.")
    elif evaluate and args.eval_before_training:
        evaluate(progress, "before training")

    losses, status, skipped = [], {}, 0
    bar = tqdm(total=num_steps, initial=progress.step, desc="Training", disable=not accelerator.is_main_process)
    for batch in loader if progress.step < num_steps else ():
        progress.batches += 1
        # Hard negatives need a second video, and all processes have to take part in a step.
        if not _everywhere(accelerator, progress.broken_videos.take_from(batch) >= 2):
            skipped += 1
            if skipped == 2 * sampler.batches_per_epoch:
                raise ValueError("No batch of the training set has two videos that can be decoded.")
            continue
        skipped = 0
        model.train()
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if not accelerator.sync_gradients:
            continue

        progress.step += 1
        bar.update()
        finished = progress.step == num_steps
        save = finished or progress.step % save_steps == 0
        if save or progress.step % args.logging_steps == 0:
            mean = _mean_loss(accelerator, losses, progress.step)
            accelerator.log({"loss": mean, "learning_rate": scheduler.get_last_lr()[0]}, step=progress.step)
            status["loss"], losses = f"{mean:.3f}", []
        if evaluate and (finished or (args.do_eval and progress.step % eval_steps == 0)):
            metrics = evaluate(progress, "after training" if finished else f"step {progress.step}")
            accelerator.log(metrics, step=progress.step)
            status[headline] = f"{metrics[headline]:.1f}"
        bar.set_postfix(status, refresh=False)
        if save:
            checkpoints.save(progress)
        if finished:
            break
    bar.close()
    return progress


def create_loader(dataset: Dataset, collate: Callable[[list], dict], num_workers: int, **kwargs) -> DataLoader:
    """Return a loader that takes no random number from torch's global generator; `kwargs` are the loader's own."""
    return DataLoader(dataset, collate_fn=collate, num_workers=num_workers, generator=torch.Generator(), **kwargs)


def _everywhere(accelerator: Accelerator, condition: bool) -> bool:
    if accelerator.num_processes == 1:
        return condition
    return bool(accelerator.gather(torch.tensor([condition], device=accelerator.device)).all())


def _mean_loss(accelerator: Accelerator, losses: list[torch.Tensor], step: int) -> float:
    mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
    if not math.isfinite(mean):
        raise FloatingPointError(
            f"The loss is {mean} at step {step}; lower learning_rate, or train with mixed_precision no. "
            "The last checkpoint is from before."
        )
    return mean


# --- Model cards -------------------------------------------------------------------------------------------------------


def describe_run(
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: TestaProcessor,
    progress: Progress,
    data_args: DataArguments,
    args: TrainingArguments,
) -> dict[str, Any]:
    """Return what the figures of a run depend on, whatever its task, and the GFLOPs of a video."""
    videos, config, device = processor.video_processor, model.config.video_config, accelerator.device
    files = [file for file in (data_args.train_file, data_args.validation_file, data_args.test_file) if file]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {
        "data": data_args.dataset_name
        or ", ".join(dict.fromkeys(Path(file).absolute().parent.name for file in files)),
        "videos that could not be decoded": len(progress.broken_videos),
        "frames": f"{videos.num_frames} a video, {videos.frame_sampling} sampling",
        "resolution": ", ".join(f"{name} {pixels}" for name, pixels in dict(videos.size).items() if pixels)
        + " pixels",
        "text": f"the first {data_args.max_words} words, and as many tokens",
        "merged in each block": f"frames (R_T): {config.merged_frames_per_layer}, patches of each frame (R_S): "
        f"{config.merged_patches_per_layer}",
        "GFLOPs per video": round(count_video_gflops(config, videos.num_frames), 2),
        "computed on": f"{device_name}, {accelerator.num_processes} processes, mixed precision {args.mixed_precision}",
        "seconds per video": "encoding alone, frames cached" if data_args.cache_frames else "decoding and encoding",
        "training": f"{progress.step} steps of {batch} pairs, seed {args.seed}"
        if progress.step
        else "none in this run",
    }


def write_model_card(
    folder: str | Path,
    title: str,
    introduction: str,
    results: str,
    definition: dict[str, Any],
    recipe: dict[str, Any],
    metadata: ModelCardData,
):
    """Write `README.md` and `recipe.yaml` next to a saved model.

    Args:
        folder: The model's folder.
        title: Of the card.
        introduction: What the model is for, and how it is used, in Markdown.
        results: The measured figures, in Markdown.
        definition: What the figures depend on: split, number of items, frames, sampling, ...
        recipe: What [`as_recipe`] returns.
        metadata: The card's header, with the figures for the Hub.
    """
    recipe_text = yaml.safe_dump(recipe, sort_keys=False)
    lines = [f"- {name}: {value}" for name, value in definition.items()]
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        introduction,
        "## Results",
        results,
        "\n".join(lines),
        "## Recipe",
        f"```yaml\n{recipe_text}```",
    ]
    Path(folder, "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    Path(folder, "recipe.yaml").write_text(recipe_text, encoding="utf-8")
