import logging

import pytest
import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

from transformers_testa import TestaConfig, TestaForPreTraining, TestaVideoConfig
from transformers_testa.conversion import from_blip
from transformers_testa.conversion_blip import convert_blip


SOURCES = [BlipForImageTextRetrieval, BlipForQuestionAnswering, BlipForConditionalGeneration]
ARCHITECTURES = ["pretraining", "retrieval", "videoqa", "captioning"]
DEC, ENC = 38, 39
EXACTLY = {"atol": 1e-5, "rtol": 0}
CLOSELY = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny_blip(model_class=BlipForImageTextRetrieval, num_heads: int = 4, vision_heads: int = 8, head_size: int = 8):
    """A BLIP model whose weights all have a value; its images are wider than its texts by default."""
    text = {"hidden_size": num_heads * head_size, "num_attention_heads": num_heads, "num_hidden_layers": 2}
    vision = {"hidden_size": vision_heads * head_size, "num_attention_heads": vision_heads, "num_hidden_layers": 3}
    config = BlipConfig(
        # Large epsilons, so that one that is not taken over shows.
        text_config=text
        | {"vocab_size": 40, "bos_token_id": DEC, "sep_token_id": 3, "max_position_embeddings": 16}
        | {"intermediate_size": 24, "layer_norm_eps": 0.01},
        vision_config=vision | {"image_size": 12, "patch_size": 4, "intermediate_size": 40, "layer_norm_eps": 0.1},
        image_text_hidden_size=10,
    )
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def as_original(blip) -> dict[str, Tensor]:
    """The state dict of a .pth file of the original code, training state included."""
    names = [
        ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
        ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
        ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
        ("vision_model.post_layernorm", "visual_encoder.norm"),
        ("vision_model.encoder.layers", "visual_encoder.blocks"),
        ("layer_norm", "norm"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn", "attn"),
    ]
    state_dict = {}
    for name, tensor in blip.state_dict().items():
        for transformers_name, original_name in names:
            name = name.replace(transformers_name, original_name)
        state_dict[name] = tensor
    momentum = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
    for name, tensor in list(state_dict.items()):
        part, _, rest = name.partition(".")
        if part in momentum:
            state_dict[f"{part}_m.{rest}"] = tensor + 1
    extra = {"text_encoder.embeddings.position_ids": torch.arange(16)[None], "temp": torch.tensor(0.05)}
    queues = {"image_queue": torch.ones(10, 6), "text_queue": torch.ones(10, 6), "queue_ptr": torch.zeros(1)}
    return state_dict | extra | queues


def static_videos(images: Tensor, num_frames: int) -> Tensor:
    return images[:, None].expand(-1, num_frames, -1, -1, -1)


def example_texts(first_token: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, DEC, (2, 6))
    ids[:, 0] = first_token
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask


# --- Before training the model is BLIP -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize("source", SOURCES)
def test_every_frame_of_a_static_video_looks_as_the_image_does_to_blip(source, num_frames):
    blip = tiny_blip(source)
    model = from_blip(blip, "captioning")
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        class_token, patches = blip.vision_model(images).last_hidden_state.split([1, 9], dim=1)
        tokens = model.testa.video_model(static_videos(images, num_frames)).last_hidden_state
    expected = torch.cat([class_token, patches.repeat(1, num_frames, 1)], dim=1)
    torch.testing.assert_close(tokens, expected, **EXACTLY)


def test_images_of_another_size_look_as_they_do_to_blip_when_it_resizes_positions():
    blip = tiny_blip()
    config = from_blip(blip, "retrieval").config
    config.video_config = TestaVideoConfig(**{**config.video_config.to_dict(), "image_size": 20})
    model = from_blip(blip, "retrieval", config)
    images = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        expected = blip.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
        tokens = model.testa.video_model(static_videos(images, 1)).last_hidden_state
    torch.testing.assert_close(tokens, expected, **EXACTLY)


def test_similarities_of_static_videos_and_texts_are_blips():
    blip = tiny_blip()
    config = from_blip(blip, "retrieval").config
    config.video_pooling = "cls"
    model = from_blip(blip, "retrieval", config)
    images, (ids, mask) = torch.randn(2, 3, 12, 12), example_texts(first_token=2)
    with torch.no_grad():
        similarities = blip(ids, images, attention_mask=mask, use_itm_head=False).itm_score
        output = model(static_videos(images, 3), ids, mask)
    torch.testing.assert_close(output.video_embeds @ output.text_embeds.t(), similarities, **CLOSELY)


# A text that is read with a video meets its class token once and each patch in every frame: with BLIP one frame agrees.


def test_matches_of_images_are_blips():
    blip = tiny_blip()
    model = from_blip(blip, "retrieval")
    # Transformers' BLIP leaves it to the caller to put [ENC] in the first place.
    images, (ids, mask) = torch.randn(2, 3, 12, 12), example_texts(first_token=ENC)
    with torch.no_grad():
        expected = blip(ids, images, attention_mask=mask, use_itm_head=True).itm_score
        videos = model.get_video_features(static_videos(images, 1)).last_hidden_state
        torch.testing.assert_close(model.match(videos, ids, mask), expected, **CLOSELY)


def test_answers_about_images_are_predicted_as_blip_does():
    blip = tiny_blip(BlipForQuestionAnswering, vision_heads=4)
    model = from_blip(blip, "videoqa")
    images = torch.randn(2, 3, 12, 12)
    # Questions without padding, which the cross-attention of Transformers' BLIP doesn't mask.
    (questions, _), (answers, answer_mask) = example_texts(first_token=ENC), example_texts(first_token=DEC)
    with torch.no_grad():
        states = blip.text_encoder(
            questions, encoder_hidden_states=blip.vision_model(images).last_hidden_state
        ).last_hidden_state
        expected = blip.text_decoder(answers, answer_mask, encoder_hidden_states=states).logits
        logits = model(static_videos(images, 1), questions, None, answers, answer_mask).logits
    torch.testing.assert_close(logits[answer_mask == 1], expected[answer_mask == 1], **CLOSELY)


def test_captions_of_images_are_predicted_as_blip_does():
    blip = tiny_blip(BlipForConditionalGeneration)
    model = from_blip(blip, "captioning")
    images, (ids, mask) = torch.randn(2, 3, 12, 12), example_texts(first_token=DEC)
    with torch.no_grad():
        expected = blip(images, ids, attention_mask=mask).logits
        logits = model(static_videos(images, 1), ids, mask).logits
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], **CLOSELY)


