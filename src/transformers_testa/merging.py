"""Run a trained model with more or less token aggregation than it was trained with: no weights depend on it."""

import copy
from itertools import chain
from typing import TypeVar

from transformers import PreTrainedModel

from .aggregation_testa import limit_merges
from .configuration_testa import TestaVideoConfig
from .modeling_testa import TestaVideoModel


Model = TypeVar("Model", bound=PreTrainedModel)


def with_merges(
    model: Model, merged_frames_per_layer: int | list[int], merged_patches_per_layer: int | list[int]
) -> Model:
    """Return a model that shares all weights with another and merges differently.

    Args:
        model: One with a video encoder. It stays as it is.
        merged_frames_per_layer: As in [`TestaVideoConfig`].
        merged_patches_per_layer: As in [`TestaVideoConfig`].

    Raises:
        ValueError: Where the model has no video encoder, or the counts don't fit its configuration.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    encoders = [module for module in twin.modules() if isinstance(module, TestaVideoModel)]
    if not encoders:
        raise ValueError(f"A {type(model).__name__} has no video encoder, so it has nothing to merge.")
    for encoder in encoders:
        config = encoder.config
        config.merged_frames_per_layer = merged_frames_per_layer
        config.merged_patches_per_layer = merged_patches_per_layer
        config.validate_architecture()
        for layer, frames, patches in zip(encoder.layers, config.merged_frames, config.merged_patches, strict=True):
            layer.spatial.num_merged = patches
            if layer.is_divided:
                layer.temporal.num_merged = frames
    return twin


def count_kept(config: TestaVideoConfig, num_frames: int | None = None) -> tuple[int, int]:
    """Return how many frames, and patches of each, are left after the last block (joint attention: 1, and tokens).

    Args:
        config: The encoder.
        num_frames: Frames of the video; `config.num_frames` where None.
    """
    frames, patches = config.num_frames if num_frames is None else num_frames, config.num_patches
    if config.attention_type == "joint_space_time":
        frames, patches = 1, frames * patches
    for merged_frames, merged_patches in zip(config.merged_frames, config.merged_patches, strict=True):
        frames -= limit_merges(merged_frames, frames)
        patches -= limit_merges(merged_patches, patches, class_token_ahead=True)
    return frames, patches


def count_tokens(config: TestaVideoConfig, num_frames: int | None = None) -> int:
    """Return how many tokens `last_hidden_state` has, class tokens included. Arguments are those of [`count_kept`]."""
    frames, patches = count_kept(config, num_frames)
    return frames * (1 + patches) if config.attention_type == "space_only" else 1 + frames * patches
