import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_testa.aggregation_testa import (
    compose,
    flatten_frames,
    flatten_patches,
    limit_merges,
    mean_key,
    merge,
    plan_aggregation,
    plan_consecutive,
    received_attention,
    unmerge,
)


STRATEGIES = ("geometry", "importance", "prune")


@st.composite
def plans(draw, strategies=STRATEGIES):
    """An assignment of random tokens, with all that it was made from."""
    num_tokens = draw(st.integers(2, 12))
    class_token_ahead = draw(st.booleans())
    limit = limit_merges(num_tokens, num_tokens, class_token_ahead)
    num_merged = draw(st.integers(0, limit))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    metric = torch.randn(2, 3, num_tokens, 4, generator=generator)
    importance = torch.rand(2, 3, num_tokens, generator=generator)
    strategy = draw(st.sampled_from(strategies))
    assignment = plan_aggregation(metric, num_merged, strategy, importance, class_token_ahead)
    return metric, num_merged, strategy, importance, class_token_ahead, assignment


@given(plans())
def test_every_slot_is_filled_and_none_is_out_of_range(plan):
    metric, num_merged, strategy, _, _, assignment = plan
    num_slots = metric.shape[-2] - num_merged
    for row in assignment.flatten(0, 1).tolist():
        assert set(row) - {-1} == set(range(num_slots))
        assert row.count(-1) == (num_merged if strategy == "prune" else 0)


@given(plans(strategies=("geometry",)))
def test_geometry_accepts_the_best_proposals_of_every_second_token(plan):
    metric, num_merged, _, _, class_token_ahead, assignment = plan
    for tokens, slots in zip(metric.flatten(0, 1), assignment.flatten(0, 1).tolist(), strict=True):
        unit = tokens / tokens.norm(dim=-1, keepdim=True)
        set_a = [n for n in range(len(tokens)) if n % 2 == int(class_token_ahead)]
        set_b = [n for n in range(len(tokens)) if n not in set_a]
        proposals = {a: max(set_b, key=lambda b: float(unit[a] @ unit[b])) for a in set_a}
        similarity = {a: float(unit[a] @ unit[b]) for a, b in proposals.items()}
        accepted = sorted(set_a, key=lambda a: -similarity[a])[:num_merged]
        expected = [a for a in set_a if a not in accepted] + set_b
        for token, slot in enumerate(slots):
            assert expected[slot] == (proposals[token] if token in accepted else token)


@given(plans(strategies=("importance", "prune")))
def test_importance_gives_up_the_least_attended_tokens(plan):
    metric, num_merged, strategy, importance, _, assignment = plan
    for tokens, scores, slots in zip(
        metric.flatten(0, 1), importance.flatten(0, 1), assignment.flatten(0, 1).tolist(), strict=True
    ):
        unit = tokens / tokens.norm(dim=-1, keepdim=True)
        gone = scores.argsort(stable=True)[:num_merged].tolist()
        kept = [n for n in range(len(tokens)) if n not in gone]
        for token, slot in enumerate(slots):
            if token not in gone:
                assert kept[slot] == token
            elif strategy == "prune":
                assert slot == -1
            else:
                assert kept[slot] == max(kept, key=lambda k: float(unit[token] @ unit[k]))


def test_pruning_compares_no_tokens():
    importance = torch.tensor([[0.3, 0.1, 0.4, 0.2]])
    assert plan_aggregation(None, 2, "prune", importance).tolist() == [[0, -1, 1, -1]]


@pytest.mark.parametrize(
    ("strategy", "missing"),
    [
        ("geometry", "metric"),
        ("importance", "metric"),
        ("importance", "received_attention"),
        ("prune", "received_attention"),
    ],
)
def test_a_plan_without_what_its_strategy_reads_is_refused(strategy, missing):
    read = {"metric": torch.randn(1, 4, 2), "received_attention": torch.rand(1, 4)}
    with pytest.raises(ValueError, match=f"{missing} is None"):
        plan_aggregation(**{**read, missing: None}, num_merged=1, strategy=strategy)


