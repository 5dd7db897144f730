"""Arguments that the scripts share, and recipes: files of arguments that the command line overrides."""

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import yaml
from transformers import HfArgumentParser

from transformers_testa.data.benchmarks import BENCHMARKS
from transformers_testa.video_processing_testa import available_threads


# An argument on the command line takes the place, in a recipe, of those that exclude it: argument → what it replaces.
Replaces = dict[str, tuple[str, ...]]
COUNTS = ("merged_frames_per_layer", "merged_patches_per_layer")
BUDGETS = ("keep_ratio", "max_gflops")
FILES = ("train_file", "validation_file", "test_file")
OF_DATASETS = ("dataset_name", "dataset_config_name", "data_dir")
OF_NEW_WEIGHTS = (
    *("config_name", "initializer_range", "mimetic_initialization"),
    *("init_from_blip", "init_text_from_bert"),
)


@dataclass
class ModelArguments:
    """Which model. `free` names, here and below, the arguments that may change when a run goes on from a checkpoint."""

    free: ClassVar[tuple[str, ...]] = (
        *("config_name", "init_from_blip", "init_text_from_bert", "attn_implementation"),
        # What these lead to is in the model's configuration.
        *("keep_ratio", "max_gflops", "merge_schedule"),
        *("attention_type", "aggregation_strategy", "frame_matching", "proportional_attention"),
    )
    replaces: ClassVar[Replaces] = {
        "model_name_or_path": OF_NEW_WEIGHTS,
        "config_name": ("model_name_or_path",),
        **dict.fromkeys(COUNTS, (*BUDGETS, "merge_schedule")),
        **dict.fromkeys(BUDGETS, (*COUNTS, *BUDGETS)),
    }

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A trained model, to go on from or to use."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "For new weights: a folder of config.json, processor and tokenizer."}
    )
    initializer_range: float | None = field(
        default=None, metadata={"help": "With config_name: standard deviation of new weights; else the config's."}
    )
    mimetic_initialization: bool = field(
        default=False,
        metadata={
            "help": "With config_name: new video attention begins like that of trained models, which learns from less."
        },
    )
    time_embeddings: int | None = field(
        default=None,
        metadata={
            "help": "Frames that the model has embeddings for, if not num_frames: more, in a first lesson on clips, leave "
            "each frame of a longer video an embedding of its own."
        },
    )
    init_from_blip: str | None = field(
        default=None, metadata={"help": "With config_name: a BLIP checkpoint (.pth, folder or Hub id) to start from."}
    )
    init_text_from_bert: str | None = field(
        default=None,
        metadata={
            "help": "With config_name: a BERT model (folder or Hub id) that the text encoder starts from, MiniLM for one."
        },
    )
    merged_frames_per_layer: list[int] | None = field(
        default=None, metadata={"help": "The paper's R_T, one number or one a block; else the config's."}
    )
    merged_patches_per_layer: list[int] | None = field(default=None, metadata={"help": "The same of R_S."})
    keep_ratio: float | None = field(
        default=None,
        metadata={"help": "Instead of counts: share of the GFLOPs without merging that a video may cost, say 0.5."},
    )
    max_gflops: float | None = field(default=None, metadata={"help": "The same in GFLOPs."})
    merge_schedule: Literal["constant", "decreasing", "increasing"] = field(
        default="constant", metadata={"help": "How merges chosen by keep_ratio or max_gflops spread over the blocks."}
    )
    attention_type: Literal["divided_space_time", "joint_space_time", "space_only"] | None = field(
        default=None,
        metadata={
            "help": "Attention of the video encoder, else the config's; another than trained weights have learns anew."
        },
    )
    aggregation_strategy: Literal["geometry", "importance", "prune"] | None = field(
        default=None, metadata={"help": "Which tokens merge, or are dropped; else the config's."}
    )
    frame_matching: Literal["mean", "vote", "consecutive"] | None = field(
        default=None, metadata={"help": "How frames are compared, to merge; else the config's."}
    )
    proportional_attention: bool | None = field(
        default=None, metadata={"help": "Whether a token counts as the patches merged into it; else the config's."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})

    def __post_init__(self) -> None:
        for name in COUNTS:
            match getattr(self, name):
                case [number]:
                    setattr(self, name, number)
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("Give either model_name_or_path (trained weights) or config_name (new weights).")
        if self.initializer_range is not None and self.config_name is None:
            raise ValueError(
                f"initializer_range is {self.initializer_range}, but {self.model_name_or_path} has its weights; it needs "
                "config_name."
            )
        if self.mimetic_initialization and (self.config_name is None or self.init_from_blip):
            raise ValueError("mimetic_initialization is for new weights: it needs config_name, and no init_from_blip.")
        if self.init_from_blip and self.config_name is None:
            raise ValueError("init_from_blip needs config_name: the folder of the new model's configuration.")
        if self.init_text_from_bert and (self.config_name is None or self.init_from_blip):
            raise ValueError("init_text_from_bert is for new weights: it needs config_name, and no init_from_blip.")
        counts, budget = ([name for name in names if getattr(self, name) is not None] for names in (COUNTS, BUDGETS))
        if counts and budget:
            raise ValueError(f"Give either {counts[0]} or {budget[0]}, which chooses counts itself.")
        if self.merge_schedule != "constant" and not budget:
            raise ValueError(f"merge_schedule is {self.merge_schedule!r}; it needs keep_ratio or max_gflops.")


