"""Retrieval and question answering metrics: functions of tensors, and `evaluate.Metric` classes around them.

Recalls and accuracies are percentages, as papers print them; ranks count from 1; MRR and nDCG lie between 0 and 1.
"""

from collections import defaultdict
from typing import Any

import datasets
import evaluate
import torch


RECALL_AT = (1, 5, 10)


def ranks(scores: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """Rank of the best relevant candidate of each query; an irrelevant candidate of equal score counts as ahead of it.

    Args:
        scores: `[queries, candidates]`, higher is better.
        relevant: `[queries, candidates]`, boolean.

    Returns:
        `[queries]`, int64, counted from 1.

    Raises:
        ValueError: if a score is not finite, or a query has no relevant candidate.
    """
    _check_relevant(scores, relevant)
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + (~relevant & (scores >= best)).sum(dim=1)


def ndcg(scores: torch.Tensor, relevant: torch.Tensor, k: int = 10) -> torch.Tensor:
    """Normalised discounted cumulative gain at `k` of each query, every relevant candidate having a gain of 1.

    Irrelevant candidates come before relevant ones of equal score. Arguments and errors are those of [`ranks`].

    Returns:
        `[queries]`, float32, between 0 and 1.
    """
    _check_relevant(scores, relevant)
    # Relevant candidates last, then by score with a stable sort, which leaves them last among equals.
    relevant_last = relevant.byte().argsort()
    by_score = scores.gather(1, relevant_last).argsort(descending=True, stable=True)
    gains = relevant.gather(1, relevant_last).gather(1, by_score)[:, :k].float()
    discounts = torch.arange(2, 2 + gains.shape[1], device=scores.device).log2().reciprocal()
    ideal = discounts.cumsum(dim=0)[relevant.sum(dim=1).clamp(max=gains.shape[1]) - 1]
    return (gains * discounts).sum(dim=1) / ideal


def ranking_metrics(scores: torch.Tensor, relevant: torch.Tensor) -> dict[str, float]:
    """Recall@1/5/10 and their mean, median and mean rank, MRR and nDCG@10 over the queries.

    Arguments and errors are those of [`ranks`].
    """
    rank = ranks(scores, relevant).double()
    recalls = {f"recall@{k}": 100 * (rank <= k).double().mean().item() for k in RECALL_AT}
    return {
        **recalls,
        "mean_recall": sum(recalls.values()) / len(recalls),
        "median_rank": rank.quantile(0.5).item(),
        "mean_rank": rank.mean().item(),
        "mrr": rank.reciprocal().mean().item(),
        "ndcg@10": ndcg(scores, relevant).mean().item(),
    }


def retrieval_metrics(
    scores: torch.Tensor, video_of_text: torch.Tensor, video_to_text_scores: torch.Tensor | None = None
) -> dict[str, float]:
    """[`ranking_metrics`] of both directions, their names preceded by `text_to_video_` and `video_to_text_`.

    Args:
        scores: `[texts, videos]`.
        video_of_text: `[texts]`, the column of each text's video. A video may have several texts; one without a text
            is a candidate, not a query.
        video_to_text_scores: `[videos, texts]` where the other direction has scores of its own, as after re-ranking.

    Raises:
        ValueError: if a score is not finite, there is no text, or an index isn't that of a video.
    """
    _check_matrix(scores)
    _check_indices(scores, video_of_text, "references")
    relevant = video_of_text[:, None] == torch.arange(scores.shape[1], device=scores.device)
    reverse = scores.T if video_to_text_scores is None else video_to_text_scores
    queries = relevant.any(dim=0)
    directions = {
        "text_to_video": ranking_metrics(scores, relevant),
        "video_to_text": ranking_metrics(reverse[queries], relevant.T[queries]),
    }
    return {f"{direction}_{name}": value for direction, found in directions.items() for name, value in found.items()}


def dual_softmax(scores: torch.Tensor, temperature: float = 0.01) -> torch.Tensor:
    """Logarithm of the softmax over the columns times the softmax over the rows, `[rows, columns]`, float64.

    It uses all queries at once, so it is a transductive score: report it beside the plain one.
    """
    logits = scores.double() / temperature
    return logits.log_softmax(dim=0) + logits.log_softmax(dim=1)


def dual_softmax_metrics(scores: torch.Tensor, video_of_text: torch.Tensor) -> dict[str, float]:
    """[`retrieval_metrics`] of the [`dual_softmax`] of `scores`, their names preceded by `dual_softmax_`."""
    found = retrieval_metrics(dual_softmax(scores), video_of_text)
    return {f"dual_softmax_{name}": value for name, value in found.items()}


def distractor_accuracy(scores: torch.Tensor, video_of_text: torch.Tensor, distractors: torch.Tensor) -> float:
    """Percentage of texts whose own video scores strictly above their distractor, such as its scenes in another order.

    Args:
        scores: `[texts, videos]`.
        video_of_text: `[texts]`, the column of each text's video.
        distractors: `[texts]`, the column of each text's distractor, or -1 for a text without one.

    Raises:
        ValueError: if a score is not finite, an index isn't that of a video, or no text has a distractor.
    """
    _check_matrix(scores)
    _check_indices(scores, video_of_text, "references")
    has_distractor = distractors != -1
    if not has_distractor.any():
        raise ValueError("distractors holds -1 only: at least one text must have a distractor")
    # A text without a distractor is compared with its own video, and left out of the mean.
    distractors = distractors.where(has_distractor, video_of_text)
    _check_indices(scores, distractors, "distractors")
    own, other = (scores.gather(1, index[:, None])[has_distractor] for index in (video_of_text, distractors))
    return 100 * (own > other).double().mean().item()


class RetrievalMetric(evaluate.Metric):
    """Text-to-video and video-to-text retrieval from a matrix of scores.

    `compute(predictions, references, distractors=None)` takes the scores `[texts, videos]` (kept as float32), the
    column of each text's video, and, where there are any, the column of each text's distractor (-1: none). It gives
    what [`retrieval_metrics`] returns, the same of the [`dual_softmax`] scores under `dual_softmax_…`, and
    `distractor_accuracy`.
    """

    def __init__(self, keep_in_memory: bool = True, **kwargs: Any):
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Recall, rank and nDCG of text-to-video and video-to-text retrieval.",
            citation="",
            inputs_description=RetrievalMetric.__doc__,
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[int], distractors: list[int] | None = None
    ) -> dict[str, float]:
        if len(lengths := {len(row) for row in predictions}) > 1:
            raise ValueError(f"predictions has rows of {sorted(lengths)} scores: every text needs one score a video")
        scores, video_of_text = torch.tensor(predictions), torch.tensor(references)
        metrics = retrieval_metrics(scores, video_of_text) | dual_softmax_metrics(scores, video_of_text)
        if distractors is not None:
            metrics["distractor_accuracy"] = distractor_accuracy(scores, video_of_text, torch.as_tensor(distractors))
        return metrics


