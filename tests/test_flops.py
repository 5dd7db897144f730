import pytest

from transformers_testa import TestaVideoConfig
from transformers_testa.flops import count_video_gflops


@pytest.mark.parametrize(
    ("num_frames", "merged_frames", "merged_patches", "fields", "published"),
    [
        (32, 0, 0, {}, 786.8),
        (32, 1, 12, {}, 419.8),
        (32, 1, 12, {"aggregation_strategy": "prune"}, 419.7),
        (96, 0, 0, {}, 2382.5),
        (96, 4, 8, {}, 1381.4),
        (96, 0, 14, {}, 1364.0),
        (96, 7, 0, {}, 1303.9),
        (16, 0, 0, {}, 392.5),
        (16, 1, 2, {}, 229.0),
        (16, 0, 0, {"attention_type": "joint_space_time"}, 450),
        (16, 0, 197, {"attention_type": "joint_space_time"}, 252),
    ],
)
@pytest.mark.parametrize("frame_matching", ["mean", "vote"])
def test_base_encoders_cost_what_was_published(
    num_frames, merged_frames, merged_patches, fields, published, frame_matching
):
    config = TestaVideoConfig(
        num_frames=num_frames,
        merged_frames_per_layer=merged_frames,
        merged_patches_per_layer=merged_patches,
        frame_matching=frame_matching,
        **fields,
    )
    assert count_video_gflops(config) == pytest.approx(published, rel=0.005)


def test_fewer_frames_and_smaller_pictures_cost_less():
    config = TestaVideoConfig()
    assert count_video_gflops(config, num_frames=16) == count_video_gflops(TestaVideoConfig(num_frames=16))
    assert count_video_gflops(config, image_size=112) == count_video_gflops(TestaVideoConfig(image_size=112))


def test_consecutive_frames_are_compared_with_one_other_patch_by_patch():
    def gflops(frame_matching):
        fields = {"num_hidden_layers": 1, "num_frames": 9, "merged_frames_per_layer": 2}
        return count_video_gflops(TestaVideoConfig(**fields, frame_matching=frame_matching))

    consecutive, every_second_with_the_others = 196 * 8, 4 * 5
    difference = (consecutive - every_second_with_the_others) * 64 / 1e9
    assert gflops("consecutive") - gflops("mean") == pytest.approx(difference, rel=1e-6)