@pytest.mark.parametrize("fields", [{}, {"use_temporal_scaling": True}, {"attention_type": "joint_space_time"}])
def test_time_is_not_seen_before_training_and_temporal_attention_starts_as_the_spatial(fields):
    blip = tiny_blip()
    config = from_blip(blip, "retrieval").config
    config.video_config = TestaVideoConfig(**{**config.video_config.to_dict(), **fields})
    model = from_blip(blip, "retrieval", config).testa.video_model
    assert not model.embeddings.time_embeddings.any()
    for layer in model.layers if config.video_config.attention_type == "divided_space_time" else ():
        assert not layer.temporal.temporal_fc.weight.any() and not layer.temporal.temporal_fc.bias.any()
        assert torch.equal(layer.temporal.norm.weight, layer.spatial.norm.weight)
        for temporal, spatial in zip(
            layer.temporal.attention.parameters(), layer.spatial.attention.parameters(), strict=True
        ):
            assert torch.equal(temporal, spatial) and temporal is not spatial


# --- Where it comes from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_an_original_pth_file_gives_the_same_model_as_transformers_blip(tmp_path, source, wrapped):
    # A decoder of answers reads states of the question, which are as wide as texts.
    vision_heads = 1 if source is BlipForQuestionAnswering else 2
    blip = tiny_blip(source, num_heads=1, vision_heads=vision_heads, head_size=64)
    state_dict = as_original(blip)
    torch.save({"model": state_dict, "epoch": 3} if wrapped else state_dict, tmp_path / "blip.pth")
    architecture = ARCHITECTURES[1 + SOURCES.index(source)]
    from_file, from_model = from_blip(tmp_path / "blip.pth", architecture), from_blip(blip, architecture)
    assert type(from_file) is type(from_model)
    if architecture == "retrieval":
        assert from_file.temperature.item() == pytest.approx(0.05)
    for name, tensor in from_model.state_dict().items():
        assert name == "temperature" or torch.equal(tensor, from_file.state_dict()[name]), name
    assert from_file.config.text_config.num_attention_heads == 1
    assert from_file.config.video_config.num_attention_heads == vision_heads


