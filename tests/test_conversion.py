import json
import runpy
from pathlib import Path

import pytest
import torch
from original import OriginalCase, case_names
from transformers import TimesformerConfig, TimesformerModel

import transformers_testa
from transformers_testa import TestaForRetrieval, TestaProcessor, TestaVideoModel, conversion
from transformers_testa.conversion_original import convert_original


BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "conversion.py"
DEMO = Path(__file__).parents[1] / "hub_configs" / "testa-demo"
MODELS = {
    "encoder": ("video", "TestaVideoModel"),
    "retrieval": ("retrieval", "TestaForRetrieval"),
    "videoqa": ("videoqa", "TestaForVideoQA"),
    "pretraining": ("pretraining", "TestaForPreTraining"),
}
TOLERANCE = {"atol": 1e-4, "rtol": 0}


# --- Released weights ------------------------------------------------------------------------------------------------


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
    case = OriginalCase("pretraining")
    model, dropped = convert_original(case.state_dict, "pretraining", case.config)
    assert set(dropped) == {
        "momentum teacher, training state",
        "feature queue, training state",
        "position numbers, not learned",
        "second name of the decoder's bias",
    }
    assert len(case.state_dict) == len(model.state_dict()) + sum(map(len, dropped.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("itm_head.bias"), "1 missing: matching_head.bias"),
        (lambda weights: weights.update(extra=torch.ones(1)), "1 left over: extra"),
        (
            lambda weights: weights.update({"itm_head.bias": torch.ones(3)}),
            r"1 of another shape: matching_head.bias \(3,\)",
        ),
        (
            lambda weights: weights["text_decoder.bert.embeddings.LayerNorm.bias"].add_(1),
            r"1 different though the model shares them: text_decoder\.text_model\.embeddings\.layer_norm\.bias and "
            r"testa\.text_model\.embeddings\.layer_norm\.bias",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_tensor(change, message):
    case = OriginalCase("pretraining")
    change(case.state_dict)
    with pytest.raises(ValueError, match=message):
        conversion.load_original_checkpoint(case.state_dict, "pretraining", case.config)


def test_another_architecture_is_refused():
    case = OriginalCase("encoder_no_aggregation")
    with pytest.raises(ValueError, match=r"has no tensor 'text_encoder\.embeddings\.word_embeddings\.weight'"):
        conversion.load_original_checkpoint(case.state_dict, "retrieval")
    with pytest.raises(ValueError, match="Unknown architecture 'image'; known are 'video', 'retrieval'"):
        conversion.load_original_checkpoint(case.state_dict, "image")


# --- Files -----------------------------------------------------------------------------------------------------------


def test_a_pickle_with_code_is_never_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth is no plain file of tensors: .* code, which is never executed"):
        conversion.load_original_checkpoint(tmp_path / "evil.pth", "retrieval")
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lost\.pth is no file"):
        conversion.load_original_checkpoint(tmp_path / "lost.pth", "retrieval")


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pth is .*damaged"):
        conversion.load_original_checkpoint(tmp_path / "broken.pth", "retrieval")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list; a dict of tensors by name is needed"),
        ({"model": [1]}, "holds a list; a dict of tensors by name is needed"),
        ({"state_dict": {}}, "holds a dict under 'state_dict'; a tensor is needed, or all .* under 'model'"),
        ({"model": {"epoch": 3}}, "holds a int under 'epoch'"),
    ],
)
def test_a_file_without_named_tensors_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth {message}"):
        conversion.load_original_checkpoint(tmp_path / "other.pth", "retrieval")


# --- The command line ------------------------------------------------------------------------------------------------


def convert(tmp_path, state_dict, *options: str, config=None, output_dir: str = "converted") -> Path:
    """Convert a .pth file on the command line, with a folder of the configuration and the demo's processor if given."""
    torch.save({"model": state_dict}, tmp_path / "testa.pth")
    if config is not None:
        config.save_pretrained(tmp_path / "config")
        TestaProcessor.from_pretrained(DEMO).save_pretrained(tmp_path / "config")
        options = (*options, "--config_dir", str(tmp_path / "config"))
    conversion.main([str(tmp_path / "testa.pth"), str(tmp_path / output_dir), *options])
    return tmp_path / output_dir


@pytest.mark.parametrize("name", case_names(""))
def test_a_converted_folder_computes_what_the_released_code_does(tmp_path, name):
    case = OriginalCase(name)
    architecture, class_name = MODELS[name.partition("_")[0]]
    config = case.video_config if architecture == "video" else case.config
    folder = convert(tmp_path, case.state_dict, "--architecture", architecture, config=config)
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    model = getattr(transformers_testa, class_name).from_pretrained(folder)
    with torch.no_grad():
        for ours, theirs in OUTPUTS[architecture](model, case):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)


def video_outputs(model, case):
    frames_left = case.videos.shape[1] - sum(case.video_config.merged_frames)
    yield model(case.videos).last_hidden_state, case.last_hidden_state(frames_left)


def retrieval_outputs(model, case):
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    output = model(case.videos, ids, mask)
    yield output.video_embeds, case.outputs["video_embeds"]
    yield output.text_embeds, case.outputs["text_embeds"]
    videos = output.video_model_output.last_hidden_state
    yield torch.stack([model.match(video[None], ids, mask) for video in videos]), case.outputs["vtm_logits_video_text"]


def videoqa_outputs(model, case):
    questions = case.videos, case.inputs["question_input_ids"], case.inputs["question_attention_mask"]
    yield model.read_question(*questions)[1], case.outputs["question_hidden"]
    candidates = case.inputs["candidate_input_ids"], case.inputs["candidate_attention_mask"]
    yield model.score_answers(*questions, *candidates), case.outputs["candidate_scores"]


