import pytest
import torch
from retrieval_world import tiny_config

from transformers_testa import TestaForRetrieval, TestaTextModel, TestaVideoModel
from transformers_testa.merging import count_kept, with_merges


ATTENTION_TYPES = ["divided_space_time", "joint_space_time", "space_only"]


def test_a_model_with_other_merges_shares_its_weights_and_leaves_the_first_as_it_was():
    model = TestaForRetrieval(tiny_config()).eval()
    frames = torch.randn(1, 6, 3, 32, 32)
    before = model.get_video_features(frames)
    other = with_merges(model, [2, 0], 0)
    output = other.get_video_features(frames)
    assert output.last_hidden_state.shape[1] == 1 + 4 * 4
    assert output.token_map.unique().tolist() == list(range(1, 17))
    assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in model.parameters()]
    after = model.get_video_features(frames)
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)
    assert model.config.video_config.merged_frames_per_layer == 1


def test_it_gives_what_a_model_built_with_these_merges_gives():
    model = TestaForRetrieval(tiny_config()).eval()
    built = TestaForRetrieval(tiny_config(merged_frames_per_layer=[2, 1], merged_patches_per_layer=0)).eval()
    built.load_state_dict(model.state_dict())
    frames = torch.randn(2, 6, 3, 32, 32)
    other = with_merges(model, [2, 1], 0)
    assert other.config.to_dict() == built.config.to_dict()
    assert torch.equal(other.get_video_features(frames).pooler_output, built.get_video_features(frames).pooler_output)


def test_merges_that_do_not_fit_are_refused():
    model = TestaForRetrieval(tiny_config())
    with pytest.raises(ValueError, match="that merges 6 of 6 frames"):
        with_merges(model, 3, 0)
    with pytest.raises(ValueError, match="TestaTextModel has no video encoder"):
        with_merges(TestaTextModel(tiny_config().text_config), 1, 1)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_as_many_tokens_are_counted_as_the_encoder_leaves(attention_type):
    frames = 1 if attention_type == "divided_space_time" else 0
    settings = {"merged_frames_per_layer": frames, "merged_patches_per_layer": 1, "attention_type": attention_type}
    config = tiny_config(**settings).video_config
    output = TestaVideoModel(config)(torch.randn(1, 6, 3, 32, 32))
    kept_frames, kept_patches = count_kept(config)
    assert len(output.token_map.unique()) == kept_frames * kept_patches
