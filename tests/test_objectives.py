import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_testa.objectives import (
    contrastive_loss,
    matching_loss,
    same_pair_targets,
    sample_hard_negatives,
)


def test_targets_are_shared_by_samples_of_one_video():
    ids = torch.tensor([3, 20, 3])
    assert same_pair_targets(ids, ids).tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]


def test_contrastive_loss_is_the_mean_of_both_directions():
    logits = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    targets = torch.eye(2)
    per_video = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    per_text = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-1))) / 2
    loss = contrastive_loss(logits, logits.t(), targets, targets)
    torch.testing.assert_close(loss.item(), (per_video + per_text) / 2)


@given(st.integers(0, 2**31), st.lists(st.integers(0, 3), min_size=2, max_size=8))
def test_a_hard_negative_is_never_a_sample_of_the_same_video(seed, ids):
    torch.manual_seed(seed)
    ids = torch.tensor(ids)
    is_positive = ids[:, None] == ids[None]
    negative, has_negative = sample_hard_negatives(torch.randn(len(ids), len(ids)) * 50, is_positive)
    assert has_negative.tolist() == [len(ids.unique()) > 1] * len(ids)
    if len(ids.unique()) > 1:
        assert (ids[negative] != ids).all()


def test_more_similar_negatives_are_drawn_more_often():
    torch.manual_seed(0)
    logits = torch.tensor([[9.0, 2.0, 0.0]]).expand(4000, -1)
    negative, _ = sample_hard_negatives(logits, torch.tensor([[True, False, False]]).expand(4000, -1))
    # Only the two candidates' own weights count: e^2 and e^0 over the softmax's sum, plus 1e-4 each.
    weights = torch.softmax(logits[0], dim=0)[1:] + 1e-4
    expected = (weights[0] / weights.sum()).item()
    assert abs((negative == 1).float().mean().item() - expected) < 0.03


def test_matching_loss_leaves_out_pairs_without_a_negative():
    positive, negative = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    first = math.log(1 + math.exp(-1))
    last = math.log(1 + math.exp(-2))
    loss = matching_loss(positive, negative, torch.tensor([False, True]))
    torch.testing.assert_close(loss.item(), (first + last) / 2)


def test_broken_features_are_left_for_the_loss_to_show():
    logits = torch.full((2, 2), torch.nan)
    negative, _ = sample_hard_negatives(logits, torch.eye(2, dtype=torch.bool))
    assert negative.tolist() == [1, 0]
