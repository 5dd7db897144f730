from itertools import product

import pytest
import torch
from original import OriginalCase, case_names
from test_modeling_common import tiny_config, tiny_text_config, tiny_video_config
from transformers import AutoModel
from transformers.utils import is_flash_attn_2_available, logging

from transformers_testa import (
    TestaConfig,
    TestaForRetrieval,
    TestaModel,
    TestaTextModel,
    TestaVideoModel,
    conversion,
)
from transformers_testa.aggregation_testa import unmerge
from transformers_testa.modeling_testa import TestaVideoAttention
from transformers_testa.objectives import HardNegatives, matching_loss


TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def example_videos(batch_size: int = 2, num_frames: int = 4, size: int = 8) -> torch.Tensor:
    return torch.randn(batch_size, num_frames, 3, size, size)


def trained(model):
    """Give every weight a value: new models have zeros where they would hide mistakes (biases)."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.add_(0.1)
    return model.eval()


# --- The released code decides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", case_names("encoder"))
def test_encoder_computes_what_the_released_code_does(name, attention):
    case = OriginalCase(name)
    model = conversion.load_original_checkpoint(case.state_dict, "video", case.video_config)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        output = model(case.videos)
    frames_left = case.videos.shape[1] - sum(case.video_config.merged_frames)
    torch.testing.assert_close(output.last_hidden_state, case.last_hidden_state(frames_left), **TOLERANCE)
    if "token_size" in case.outputs:
        expected = case.outputs["token_size"].squeeze(-1)
        if case.video_config.attention_type == "divided_space_time":  # every frame repeats the class token's size
            expected = torch.cat([expected[:, 0, :1], expected[:, :, 1:].flatten(1)], dim=1)
        torch.testing.assert_close(output.token_sizes, expected.float().view_as(output.token_sizes))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", case_names("retrieval"))
def test_retrieval_computes_what_the_released_code_does(name, attention):
    case = OriginalCase(name)
    model = conversion.load_original_checkpoint(case.state_dict, "retrieval", case.config)
    model.set_attn_implementation(attention)
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    with torch.no_grad():
        output = model(case.videos, ids, mask)
        videos = output.video_model_output.last_hidden_state
        matches = torch.stack([model.match(video[None], ids, mask) for video in videos])
    torch.testing.assert_close(output.video_embeds, case.outputs["video_embeds"], **TOLERANCE)
    torch.testing.assert_close(output.text_embeds, case.outputs["text_embeds"], **TOLERANCE)
    torch.testing.assert_close(matches, case.outputs["vtm_logits_video_text"], **TOLERANCE)
    torch.testing.assert_close(
        output.video_embeds @ output.text_embeds.t(), case.outputs["similarity_video_text"], **TOLERANCE
    )


@pytest.mark.parametrize("name", case_names("retrieval"))
def test_matching_loss_is_the_released_one_for_the_same_negatives(name):
    case = OriginalCase(name)
    model = conversion.load_original_checkpoint(case.state_dict, "retrieval", case.config)
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    negative_videos, negative_texts = case.outputs["negative_draws"].long().chunk(2)
    with torch.no_grad():
        videos = model.get_video_features(case.videos).last_hidden_state
        positive = model.match(videos, ids, mask)
        negative = torch.cat(
            [
                model.match(videos[negative_videos], ids, mask),
                model.match(videos, ids[negative_texts], mask[negative_texts]),
            ]
        )
    loss = matching_loss(positive, negative, torch.ones(len(negative), dtype=torch.bool))
    torch.testing.assert_close(loss.reshape(()), case.outputs["loss_vtm"].reshape(()), **TOLERANCE)


# --- Token aggregation in the encoder --------------------------------------------------------------------------------

AGGREGATIONS = [
    {"merged_frames_per_layer": 1},
    {"merged_patches_per_layer": 1},
    {"merged_frames_per_layer": [1, 0], "merged_patches_per_layer": [0, 2]},
    {"merged_frames_per_layer": 1, "merged_patches_per_layer": 1, "frame_matching": "vote"},
    {"attention_type": "joint_space_time", "merged_patches_per_layer": [5, 2]},
    {"attention_type": "space_only", "merged_patches_per_layer": 1},
]
STRATEGIES = ["geometry", "importance", "prune"]
CONSECUTIVE = {"merged_frames_per_layer": 1, "merged_patches_per_layer": 1, "frame_matching": "consecutive"}
CASES = [*product(AGGREGATIONS, STRATEGIES), (CONSECUTIVE, "geometry")]


@pytest.mark.parametrize(("fields", "strategy"), CASES)
def test_token_map_and_sizes_account_for_every_patch(fields, strategy):
    model = trained(TestaVideoModel(tiny_video_config(**fields, aggregation_strategy=strategy)))
    output = model(example_videos())
    num_tokens = output.last_hidden_state.shape[1]
    assert output.token_map.shape == (2, 4, 4) and output.token_sizes.shape == (2, num_tokens)
    class_tokens = {0} if model.config.attention_type != "space_only" else {n * num_tokens // 4 for n in range(4)}
    for token_map, sizes in zip(output.token_map, output.token_sizes, strict=True):
        counts = torch.bincount(token_map[token_map >= 0], minlength=num_tokens)
        for token in range(num_tokens):
            assert sizes[token] == (1 if token in class_tokens else counts[token])
        assert (counts[list(class_tokens)] == 0).all()
        assert ((token_map < 0).any()) == (strategy == "prune")


def test_consecutive_frames_merge_into_spans_of_time():
    model = trained(TestaVideoModel(tiny_video_config(**CONSECUTIVE | {"merged_patches_per_layer": 0})))
    token_map = model(example_videos()).token_map
    assert (token_map[:, 0] == 1 + torch.arange(4)).all() and (token_map[:, -1] == 5 + torch.arange(4)).all()
    assert set((token_map[:, 1:] - token_map[:, :-1]).flatten().tolist()) == {0, 4}


@pytest.mark.parametrize("attention_type", ["divided_space_time", "joint_space_time", "space_only"])
def test_token_map_leads_from_every_patch_to_the_token_that_saw_it(attention_type):
    """Without attention or MLP a token is the mean of its patches: the dense map must give each patch its mean back."""
    fields = {"merged_frames_per_layer": 1} if attention_type == "divided_space_time" else {}
    config = tiny_video_config(attention_type=attention_type, merged_patches_per_layer=1, **fields)
    model = trained(TestaVideoModel(config))
    with torch.no_grad():
        for name, parameter in model.layers.named_parameters():
            if "proj" in name or "fc" in name:
                parameter.zero_()
    model.norm = torch.nn.Identity()
    videos = example_videos()
    output = model(videos)
    _, patches = model.embeddings(videos)
    dense = unmerge(output.last_hidden_state, output.token_map.flatten(1)).view_as(patches)
    for video in range(2):
        for token in output.token_map[video].unique():
            members = output.token_map[video] == token
            expected = patches[video][members].mean(0).expand(int(members.sum()), -1)
            torch.testing.assert_close(dense[video][members], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize(("fields", "strategy"), CASES)
def test_eager_and_sdpa_agree(fields, strategy, proportional):
    config = tiny_video_config(**fields, aggregation_strategy=strategy, proportional_attention=proportional)
    model = trained(TestaVideoModel(config))
    videos = example_videos()
    model.set_attn_implementation("eager")
    eager = model(videos).last_hidden_state
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(videos).last_hidden_state, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("with_class_token", [False, True])
def test_proportional_attention_counts_a_merged_token_as_all_that_it_stands_for(with_class_token, attention):
    config = tiny_video_config(proportional_attention=True)
    config._attn_implementation = attention
    module = trained(TestaVideoAttention(config))
    tokens = torch.randn(2, 3, 6, 32)
    tokens[:, :, 1] = tokens[:, :, 0]
    class_tokens = torch.randn(2, 1, 1, 32) if with_class_token else None
    apart, _, apart_class, _, _ = module(tokens, torch.ones(2, 3, 6), class_tokens)
    sizes = torch.tensor([2.0, 1, 1, 1, 1]).expand(2, 3, -1)
    merged, _, merged_class, _, _ = module(tokens[:, :, 1:], sizes, class_tokens)
    torch.testing.assert_close(merged, apart[:, :, 1:], atol=1e-5, rtol=1e-5)
    if with_class_token:
        torch.testing.assert_close(merged_class, apart_class, atol=1e-5, rtol=1e-5)


def test_proportional_attention_refuses_kernels_without_a_bias():
    model = TestaVideoModel(tiny_video_config(proportional_attention=True))
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="proportional_attention needs attn_implementation"):
        model(example_videos())


def test_fewer_frames_than_configured_cap_the_merges():
    model = TestaVideoModel(tiny_video_config(merged_frames_per_layer=[2, 1])).eval()
    assert model(example_videos(num_frames=3)).last_hidden_state.shape[1] == 1 + 2 * 4  # (3-1)//2 go, then none of two
    assert model(example_videos(num_frames=1)).last_hidden_state.shape[1] == 1 + 4


def test_other_lengths_and_sizes_than_configured_work():
    model = TestaVideoModel(tiny_video_config()).eval()
    assert model(example_videos(num_frames=7, size=16)).token_map.shape == (2, 7, 16)


def test_a_repeated_frame_gives_the_same_tokens_in_any_place_without_time_embeddings():
    model = TestaVideoModel(tiny_video_config()).eval()
    with torch.no_grad():
        model.embeddings.time_embeddings.zero_()
    still = example_videos(num_frames=1)
    tokens = model(still.expand(-1, 4, -1, -1, -1)).last_hidden_state
    torch.testing.assert_close(tokens[:, 1:].unflatten(1, (4, 4))[:, 3], model(still).last_hidden_state[:, 1:])


def test_a_video_gives_the_same_tokens_alone_and_in_any_batch():
    config = tiny_video_config(merged_frames_per_layer=[1, 0], merged_patches_per_layer=1)
    model = trained(TestaVideoModel(config))
    videos = example_videos(5)
    together = model(videos).last_hidden_state
    for n in range(5):
        torch.testing.assert_close(model(videos[n : n + 1]).last_hidden_state[0], together[n], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [*AGGREGATIONS, CONSECUTIVE])
def test_the_encoder_compiles_without_a_graph_break(fields):
    model = trained(TestaVideoModel(tiny_video_config(**fields, proportional_attention=True)))
    videos = example_videos()
    torch.compiler.reset()  # else sizes that differ from those of earlier tests are symbols, which take minutes
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(videos).last_hidden_state, model(videos).last_hidden_state)


def test_an_mlp_in_chunks_computes_the_same():
    model = trained(TestaVideoModel(tiny_video_config()))
    chunked = TestaVideoModel(tiny_video_config(chunk_size_feed_forward=5)).eval()
    chunked.load_state_dict(model.state_dict())
    videos = example_videos()
    torch.testing.assert_close(chunked(videos).last_hidden_state, model(videos).last_hidden_state, **TOLERANCE)


def test_matching_learns_the_same_whether_pairs_share_keys_and_values_or_not():
    model = trained(TestaForRetrieval(tiny_config())).train()
    videos = torch.randn(4, 9, model.config.video_config.hidden_size, requires_grad=True)
    texts = torch.randint(10, 20, (4, 5)), torch.ones(4, 5, dtype=torch.long)
    has_negative = torch.tensor([True, True, True, False])
    negatives = HardNegatives(torch.tensor([2, 0, 2, 1]), torch.tensor([1, 1, 0, 3]), has_negative, has_negative)
    results = []
    for candidate_videos, checkpointing in ((videos, False), (videos.clone(), False), (videos, True)):
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        loss = model.matching_loss(videos, *texts, negatives, (candidate_videos, *texts))
        parameters = [videos, *model.testa.text_model.layers.parameters()]
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="There is flash attention 2.")
def test_flash_attention_2_becomes_sdpa_with_one_warning_where_there_is_none(tmp_path, caplog):
    logging.enable_propagation()
    expected = TestaForRetrieval(tiny_config()).eval()
    expected.save_pretrained(tmp_path)
    model = TestaForRetrieval.from_pretrained(tmp_path, attn_implementation="flash_attention_2").eval()
    again = TestaForRetrieval.from_pretrained(tmp_path).eval()
    again.set_attn_implementation("flash_attention_2")
    logging.disable_propagation()
    assert [record.message.count("'sdpa' instead") for record in caplog.records] == [1]
    videos = example_videos()
    for one in (model, again):
        assert one.testa.video_model.config._attn_implementation == "sdpa"
        assert torch.equal(
            one.get_video_features(videos).pooler_output, expected.get_video_features(videos).pooler_output
        )


def test_all_weights_of_the_encoder_learn_with_gradient_checkpointing():
    model = trained(
        TestaVideoModel(tiny_video_config(merged_frames_per_layer=[1, 0], merged_patches_per_layer=[1, 0]))
    )
    videos = example_videos()
    model.train()
    model(videos).pooler_output.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(videos).pooler_output.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
        assert parameter.grad.abs().sum() > 0 or name.endswith("key.bias"), name


def test_temporal_attentions_are_recorded_on_request():
    model = TestaVideoModel(tiny_video_config()).eval()
    model.set_attn_implementation("eager")
    output = model(example_videos(), output_attentions=True, output_temporal_attentions=True)
    assert [a.shape for a in output.attentions] == [(2 * 4, 4, 5, 5)] * 2
    assert [a.shape for a in output.temporal_attentions] == [(2 * 4, 4, 4, 4)] * 2


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 1, 8, 8)])
def test_a_wrong_rank_or_channel_count_is_named(shape):
    with pytest.raises(ValueError, match=r"pixel_values_videos must be \[batch, frames, channels, height, width\]"):
        TestaVideoModel(tiny_video_config())(torch.randn(shape))


# --- Text ------------------------------------------------------------------------------------------------------------


def example_texts(batch_size: int = 3, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, 99, (batch_size, length))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return ids, mask


def test_a_decoder_gives_the_same_states_with_and_without_cache():
    model = trained(TestaTextModel(tiny_text_config(is_decoder=True)))
    ids, _ = example_texts()
    states = torch.randn(3, 5, 32)
    expected = model(ids, encoder_hidden_states=states, use_cache=False).last_hidden_state
    cache = model.cache_cross_attention(states)
    for n in range(ids.shape[1]):
        step = model(ids[:, n : n + 1], cache=cache, use_cache=True)
        torch.testing.assert_close(step.last_hidden_state[:, 0], expected[:, n], atol=1e-5, rtol=1e-5)


def test_a_decoder_never_looks_ahead():
    model = trained(TestaTextModel(tiny_text_config(is_decoder=True)))
    ids, _ = example_texts()
    changed = ids.clone()
    changed[:, 4:] = 5
    same, differs = model(ids).last_hidden_state.split([4, 3], 1), model(changed).last_hidden_state.split([4, 3], 1)
    torch.testing.assert_close(same[0], differs[0])
    assert not torch.allclose(same[1], differs[1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_one_video_serves_many_texts_as_if_repeated(attention, is_decoder):
    model = trained(TestaTextModel(tiny_text_config(is_decoder=is_decoder)))
    model.set_attn_implementation(attention)
    ids, mask = example_texts(6)
    states, states_mask = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    shared = model(ids, mask, states, states_mask, output_attentions=attention == "eager")
    repeated = model(
        ids,
        mask,
        states.repeat_interleave(3, 0),
        states_mask.repeat_interleave(3, 0),
        output_attentions=attention == "eager",
    )
    torch.testing.assert_close(shared.last_hidden_state, repeated.last_hidden_state, atol=1e-5, rtol=1e-5)
    if attention == "eager":
        torch.testing.assert_close(shared.cross_attentions, repeated.cross_attentions, atol=1e-5, rtol=1e-5)


def test_cached_cross_attention_serves_any_number_of_texts():
    model = trained(TestaTextModel(tiny_text_config()))
    states = torch.randn(1, 5, 32)
    cache = model.cache_cross_attention(states)
    for batch_size in (1, 4):
        ids, mask = example_texts(batch_size)
        torch.testing.assert_close(
            model(ids, mask, cache=cache).last_hidden_state, model(ids, mask, states).last_hidden_state
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_texts_read_alone_first_are_read_as_at_once(attention, num_layers):
    config = tiny_text_config()
    config.num_hidden_layers = num_layers
    model = trained(TestaTextModel(config))
    model.set_attn_implementation(attention)
    ids, mask = example_texts(6)
    videos = torch.randn(2, 5, 32)
    expected = model(ids, mask, videos).last_hidden_state
    cache = model.cache_cross_attention(videos)
    states = model.read_alone(ids, mask)
    for first_token_only in (False, True):
        read = model(text_states=states, attention_mask=mask, cache=cache, first_token_only=first_token_only)
        wanted = expected[:, :1] if first_token_only else expected
        assert read.last_hidden_state.shape == wanted.shape
        torch.testing.assert_close(
            read.last_hidden_state[mask[:, : wanted.shape[1]] > 0],
            wanted[mask[:, : wanted.shape[1]] > 0],
            atol=1e-5,
            rtol=1e-5,
        )


def test_matching_with_shared_states_has_the_gradients_of_matching_each_pair():
    model = trained(TestaForRetrieval(tiny_config()))
    videos, (ids, mask) = torch.randn(2, 5, 32), example_texts(6)
    model.match(videos.repeat_interleave(3, 0), ids, mask).square().sum().backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    cache = model.testa.text_model.cache_cross_attention(videos)
    model.match_states(model.read_before_matching(ids, mask), mask, cache).square().sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing():
    model = trained(TestaTextModel(tiny_text_config()))
    ids, mask = example_texts()
    torch.testing.assert_close(
        model(ids, mask).last_hidden_state[0, :5], model(ids[:1, :5]).last_hidden_state[0], atol=1e-5, rtol=1e-5
    )


def test_too_long_a_text_and_too_few_texts_are_named():
    model = TestaTextModel(tiny_text_config())
    with pytest.raises(ValueError, match="max_position_embeddings=40"):
        model(torch.ones(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="3 texts can't share 2 encoder sequences"):
        model(torch.ones(3, 4, dtype=torch.long), encoder_hidden_states=torch.randn(2, 5, 32))
    decoder = TestaTextModel(tiny_text_config(is_decoder=True))
    with pytest.raises(ValueError, match="this is a decoder"):
        decoder(torch.ones(1, 4, dtype=torch.long), first_token_only=True)
    with pytest.raises(ValueError, match="Exactly one"):
        model()


# --- Retrieval -------------------------------------------------------------------------------------------------------


def test_retrieval_embeddings_have_length_one_and_pooling_is_a_choice():
    ids, mask = example_texts(2)
    videos = example_videos()
    config = tiny_config()
    mean_model = trained(TestaForRetrieval(config))
    cls_model = TestaForRetrieval(TestaConfig(**{**config.to_dict(), "video_pooling": "cls"})).eval()
    cls_model.load_state_dict(mean_model.state_dict())
    mean, cls = mean_model(videos, ids, mask), cls_model(videos, ids, mask)
    torch.testing.assert_close(mean.video_embeds.norm(dim=-1), torch.ones(2))
    first = cls.video_model_output.last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(cls_model.video_projection(first), dim=-1)
    torch.testing.assert_close(cls.video_embeds, expected)
    assert not torch.allclose(mean.video_embeds, cls.video_embeds)


def test_the_loss_comes_in_training_or_on_request():
    model = TestaForRetrieval(tiny_config()).eval()
    ids, mask = example_texts(2)
    assert model(example_videos(), ids, mask).loss is None
    assert model(example_videos(), ids, mask, return_loss=True).loss.isfinite()
    assert model(example_videos(), ids, mask, pair_ids=torch.tensor([4, 9])).loss.isfinite()
    assert model.train()(example_videos(), ids, mask).loss.isfinite()


def test_samples_of_one_video_are_positives_and_never_negatives():
    model = trained(TestaForRetrieval(tiny_config()))
    ids, mask = example_texts(3)
    one_video = model(example_videos(1).expand(3, -1, -1, -1, -1), ids, mask, pair_ids=torch.tensor([7, 7, 7]))
    matched = model.match(one_video.video_model_output.last_hidden_state, ids, mask)
    torch.testing.assert_close(
        one_video.loss_vtm, torch.nn.functional.cross_entropy(matched, torch.ones(3, dtype=torch.long))
    )


def test_a_loss_without_pairs_is_refused():
    model = TestaForRetrieval(tiny_config())
    ids, mask = example_texts(3)
    with pytest.raises(ValueError, match="2 videos and 3 texts"):
        model(example_videos(2), ids, mask, return_loss=True)


def test_auto_model_takes_the_encoders_out_of_a_retrieval_checkpoint(tmp_path):
    model = trained(TestaForRetrieval(tiny_config()))
    model.save_pretrained(tmp_path)
    encoders = AutoModel.from_pretrained(tmp_path)
    assert type(encoders) is TestaModel
    videos = example_videos()
    torch.testing.assert_close(
        encoders.get_video_features(videos).last_hidden_state, model.get_video_features(videos).last_hidden_state
    )
    reloaded = TestaForRetrieval.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reloaded.state_dict()[name]), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_stays_near_float32(attention):
    model = trained(TestaForRetrieval(tiny_config()))
    model.set_attn_implementation(attention)
    videos = example_videos()
    exact = model.get_video_features(videos).pooler_output
    rounded = model.to(torch.bfloat16).get_video_features(videos).pooler_output
    assert rounded.dtype == torch.bfloat16
    assert torch.cosine_similarity(exact, rounded.float()).min() > 0.98


def test_new_time_and_position_embeddings_are_smooth():
    """Neighbours start more alike than strangers, so that order is learned from few examples."""
    model = TestaModel(tiny_config())
    for embeddings in (
        model.video_model.embeddings.time_embeddings[0],
        model.text_model.embeddings.position_embeddings.weight,
    ):
        unit = torch.nn.functional.normalize(embeddings.detach(), dim=-1)
        assert unit[1] @ unit[2] > unit[0] @ unit[-1]
    assert model.video_model.embeddings.time_embeddings.square().mean().sqrt().item() == pytest.approx(0.5, rel=0.1)


def test_autocast_keeps_scores_in_float32():
    model = trained(TestaForRetrieval(tiny_config()))
    ids, mask = example_texts(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(example_videos(), ids, mask)
        matches = model.match(output.video_model_output.last_hidden_state, ids, mask)
    for scores in (output.video_embeds, output.text_embeds, output.logits_per_video, matches):
        assert scores.dtype == torch.float32
        assert not torch.equal(scores, scores.to(torch.bfloat16).float())


# --- Grounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["geometry", "prune"])
def test_grounding_gives_patches_of_one_token_one_score_and_dropped_ones_the_least(strategy):
    fields = {"merged_patches_per_layer": 1, "merged_frames_per_layer": 1, "aggregation_strategy": strategy}
    config = TestaConfig(video_config=tiny_video_config(**fields), text_config=tiny_text_config(), projection_dim=16)
    model = trained(TestaForRetrieval(config))
    output = model.ground(example_videos(), *example_texts(batch_size=2))
    token_map = output.video_model_output.token_map
    assert output.scores.shape == token_map.shape
    assert torch.equal(output.frame_scores, output.scores.amax(dim=-1))
    for scores, tokens in zip(output.scores, token_map, strict=True):
        for token in tokens.unique():
            assert len(scores[tokens == token].unique()) == 1
        assert (scores[tokens < 0] == -1).all()
    assert (token_map < 0).any() == (strategy == "prune")


def test_grounding_compares_a_patchs_token_with_a_text_as_videos_are_compared():
    model = trained(TestaForRetrieval(tiny_config()))
    videos, (input_ids, attention_mask) = example_videos(1), example_texts(batch_size=3)
    output = model.ground(videos, input_ids, attention_mask)
    tokens = output.video_model_output.last_hidden_state[0, output.video_model_output.token_map[0]]
    with torch.no_grad():
        text_embeds = model.get_text_features(input_ids, attention_mask).pooler_output
        expected = torch.cosine_similarity(model.video_projection(tokens)[None], text_embeds[:, None, None], dim=-1)
    torch.testing.assert_close(output.scores, expected)


def test_grounding_reads_several_texts_of_each_video_in_a_row():
    model = trained(TestaForRetrieval(tiny_config()))
    videos, (input_ids, attention_mask) = example_videos(2), example_texts(batch_size=6)
    together = model.ground(videos, input_ids, attention_mask).scores
    for video in range(2):
        texts = slice(3 * video, 3 * video + 3)
        alone = model.ground(videos[video : video + 1], input_ids[texts], attention_mask[texts]).scores
        torch.testing.assert_close(together[texts], alone)
    with pytest.raises(ValueError, match="3 texts can't share 2 videos"):
        model.ground(videos, input_ids[:3], attention_mask[:3])
