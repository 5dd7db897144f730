"""Multiply-adds of the video encoder, counted as the paper's tables count them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .aggregation_testa import limit_merges


if TYPE_CHECKING:
    from .configuration_testa import TestaVideoConfig


# A layer norm with weight and bias: mean, variance, scale and shift take five operations an element.
LAYER_NORM_COST = 5


def count_video_gflops(
    config: "TestaVideoConfig",
    num_frames: int | None = None,
    image_size: int | None = None,
    merges: tuple[Sequence[int], Sequence[int]] | None = None,
) -> float:
    """Return the GFLOPs of encoding one video: convolution, linear layers, matrix products and layer norms.

    A multiply-add counts once. Of aggregation, comparing tokens counts; taking means and the attention that importance
    is read from don't, as in the paper.

    Args:
        config: The encoder's [`TestaVideoConfig`], with its aggregation.
        num_frames: Frames of the video; `config.num_frames` where None.
        image_size: Height and width of its frames in pixels; `config.image_size` where None.
        merges: Frames and patches that each block merges away; those of `config` where None.
    """
    frames = config.num_frames if num_frames is None else num_frames
    patches = ((config.image_size if image_size is None else image_size) // config.patch_size) ** 2
    width, is_divided = config.hidden_size, config.attention_type == "divided_space_time"
    operations = frames * patches * width * config.num_channels * config.patch_size**2
    if config.attention_type == "joint_space_time":
        frames, patches = 1, frames * patches  # one group of tokens
    class_tokens = frames if config.attention_type == "space_only" else 1

    merges = (config.merged_frames, config.merged_patches) if merges is None else merges
    for merged_frames, merged_patches in zip(*merges, strict=True):
        if is_divided:
            tokens = frames * patches
            operations += tokens * (5 * width**2 + LAYER_NORM_COST * width)  # qkv, projection, temporal_fc
            operations += 2 * patches * frames**2 * width
            num_merged = limit_merges(merged_frames, frames)
            opinions = 1 if config.frame_matching == "mean" else patches
            is_consecutive = config.frame_matching == "consecutive"
            operations += _comparison(config, opinions, frames, num_merged, is_consecutive)
            frames -= num_merged
        tokens = frames * patches
        operations += (tokens + class_tokens) * (3 * width**2 + LAYER_NORM_COST * width)  # qkv
        operations += (tokens + class_tokens) * width**2  # projection
        operations += 2 * frames * (1 + patches) ** 2 * width
        num_merged = limit_merges(merged_patches, patches, class_token_ahead=True)
        operations += frames * _comparison(config, 1, patches, num_merged)
        patches -= num_merged
        tokens = frames * patches + class_tokens
        operations += tokens * (2 * width * config.intermediate_size + LAYER_NORM_COST * width)
    operations += tokens * LAYER_NORM_COST * width
    return operations / 1e9


def _comparison(
    config: "TestaVideoConfig", opinions: int, num_tokens: int, num_merged: int, is_consecutive: bool = False
) -> int:
    """Operations of comparing tokens by their keys."""
    if num_merged == 0 or config.aggregation_strategy == "prune":
        return 0
    pairs = num_tokens**2 if config.aggregation_strategy == "importance" else (num_tokens // 2) * -(-num_tokens // 2)
    if is_consecutive:
        pairs = num_tokens - 1
    return opinions * pairs * (config.hidden_size // config.num_attention_heads)