@dataclass
class DataArguments:
    """Which videos and texts, and what is taken of them."""

    free: ClassVar[tuple[str, ...]] = (
        *(*OF_DATASETS, *FILES, "columns", "video_root"),
        *("cache_frames", "cache_videos"),
        *("decoding_time_limit", "decoding_memory_limit"),
    )
    replaces: ClassVar[Replaces] = {
        "dataset_name": (*FILES, *OF_DATASETS, "columns"),
        **dict.fromkeys(FILES, OF_DATASETS),
    }

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Benchmarks ({', '.join(BENCHMARKS)}) or data sets of the Hub, instead of the three files."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a data set of the Hub."})
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "How files or a data set of the Hub name our columns, if not as we do: text=caption video=path"
        },
    )
    data_dir: list[str] | None = field(
        default=None, metadata={"help": "Holds the annotation files of a benchmark; one for each in dataset_name."}
    )
    train_file: list[str] | None = field(
        default=None, metadata={"help": "JSONL or CSV files with the columns that the task needs."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "The same, for evaluation."})
    test_file: list[str] | None = field(default=None, metadata={"help": "The same, for the test at the end."})
    train_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Share of each training file, or benchmark, in what is trained on; else by their sizes."},
    )
    video_root: str | None = field(
        default=None, metadata={"help": "Holds the videos; else where the annotations are."}
    )
    max_words: int | None = field(
        default=None, metadata={"help": "Words kept of a text; the benchmark's number, or 64, if not given."}
    )
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video; else the processor's number."})
    frame_sampling: str | None = field(default=None, metadata={"help": "uniform, middle, ...; else the processor's."})
    train_frame_sampling: str | None = field(default=None, metadata={"help": "Another one for training, say jitter."})
    decoding_time_limit: float | None = field(
        default=None, metadata={"help": "Seconds that reading a video may take; else the processor's number."}
    )
    decoding_memory_limit: int | None = field(
        default=None, metadata={"help": "Bytes that reading a video may take; else the processor's number."}
    )
    cache_frames: bool = field(
        default=False, metadata={"help": "Decode the chosen frames of each video once, into a file on disk."}
    )
    cache_videos: bool = field(
        default=False,
        metadata={"help": "Decode each video once and whole, into a file on disk: for many clips of short videos."},
    )
    crop_from: int | None = field(
        default=None,
        metadata={"help": "In training, resize frames to this height and width, and crop at random from there."},
    )
    random_flip: bool = field(default=False, metadata={"help": "In training, mirror every second video."})
    rand_augment_ops: int = field(
        default=0, metadata={"help": "In training, so many operations of RandAugment, the same for a video's frames."}
    )
    group_distractors: bool = field(
        default=False, metadata={"help": "Train on a video and the distractor that its row names in the same batch."}
    )

    def __post_init__(self) -> None:
        names, folders = self.dataset_name or [], self.data_dir or []
        benchmarks = [name for name in names if name in BENCHMARKS]
        if len(folders) != len(benchmarks):
            raise ValueError(
                f"data_dir names {len(folders)} folders for {len(benchmarks)} benchmarks in dataset_name "
                f"({', '.join(benchmarks) or 'none'}); the folder of the annotation files of each is needed."
            )
        if self.max_words is None:
            self.max_words = max((BENCHMARKS[name].max_words for name in benchmarks), default=64)
        given = [name for name in FILES if getattr(self, name)]
        if names and given:
            raise ValueError(f"Give either dataset_name or {given[0]}: a data set has splits of its own.")
        has_hub_dataset = len(names) > len(benchmarks)
        if self.columns and names and not has_hub_dataset:
            raise ValueError("columns is for files and data sets of the Hub; the columns of the benchmarks are known.")
        if self.dataset_config_name and not has_hub_dataset:
            raise ValueError(
                f"dataset_config_name is {self.dataset_config_name!r}, which is for data sets of the Hub; dataset_name "
                f"has none: {', '.join(names) or 'it is not given'}."
            )
        for column in self.columns or ():
            if "=" not in column:
                raise ValueError(f"columns has {column!r}; ours=theirs is needed, such as text=caption.")
        num_sources = len(self.dataset_name or self.train_file or [])
        if self.train_weights and len(self.train_weights) != num_sources:
            raise ValueError(f"train_weights has {len(self.train_weights)} numbers for {num_sources} sources.")
        if self.cache_frames and self.cache_videos:
            raise ValueError(
                "Give either cache_frames or cache_videos: whole videos hold the chosen frames, and all others."
            )