class VideoQAAccuracy(evaluate.Metric):
    """Accuracy of open-ended answers, case and surrounding or doubled spaces aside.

    `compute(predictions, references, question_types=None)` takes one answer a question, one accepted answer or a list
    of accepted answers a question, and, where they are known, one type a question. It gives `accuracy` and
    `accuracy_<type>` for each type.
    """

    def __init__(self, keep_in_memory: bool = True, **kwargs: Any):
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Accuracy of video question answering, overall and by type of question.",
            citation="",
            inputs_description=VideoQAAccuracy.__doc__,
            features=[
                datasets.Features({"predictions": string, "references": references})
                for references in (string, datasets.Sequence(string))
            ],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str] | list[list[str]],
        question_types: list[str] | None = None,
    ) -> dict[str, float]:
        if question_types is not None and len(question_types) != len(predictions):
            raise ValueError(f"question_types has {len(question_types)} entries for {len(predictions)} questions")
        correct_by_type = defaultdict(list)
        for row, (answer, accepted) in enumerate(zip(predictions, references, strict=True)):
            accepted = [accepted] if isinstance(accepted, str) else accepted
            correct = _normalize(answer) in map(_normalize, accepted)
            correct_by_type["accuracy"].append(correct)
            if question_types is not None:
                correct_by_type[f"accuracy_{question_types[row]}"].append(correct)
        return {name: 100 * sum(correct) / len(correct) for name, correct in correct_by_type.items()}


def _normalize(answer: str) -> str:
    return " ".join(answer.casefold().split())


def _check_relevant(scores: torch.Tensor, relevant: torch.Tensor) -> None:
    _check_matrix(scores)
    if scores.shape != relevant.shape:
        raise ValueError(f"scores is {list(scores.shape)} and relevant is {list(relevant.shape)}: both must be alike")
    missing = (~relevant.any(dim=1)).nonzero()
    if len(missing):
        raise ValueError(f"query {missing[0].item()} has no relevant candidate, so it has no rank")


def _check_matrix(scores: torch.Tensor) -> None:
    if scores.ndim != 2 or not scores.numel():
        raise ValueError(f"scores has the shape {list(scores.shape)}: a row a query, a column a candidate are needed")
    broken = (~scores.isfinite()).nonzero()
    if len(broken):
        row, column = broken[0].tolist()
        raise ValueError(
            f"scores has {len(broken)} values that are not finite: the first is {scores[row, column]} at [{row}, {column}]"
        )


def _check_indices(scores: torch.Tensor, indices: torch.Tensor, name: str) -> None:
    if len(indices) != len(scores):
        raise ValueError(
            f"{name} has {len(indices)} entries for {len(scores)} texts: give the index of one video a text"
        )
    outside = ((indices < 0) | (indices >= scores.shape[1])).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"{name}[{row}] is {indices[row]}: with {scores.shape[1]} videos it must be 0 to {scores.shape[1] - 1}"
        )
