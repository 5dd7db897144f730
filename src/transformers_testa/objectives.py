"""Training objectives as functions of similarities and logits."""

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
