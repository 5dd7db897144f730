"""The models with a text decoder: question answering, captioning, pre-training."""

import pytest
import torch
from original import OriginalCase, case_names
from safetensors.torch import load_file
from test_modeling import TOLERANCE, example_texts, example_videos, trained
from test_modeling_common import tiny_config, tiny_text_config

from transformers_testa import (
    TestaForCaptioning,
    TestaForMultipleChoiceVideoQA,
    TestaForPreTraining,
    TestaForRetrieval,
    TestaForVideoQA,
    TestaTextDecoder,
    conversion,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def example_questions(batch_size: int = 3):
    videos = example_videos(batch_size)
    ids, mask = example_texts(batch_size)
    return {"pixel_values_videos": videos, "input_ids": ids, "attention_mask": mask}


# --- The released code decides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", case_names("videoqa"))
def test_question_answering_computes_what_the_released_code_does(name, attention):
    case = OriginalCase(name)
    model = conversion.load_original_checkpoint(case.state_dict, "videoqa", case.config)
    model.set_attn_implementation(attention)
    inputs = case.inputs
    question = {
        "pixel_values_videos": case.videos,
        "input_ids": inputs["question_input_ids"],
        "attention_mask": inputs["question_attention_mask"],
    }
    answers = {name: inputs[name] for name in ("answer_input_ids", "answer_attention_mask", "answer_weights")}
    candidates = {
        "answer_input_ids": inputs["candidate_input_ids"],
        "answer_attention_mask": inputs["candidate_attention_mask"],
    }
    with torch.no_grad():
        output = model(**question, **answers, answers_per_question=torch.tensor(case.facts["answers_per_question"]))
    hidden = output.question_hidden_states
    torch.testing.assert_close(hidden, case.outputs["question_hidden"], **TOLERANCE)
    torch.testing.assert_close(output.loss, case.outputs["loss"], **TOLERANCE)
    scores = model.score_answers(**question, **candidates)
    torch.testing.assert_close(scores, case.outputs["candidate_scores"], **TOLERANCE)
    best = model.rank_answers(**question, **candidates, top_k=case.facts["k_test"])
    assert torch.equal(best, case.outputs["rank_top4_answer"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_captions_are_predicted_as_in_the_released_pre_training(attention):
    (name,) = case_names("pretraining")
    case = OriginalCase(name)
    model = conversion.load_original_checkpoint(case.state_dict, "pretraining", case.config)
    model.set_attn_implementation(attention)
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    with torch.no_grad():
        output = model(case.videos, ids, mask, return_loss=True)
        videos = output.video_model_output.last_hidden_state
        ids = torch.cat([torch.full_like(ids[:, :1], case.facts["bos_token_id"]), ids[:, 1:]], dim=1)
        logits = model.text_decoder(ids, mask, videos).logits
    torch.testing.assert_close(output.loss_caption, case.outputs["loss_cap"], **TOLERANCE)
    is_text = mask.bool()
    torch.testing.assert_close(logits[is_text], case.outputs["caption_logits"][is_text], **TOLERANCE)


# --- Losses ----------------------------------------------------------------------------------------------------------


def test_answers_count_by_their_weights_and_belong_to_their_questions():
    model = trained(TestaForVideoQA(tiny_config()))
    question = example_questions(2)
    ids, mask = example_texts(3, length=5)
    answers = {"answer_input_ids": ids, "answer_attention_mask": mask}
    weights, per_question = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([1, 2])
    loss = model(**question, **answers, answer_weights=weights, answers_per_question=per_question).loss
    one_by_one = 0
    for question_number, answer_number in ((0, 0), (1, 1), (1, 2)):
        single = {name: value[question_number : question_number + 1] for name, value in question.items()}
        answer = {name: value[answer_number : answer_number + 1] for name, value in answers.items()}
        one_by_one += weights[answer_number] * model(**single, **answer).loss
    torch.testing.assert_close(loss, one_by_one / 2)


def test_questions_that_share_a_video_are_answered_as_each_with_its_own(answering):
    videos, question = example_videos(2), example_questions(6)
    ids, mask = example_texts(6, length=5)
    texts = {name: question[name] for name in ("input_ids", "attention_mask")}
    answers = {"answer_input_ids": ids, "answer_attention_mask": mask}
    shared = answering(videos, **texts, **answers)
    apart = answering(videos.repeat_interleave(3, 0), **texts, **answers)
    torch.testing.assert_close(shared.loss, apart.loss)
    assert torch.equal(
        answering.rank_answers(videos, **texts, **answers),
        answering.rank_answers(videos.repeat_interleave(3, 0), **texts, **answers),
    )


def test_labels_hide_a_prompt_from_the_caption_loss():
    model = trained(TestaForCaptioning(tiny_config()))
    ids, _ = example_texts(2)
    labels = ids.clone()
    labels[:, :5] = -100
    output = model(example_videos(), ids, labels=labels)
    log_probabilities = output.logits[:, 4:-1].log_softmax(dim=-1)
    hit = log_probabilities.gather(2, ids[:, 5:, None]).mean()
    expected = -(0.9 * hit + 0.1 * log_probabilities.mean())
    torch.testing.assert_close(output.loss, expected)


def test_a_choice_is_judged_as_a_text_is_matched():
    config = tiny_config()
    retrieval = trained(TestaForRetrieval(config))
    model = TestaForMultipleChoiceVideoQA(config).eval()
    model.load_state_dict(retrieval.state_dict(), strict=False)
    videos = example_videos(2)
    ids, mask = (tensor.unflatten(0, (2, 3)) for tensor in example_texts(6))
    output = model(videos, ids, mask, labels=torch.tensor([2, 0]))
    states = retrieval.get_video_features(videos).last_hidden_state
    matches = retrieval.match(states, ids.flatten(0, 1), mask.flatten(0, 1))
    torch.testing.assert_close(output.logits.flatten(), matches[:, 1] - matches[:, 0])
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([2, 0]))
    torch.testing.assert_close(output.loss, expected)


# --- Generation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioning():
    torch.manual_seed(1)
    return trained(TestaForCaptioning(tiny_config()))


@pytest.fixture(scope="module")
def answering():
    torch.manual_seed(1)
    return trained(TestaForVideoQA(tiny_config()))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_is_the_same_with_and_without_cache(captioning, answering, num_beams):
    settings = {"max_new_tokens": 6, "num_beams": num_beams}
    videos, question = example_videos(3), example_questions()
    for generate in (
        lambda **kwargs: captioning.generate(videos, **settings, **kwargs),
        lambda **kwargs: answering.generate(**question, **settings, **kwargs),
    ):
        assert torch.equal(generate(use_cache=True), generate(use_cache=False))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_is_answered_as_its_questions_are_alone(answering, num_beams):
    question = example_questions()
    settings = {"max_new_tokens": 5, "num_beams": num_beams, "eos_token_id": 98}
    together = answering.generate(**question, **settings)
    for number in range(3):
        alone = answering.generate(
            **{name: value[number : number + 1] for name, value in question.items()}, **settings
        )
        assert torch.equal(together[number, : alone.shape[1]], alone[0])
        assert (together[number, alone.shape[1] :] == 0).all()  # [PAD]


def test_beams_are_ordered_by_their_score_which_is_their_log_probability(captioning):
    videos = example_videos(2)
    output = captioning.generate(
        *(videos,),
        **{
            "num_beams": 4,
            "num_return_sequences": 4,
            "max_new_tokens": 4,
            "length_penalty": 0.0,
            "eos_token_id": None,
        },
        **{"return_dict_in_generate": True, "output_scores": True},
    )
    scores = output.sequences_scores.view(2, 4)
    assert (scores.diff(dim=1) <= 0).all()
    with torch.no_grad():
        logits = captioning(videos.repeat_interleave(4, 0), output.sequences).logits
    log_probabilities = logits[:, :-1].log_softmax(dim=-1).gather(2, output.sequences[:, 1:, None]).sum(dim=(1, 2))
    torch.testing.assert_close(log_probabilities, scores.flatten(), atol=1e-4, rtol=1e-4)


def test_a_caption_goes_on_from_its_prompt_wherever_the_padding_was(captioning):
    videos = example_videos(2)
    # [CLS] a b c [SEP] and [CLS] a [SEP]; [SEP] is 3.
    ids = torch.tensor([[90, 11, 12, 13, 3], [90, 11, 3, 0, 0]])
    captions = captioning.generate(videos, ids, (ids != 0).long(), max_new_tokens=4)
    for number, length in enumerate((5, 3)):
        alone = captioning.generate(videos[number : number + 1], ids[number : number + 1, :length], max_new_tokens=4)
        words = [token for token in captions[number].tolist() if token not in (0, 3)]
        assert words == [token for token in alone[0].tolist() if token not in (0, 3)]
        assert words[: length - 1] == [1, 11, 12, 13][: length - 1]  # [DEC] is 1


def test_generation_stops_after_max_new_tokens_or_the_end_of_the_text(captioning):
    videos = example_videos(2)
    ids = captioning.generate(videos, max_new_tokens=7, eos_token_id=None)
    assert ids.shape == (2, 8) and (ids[:, 0] == 1).all()
    end = ids[0, 3].item()
    stopped = captioning.generate(videos[:1], max_new_tokens=7, eos_token_id=end)
    assert stopped[0].tolist() == ids[0, : ids[0].tolist().index(end) + 1].tolist()


def test_padding_of_questions_and_answers_changes_nothing(answering):
    question = example_questions(2)
    ids, mask = example_texts(4, length=5)
    mask[:] = 1
    mask[1, 3:] = 0
    expected = answering.score_answers(**question, answer_input_ids=ids, answer_attention_mask=mask)
    padded = {
        name: torch.nn.functional.pad(value, (0, 3))
        for name, value in question.items()
        if name != "pixel_values_videos"
    }
    ids, mask = (torch.nn.functional.pad(tensor, (0, 2)) for tensor in (ids, mask))
    padded = {**padded, "pixel_values_videos": question["pixel_values_videos"]}
    scores = answering.score_answers(**padded, answer_input_ids=ids, answer_attention_mask=mask)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


def test_ranking_all_answers_takes_the_one_with_the_highest_score(answering):
    question = example_questions()
    ids, mask = example_texts(40, length=4)
    answers = {"answer_input_ids": ids, "answer_attention_mask": mask}
    scores = answering.score_answers(**question, **answers)
    assert torch.equal(answering.rank_answers(**question, **answers, top_k=128), scores.argmax(dim=1))
    # A shortlist of one is the answer with the likeliest first token.
    (shortest,) = {answering.rank_answers(**question, **answers, top_k=1).shape}
    assert shortest == (3,)


def test_a_decoder_has_to_be_causal():
    with pytest.raises(ValueError, match="is_decoder is False"):
        TestaTextDecoder(tiny_text_config())


# --- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pre-trained model and the folder it is saved in."""
    torch.manual_seed(2)
    model = trained(TestaForPreTraining(tiny_config()))
    folder = tmp_path_factory.mktemp("pretrained")
    model.save_pretrained(folder)
    return model, folder


def test_what_decoder_and_encoder_share_is_stored_once_and_stays_shared(pretrained):
    model, folder = pretrained
    stored = load_file(folder / "model.safetensors")
    of_decoder = {name for name in stored if name.startswith("text_decoder.text_model.")}
    assert of_decoder and all(".self_attention." in name for name in of_decoder)
    loaded = TestaForPreTraining.from_pretrained(folder)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    encoder, decoder = loaded.testa.text_model, loaded.text_decoder.text_model
    with torch.no_grad():
        encoder.layers[1].mlp.output.weight.zero_()
        encoder.embeddings.word_embeddings.weight.zero_()
    assert decoder.layers[1].mlp.output.weight.abs().sum() == 0
    assert loaded.text_decoder.prediction_head.decoder.weight.abs().sum() == 0
    assert decoder.layers[1].self_attention.query.weight is not encoder.layers[1].self_attention.query.weight


@pytest.mark.parametrize(
    "model_class", [TestaForRetrieval, TestaForVideoQA, TestaForMultipleChoiceVideoQA, TestaForCaptioning]
)
def test_every_task_starts_from_pre_trained_weights_by_name(pretrained, model_class, tmp_path):
    model, folder = pretrained
    weights = model.state_dict()
    loaded, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    loaded.save_pretrained(tmp_path)
    again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items())


def test_a_decoder_starts_as_the_text_encoder_of_a_retrieval_model(tmp_path):
    retrieval = trained(TestaForRetrieval(tiny_config()))
    retrieval.save_pretrained(tmp_path)
    model, info = TestaForVideoQA.from_pretrained(tmp_path, output_loading_info=True)
    assert all(".prediction_head." in name for name in info["missing_keys"])
    encoder, decoder = model.testa.text_model.state_dict(), model.text_decoder.text_model.state_dict()
    assert all(torch.equal(encoder[name], weight) for name, weight in decoder.items())
    with torch.no_grad():
        model.text_decoder.text_model.layers[0].mlp.output.weight.zero_()
    assert model.testa.text_model.layers[0].mlp.output.weight.abs().sum() > 0  # a copy, not shared
