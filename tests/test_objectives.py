import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_testa.objectives import (
    contrastive_loss,
    distilled_targets,
    draw_hard_negatives,
    matching_loss,
    same_pair_targets,
    sample_hard_negatives,
    text_log_likelihoods,
)


def test_targets_are_shared_by_samples_of_one_video():
    ids = torch.tensor([3, 20, 3])
    assert same_pair_targets(ids, ids).tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]


def test_a_video_that_no_candidate_shows_has_no_targets():
    assert same_pair_targets(torch.tensor([1, 2]), torch.tensor([2, 5, 2])).tolist() == [[0, 0, 0], [0.5, 0, 0.5]]


def test_distillation_mixes_targets_with_the_beliefs_of_the_teacher():
    targets, teacher_logits = torch.eye(2), torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    expected = torch.tensor([[0.6 + 0.4 * 0.5, 0.4 * 0.5], [0.4 * 0.75, 0.6 + 0.4 * 0.25]])
    for weight in (0.4, torch.tensor(0.4, dtype=torch.float64)):
        torch.testing.assert_close(distilled_targets(targets, teacher_logits, weight), expected)


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


def test_each_direction_draws_its_own_hardest_negatives():
    torch.manual_seed(0)
    # Text 0 is most like video 1, text 1 like video 2, text 2 like video 0; a video's hardest text is another one's.
    logits_per_video = torch.tensor([[9.0, 0.0, 60.0], [60.0, 9.0, 0.0], [0.0, 60.0, 9.0]])
    negatives = [draw_hard_negatives(logits_per_video, torch.arange(3)) for _ in range(200)]
    assert sum(drawn.video_of_text.tolist() == [1, 2, 0] for drawn in negatives) > 190
    assert sum(drawn.text_of_video.tolist() == [2, 0, 1] for drawn in negatives) > 190
    assert all(drawn.text_has_negative.all() and drawn.video_has_negative.all() for drawn in negatives)


def test_samples_of_one_video_are_no_negatives_of_each_other():
    torch.manual_seed(0)
    for _ in range(20):
        drawn = draw_hard_negatives(torch.randn(3, 3), torch.tensor([7, 4, 7]))
        assert drawn.video_of_text[[0, 2]].tolist() == drawn.text_of_video[[0, 2]].tolist() == [1, 1]
        assert drawn.video_of_text[1] != 1 and drawn.text_of_video[1] != 1
    drawn = draw_hard_negatives(torch.randn(2, 2), torch.tensor([7, 7]))
    assert not drawn.text_has_negative.any() and not drawn.video_has_negative.any()


def test_matching_loss_leaves_out_pairs_without_a_negative():
    positive, negative = torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    counted = [math.log(1 + math.exp(-difference)) for difference in (1, 3, 2)]
    loss = matching_loss(positive, negative, torch.tensor([False, True]))
    torch.testing.assert_close(loss.item(), sum(counted) / 3)


def test_broken_features_are_left_for_the_loss_to_show():
    logits = torch.full((2, 2), torch.nan)
    negative, _ = sample_hard_negatives(logits, torch.eye(2, dtype=torch.bool))
    assert negative.tolist() == [1, 0]


def test_likelihood_of_a_text_adds_up_its_tokens_each_predicted_from_those_before():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3]])
    logits = probabilities.log().expand(2, 3, 3)
    labels = torch.tensor([[0, 1, 2], [2, 0, -100]])
    found = text_log_likelihoods(logits, labels)
    torch.testing.assert_close(found, torch.tensor([math.log(0.25) + math.log(0.7), math.log(0.5)]))
    assert text_log_likelihoods(logits.half(), labels).dtype == torch.float32


def test_label_smoothing_spreads_a_share_of_each_target_over_the_vocabulary():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(1, 2, 3)
    expected = 0.9 * math.log(0.25) + 0.1 * (math.log(0.5) + 2 * math.log(0.25)) / 3
    found = text_log_likelihoods(logits, torch.tensor([[0, 1]]), label_smoothing=0.1)
    torch.testing.assert_close(found.item(), expected)
