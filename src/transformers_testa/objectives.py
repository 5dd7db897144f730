"""Training objectives as functions of similarities and logits."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def same_pair_targets(query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """Return targets `[Q, C]`: each query's probability is shared equally by the candidates with its own id.

    Args:
        query_ids: `[Q]` integers; equal ids mean the same video.
        candidate_ids: `[C]` integers.
    """
    same = (query_ids[:, None] == candidate_ids[None, :]).float()
    return same / same.sum(dim=1, keepdim=True).clamp(min=1)


def distilled_targets(targets: Tensor, teacher_logits: Tensor, weight: Tensor | float) -> Tensor:
    """Mix targets with what a teacher believes: `(1 - weight) * targets + weight * softmax(teacher_logits)`, `[Q, C]`."""
    return torch.lerp(targets, torch.softmax(teacher_logits, dim=1), weight)


def contrastive_loss(
    logits_per_video: Tensor, logits_per_text: Tensor, video_targets: Tensor, text_targets: Tensor
) -> Tensor:
    """Video-text contrastive loss (VTC): cross-entropy against target distributions, mean of both directions.

    Args:
        logits_per_video: `[videos, texts]` similarities over the temperature.
        logits_per_text: `[texts, videos]`.
        video_targets: `[videos, texts]`, rows sum to one.
        text_targets: `[texts, videos]`, rows sum to one.
    """
    return (F.cross_entropy(logits_per_video, video_targets) + F.cross_entropy(logits_per_text, text_targets)) / 2


def sample_hard_negatives(logits: Tensor, is_positive: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a negative candidate for every query, the more similar the likelier.

    Args:
        logits: `[Q, C]` similarities over the temperature; no gradient flows into the draw.
        is_positive: `[Q, C]`, candidates that show the query's own video and never serve as its negatives.

    Returns:
        The index `[Q]` of each query's negative, and whether `[Q]` it has one: where every candidate is positive, the
        index is meaningless.
    """
    with torch.no_grad():
        # The small constant keeps every negative possible when one similarity takes all of the softmax.
        weights = torch.softmax(logits.float(), dim=1) + 1e-4
        # Broken features make a broken loss, which training reports; drawing from them would only hide the reason.
        weights = weights.nan_to_num(1.0).masked_fill(is_positive, 0)
        has_negative = ~is_positive.all(dim=1)
        drawn = torch.multinomial(weights.masked_fill(~has_negative[:, None], 1), num_samples=1)
        return drawn.squeeze(1), has_negative


class HardNegatives(NamedTuple):
    """One negative of each sample of a batch, all `[B]`.

    Args:
        video_of_text: Index of the negative video of each text.
        text_of_video: Index of the negative text of each video.
        text_has_negative: Whether each text has a negative video; where not, the index is meaningless.
        video_has_negative: Whether each video has a negative text.
    """

    video_of_text: Tensor
    text_of_video: Tensor
    text_has_negative: Tensor
    video_has_negative: Tensor


def draw_hard_negatives(logits_per_video: Tensor, pair_ids: Tensor) -> HardNegatives:
    """Draw a negative video for every text, then a negative text for every video.

    Args:
        logits_per_video: `[B, B]`, videos by texts.
        pair_ids: `[B]` integers, equal for samples of one video, which are never each other's negatives.
    """
    is_positive = pair_ids[:, None] == pair_ids[None]
    video_of_text, text_has_negative = sample_hard_negatives(logits_per_video.t(), is_positive)
    text_of_video, video_has_negative = sample_hard_negatives(logits_per_video, is_positive)
    return HardNegatives(video_of_text, text_of_video, text_has_negative, video_has_negative)


def matching_loss(positive: Tensor, negative: Tensor, has_negative: Tensor) -> Tensor:
    """Video-text matching loss (VTM): cross-entropy of matched (class 1) against unmatched pairs (class 0).

    Args:
        positive: `[P, 2]` logits of matched pairs.
        negative: `[N, 2]` logits of unmatched pairs.
        has_negative: `[N]`, the rows of `negative` that count.
    """
    loss = F.cross_entropy(positive, positive.new_ones(len(positive), dtype=torch.long), reduction="sum")
    loss_negative = F.cross_entropy(negative, negative.new_zeros(len(negative), dtype=torch.long), reduction="none")
    return (loss + (loss_negative * has_negative).sum()) / (len(positive) + has_negative.sum())


def text_log_likelihoods(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Log-probability of each text, the sum over its tokens; each token is predicted from those before it.

    Args:
        logits: `[N, L, vocabulary]`, predictions of each next token.
        labels: `[N, L]`, the texts themselves; -100 where nothing is to be predicted.
        label_smoothing: Share of a target's probability that is spread over the vocabulary.

    Returns:
        `[N]` (float32).
    """
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=-100,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return -losses.view(len(labels), -1).sum(dim=1)
