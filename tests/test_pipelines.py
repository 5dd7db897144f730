import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from retrieval_world import COLOURS, tiny_config, tiny_processor, write_stories
from transformers import BertTokenizer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from transformers_testa import TestaForRetrieval, TestaForVideoQA, VideoDecodingError
from transformers_testa.data.annotations import load_annotations
from transformers_testa.gallery import Gallery
from transformers_testa.pipelines import VideoQuestionAnsweringPipeline, VideoTextRetrievalPipeline
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.retrieval import VideoSearch, index_videos


TEXTS = ["first red, then green", "white", "blue then white then blue then red", "finally green"]
QUESTION = "What comes finally?"
ANSWERS = ["red", "green then blue", "white then white then red", "blue"]


def lively(model):
    """Give a model random weights that are large enough to tell videos, texts and answers apart."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_stories(tmp_path_factory.mktemp("world") / "stories", num_test=6)


@pytest.fixture(scope="module")
def videos(world):
    return [str(world / f"videos/test-{number}.mp4") for number in range(6)]


@pytest.fixture(scope="module")
def retrieval():
    return pipeline("video-text-retrieval", model=lively(TestaForRetrieval(tiny_config())), processor=tiny_processor())


@pytest.fixture(scope="module")
def answering():
    return pipeline(
        "video-question-answering", model=lively(TestaForVideoQA(tiny_config())), processor=tiny_processor()
    )


def logits_of(pipe, videos, texts):
    inputs = pipe.processor(videos=videos, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return pipe.model(**inputs).logits_per_video


def assert_alike(results, expected):
    """The same candidates in the same order, with the same scores but for rounding."""
    assert len(results) == len(expected)
    for result, other in zip(results, expected, strict=True):
        assert [{**row, "score": None} for row in result] == [{**row, "score": None} for row in other]
        assert [row["score"] for row in result] == pytest.approx([row["score"] for row in other], abs=1e-4)


# --- Retrieval ---------------------------------------------------------------------------------------------------------


def test_texts_are_ranked_by_how_well_they_describe_a_video(retrieval, videos):
    expected = logits_of(retrieval, videos[:1], TEXTS)[0].softmax(dim=0)
    results = retrieval(videos[0], candidate_texts=TEXTS)
    assert sorted(result["text"] for result in results) == sorted(TEXTS)
    assert [result["score"] for result in results] == sorted((result["score"] for result in results), reverse=True)
    for result in results:
        assert result["score"] == pytest.approx(expected[TEXTS.index(result["text"])].item(), abs=1e-5)
    assert_alike([retrieval(videos[0], candidate_texts=TEXTS, top_k=2)], [results[:2]])


def test_videos_are_ranked_by_how_well_a_text_describes_them(retrieval, videos):
    expected = logits_of(retrieval, videos, TEXTS[:1])[:, 0].softmax(dim=0)
    results = retrieval(TEXTS[0], candidate_videos=videos)
    assert [result["video"] for result in results] == [videos[number] for number in expected.argsort(descending=True)]
    assert [result["score"] for result in results] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)


def test_re_ranking_gives_the_order_of_a_search(retrieval, videos, tmp_path):
    with Gallery(tmp_path, retrieval.model, writable=True, dtype=torch.float32) as gallery:
        index_videos(retrieval.model, retrieval.processor, videos, gallery)
    search = VideoSearch(retrieval.model, retrieval.processor, gallery)
    for query, name, candidates, found in (
        (videos[0], "text", TEXTS, search.search_texts(videos[0], TEXTS)),
        (TEXTS[2], "video", videos, search.search(TEXTS[2])[0]),
    ):
        results = retrieval(query, rerank=True, **{f"candidate_{name}s": candidates})
        assert [result[name] for result in results] == [result.id for result in found]
        expected = torch.tensor([result.score for result in found]).softmax(dim=0)
        assert [result["score"] for result in results] == pytest.approx(expected.tolist(), abs=1e-5)
        by_similarity = retrieval(query, **{f"candidate_{name}s": candidates})
        assert [result["score"] for result in by_similarity] != pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("rerank", [False, True])
def test_batches_and_streams_give_what_single_inputs_give(retrieval, videos, world, rerank):
    settings = {"candidate_texts": TEXTS, "rerank": rerank}
    expected = [retrieval(video, **settings) for video in videos]
    assert_alike(retrieval(videos, **settings), expected)
    assert_alike(retrieval(videos, batch_size=2, **settings), expected)
    assert_alike(list(retrieval((video for video in videos), batch_size=3, **settings)), expected)
    dataset = KeyDataset(load_annotations(world / "test.jsonl"), "video")
    assert_alike(list(retrieval(dataset, batch_size=4, **settings)), expected)

    settings = {"candidate_videos": videos, "rerank": rerank}
    expected = [retrieval(text, **settings) for text in TEXTS]
    assert_alike(retrieval(TEXTS, batch_size=3, **settings), expected)
    assert_alike(list(retrieval(iter_of(TEXTS), **settings)), expected)


def iter_of(items):
    yield from items


def test_a_stream_is_read_no_further_than_it_is_asked_for(retrieval, videos):
    read = []

    def stream():
        for video in videos:
            read.append(video)
            yield video

    results = iter(retrieval(stream(), candidate_texts=TEXTS, batch_size=2))
    next(results)
    assert len(read) <= 3


def test_videos_may_be_bytes_arrays_and_frames(retrieval, videos):
    frames = retrieval.processor.video_processor.decode(videos[0])
    expected = [retrieval(videos[0], candidate_texts=TEXTS)]
    inputs = [Path(videos[0]), Path(videos[0]).read_bytes(), frames, np.asarray(frames)]
    assert_alike(retrieval(inputs, candidate_texts=TEXTS), expected * 4)


def test_candidates_may_be_given_once_for_all(videos, retrieval):
    pipe = VideoTextRetrievalPipeline(retrieval.model, retrieval.processor, candidate_texts=TEXTS, top_k=1)
    assert_alike([pipe(videos[0])], [retrieval(videos[0], candidate_texts=TEXTS, top_k=1)])
    other = {"candidate_videos": videos}
    assert_alike([pipe(TEXTS[0], **other)], [retrieval(TEXTS[0], **other, top_k=1)])


# --- Question answering ------------------------------------------------------------------------------------------------


def questions_about(videos):
    return [{"video": video, "question": f"What comes {place}?"} for video in videos for place in ("first", "finally")]


def question_inputs(pipe, video):
    return pipe.processor(videos=[video], text=[QUESTION], return_tensors="pt")


def test_candidates_are_ranked_by_the_log_probabilities_of_the_model(answering, videos):
    tokens = answering.processor(text=ANSWERS, padding=True, return_tensors="pt")
    answers = {"answer_input_ids": tokens["input_ids"], "answer_attention_mask": tokens["attention_mask"]}
    inputs = question_inputs(answering, videos[0])
    expected = answering.model.score_answers(**inputs, **answers)[0].softmax(dim=0)
    results = answering(video=videos[0], question=QUESTION, candidates=ANSWERS, top_k=10)
    assert [result["answer"] for result in results] == [
        ANSWERS[number] for number in expected.argsort(descending=True)
    ]
    assert sum(result["score"] for result in results) == pytest.approx(1, abs=1e-5)
    best = answering(video=videos[0], question=QUESTION, candidates=ANSWERS)
    assert_alike([best], [results[:1]])
    assert best[0]["answer"] == ANSWERS[answering.model.rank_answers(**inputs, **answers)]


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_score_of_a_free_answer_is_the_probability_of_its_words(answering, videos, top_k):
    results = answering(video=videos[0], question=QUESTION, top_k=top_k, max_new_tokens=6)
    inputs = question_inputs(answering, videos[0])
    options = {"num_beams": top_k, "num_return_sequences": top_k, "max_new_tokens": 6}
    ids = answering.model.generate(**inputs, **options, **({"length_penalty": 0.0} if top_k > 1 else {}))
    assert len(results) == top_k
    assert [result["score"] for result in results] == sorted((result["score"] for result in results), reverse=True)
    for result, answer in zip(results, ids, strict=True):
        assert result["answer"] == answering.tokenizer.decode(answer, skip_special_tokens=True)
        ends = (answer == answering.tokenizer.sep_token_id).nonzero()
        answer = answer[: ends[0] + 1] if len(ends) else answer
        with torch.no_grad():
            logits = answering.model(**inputs, answer_input_ids=answer[None]).logits[0, :-1]
        words = logits.log_softmax(dim=-1).gather(1, answer[1:, None])
        assert result["score"] == pytest.approx(words.sum().exp().item(), rel=1e-3)


def test_a_free_answer_has_no_start_token_even_where_the_tokenizer_takes_it_for_a_word(answering, videos):
    vocabulary = answering.tokenizer.get_vocab()
    processor = TestaProcessor(
        answering.processor.video_processor, BertTokenizer(vocab=vocabulary, model_max_length=32)
    )
    assert processor.tokenizer.decode([vocabulary["[DEC]"]], skip_special_tokens=True) == "[DEC]"
    pipe = VideoQuestionAnsweringPipeline(model=answering.model, processor=processor)
    (result,) = pipe(video=videos[0], question=QUESTION, max_new_tokens=6)
    ids = answering.model.generate(**question_inputs(answering, videos[0]), max_new_tokens=6)
    assert result["answer"] == processor.tokenizer.decode(ids[0, 1:], skip_special_tokens=True)


@pytest.mark.parametrize(
    "settings", [{"candidates": ANSWERS, "top_k": 3}, {"max_new_tokens": 5}, {"top_k": 2, "max_new_tokens": 4}]
)
def test_batches_and_streams_of_questions_give_what_single_ones_give(answering, videos, settings):
    questions = questions_about(videos[:2])
    expected = [answering(**question, **settings) for question in questions]
    assert_alike(answering(questions, **settings), expected)
    assert_alike(answering(questions, batch_size=3, **settings), expected)
    assert_alike(list(answering(iter_of(questions), batch_size=2, **settings)), expected)


# --- Any pipeline ------------------------------------------------------------------------------------------------------


def test_a_folder_is_all_that_a_pipeline_needs(retrieval, answering, videos, tmp_path):
    retrieval.save_pretrained(tmp_path / "retrieval")
    answering.save_pretrained(tmp_path / "answering")
    loaded = pipeline("video-text-retrieval", model=str(tmp_path / "retrieval"))
    assert_alike(loaded(videos, candidate_texts=TEXTS), retrieval(videos, candidate_texts=TEXTS))
    loaded = pipeline("video-question-answering", model=str(tmp_path / "answering"))
    settings = {"video": videos[0], "question": QUESTION, "candidates": ANSWERS}
    assert_alike([loaded(**settings)], [answering(**settings)])


def test_a_model_with_adapters_is_as_good(retrieval, videos):
    settings = {"candidate_texts": TEXTS, "rerank": True}
    expected = [retrieval(videos[0], **settings)]
    model = lively(TestaForRetrieval(tiny_config()))
    adapted = get_peft_model(model, LoraConfig(target_modules=["qkv", "query"]))  # new adapters change nothing
    pipe = pipeline("video-text-retrieval", model=adapted, processor=retrieval.processor)
    assert_alike([pipe(videos[0], **settings)], expected)


def test_a_model_in_training_answers_without_dropout(retrieval, videos):
    model = lively(TestaForRetrieval(tiny_config())).train()
    pipe = pipeline("video-text-retrieval", model=model, processor=retrieval.processor)
    assert_alike([pipe(videos[0], candidate_texts=TEXTS)], [retrieval(videos[0], candidate_texts=TEXTS)])


def test_a_model_of_another_kind_is_refused(retrieval):
    with pytest.raises(ValueError, match="needs a TestaForVideoQA; the model is a TestaForRetrieval"):
        VideoQuestionAnsweringPipeline(retrieval.model, retrieval.processor)


@pytest.mark.parametrize(
    ("inputs", "settings", "error", "message"),
    [
        ("missing.mp4", {"candidate_texts": TEXTS}, VideoDecodingError, "missing.mp4"),
        (7, {"candidate_texts": TEXTS}, ValueError, "7.* is no video"),
        (np.zeros((2, 6, 8, 8, 3), np.uint8), {"candidate_texts": TEXTS}, ValueError, "2 videos were given as one"),
        (np.zeros((6, 8, 8), np.uint8), {"candidate_texts": TEXTS}, ValueError, "3 dimensions"),
        ("red", {"candidate_videos": ["missing.mp4"]}, VideoDecodingError, "missing.mp4"),
        ("a.mp4", {}, ValueError, "Give candidate_texts, or candidate_videos"),
        ("a.mp4", {"candidate_texts": []}, ValueError, r"candidate_texts is \[\]"),
        ("a.mp4", {"candidate_texts": "red"}, ValueError, "candidate_texts is 'red'; a list"),
        ("a.mp4", {"candidate_texts": ["red", " "]}, ValueError, "Candidate ' ' is no text"),
        ("a.mp4", {"candidate_texts": TEXTS, "candidate_videos": ["b.mp4"]}, ValueError, "Give one of them"),
        ("a.mp4", {"candidate_texts": TEXTS, "top_k": 0}, ValueError, "top_k is 0"),
    ],
)
def test_a_wrong_input_is_told_in_a_sentence(retrieval, inputs, settings, error, message):
    with pytest.raises(error, match=message):
        retrieval(inputs, **settings)


def test_an_input_for_candidate_videos_is_a_text(retrieval, videos):
    with pytest.raises(ValueError, match="The input 7 is no text"):
        retrieval(7, candidate_videos=videos[:1])


def test_a_wrong_question_is_told_in_a_sentence(answering, videos, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    with pytest.raises(VideoDecodingError, match=re.escape(str(tmp_path / "broken.mp4"))):
        answering(video=str(tmp_path / "broken.mp4"), question=QUESTION)
    with pytest.raises(ValueError, match="no dict of video and question"):
        answering(videos[0])
    with pytest.raises(ValueError, match="no dict of video and question"):
        answering({"video": videos[0]})
    with pytest.raises(ValueError, match="The question '' is no text"):
        answering(video=videos[0], question="")
    with pytest.raises(ValueError, match=r"candidates is \[\]"):
        answering(video=videos[0], question=QUESTION, candidates=[])


def test_videos_of_unlike_shapes_are_refused_as_a_batch_and_not_padded(retrieval, videos):
    processor = tiny_processor()
    processor.video_processor.do_sample_frames = False
    pipe = VideoTextRetrievalPipeline(retrieval.model, processor)
    unlike = [np.full((length, 32, 32, 3), COLOURS["red"], np.uint8) for length in (6, 8)]
    assert len(pipe(unlike, candidate_texts=TEXTS)) == 2
    with pytest.raises(ValueError, match=r"\(6, 3, 32, 32\), \(8, 3, 32, 32\).* batch_size=1"):
        pipe(unlike, candidate_texts=TEXTS, batch_size=2)