@pytest.mark.parametrize("source", SOURCES)
def test_a_folder_gives_the_same_model_as_the_model_saved_in_it(tmp_path, source):
    blip = tiny_blip(source)
    blip.save_pretrained(tmp_path)
    from_folder, from_model = from_blip(str(tmp_path), "captioning"), from_blip(blip, "captioning")
    assert from_folder.config.to_dict() == from_model.config.to_dict()
    for name, tensor in from_model.text_decoder.text_model.state_dict().items():
        assert torch.equal(tensor, from_folder.text_decoder.text_model.state_dict()[name]), name


def test_the_configuration_is_blips_where_weights_rely_on_it_and_testas_elsewhere():
    config = from_blip(tiny_blip(), "retrieval").config
    video, text, default = config.video_config, config.text_config, TestaConfig()
    assert (video.image_size, video.patch_size, video.hidden_size, video.num_hidden_layers) == (12, 4, 64, 3)
    assert (video.num_attention_heads, video.layer_norm_eps, text.layer_norm_eps) == (8, 0.1, 0.01)
    assert (text.vocab_size, text.bos_token_id, text.enc_token_id, text.sep_token_id) == (40, DEC, ENC, 3)
    assert (text.num_attention_heads, text.encoder_hidden_size, config.projection_dim) == (4, 64, 10)
    assert (video.num_frames, video.frame_matching) == (32, default.video_config.frame_matching)
    assert (config.video_pooling, text.label_smoothing) == ("mean", default.text_config.label_smoothing)


# --- What one has and the other lacks --------------------------------------------------------------------------------

PREDICTION_HEAD = (
    *("text_decoder.prediction_head.decoder.bias", "text_decoder.prediction_head.layer_norm.bias"),
    *("text_decoder.prediction_head.layer_norm.weight", "text_decoder.prediction_head.transform.bias"),
    "text_decoder.prediction_head.transform.weight",
)
HEADS = (
    *("matching_head.bias", "matching_head.weight", "temperature", "text_projection.bias", "text_projection.weight"),
    *("video_projection.bias", "video_projection.weight"),
)
DECODER_COPIED = "text_decoder.text_model starts as a copy of testa.text_model"
ENCODER_COPIED = "testa.text_model starts as a copy of text_decoder.text_model"


@pytest.mark.parametrize(
    ("source", "architecture", "notes", "new"),
    [
        (BlipForImageTextRetrieval, "retrieval", [], ("temperature",)),
        (BlipForImageTextRetrieval, "pretraining", [DECODER_COPIED], ("temperature", *PREDICTION_HEAD)),
        (BlipForImageTextRetrieval, "videoqa", [DECODER_COPIED], PREDICTION_HEAD),
        (BlipForImageTextRetrieval, "captioning", [DECODER_COPIED], PREDICTION_HEAD),
        (BlipForQuestionAnswering, "videoqa", [], ()),
        (BlipForQuestionAnswering, "captioning", [], ()),
        (BlipForQuestionAnswering, "retrieval", [], HEADS),
        (BlipForQuestionAnswering, "pretraining", [], HEADS),
        (BlipForConditionalGeneration, "captioning", [], ()),
        (BlipForConditionalGeneration, "videoqa", [ENCODER_COPIED], ()),
        (BlipForConditionalGeneration, "retrieval", [ENCODER_COPIED], HEADS),
        (BlipForConditionalGeneration, "pretraining", [ENCODER_COPIED], HEADS),
    ],
)
def test_what_blip_lacks_is_named_in_one_warning(source, architecture, notes, new, caplog):
    with caplog.at_level(logging.WARNING):
        model = from_blip(tiny_blip(source, vision_heads=4 if architecture == "videoqa" else 8), architecture)
    notes = notes + [f"newly initialised, to be trained: {', '.join(sorted(new))}"] * bool(new)
    expected = [f"the model lacks parts of {type(model).__name__}: {'; '.join(notes)}."] if notes else []
    assert [record.getMessage() for record in caplog.records] == expected


