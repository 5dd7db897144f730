"""Budgets: from what a video may cost to how many frames and patches each block merges."""

import math
from bisect import bisect_left
from typing import TYPE_CHECKING

from .aggregation_testa import limit_merges
from .flops import count_video_gflops


if TYPE_CHECKING:
    from .configuration_testa import TestaVideoConfig


MERGE_SCHEDULES = ("constant", "decreasing", "increasing")

# The paper merges 12 of 32 frames with 144 of 196 patches, and 48 of 96 with 96. Of the (logarithm of the) factor by
# which tokens become fewer, time's share is 0.261 and 0.507 there. It grows with the logarithm of the number of frames:
# the more of a video are seen, the more alike are neighbours.
_TIME_SHARE_AT_32_FRAMES, _TIME_SHARE_AT_96_FRAMES, _LEAST_TIME_SHARE = 0.261, 0.507, 0.1


def plan_merges(
    config: "TestaVideoConfig",
    keep_ratio: float | None = None,
    max_gflops: float | None = None,
    merge_schedule: str = "constant",
) -> tuple[list[int], list[int]]:
    """Choose how many frames and patches each block merges away, so that a video costs no more than a budget.

    Time and space shrink together, in the proportion of the paper's own choices; undivided attention and temporal
    scaling leave time as it is. The cost comes as near to the budget as one patch more or less allows.

    Args:
        config: The encoder's [`TestaVideoConfig`]; which merges it has doesn't matter.
        keep_ratio: Budget as a share of the GFLOPs without merging, above 0 and at most 1.
        max_gflops: Budget in GFLOPs, instead.
        merge_schedule: "constant" merges as many in every block, give or take one; "decreasing" merges more in early
            blocks, where a merge saves more; "increasing" in late ones.

    Returns:
        `merged_frames_per_layer` and `merged_patches_per_layer`, one entry a block.

    Raises:
        ValueError: Where not exactly one budget is given, or the budget can't be met.
    """
    if merge_schedule not in MERGE_SCHEDULES:
        raise ValueError(f"merge_schedule is {merge_schedule!r}; allowed are {', '.join(map(repr, MERGE_SCHEDULES))}.")
    if (keep_ratio is None) == (max_gflops is None):
        raise ValueError(f"keep_ratio is {keep_ratio} and max_gflops is {max_gflops}; exactly one is needed.")
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio is {keep_ratio}; a share of the GFLOPs, above 0 and at most 1, is needed.")
    blocks, frames, patches = config.num_hidden_layers, *_groups(config)
    time_share = _time_share(config)
    most_frames, most_patches = _highest_levels(config, merge_schedule)

    def merges_at(frame_level: float, patch_level: float) -> tuple[list[int], list[int]]:
        return _spread(frame_level, blocks, merge_schedule), _spread(patch_level, blocks, merge_schedule)

    def gflops_at(frame_level: float, patch_level: float) -> float:
        return count_video_gflops(config, merges=merges_at(frame_level, patch_level))

    def shrink(step: int) -> tuple[float, float]:
        kept = 2 ** (-step / 16)  # of all tokens
        return (
            min(most_frames, frames * (1 - kept**time_share) / blocks),
            min(most_patches, patches * (1 - kept ** (1 - time_share)) / blocks),
        )

    unmerged, least = gflops_at(0, 0), gflops_at(most_frames, most_patches)
    budget, possible, asked = math.inf if max_gflops is None else max_gflops, least, f"max_gflops is {max_gflops}"
    if keep_ratio is not None:
        budget, possible, asked = keep_ratio * unmerged, least / unmerged, f"keep_ratio is {keep_ratio}"
    if budget < least * (1 - 1e-9):
        raise ValueError(
            f"{asked}; {config.num_frames} frames of {config.num_patches} patches in {blocks} blocks allow no less than "
            f"{possible:.4g} with merge_schedule={merge_schedule!r}."
        )

    budget = max(budget, least)  # the smallest possible ratio, rounded, is not refused

    # Shrink both until the budget is met. Then, with the frames of that step or the one before, patches alone.
    enough = bisect_left(range(4096), True, key=lambda step: gflops_at(*shrink(step)) <= budget)
    # The steps are fine because blocks that reach a whole number at nearly the same level shall do so one by one.
    steps = 2**20
    plans = []
    for frame_level in {shrink(step)[0] for step in (max(enough - 1, 0), enough)}:

        def is_enough(step: int, frame_level: float = frame_level) -> bool:
            return gflops_at(frame_level, most_patches * step / steps) <= budget

        found = bisect_left(range(steps + 1), True, key=is_enough)
        if found <= steps:
            plans.append(merges_at(frame_level, most_patches * found / steps))
    return max(plans, key=lambda merges: count_video_gflops(config, merges=merges))


def least_keep_ratio(config: "TestaVideoConfig", merge_schedule: str = "constant") -> float:
    """Return the smallest `keep_ratio` that [`plan_merges`] can meet."""
    blocks = config.num_hidden_layers
    frames, patches = (_spread(level, blocks, merge_schedule) for level in _highest_levels(config, merge_schedule))
    unmerged = count_video_gflops(config, merges=([0] * blocks, [0] * blocks))
    return count_video_gflops(config, merges=(frames, patches)) / unmerged


def _groups(config: "TestaVideoConfig") -> tuple[int, int]:
    """Return the groups of tokens that attend to each other, and the patches in each: frames, or one of all patches."""
    if config.attention_type == "joint_space_time":
        return 1, config.num_frames * config.num_patches
    return config.num_frames, config.num_patches


def _time_share(config: "TestaVideoConfig") -> float:
    if config.attention_type != "divided_space_time" or config.use_temporal_scaling:
        return 0.0
    slope = (_TIME_SHARE_AT_96_FRAMES - _TIME_SHARE_AT_32_FRAMES) / math.log(96 / 32)
    return max(_LEAST_TIME_SHARE, _TIME_SHARE_AT_32_FRAMES + slope * math.log(config.num_frames / 32))


def _highest_levels(config: "TestaVideoConfig", merge_schedule: str) -> tuple[float, float]:
    """Return the most frames and patches a block, on average, that can merge without a step at its limit."""
    frames, patches = _groups(config)
    blocks = config.num_hidden_layers
    most_frames = _highest_level(frames, blocks, merge_schedule, class_token_ahead=False)
    most_patches = _highest_level(patches, blocks, merge_schedule, class_token_ahead=True)
    return most_frames if _time_share(config) else 0.0, most_patches


def _spread(level: float, blocks: int, merge_schedule: str) -> list[int]:
    """Return whole numbers, one a block, of mean `level` or nearly so; none of them falls where the level rises."""
    if merge_schedule == "constant":
        return [math.floor(level + block / blocks) for block in reversed(range(blocks))]
    # From half of the mean to half as much again.
    rising = [math.floor(level * (0.5 + (block + 0.5) / blocks) + block / blocks) for block in range(blocks)]
    return rising if merge_schedule == "increasing" else rising[::-1]


def _highest_level(num_tokens: int, blocks: int, merge_schedule: str, class_token_ahead: bool) -> float:
    """Return the highest level at which no block is asked for more merges than a step may make."""

    def is_too_high(step: int) -> bool:
        remaining = num_tokens
        for count in _spread(step / (8 * blocks), blocks, merge_schedule):
            if count > limit_merges(count, remaining, class_token_ahead):
                return True
            remaining -= count
        return False

    return (bisect_left(range(8 * num_tokens), True, key=is_too_high) - 1) / (8 * blocks)
