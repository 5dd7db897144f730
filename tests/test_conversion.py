import pickle

import pytest
import torch
from original import OriginalCase

from transformers_testa import TestaForRetrieval, conversion


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pth_file_gives_the_same_model_as_its_state_dict(tmp_path, wrapped):
    case = OriginalCase("retrieval_aggregated")
    torch.save({"model": case.state_dict, "epoch": 3} if wrapped else case.state_dict, tmp_path / "testa.pth")
    from_file = conversion.load_original_checkpoint(tmp_path / "testa.pth", "retrieval", case.config)
    from_dict = conversion.load_original_checkpoint(case.state_dict, "retrieval", case.config)
    assert type(from_file) is TestaForRetrieval
    for name, tensor in from_dict.state_dict().items():
        assert torch.equal(tensor, from_file.state_dict()[name]), name


def test_the_configuration_is_inferred_from_shapes():
    case = OriginalCase("retrieval_full")
    config = conversion.load_original_checkpoint(case.state_dict, "retrieval").config
    video, text = config.video_config, config.text_config
    assert (video.image_size, video.num_frames, video.hidden_size, video.num_hidden_layers) == (48, 8, 32, 3)
    assert (video.frame_matching, video.attention_type) == ("vote", "divided_space_time")
    assert (text.vocab_size, text.bos_token_id, text.enc_token_id, text.num_hidden_layers) == (200, 198, 199, 2)
    assert config.projection_dim == 16


@pytest.mark.parametrize(
    ("case_name", "attention_type"),
    [
        ("encoder_joint_no_aggregation", "joint_space_time"),
        ("encoder_tome_space_only", "space_only"),
        ("encoder_temporal_scaling", "divided_space_time"),
    ],
)
def test_the_kind_of_attention_is_inferred_from_the_names(case_name, attention_type):
    config = conversion.load_original_checkpoint(OriginalCase(case_name).state_dict, "video").config
    assert config.attention_type == attention_type
    assert config.use_temporal_scaling == (case_name == "encoder_temporal_scaling")


def test_every_tensor_is_used_or_dropped_for_a_reason():
    state_dict = OriginalCase("retrieval_full").state_dict
    reasons = {conversion.dropped_reason(name) for name in state_dict}
    assert reasons == {
        None,
        "momentum teacher, training state",
        "feature queue, training state",
        "position numbers, not learned",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("itm_head.bias"), "1 missing: matching_head.bias"),
        (lambda weights: weights.update(extra=torch.ones(1)), "1 left over: extra"),
        (
            lambda weights: weights.update({"itm_head.bias": torch.ones(3)}),
            r"1 of another shape: matching_head.bias \(3,\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_tensor(change, message):
    case = OriginalCase("retrieval_full")
    change(case.state_dict)
    with pytest.raises(ValueError, match=message):
        conversion.load_original_checkpoint(case.state_dict, "retrieval", case.config)


def test_another_architecture_is_refused():
    case = OriginalCase("encoder_no_aggregation")
    with pytest.raises(ValueError, match=r"has no tensor 'text_encoder\.embeddings\.word_embeddings\.weight'"):
        conversion.load_original_checkpoint(case.state_dict, "retrieval")
    with pytest.raises(ValueError, match="Unknown architecture 'image'; known are 'video', 'retrieval'"):
        conversion.load_original_checkpoint(case.state_dict, "image")


def test_a_pickle_with_code_is_never_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        conversion.load_original_checkpoint(tmp_path / "evil.pth", "retrieval")
    assert not (tmp_path / "executed").exists()
