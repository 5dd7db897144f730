import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from transformers_testa import TestaConfig, TestaVideoConfig
from transformers_testa.aggregation_testa import limit_merges
from transformers_testa.budgets import MERGE_SCHEDULES, least_keep_ratio, plan_merges
from transformers_testa.flops import count_video_gflops


ATTENTION_TYPES = ("divided_space_time", "joint_space_time", "space_only")


@st.composite
def encoders(draw):
    return TestaVideoConfig(
        num_frames=draw(st.integers(4, 128)),
        image_size=16 * draw(st.integers(4, 14)),
        num_hidden_layers=draw(st.integers(3, 12)),
        attention_type=draw(st.sampled_from(ATTENTION_TYPES)),
        aggregation_strategy=draw(st.sampled_from(["geometry", "prune"])),
    )


def gflops(config: TestaVideoConfig, merges: tuple[list[int], list[int]] | None = None) -> float:
    return count_video_gflops(config, merges=merges or ([0] * config.num_hidden_layers,) * 2)


def cheaper_by_one_patch(config: TestaVideoConfig, merges: tuple[list[int], list[int]]) -> float:
    """The most that one patch more or less, in one block, changes the cost of a plan."""
    frames, patches = merges
    costs = []
    for block in range(len(patches)):
        for change in (1, -1):
            other = [count + change * (number == block) for number, count in enumerate(patches)]
            if other[block] >= 0:
                costs.append(abs(gflops(config, (frames, other)) - gflops(config, merges)))
    return max(costs)


@given(encoders(), st.sampled_from(MERGE_SCHEDULES), st.floats(0.05, 1))
def test_the_cost_is_just_within_the_budget(config, merge_schedule, keep_ratio):
    assume(keep_ratio >= least_keep_ratio(config, merge_schedule))
    merges = plan_merges(config, keep_ratio, merge_schedule=merge_schedule)
    budget = keep_ratio * gflops(config)
    assert gflops(config, merges) <= budget * (1 + 1e-12)
    if merges == plan_merges(config, least_keep_ratio(config, merge_schedule), merge_schedule=merge_schedule):
        return  # nothing merges more
    assert gflops(config, merges) >= budget - 2 * cheaper_by_one_patch(config, merges)


@given(encoders(), st.sampled_from(MERGE_SCHEDULES), st.floats(0.05, 1))
def test_every_block_can_merge_what_it_is_told_to(config, merge_schedule, keep_ratio):
    assume(keep_ratio >= least_keep_ratio(config, merge_schedule))
    frames, patches = plan_merges(config, keep_ratio, merge_schedule=merge_schedule)
    num_frames, num_patches = config.num_frames, config.num_patches
    if config.attention_type == "joint_space_time":
        num_patches *= num_frames
    for merged_frames, merged_patches in zip(frames, patches, strict=True):
        assert limit_merges(merged_frames, num_frames) == merged_frames
        assert limit_merges(merged_patches, num_patches, class_token_ahead=True) == merged_patches
        num_frames, num_patches = num_frames - merged_frames, num_patches - merged_patches
    TestaVideoConfig(
        **{
            name: getattr(config, name) for name in ("num_frames", "image_size", "num_hidden_layers", "attention_type")
        },
        merged_frames_per_layer=frames,
        merged_patches_per_layer=patches,
    )


@given(encoders(), st.floats(0.05, 1))
def test_schedules_rise_fall_or_stay(config, keep_ratio):
    for merge_schedule in MERGE_SCHEDULES:
        assume(keep_ratio >= least_keep_ratio(config, merge_schedule))
        for counts in plan_merges(config, keep_ratio, merge_schedule=merge_schedule):
            if merge_schedule == "constant":
                assert max(counts) - min(counts) <= 1
            else:
                assert counts == sorted(counts, reverse=merge_schedule == "decreasing")


@pytest.mark.parametrize(("num_frames", "merged_frames", "merged_patches"), [(32, 1, 12), (96, 4, 8)])
def test_the_papers_costs_lead_to_nearly_the_papers_choices(num_frames, merged_frames, merged_patches):
    paper = TestaVideoConfig(
        num_frames=num_frames, merged_frames_per_layer=merged_frames, merged_patches_per_layer=merged_patches
    )
    frames, patches = plan_merges(paper, max_gflops=count_video_gflops(paper))
    assert sum(frames) == pytest.approx(12 * merged_frames, abs=1)
    assert sum(patches) == pytest.approx(12 * merged_patches, rel=0.02)


def test_a_budget_becomes_counts_that_are_stored(tmp_path):
    config = TestaConfig(video_config={"num_frames": 96, "keep_ratio": 0.5, "merge_schedule": "decreasing"})
    video_config = config.video_config
    assert count_video_gflops(video_config) == pytest.approx(0.5 * 2379.8, rel=0.01)
    assert video_config.merged_patches[0] > video_config.merged_patches[-1]
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["video_config"]
    assert stored["merged_frames_per_layer"] == video_config.merged_frames
    assert stored["merged_patches_per_layer"] == video_config.merged_patches
    assert not {"keep_ratio", "max_gflops", "merge_schedule"} & set(stored)
    assert TestaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_stored_configuration_takes_another_budget(tmp_path):
    TestaVideoConfig(merged_patches_per_layer=12).save_pretrained(tmp_path)
    config = TestaVideoConfig.from_pretrained(tmp_path, max_gflops=1200.0, num_frames=96)
    assert config.num_frames == 96
    assert count_video_gflops(config) == pytest.approx(1200, rel=0.01)


def test_time_stays_as_it_is_where_it_may_not_shrink():
    for fields in ({"use_temporal_scaling": True}, {"attention_type": "joint_space_time"}):
        frames, patches = plan_merges(TestaVideoConfig(**fields), keep_ratio=0.6)
        assert frames == [0] * 12 and min(patches) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_ratio": 0.1}, r"keep_ratio is 0.1; 32 frames of 196 patches in 12 blocks allow no less than 0.33"),
        ({"max_gflops": 10.0}, "max_gflops is 10.0; .* allow no less than 259.8 with merge_schedule='constant'"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5; a share"),
        ({"keep_ratio": 0.5, "max_gflops": 400.0}, "exactly one is needed"),
        ({"keep_ratio": 0.5, "merge_schedule": "cosine"}, "merge_schedule is 'cosine'; allowed are 'constant'"),
        ({"merge_schedule": "increasing"}, "it needs a keep_ratio or max_gflops"),
        ({"keep_ratio": 0.5, "merged_patches_per_layer": 3}, "merged_patches_per_layer is 3; give either"),
        ({"keep_rato": 0.5}, "did you mean `keep_ratio`"),
    ],
)
def test_an_impossible_budget_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TestaVideoConfig(**arguments)