def pretraining_outputs(model, case):
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    videos = model.get_video_features(case.videos).last_hidden_state
    yield model.caption_loss(videos, ids, mask), case.outputs["loss_cap"]
    ids = torch.cat([torch.full_like(ids[:, :1], model.config.text_config.bos_token_id), ids[:, 1:]], dim=1)
    yield model.text_decoder(ids, mask, videos).logits, case.outputs["caption_logits"]


OUTPUTS = {
    "video": video_outputs,
    "retrieval": retrieval_outputs,
    "videoqa": videoqa_outputs,
    "pretraining": pretraining_outputs,
}


def test_a_converted_processor_chooses_frames_as_the_released_training_did(tmp_path):
    case = OriginalCase("retrieval_full")
    folder = convert(tmp_path, case.state_dict, "--architecture", "retrieval", config=case.config)
    assert TestaProcessor.from_pretrained(DEMO).video_processor.frame_sampling != "legacy_uniform"
    assert TestaProcessor.from_pretrained(folder).video_processor.frame_sampling == "legacy_uniform"


def test_merged_tokens_are_set_on_the_command_line(tmp_path):
    case = OriginalCase("encoder_frames_and_patches")
    options = ("--merged_frames_per_layer", "1", "--merged_patches_per_layer", "2", "0", "3")
    folder = convert(tmp_path, case.state_dict, "--architecture", "video", *options)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    model = TestaVideoModel.from_pretrained(folder)
    assert (model.config.merged_frames, model.config.merged_patches) == ([1, 1, 1], [2, 0, 3])
    assert model(case.videos).last_hidden_state.shape[1] == 1 + (8 - 3) * (9 - 5)


def test_impossible_counts_are_refused_before_anything_is_saved(tmp_path):
    case = OriginalCase("encoder_no_aggregation")
    with pytest.raises(ValueError, match="merged_frames_per_layer is 8; that merges 24 of 8 frames"):
        convert(tmp_path, case.state_dict, "--architecture", "video", "--merged_frames_per_layer", "8")
    assert not list((tmp_path / "converted").iterdir())


def test_dropped_tensors_are_counted_by_reason_and_named_on_demand(tmp_path, capsys):
    case = OriginalCase("retrieval_full")
    convert(tmp_path, case.state_dict, "--architecture", "retrieval")
    short = capsys.readouterr().out
    assert "holds a TestaForRetrieval" in short
    assert "Dropped 4: feature queue, training state." in short and "image_queue" not in short
    convert(tmp_path, case.state_dict, "--architecture", "retrieval", "--verbose")
    assert "Dropped 4: feature queue, training state.\n    " in (long := capsys.readouterr().out)
    assert "\n    image_queue\n" in long and "\n    text_encoder_m.embeddings.position_ids\n" in long


def test_a_configuration_that_does_not_fit_the_weights_names_the_tensor(tmp_path):
    case = OriginalCase("retrieval_full")
    config = case.config
    config.video_config.image_size = 64
    with pytest.raises(ValueError, match=r"position_embeddings \(1, 10, 32\) instead of \(1, 17, 32\)"):
        convert(tmp_path, case.state_dict, "--architecture", "retrieval", config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--architecture is None; needed is one of: video, retrieval, videoqa, pretraining (from testa)"),
        (("--architecture", "captioning"), "--architecture is captioning; needed is one of"),
        (("--from", "timesformer", "--architecture", "retrieval"), "video (from timesformer)"),
        (("--architecture", "video", "--config_dir", "nowhere"), "--config_dir is nowhere; a folder of config.json"),
        (("--architecture", "video", "--verbos"), "unrecognized arguments: --verbos"),
    ],
)
def test_a_wrong_command_line_is_explained(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        conversion.main([str(tmp_path / "testa.pth"), str(tmp_path / "converted"), *options])
    assert message in capsys.readouterr().err


def test_blip_and_timesformer_are_sources_as_well(tmp_path):
    image_model = {
        name: tensor
        for name, tensor in OriginalCase("retrieval_full").state_dict.items()
        if ".temporal_" not in name and not name.endswith("time_embed")
    }
    options = ("--from", "blip", "--architecture", "videoqa", "--config_dir", str(tmp_path / "config"))
    OriginalCase("retrieval_full").config.save_pretrained(tmp_path / "config")
    TestaProcessor.from_pretrained(DEMO).save_pretrained(tmp_path / "config")
    folder = convert(tmp_path, image_model, *options)
    assert transformers_testa.TestaForVideoQA.from_pretrained(folder).config.video_config.num_frames == 8
    assert TestaProcessor.from_pretrained(folder).video_processor.frame_sampling != "legacy_uniform"

    config = TimesformerConfig(
        image_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    TimesformerModel(config).save_pretrained(tmp_path / "timesformer")
    conversion.main([str(tmp_path / "timesformer"), str(tmp_path / "encoder"), "--from", "timesformer"])
    assert TestaVideoModel.from_pretrained(tmp_path / "encoder").config.num_attention_heads == 4


@pytest.mark.slow
def test_a_full_size_checkpoint_takes_at_most_a_minute_and_four_gibibytes(tmp_path):
    runpy.run_path(str(BENCHMARK))["main"](["--output", str(tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [row["architecture"] for row in rows] == ["retrieval", "pretraining", "videoqa"]
    for row in rows:
        assert row["seconds"] < 60 and row["peak GiB"] < 4, row