@dataclass
class ObjectiveArguments:
    """How videos and texts are compared in training for retrieval and in pre-training."""

    free: ClassVar[tuple[str, ...]] = ()

    momentum: float | None = field(
        default=None,
        metadata={
            "help": "Share of its weights that a teacher keeps in a step, such as 0.995; no teacher if not given."
        },
    )
    queue_size: int = field(default=32, metadata={"help": "Samples of earlier batches that a batch is compared with."})
    distillation_weight: float = field(default=0.4, metadata={"help": "Weight of the teacher's targets (alpha)."})
    distillation_ramp_epochs: float = field(
        default=1.0, metadata={"help": "Epochs over which that weight rises linearly from 0."}
    )

    def __post_init__(self) -> None:
        if self.momentum is None:
            for argument in dataclasses.fields(self):
                if (value := getattr(self, argument.name)) != argument.default:
                    raise ValueError(f"{argument.name} is {value}, and there is no teacher: it needs momentum.")
        for name in ("momentum", "distillation_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; a share from 0 to 1 is needed.")
        for name in ("queue_size", "distillation_ramp_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; 0 or more is needed.")


@dataclass
class TrainingArguments:
    """How a model is trained and evaluated."""

    free: ClassVar[tuple[str, ...]] = (
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict"),
        *("eval_before_training", "per_device_eval_batch_size", "eval_steps", "save_steps", "logging_steps"),
        *("num_workers", "report_to"),
    )
    replaces: ClassVar[Replaces] = {"warmup_ratio": ("warmup_steps",), "num_train_epochs": ("max_train_steps",)}

    output_dir: str | None = field(
        default=None, metadata={"help": "Where checkpoints, the trained model and the results go."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints in output_dir and start over."}
    )
    resume_from_checkpoint: str = field(
        default="auto",
        metadata={"help": "auto (the newest checkpoint in output_dir, if there is one) or a checkpoint's folder."},
    )
    do_train: bool = field(default=False, metadata={"help": "Train on the training split."})
    do_eval: bool = field(default=False, metadata={"help": "Evaluate on the validation split, during training too."})
    do_predict: bool = field(default=False, metadata={"help": "Evaluate on the test split at the end."})
    eval_before_training: bool = field(
        default=False, metadata={"help": "Evaluate before the first step as well, on the same splits."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "The highest learning rate."})
    warmup_start_learning_rate: float | None = field(
        default=None, metadata={"help": "Where the warm-up starts; learning_rate / warm-up steps if not given."}
    )
    min_learning_rate: float = field(default=0.0, metadata={"help": "Where the cosine ends."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps that are warm-up."})
    warmup_steps: int | None = field(default=None, metadata={"help": "Steps of warm-up, instead of warmup_ratio."})
    weight_decay: float = field(default=0.05, metadata={"help": "For the weights of linear and convolution layers."})
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata={
            "help": "adamw; or muon, which learns from fewer steps, for the linear layers and adamw for the rest."
        },
    )
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's memory of squared gradients."})
    num_train_epochs: int = field(default=10, metadata={"help": "Passes over the training set."})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps, instead of num_train_epochs."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Samples in a batch of one process."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Videos, or texts, in an evaluation batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches in an optimizer step."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    mixed_precision: Literal["no", "bf16", "auto"] = field(
        default="no", metadata={"help": "no (float32), bf16, or auto: bf16 where the hardware multiplies it."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Save memory, take about a third longer."})
    seed: int = field(default=42, metadata={"help": "Of new weights, data order, frame sampling and dropout."})
    eval_steps: int | None = field(
        default=None, metadata={"help": "Steps between evaluations; an epoch if not given."}
    )
    save_steps: int | None = field(
        default=None, metadata={"help": "Steps between checkpoints; an epoch if not given."}
    )
    logging_steps: int = field(default=10, metadata={"help": "Steps between reports of the loss."})
    num_workers: int = field(
        default_factory=lambda: min(8, available_threads() - 1) if torch.cuda.is_available() else 0,
        metadata={
            "help": "Processes that decode the next batches; if not given, 0 on a CPU, which is busy with the model, and "
            "beside a GPU one for each other core, up to 8."
        },
    )
    report_to: str = field(default="none", metadata={"help": "A tracker of Accelerate, such as tensorboard, or none."})

    def __post_init__(self) -> None:
        lowest = {"warmup_steps": 0, "num_workers": 0}
        for argument in dataclasses.fields(self):
            value, least = getattr(self, argument.name), lowest.get(argument.name, 1)
            if argument.type in (int, int | None) and argument.name != "seed" and value is not None and value < least:
                raise ValueError(f"{argument.name} is {value}; at least {least} is needed.")
        if self.mixed_precision == "auto":
            self.mixed_precision = "bf16" if multiplies_bf16() else "no"
        if (self.do_train or self.do_eval or self.do_predict) and self.output_dir is None:
            raise ValueError("output_dir is missing: the folder where checkpoints, model and results go.")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; a share of the steps, 0 to 1, is needed.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; a positive number is needed.")


def multiplies_bf16() -> bool:
    """Tell whether the GPU, or the CPU where there is none, has instructions for products of bfloat16.

    Without them these are emulated, several times more slowly than those of float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16"))


def parse_arguments(argument_classes: tuple[type, ...], arguments: list[str]) -> tuple[Any, ...]:
    """Read `[recipe.yaml] [--name value ...]`; what is named on the command line overrides the recipe.

    So do alternatives: `--keep_ratio 0.5` takes the place of a recipe's counts of merges, `--num_train_epochs 3` that of
    its number of steps.

    Args:
        argument_classes: Dataclasses that the arguments belong to.
        arguments: The command line without the script's name. A recipe is a `.yaml`, `.yml` or `.json` file of one
            mapping.

    Returns:
        One object a class.

    Raises:
        ValueError: The recipe can't be read, an argument doesn't exist (the nearest name is suggested), or it is given
            twice.
    """
    options = Counter(
        argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")
    )
    for option, count in options.items():
        if count > 1:
            raise ValueError(
                f"The command line has --{option} {count} times; give all its values after one --{option}."
            )
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        recipe = _read_recipe(Path(arguments[0]), argument_classes)
        for group in argument_classes:
            for name, replaced in getattr(group, "replaces", {}).items():
                if name in options:
                    recipe = {key: value for key, value in recipe.items() if key not in replaced}
        arguments = [*_as_arguments(recipe, argument_classes), *arguments[1:]]
    parser = HfArgumentParser(argument_classes, allow_abbrev=False)  # type: ignore[arg-type]  # it means dataclasses
    *parsed, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    for name in unknown:
        if name.startswith("--"):
            raise ValueError(
                _unknown_argument(name.lstrip("-").partition("=")[0], argument_classes, "The command line")
            )
    if unknown:
        raise ValueError(f"The command line has {unknown[0]!r}, which belongs to no argument.")
    return tuple(parsed)


def _read_recipe(file: Path, argument_classes: tuple[type, ...]) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"The recipe {file} doesn't exist.")
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    # PyYAML gives no list of what it raises: a date that is none is a ValueError, lists that never end a RecursionError.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"The recipe {file} can't be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {file} must be a mapping of argument names to values.")
    for name in recipe:
        if name not in _argument_names(argument_classes):
            raise ValueError(_unknown_argument(str(name), argument_classes, f"The recipe {file}"))
    return recipe


def _as_arguments(recipe: dict[str, Any], argument_classes: tuple[type, ...]) -> list[str]:
    switches = {
        argument.name for group in argument_classes for argument in dataclasses.fields(group) if argument.type is bool
    }
    arguments = []
    for name, value in recipe.items():
        if value is False and name not in switches:
            value = "no"  # which YAML takes for false: `mixed_precision: no`
        if value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def _argument_names(argument_classes: tuple[type, ...]) -> list[str]:
    return [argument.name for group in argument_classes for argument in dataclasses.fields(group)]


def _unknown_argument(name: str, argument_classes: tuple[type, ...], place: str) -> str:
    close = get_close_matches(name, _argument_names(argument_classes), n=1)
    return f"{place} has `{name}`, which is no argument" + (f"; did you mean `{close[0]}`?" if close else ".")


def as_recipe(*arguments: Any) -> dict[str, Any]:
    """Return the arguments of all groups as one mapping, which [`parse_arguments`] reads back from a YAML file."""
    return {name: value for group in arguments for name, value in dataclasses.asdict(group).items()}
