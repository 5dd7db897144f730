import pytest

from transformers_testa import TestaConfig, TestaTextConfig, TestaVideoConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merged_frames_per_layer": -1}, "merged_frames_per_layer is -1"),
        (
            {"merged_patches_per_layer": [1, 2]},
            r"merged_patches_per_layer is \[1, 2\]; one entry a layer is needed: 12",
        ),
        ({"merged_frames_per_layer": 3}, "merges 36 of 32 frames"),
        ({"merged_patches_per_layer": 17}, "merges 204 of 196 patches"),
        ({"attention_type": "joint_space_time", "merged_frames_per_layer": 1}, "frames merge only with"),
        ({"attention_type": "joint_space_time", "merged_patches_per_layer": 600}, "merges 7200 of 6272"),
        ({"use_temporal_scaling": True, "merged_frames_per_layer": 1}, "use_temporal_scaling is True"),
        ({"attention_type": "both"}, "attention_type is 'both'; allowed are 'divided_space_time'"),
        ({"aggregation_strategy": "random"}, "aggregation_strategy is 'random'"),
        ({"frame_matching": "median"}, "frame_matching is 'median'"),
        (
            {"frame_matching": "consecutive", "aggregation_strategy": "importance"},
            "frame_matching is 'consecutive'; it needs aggregation_strategy='geometry', not 'importance'",
        ),
        ({"image_size": 225}, "image_size is 225; a multiple of patch_size=16"),
        ({"hidden_size": 770}, "hidden_size is 770; a multiple of num_attention_heads=12"),
        ({"num_frames": 0}, "num_frames is 0; a positive number"),
        ({"merged_frame_per_layer": 1}, "did you mean `merged_frames_per_layer`"),
    ],
)
def test_an_impossible_video_encoder_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TestaVideoConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"text_config": {"encoder_hidden_size": 4}},
            "encoder_hidden_size is 4; the hidden_size of the video encoder",
        ),
        ({"video_pooling": "max"}, "video_pooling is 'max'; allowed are 'mean', 'cls'"),
        ({"video_pooling": "cls", "video_config": {"attention_type": "space_only"}}, "has a class token a frame"),
        ({"projection_dim": 0}, "projection_dim is 0"),
    ],
)
def test_an_impossible_pair_of_encoders_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TestaConfig(**fields)


def test_text_generation_ends_at_the_separator():
    assert TestaTextConfig().eos_token_id == 102
    assert TestaTextConfig(eos_token_id=7).eos_token_id == 7


def test_a_saved_configuration_comes_back_whole(tmp_path):
    config = TestaConfig(
        video_config={"merged_frames_per_layer": [1] * 12, "frame_matching": "vote"}, video_pooling="cls"
    )
    config.save_pretrained(tmp_path)
    assert TestaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert TestaVideoConfig.from_pretrained(tmp_path).merged_frames == [1] * 12
