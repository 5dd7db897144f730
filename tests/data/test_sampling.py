from collections import Counter
from itertools import accumulate, islice, pairwise

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_testa.data.sampling import EpochBatchSampler, distractor_rows


def epoch_of(sampler, epoch=0):
    first = epoch * sampler.batches_per_epoch
    return list(islice(sampler, first, first + sampler.batches_per_epoch))


@st.composite
def hard_negatives(draw):
    """Rows of which some name others, in any way."""
    num_rows = draw(st.integers(2, 40))
    row = st.integers(0, num_rows - 1)
    return [draw(st.lists(row.filter(lambda other, own=own: other != own), max_size=2)) for own in range(num_rows)]


@given(hard_negatives(), st.integers(1, 9), st.integers(0, 100))
def test_an_epoch_is_full_batches_of_different_rows(partners, batch_size, seed):
    batch_size = min(batch_size, len(partners))
    batches = epoch_of(EpochBatchSampler(len(partners), batch_size, seed, partners), epoch=2)
    assert len(batches) == len(partners) // batch_size
    assert all(len(batch) == batch_size for batch in batches)
    assert max(Counter(row for batch in batches for row, _ in batch).values()) == 1


@given(st.integers(1, 30), st.integers(0, 5), st.integers(2, 9), st.integers(0, 100))
def test_twins_share_a_batch(num_pairs, num_singles, batch_size, seed):
    num_rows = 2 * num_pairs + num_singles
    batch_size = min(batch_size, num_rows)
    partners = [[row ^ 1] if row < 2 * num_pairs else [] for row in range(num_rows)]
    batches = [
        {row for row, _ in batch} for batch in epoch_of(EpochBatchSampler(num_rows, batch_size, seed, partners))
    ]
    parted = sum(row < 2 * num_pairs and row ^ 1 not in batch for batch in batches for row in batch)
    # An odd place that no single row fills takes half a pair; for even batches that is one pair at the most.
    assert parted <= (len(batches) + 1 if batch_size % 2 else 2)


@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 40), st.integers(0, 100))
@settings(max_examples=50)
def test_a_sampler_goes_on_where_another_stopped(num_rows, batch_size, done, seed):
    batch_size = min(batch_size, num_rows)
    whole = list(islice(EpochBatchSampler(num_rows, batch_size, seed), done + 10))
    resumed = EpochBatchSampler(num_rows, batch_size, seed)
    resumed.first_batch = done
    assert list(islice(resumed, 10)) == whole[done:]


def test_epochs_and_seeds_differ():
    sampler = EpochBatchSampler(20, 4, seed=1)
    assert epoch_of(sampler, 0) != epoch_of(sampler, 1) != epoch_of(EpochBatchSampler(20, 4, seed=2), 1)


@st.composite
def mixtures(draw):
    """Sizes and weights of sources."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    weights = draw(st.lists(st.floats(0, 100), min_size=len(sizes), max_size=len(sizes)).filter(lambda w: sum(w) > 0))
    return sizes, weights


def rows_by_source(batches, sizes):
    """How often each row is drawn, one counter a source."""
    counts = Counter(row for batch in batches for row, _ in batch)
    return [[counts[row] for row in range(*ends)] for ends in pairwise(accumulate(sizes, initial=0))]


@given(mixtures(), st.integers(0, 3), st.integers(0, 100))
def test_each_source_has_its_share_of_every_epoch(mixture, epoch, seed):
    sizes, weights = mixture
    sampler = EpochBatchSampler(sum(sizes), 1, seed, source_sizes=sizes, source_weights=weights)
    shares = [sum(counts) for counts in rows_by_source(epoch_of(sampler, epoch), sizes)]
    assert sum(shares) == sum(sizes)
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - sum(sizes) * weight / sum(weights)) <= 1 + 1e-6


@given(mixtures(), st.integers(1, 6), st.integers(0, 100))
def test_no_row_of_a_source_is_drawn_again_before_all_others(mixture, num_epochs, seed):
    sizes, weights = mixture
    sampler = EpochBatchSampler(sum(sizes), 1, seed, source_sizes=sizes, source_weights=weights)
    batches = islice(sampler, num_epochs * sum(sizes))
    assert all(max(counts) - min(counts) <= 1 for counts in rows_by_source(batches, sizes))


@given(mixtures(), st.integers(1, 5), st.integers(0, 40), st.integers(0, 100))
@settings(max_examples=50)
def test_a_mixture_goes_on_where_another_stopped(mixture, batch_size, done, seed):
    sizes, weights = mixture
    batch_size = min(batch_size, sum(sizes))
    whole, resumed = (
        EpochBatchSampler(sum(sizes), batch_size, seed, source_sizes=sizes, source_weights=weights) for _ in range(2)
    )
    resumed.first_batch = done
    assert list(islice(resumed, 10)) == list(islice(whole, done, done + 10))


def test_a_row_that_an_epoch_repeats_gets_another_seed_each_time():
    (batch,) = epoch_of(EpochBatchSampler(100, 100, source_sizes=[2, 98], source_weights=[1, 1]))
    assert len({seed for row, seed in batch if row == 0}) == 25
    assert len(set(batch)) == 100


def test_the_parts_of_an_epoch_are_mixed():
    first_half = epoch_of(EpochBatchSampler(200, 100, source_sizes=[100, 100], source_weights=[1, 1]))[0]
    assert 30 < sum(row < 100 for row, _ in first_half) < 70


def test_sources_without_weights_change_nothing():
    plain, sources = EpochBatchSampler(30, 4, seed=5), EpochBatchSampler(30, 4, seed=5, source_sizes=[10, 20])
    assert list(islice(plain, 20)) == list(islice(sources, 20))


def test_twins_in_a_mixture_share_a_batch():
    partners = [[row ^ 1] for row in range(40)]
    sampler = EpochBatchSampler(40, 8, hard_negatives=partners, source_sizes=[4, 36], source_weights=[1, 1])
    for batch in epoch_of(sampler):
        # Of the four rows of the small source each is drawn five times, of the large one each half of the rows once.
        counts = Counter(row for row, _ in batch if row < 4)
        assert counts[0] == counts[1] and counts[2] == counts[3]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([3, 4], [1, 1], "have 3, 4 rows and the training set 10"),
        ([10, 0], [1, 1], "none may be empty"),
        ([4, 6], [1], "1 weights for 2 sources"),
        ([4, 6], [], "0 weights for 2 sources"),
        ([4, 6], [2, -1], "are 2, -1; none may be negative"),
        ([4, 6], [0, 0], "one at least must be positive"),
        ([4, 6], [float("nan"), 1], "are nan, 1"),
        (None, [1, 1], "2 weights for 1 sources"),
    ],
)
def test_sources_and_weights_that_make_no_mixture_are_errors(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        EpochBatchSampler(10, 2, source_sizes=sizes, source_weights=weights)


def test_a_row_is_paired_with_any_row_of_the_video_it_names():
    table = Dataset.from_dict({"video_id": ["a", "b", "a"], "distractor": ["b", "a", "b"]})
    assert distractor_rows(table) == [[1], [0, 2], [1]]
    with pytest.raises(ValueError, match="column `distractor`"):
        distractor_rows(table.remove_columns("distractor"))


def test_too_few_rows_for_a_batch_is_an_error():
    with pytest.raises(ValueError, match="has 3 rows and a batch 4; lower per_device_train_batch_size"):
        EpochBatchSampler(3, 4)
