import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_testa.metrics import (
    RetrievalMetric,
    VideoQAAccuracy,
    distractor_accuracy,
    dual_softmax,
    ndcg,
    ranking_metrics,
    ranks,
    retrieval_metrics,
)


torch.set_num_threads(1)


@st.composite
def scored_candidates(draw):
    """Scores with many ties `[queries, candidates]`, and a relevance with at least one candidate a query."""
    queries, candidates = draw(st.integers(1, 5)), draw(st.integers(1, 15))
    cells = st.lists(st.integers(-2, 2), min_size=candidates, max_size=candidates)
    scores = draw(st.lists(cells, min_size=queries, max_size=queries))
    subsets = st.sets(st.integers(0, candidates - 1), min_size=1)
    relevant = torch.zeros(queries, candidates, dtype=torch.bool)
    for query in range(queries):
        relevant[query, list(draw(subsets))] = True
    return torch.tensor(scores).float(), relevant


def worst_order(scores, relevant):
    """Candidates of one query from first to last, irrelevant ones first among equals."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], relevant[i]))


@given(scored_candidates())
def test_rank_is_the_place_of_the_first_relevant_candidate_in_the_worst_order(case):
    scores, relevant = (tensor.tolist() for tensor in case)
    expected = [
        1 + [relevant[q][i] for i in worst_order(scores[q], relevant[q])].index(True) for q in range(len(scores))
    ]
    assert ranks(*case).tolist() == expected


@given(scored_candidates())
def test_ndcg_is_the_discounted_gain_of_the_worst_order_over_that_of_the_best(case):
    scores, relevant = (tensor.tolist() for tensor in case)
    for query, found in enumerate(ndcg(*case).tolist()):
        order = worst_order(scores[query], relevant[query])
        gains = [relevant[query][i] for i in order[:10]]
        best = sorted(relevant[query], reverse=True)[:10]
        gain, ideal = (sum(g / math.log2(place + 2) for place, g in enumerate(each)) for each in (gains, best))
        assert found == pytest.approx(gain / ideal, abs=1e-6)


def test_among_hundreds_of_equal_scores_relevant_candidates_come_last_too():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (20, 500), generator=generator).float()
    relevant = torch.rand(20, 500, generator=generator) < 0.2
    assert torch.equal(ranks(scores, relevant), 1 + ((scores == 2) & ~relevant).sum(dim=1))
    assert (ndcg(scores, relevant) == 0).all()


@given(scored_candidates())
def test_ranking_metrics_summarise_the_ranks(case):
    found = ranking_metrics(*case)
    assert found["mean_recall"] == pytest.approx(sum(found[f"recall@{k}"] for k in (1, 5, 10)) / 3)
    assert found["ndcg@10"] == pytest.approx(ndcg(*case).mean().item())
    rank = sorted(ranks(*case).tolist())
    middle = (rank[(len(rank) - 1) // 2] + rank[len(rank) // 2]) / 2
    assert found["median_rank"] == middle
    assert found["mean_rank"] == pytest.approx(sum(rank) / len(rank))
    assert found["mrr"] == pytest.approx(sum(1 / r for r in rank) / len(rank))
    for k in (1, 5, 10):
        assert found[f"recall@{k}"] == pytest.approx(100 * sum(r <= k for r in rank) / len(rank))


@st.composite
def retrieval_tasks(draw):
    """Scores `[texts, videos]` with ties, and the video of each text; videos may have several texts or none."""
    texts, videos = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    row = st.lists(st.integers(-3, 3), min_size=videos, max_size=videos)
    scores = draw(st.lists(row, min_size=texts, max_size=texts))
    video_of_text = draw(st.lists(st.integers(0, videos - 1), min_size=texts, max_size=texts))
    return scores, video_of_text


@given(retrieval_tasks())
def test_both_directions_count_what_a_loop_counts(task):
    scores, video_of_text = task
    found = retrieval_metrics(torch.tensor(scores).float(), torch.tensor(video_of_text))

    text_ranks = [
        1 + sum(scores[t][v] >= scores[t][own] for v in range(len(scores[t])) if v != own)
        for t, own in enumerate(video_of_text)
    ]
    video_ranks = []
    for video in set(video_of_text):
        own = [t for t, v in enumerate(video_of_text) if v == video]
        best = max(scores[t][video] for t in own)
        video_ranks.append(1 + sum(scores[t][video] >= best for t in range(len(scores)) if t not in own))

    for direction, rank in (("text_to_video", text_ranks), ("video_to_text", video_ranks)):
        assert found[f"{direction}_mean_rank"] == pytest.approx(sum(rank) / len(rank))
        for k in (1, 5, 10):
            assert found[f"{direction}_recall@{k}"] == pytest.approx(100 * sum(r <= k for r in rank) / len(rank))


def test_a_model_that_scores_everything_alike_finds_nothing():
    found = retrieval_metrics(torch.zeros(12, 12), torch.arange(12))
    assert found["text_to_video_recall@10"] == found["video_to_text_recall@10"] == found["text_to_video_ndcg@10"] == 0
    assert found["text_to_video_median_rank"] == 12


def test_a_perfect_model_has_the_best_value_of_every_metric():
    video_of_text = torch.tensor([0, 0, 1, 2, 2, 2])
    scores = torch.nn.functional.one_hot(video_of_text, 3).float()
    for name, value in retrieval_metrics(scores, video_of_text).items():
        assert value == (100 if "recall" in name else 1), name


def test_a_video_without_a_text_is_a_candidate_but_no_query():
    found = retrieval_metrics(torch.tensor([[0.1, 0.9]]), torch.tensor([0]))
    assert found["text_to_video_mean_rank"] == 2
    assert found["video_to_text_mean_rank"] == 1


def test_each_direction_may_have_scores_of_its_own():
    found = retrieval_metrics(torch.eye(2), torch.arange(2), video_to_text_scores=torch.eye(2).flip(0))
    assert found["text_to_video_recall@1"] == 100
    assert found["video_to_text_recall@1"] == 0


def test_dual_softmax_multiplies_both_softmaxes():
    scores = torch.randn(4, 3, dtype=torch.float64)
    expected = (scores / 0.5).softmax(dim=0) * (scores / 0.5).softmax(dim=1)
    assert torch.allclose(dual_softmax(scores, temperature=0.5).exp(), expected)


def test_dual_softmax_sharpens_cosines_a_hundredfold_unless_told_otherwise():
    scores = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(dual_softmax(scores), dual_softmax(100 * scores, temperature=1.0))


def test_dual_softmax_stands_beside_the_plain_scores():
    # Both texts prefer video 0; only the dual softmax sees that text 1 can't have it.
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.5]])
    found = RetrievalMetric().compute(predictions=scores, references=[0, 1])
    assert found["text_to_video_recall@1"] == 50
    assert found["dual_softmax_text_to_video_recall@1"] == 100
    plain = [name for name in found if name.startswith(("text_to_video", "video_to_text"))]
    assert sorted(found) == sorted(plain + [f"dual_softmax_{name}" for name in plain])


def test_metric_accepts_a_matrix_in_batches_of_texts():
    scores, video_of_text = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    metric = RetrievalMetric()
    for rows in torch.arange(6).split(4):
        metric.add_batch(predictions=scores[rows], references=video_of_text[rows])
    assert metric.compute() == RetrievalMetric().compute(predictions=scores, references=video_of_text)


def test_distractor_accuracy_asks_for_a_strictly_higher_score_of_the_own_video():
    scores = [[0.9, 0.1, 0.0], [0.5, 0.5, 0.0], [0.0, 0.9, 0.1], [0.0, 0.0, 0.0]]
    found = RetrievalMetric().compute(predictions=scores, references=[0, 0, 1, 2], distractors=[1, 1, 2, -1])
    assert found["distractor_accuracy"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_named(broken):
    scores = torch.zeros(2, 3)
    scores[1, 2] = broken
    with pytest.raises(ValueError, match=r"1 values that are not finite.* at \[1, 2\]"):
        RetrievalMetric().compute(predictions=scores, references=[0, 1])
    with pytest.raises(ValueError, match="not finite"):
        distractor_accuracy(scores, torch.tensor([0, 1]), torch.tensor([1, 0]))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"predictions": [[0.0, 1.0]], "references": [2]}, r"references\[0\] is 2: with 2 videos it must be 0 to 1"),
        ({"predictions": [[0.0, 1.0]], "references": [-1]}, r"references\[0\] is -1"),
        ({"predictions": [[0.0, 1.0], [0.0]], "references": [0, 0]}, r"rows of \[1, 2\] scores"),
        ({"predictions": [], "references": []}, "a row a query"),
        ({"predictions": [[0.0, 1.0]], "references": [0], "distractors": [5]}, r"distractors\[0\] is 5"),
        ({"predictions": [[0.0, 1.0]], "references": [0], "distractors": [1, 0]}, "distractors has 2 entries"),
        ({"predictions": [[0.0, 1.0]], "references": [0], "distractors": [-1]}, "^distractors holds -1 only: at"),
    ],
)
def test_a_wrong_input_is_told_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        RetrievalMetric().compute(**arguments)


def test_the_first_of_many_wrong_values_is_named():
    scores = torch.zeros(3, 2)
    scores[1, 0] = scores[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"scores has 2 values that are not finite: the first is nan at \[1, 0\]"):
        retrieval_metrics(scores, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"references\[1\] is 2: with 2 videos it must be 0 to 1"):
        retrieval_metrics(torch.zeros(3, 2), torch.tensor([0, 2, 3]))
    with pytest.raises(ValueError, match=r"references\[1\] is 2: with 2 videos it must be 0 to 1"):
        distractor_accuracy(torch.zeros(3, 2), torch.tensor([0, 2, 3]), torch.tensor([1, 1, 1]))


@pytest.mark.parametrize("function", [ranks, ndcg, ranking_metrics])
def test_scores_and_relevance_must_be_alike(function):
    with pytest.raises(ValueError, match=r"scores is \[2, 3\] and relevant is \[2, 2\]: both must be alike"):
        function(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"scores has the shape \[3\]: a row a query, a column a candidate"):
        function(torch.zeros(3), torch.ones(3, dtype=torch.bool))


def test_a_query_without_a_relevant_candidate_is_named():
    with pytest.raises(ValueError, match="query 1 has no relevant candidate"):
        ranks(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))


def test_an_answer_is_correct_whatever_its_case_and_spaces():
    found = VideoQAAccuracy().compute(predictions=["  In the  Garden", "two"], references=["in the garden", "three"])
    assert found == {"accuracy": 50}


def test_any_of_several_accepted_answers_is_correct():
    found = VideoQAAccuracy().compute(predictions=["sofa", "no"], references=[["couch", "sofa"], ["yes"]])
    assert found == {"accuracy": 50}


def test_accuracy_is_told_by_type_of_question():
    found = VideoQAAccuracy().compute(
        predictions=["yes", "no", "red"],
        references=["yes", "yes", "red"],
        question_types=["yes/no", "yes/no", "color"],
    )
    assert found == {"accuracy": pytest.approx(200 / 3), "accuracy_yes/no": 50, "accuracy_color": 100}


def test_question_types_must_be_one_a_question():
    with pytest.raises(ValueError, match="question_types has 1 entries for 2 questions"):
        VideoQAAccuracy().compute(predictions=["a", "b"], references=["a", "b"], question_types=["object"])


@pytest.mark.parametrize(
    ("metric", "arguments"),
    [
        (RetrievalMetric, {"predictions": [[1.0, 0.0]], "references": [0]}),
        (VideoQAAccuracy, {"predictions": ["yes"], "references": ["yes"]}),
    ],
)
def test_metrics_write_no_files_unless_asked_to(metric, arguments, tmp_path):
    in_memory, on_disk = tmp_path / "in_memory", tmp_path / "on_disk"
    metric(cache_dir=str(in_memory)).add_batch(**arguments)
    assert not [path for path in in_memory.rglob("*") if path.is_file()]
    metric(keep_in_memory=False, cache_dir=str(on_disk)).add_batch(**arguments)
    assert [path for path in on_disk.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("metric", "argument"), [(RetrievalMetric, "distractors=None"), (VideoQAAccuracy, "question_types=None")]
)
def test_a_metric_says_in_print_what_to_give_it(metric, argument):
    assert f"compute(predictions, references, {argument})" in str(metric())
