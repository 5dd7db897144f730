import pytest
import torch
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    TimesformerConfig,
    TimesformerForVideoClassification,
    TimesformerModel,
)

from transformers_testa import TestaVideoConfig, TestaVideoModel
from transformers_testa.conversion import from_timesformer, to_timesformer


ATTENTION_TYPES = ["divided_space_time", "joint_space_time", "space_only"]
SIZES = {
    "image_size": 12,
    "patch_size": 4,
    "num_frames": 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
EXACTLY = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(model):
    """Give every weight a value: zeros would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def assert_same_tokens(testa: TestaVideoModel, timesformer: TimesformerModel):
    videos = torch.randn(2, 3, 3, 12, 12)
    with torch.no_grad():
        ours, theirs = testa(videos).last_hidden_state, timesformer(videos).last_hidden_state
    if testa.config.attention_type == "divided_space_time":  # patch by patch -> frame by frame
        patches = theirs[:, 1:].unflatten(1, (9, 3)).transpose(1, 2).flatten(1, 2)
        theirs = torch.cat([theirs[:, :1], patches], dim=1)
    if testa.config.attention_type == "space_only":  # [B * T, 1 + L, D]
        theirs = theirs.unflatten(0, (2, 3)).flatten(1, 2)
    torch.testing.assert_close(ours, theirs, **EXACTLY)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_an_encoder_from_timesformer_computes_what_it_does(attention_type, qkv_bias):
    # A large epsilon, so that one that is not taken over shows.
    config = TimesformerConfig(**SIZES, attention_type=attention_type, qkv_bias=qkv_bias, layer_norm_eps=0.1)
    timesformer = trained(TimesformerModel(config))
    assert_same_tokens(from_timesformer(timesformer), timesformer)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_timesformer_from_an_encoder_computes_what_it_does(attention_type):
    model = trained(TestaVideoModel(TestaVideoConfig(**SIZES, attention_type=attention_type, layer_norm_eps=0.1)))
    assert_same_tokens(model, to_timesformer(model))


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_there_and_back_gives_the_same_weights(attention_type):
    model = trained(TestaVideoModel(TestaVideoConfig(**SIZES, attention_type=attention_type)))
    again = from_timesformer(to_timesformer(model))
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_classifier_in_a_folder_gives_its_encoder(tmp_path):
    classifier = trained(TimesformerForVideoClassification(TimesformerConfig(**SIZES)))
    classifier.save_pretrained(tmp_path)
    assert_same_tokens(from_timesformer(tmp_path), classifier.timesformer)


def test_aggregation_can_be_switched_on_in_what_was_a_timesformer():
    timesformer = trained(TimesformerModel(TimesformerConfig(**SIZES)))
    config = TestaVideoConfig(**SIZES, merged_frames_per_layer=[1, 0], merged_patches_per_layer=2)
    assert from_timesformer(timesformer, config)(torch.randn(1, 3, 3, 12, 12)).last_hidden_state.shape[1] == 1 + 2 * 5


def test_longer_and_larger_videos_than_the_timesformers_can_be_configured():
    timesformer = trained(TimesformerModel(TimesformerConfig(**SIZES)))
    embeddings = from_timesformer(
        timesformer, TestaVideoConfig(**{**SIZES, "num_frames": 6, "image_size": 24})
    ).embeddings
    times = timesformer.embeddings.time_embeddings
    assert torch.equal(embeddings.time_embeddings, times.repeat_interleave(2, dim=1))
    assert embeddings.position_embeddings.shape == (1, 1 + 36, 32)


def test_what_is_no_timesformer_is_refused(tmp_path):
    blip = BlipTextModel(BlipTextConfig(hidden_size=8, num_hidden_layers=1, vocab_size=4))
    with pytest.raises(ValueError, match="the model is a BlipTextModel; needed is one of TimesformerModel"):
        from_timesformer(blip)
    TestaVideoModel(TestaVideoConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} is a TestaVideoModel; needed is one of TimesformerModel"):
        from_timesformer(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"merged_frames_per_layer": 1}, {"merged_patches_per_layer": [0, 2]}, {"use_temporal_scaling": True}]
)
def test_what_a_timesformer_cannot_do_is_refused(fields):
    ((field, value),) = fields.items()
    model = TestaVideoModel(TestaVideoConfig(**{**SIZES, "num_frames": 4}, **fields))
    with pytest.raises(ValueError) as error:
        to_timesformer(model)
    assert f"{field} is {value}; a TimeSformer has nothing like it" in str(error.value)