def test_importance_is_the_attention_all_others_pay():
    """Equation 1 of the paper, as a direct loop."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    expected = torch.zeros(2, 5)
    for n in range(2):
        for head in range(3):
            for j in range(5):
                logits = torch.stack([query[n, head, j] @ key[n, head, i] for i in range(5)]) / 2
                probabilities = logits.exp() / logits.exp().sum()
                for i in range(5):
                    if i != j:
                        expected[n, i] += probabilities[i] / 3
    torch.testing.assert_close(received_attention(query, key, scaling=0.5), expected)


@pytest.mark.parametrize("num_frames", [7, 8])
@pytest.mark.parametrize("class_token_ahead", [False, True])
@given(seed=st.integers(0, 2**31), num_merged=st.integers(1, 3))
def test_frames_vote_patch_by_patch(num_frames, class_token_ahead, seed, num_merged):
    metric = torch.randn(5, num_frames, 4, generator=torch.Generator().manual_seed(seed))  # of 5 patch positions
    slots = plan_aggregation(metric, num_merged, class_token_ahead=class_token_ahead, vote=True).tolist()
    unit = metric / metric.norm(dim=-1, keepdim=True)
    set_a, set_b = range(class_token_ahead, num_frames, 2), range(1 - class_token_ahead, num_frames, 2)
    partner, score = {}, {}
    for frame in set_a:
        similarity = {(p, b): float(unit[p, frame] @ unit[p, b]) for p in range(5) for b in set_b}
        best = [max(set_b, key=lambda b, p=p: similarity[p, b]) for p in range(5)]
        partner[frame] = max(set_b, key=best.count)
        score[frame] = min(similarity[p, best[p]] for p in range(5))
    accepted = sorted(partner, key=lambda frame: -score[frame])[:num_merged]
    kept = [frame for frame in set_a if frame not in accepted] + list(set_b)
    assert [kept[slot] for slot in slots] == [partner[n] if n in accepted else n for n in range(num_frames)]


@given(st.integers(0, 2**31), st.integers(0, 3))
def test_the_least_attended_frames_join_the_partner_that_most_patches_vote_for(seed, num_merged):
    generator = torch.Generator().manual_seed(seed)
    metrics, importances = torch.randn(2, 5, 7, 4, generator=generator), torch.rand(2, 7, generator=generator)
    assignments = plan_aggregation(metrics, num_merged, "importance", importances, vote=True)
    for metric, importance, slots in zip(metrics, importances, assignments.tolist(), strict=True):
        unit = metric / metric.norm(dim=-1, keepdim=True)
        gone = importance.argsort()[:num_merged].tolist()
        kept = [frame for frame in range(7) if frame not in gone]
        for frame in gone:
            best = [max(kept, key=lambda k, p=p: float(unit[p, frame] @ unit[p, k])) for p in range(5)]
            assert kept[slots[frame]] == max(kept, key=best.count)
        assert [kept[slots[frame]] for frame in kept] == kept


def test_of_equally_good_tokens_the_first_go():
    assert plan_aggregation(torch.ones(1, 6, 2), 2).tolist() == [[1, 1, 1, 2, 0, 3]]
    assert plan_aggregation(None, 2, "prune", torch.tensor([1.0, 0.0, 1.0, 1.0])).tolist() == [-1, -1, 0, 1]


def test_tokens_that_are_no_numbers_go_before_any_other():
    metric = torch.eye(6)[:, :2] + 1
    metric[2] = torch.nan
    assert plan_aggregation(metric, 1).tolist() == [0, 2, 2, 3, 1, 4]
    assert plan_aggregation(None, 1, "prune", torch.tensor([0.2, 0.1, torch.nan])).tolist() == [0, 1, -1]


def test_tokens_are_compared_by_the_mean_of_their_keys_over_heads():
    key = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16)[None, :, None, None].expand(2, 3, 5, 4)
    mean = mean_key(key.clone().requires_grad_())
    assert mean.dtype == torch.float32 and not mean.requires_grad
    assert torch.equal(mean, torch.full((2, 5, 4), 86.0))  # 258 / 3; in bfloat16, 256 + 1 is 256


@given(st.integers(2, 12), st.data())
def test_consecutive_tokens_join_where_they_are_most_alike(num_tokens, data):
    num_merged = data.draw(st.integers(0, num_tokens - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    metric = torch.randn(2, num_tokens, 4, generator=generator)
    for tokens, slots in zip(metric, plan_consecutive(metric, num_merged).tolist(), strict=True):
        unit = tokens / tokens.norm(dim=-1, keepdim=True)
        joining = sorted(range(1, num_tokens), key=lambda n: -float(unit[n] @ unit[n - 1]))[:num_merged]
        expected = [0]
        for n in range(1, num_tokens):
            expected.append(expected[-1] + (n not in joining))
        assert slots == expected


def test_of_equally_alike_consecutive_tokens_the_first_join():
    assert plan_consecutive(torch.ones(5, 3), 2).tolist() == [0, 0, 0, 1, 2]


@given(plans(), st.integers(0, 2**31))
def test_merging_keeps_the_weighted_mean(plan, seed):
    metric, num_merged, _, _, _, assignment = plan
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 3, metric.shape[-2], 6, generator=generator)
    sizes = torch.randint(1, 5, tokens.shape[:-1], generator=generator).float()
    merged, merged_sizes = merge(tokens, sizes, assignment, metric.shape[-2] - num_merged)
    for slot in range(merged.shape[-2]):
        members = (assignment == slot)[..., None] * sizes[..., None]
        expected = (tokens * members).sum(-2) / members.sum(-2)
        torch.testing.assert_close(merged[..., slot, :], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged_sizes[..., slot], members.sum((-2, -1)))


@given(plans(), st.integers(0, 2**31))
def test_a_token_that_is_alone_in_its_slot_stays_as_it_is_to_the_bit(plan, seed):
    metric, num_merged, _, _, _, assignment = plan
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 3, metric.shape[-2], 6, generator=generator)
    sizes = torch.randint(1, 9, tokens.shape[:-1], generator=generator).float()
    merged, merged_sizes = merge(tokens, sizes, assignment, metric.shape[-2] - num_merged)
    alone = (assignment[..., None] == assignment[..., None, :]).sum(-1) == 1
    alone &= assignment >= 0
    assert torch.equal(unmerge(merged, assignment)[alone], tokens[alone])
    assert torch.equal(unmerge(merged_sizes[..., None], assignment)[alone].squeeze(-1), sizes[alone])


@given(plans(), st.integers(0, 2**31))
def test_the_gradient_of_a_merge_is_that_of_the_weighted_mean(plan, seed):
    metric, num_merged, _, _, _, assignment = plan
    num_slots = metric.shape[-2] - num_merged
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 3, metric.shape[-2], 6, generator=generator, dtype=torch.float64).requires_grad_()
    sizes = torch.randint(1, 5, tokens.shape[:-1], generator=generator).double()
    weights = torch.randn(2, 3, num_slots, 6, generator=generator, dtype=torch.float64)
    members = (assignment[..., None, :] == torch.arange(num_slots)[:, None]) * sizes[..., None, :]
    means = (members / members.sum(-1, keepdim=True)) @ tokens
    (expected,) = torch.autograd.grad((means * weights).sum(), tokens)
    (actual,) = torch.autograd.grad((merge(tokens, sizes, assignment, num_slots)[0] * weights).sum(), tokens)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@given(plans())
def test_unmerging_gives_every_token_its_slot(plan):
    metric, num_merged, _, _, _, assignment = plan
    values = torch.arange(metric.shape[-2] - num_merged).float()[:, None].expand(2, 3, -1, 1) + 1
    expected = torch.where(assignment < 0, 0, assignment + 1).float()[..., None]
    torch.testing.assert_close(unmerge(values, assignment), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("vote", [False, True])
def test_no_shape_depends_on_values_and_nothing_leaves_the_device_of_the_tokens(strategy, vote):
    # Tensors of this device have no values, and join with none of another device.
    metric, importance = torch.empty(2, 5, 8, 4, device="meta"), torch.empty(2, 8, device="meta")
    assignment = plan_aggregation(metric if vote else metric[:, 0], 3, strategy, importance, vote=vote)
    merged, sizes = merge(torch.empty(2, 8, 6, device="meta"), torch.empty(2, 8, device="meta"), assignment, 5)
    assert (merged.shape, sizes.shape) == ((2, 5, 6), (2, 5))
    tensors = [assignment, plan_consecutive(metric, 3), merged, sizes, unmerge(merged, assignment)]
    tensors += [compose(assignment, assignment), flatten_frames(assignment, 2), flatten_patches(assignment[None], 5)]
    assert all(tensor.is_meta for tensor in tensors)


def test_frames_merge_with_all_their_patches():
    torch.manual_seed(0)
    videos, sizes = torch.randn(2, 6, 5, 4), torch.ones(2, 6, 5)
    assignment = torch.tensor([[0, 1, 1, 2, 2, 3], [3, 0, 0, 1, 2, 0]])
    merged, merged_sizes = merge(videos, sizes, assignment, 4)
    torch.testing.assert_close(merged[0, 1], videos[0, 1:3].mean(0))
    torch.testing.assert_close(merged[1, 0], videos[1, [1, 2, 5]].mean(0))
    assert merged_sizes[1, 0].tolist() == [3.0] * 5


def test_tokens_without_a_batch_merge_as_a_batch_of_one():
    tokens, sizes, assignment = torch.randn(5, 4), torch.tensor([1.0, 2, 3, 1, 1]), torch.tensor([1, 0, 1, -1, 2])
    merged, merged_sizes = merge(tokens, sizes, assignment, 3)
    expected, expected_sizes = merge(tokens[None], sizes[None], assignment[None], 3)
    assert torch.equal(merged, expected[0])
    assert merged_sizes.tolist() == expected_sizes[0].tolist() == [2, 4, 1]
    assert torch.equal(unmerge(merged, assignment), unmerge(merged[None], assignment[None])[0])


def test_composed_assignments_do_both_steps():
    first = torch.tensor([0, 1, 1, -1, 2])
    second = torch.tensor([1, -1, 0])
    assert compose(first, second).tolist() == [1, -1, -1, -1, 0]


def test_assignments_of_frames_and_patches_become_one_of_all_tokens():
    assert flatten_frames(torch.tensor([[1, -1, 0]]), 2).tolist() == [[2, 3, -1, -1, 0, 1]]
    assert flatten_patches(torch.tensor([[[1, 0, -1], [0, 1, 1]]]), 2).tolist() == [[1, 0, -1, 2, 3, 3]]


@pytest.mark.parametrize(
    ("num_tokens", "class_token_ahead", "limit"),
    [(8, False, 3), (7, False, 3), (1, False, 0), (9, True, 4), (8, True, 4), (1, True, 0)],
)
def test_a_step_takes_at_most_half(num_tokens, class_token_ahead, limit):
    assert limit_merges(100, num_tokens, class_token_ahead) == limit
    assert limit_merges(0, num_tokens, class_token_ahead) == 0
    assert class_token_ahead or limit_merges(100, num_tokens) == limit


def test_merging_in_bfloat16_sums_in_float32():
    tokens = torch.full((1, 257, 1), 1.0, dtype=torch.bfloat16)
    assignment = torch.zeros(1, 257, dtype=torch.long)
    merged, sizes = merge(tokens, torch.ones(1, 257), assignment, 1)
    assert merged.dtype == torch.bfloat16 and merged.item() == 1.0  # a bfloat16 sum stops growing at 256
    assert sizes.item() == 257


def test_tokens_that_bfloat16_could_not_tell_apart_are_told_apart():
    degrees = torch.tensor([0.0, 3.0, 90.0, 2.9])  # the cosines to the first differ by less than 2 ** -8
    metric = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)
    assert plan_aggregation(metric, 1).tolist() == [2, 1, 0, 2]


def test_autocast_changes_no_plan():
    metric = torch.randn(64, 50, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = plan_aggregation(metric, 10), plan_consecutive(metric, 10)
    assert torch.equal(plan_aggregation(metric, 10), under_autocast[0])
    assert torch.equal(plan_consecutive(metric, 10), under_autocast[1])


def test_autocast_changes_neither_importance_nor_merges():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, 50, 8, generator=generator)
    tokens, assignment = torch.randn(2, 50, 8, generator=generator), torch.arange(50).expand(2, -1) // 2

    def importance_and_merges():
        return received_attention(query, key, 0.3), *merge(tokens, torch.ones(2, 50), assignment, 25)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = importance_and_merges()
    torch.testing.assert_close(under_autocast, importance_and_merges(), rtol=0, atol=0)
