"""Weights of other code as models of this package, from Python or from the command line.

    python -m transformers_testa.conversion CHECKPOINT OUTPUT_DIR --architecture retrieval

`CHECKPOINT` is a released TESTA file; with `--from blip` a BLIP model, file or folder, that a TESTA model starts from;
with `--from timesformer` the folder of a TimeSformer. What it becomes can be loaded with `from_pretrained`.
"""

import inspect
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_testa import TestaConfig, TestaVideoConfig
from .conversion_blip import convert_blip, from_blip
from .conversion_original import convert_original, load_original_checkpoint
from .conversion_timesformer import from_timesformer, to_timesformer
from .processing_testa import TestaProcessor


Config = TypeVar("Config", bound=PreTrainedConfig)

# By source, the architectures that it can become.
_ARCHITECTURES = {
    "testa": ("video", "retrieval", "videoqa", "pretraining"),
    "blip": ("pretraining", "retrieval", "videoqa", "captioning"),
    "timesformer": ("video",),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert a checkpoint as the command line says: see this module's description."""
    options = _parse(arguments)
    processor = None if options.config_dir is None else TestaProcessor.from_pretrained(options.config_dir)
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)

    model, dropped = _convert(options)
    _set_merging(model, options.merged_frames_per_layer, options.merged_patches_per_layer)
    model.save_pretrained(options.output_dir)
    if processor is not None:
        if options.source == "testa":
            # How the released weights saw videos in training.
            processor.video_processor.frame_sampling = "legacy_uniform"
        processor.save_pretrained(options.output_dir)

    print(f"{options.output_dir} holds a {type(model).__name__} of {model.num_parameters():,} parameters.")
    for reason, names in sorted(dropped.items()):
        print(f"Dropped {len(names)}: {reason}.")
        if options.verbose:
            print("".join(f"    {name}\n" for name in names), end="")


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(
        "python -m transformers_testa.conversion",
        description=inspect.cleandoc(__doc__),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="What is converted: a .pth file, or a folder or Hub id of Transformers.")
    parser.add_argument("output_dir", help="Folder for the weights, config.json and the processor's files.")
    parser.add_argument(
        "--from", dest="source", choices=tuple(_ARCHITECTURES), default="testa", help="Whose weights they are."
    )
    parser.add_argument("--architecture", help=f"What they become: {_list_architectures()}.")
    parser.add_argument(
        "--config_dir",
        help="Folder, as in hub_configs, whose configuration, processor and tokenizer are used; without it the "
        "configuration follows from the weights, and there is no processor.",
    )
    for field, meaning in (("merged_frames_per_layer", "R_T"), ("merged_patches_per_layer", "R_S")):
        parser.add_argument(
            f"--{field}",
            type=int,
            nargs="+",
            help=f"The paper's {meaning}, one number or one a layer; else those of the configuration.",
        )
    parser.add_argument("--verbose", action="store_true", help="Name the tensors that are dropped.")
    options = parser.parse_args(arguments)
    if options.source == "timesformer" and options.architecture is None:
        options.architecture = "video"
    if options.architecture not in _ARCHITECTURES[options.source]:
        parser.error(f"--architecture is {options.architecture}; needed is one of: {_list_architectures()}")
    if options.config_dir is not None and not Path(options.config_dir).is_dir():
        parser.error(
            f"--config_dir is {options.config_dir}; a folder of config.json, processor and tokenizer is needed"
        )
    return options


def _list_architectures() -> str:
    return "; ".join(f"{', '.join(names)} (from {source})" for source, names in _ARCHITECTURES.items())


def _convert(options: Namespace) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    if options.source == "timesformer":
        return from_timesformer(options.checkpoint, _load_config(TestaVideoConfig, options)), {}
    if options.source == "blip":
        return convert_blip(options.checkpoint, options.architecture, _load_config(TestaConfig, options))
    is_encoder = options.architecture == "video"
    config_class: type[TestaVideoConfig | TestaConfig] = TestaVideoConfig if is_encoder else TestaConfig
    return convert_original(options.checkpoint, options.architecture, _load_config(config_class, options))


def _load_config(config_class: type[Config], options: Namespace) -> Config | None:
    return None if options.config_dir is None else config_class.from_pretrained(options.config_dir)


def _set_merging(model: PreTrainedModel, merged_frames: list[int] | None, merged_patches: list[int] | None) -> None:
    """Set counts of merged tokens in the configuration to be saved; no weights depend on them."""
    config = getattr(model.config, "video_config", model.config)
    for field, counts in (("merged_frames_per_layer", merged_frames), ("merged_patches_per_layer", merged_patches)):
        if counts is not None:
            setattr(config, field, counts[0] if len(counts) == 1 else counts)
    config.validate_architecture()


__all__ = ["from_blip", "from_timesformer", "load_original_checkpoint", "main", "to_timesformer"]

if __name__ == "__main__":
    main()