def test_a_decoder_that_blip_lacks_starts_as_its_text_encoder():
    model = from_blip(tiny_blip(vision_heads=4), "videoqa")
    for name, tensor in model.testa.text_model.state_dict().items():
        assert torch.equal(tensor, model.text_decoder.text_model.state_dict()[name]), name


def test_a_decoder_gives_way_to_the_encoder_where_pretraining_shares_their_weights():
    blip = tiny_blip(BlipForQuestionAnswering)
    model, dropped = convert_blip(blip, "pretraining")
    own, encoder = blip.text_decoder.bert, blip.text_encoder
    layer = model.text_decoder.text_model.layers[0]
    assert torch.equal(layer.self_attention.query.weight, own.encoder.layer[0].attention.self.query.weight)
    assert torch.equal(layer.cross_attention.query.weight, encoder.encoder.layer[0].crossattention.self.query.weight)
    assert (
        model.text_decoder.prediction_head.decoder.weight is model.testa.text_model.embeddings.word_embeddings.weight
    )
    names = dropped["the decoder's own weight, in this architecture shared with the text encoder"]
    assert "text_decoder.cls.predictions.decoder.weight" in names
    assert "text_decoder.bert.encoder.layer.1.crossattention.self.key.bias" in names
    assert not any(".attention." in name for name in names)


def test_every_tensor_of_a_pth_file_is_used_or_dropped_for_a_reason():
    state_dict = as_original(tiny_blip(BlipForQuestionAnswering, num_heads=1, vision_heads=2, head_size=64))
    model, dropped = convert_blip(state_dict, "captioning")
    assert set(dropped) == {
        "momentum teacher, training state",
        "feature queue, training state",
        "position numbers, not learned",
        "second name of the decoder's bias",
        "text encoder, not in this architecture",
        "contrastive head, not in this architecture",
    }
    assert dropped["contrastive head, not in this architecture"] == ["temp"]
    of_time = [name for name in model.state_dict() if ".temporal." in name or "time_embeddings" in name]
    assert len(state_dict) == len(model.state_dict()) - len(of_time) + sum(map(len, dropped.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("visual_encoder.blocks.1.attn.qkv.bias"),
            "2 missing: testa.video_model.layers.1",
        ),
        (lambda weights: weights.pop("text_encoder.encoder.layer.1.output.dense.bias"), "1 missing: testa.text_model"),
        (lambda weights: weights.pop("itm_head.bias"), "1 missing: matching_head.bias"),
        (lambda weights: weights.update({"visual_encoder.extra": torch.ones(1)}), "1 left over: .*video_model.extra"),
        (lambda weights: weights.update({"cls_head.weight": torch.ones(1)}), "1 left over: cls_head.weight"),
        (lambda weights: weights.update({"itm_head.bias": torch.ones(3)}), "1 of another shape: matching_head.bias"),
        (lambda weights: weights.pop("visual_encoder.pos_embed"), "has no tensor 'visual_encoder.pos_embed'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_tensor(change, message):
    state_dict = as_original(tiny_blip(num_heads=1, vision_heads=2, head_size=64))
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        from_blip(state_dict, "retrieval")


def test_what_is_no_blip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the model is a BlipVisionModel; needed is one of BlipForImageTextRetrieval"):
        from_blip(tiny_blip().vision_model)
    model = from_blip(tiny_blip(), "pretraining")
    assert type(model) is TestaForPreTraining
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a TestaForPreTraining; needed is one of BlipForImageTextRetrieval"):
        from_blip(tmp_path)
    with pytest.raises(ValueError, match="Unknown architecture 'video'; known are 'pretraining', 'retrieval'"):
        from_blip(tiny_blip(), "video")
    with pytest.raises(FileNotFoundError, match=r"lost\.pth is no file"):
        from_blip(tmp_path / "lost.pth")
