"""Which rows make a training batch: epochs in random order, mixtures of sources, hard negatives side by side."""

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator

import datasets
import numpy as np
from torch.utils.data import Sampler


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (row number, seed), epoch after epoch; an epoch's order depends on `seed` and its number only.

    Rows that don't fill a last batch are left out of that epoch. Set `first_batch` to go on in the middle of a run.

    With `source_weights` the table is a mixture of sources that lie in it one after the other. An epoch still has
    `num_rows` rows, of which each source gives its share of the weights, rounded to whole rows: it goes through its
    own rows in random order, all of them before any again, and the next epoch goes on where this one stopped. So an
    epoch repeats rows of a small source, each time with another seed, and takes a part of a large one.

    Args:
        num_rows: Rows of the table.
        batch_size: Rows of a batch, over all processes.
        seed: Of the order, and of the seeds that each row gets for frame sampling and augmentation.
        hard_negatives: For each row the rows that should share its batch, of which one does if possible, as
            [`distractor_rows`] gives them.
        source_sizes: Rows of each source, in the order in which they lie in the table.
        source_weights: What each source counts; if not given, an epoch is every row once.

    Raises:
        ValueError: There are fewer rows than a batch needs, the sources don't add up to the table, or their weights
            aren't one a source, none of them negative and some positive.
    """

    drop_last = True

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int = 0,
        hard_negatives: list[list[int]] | None = None,
        source_sizes: list[int] | None = None,
        source_weights: list[float] | None = None,
    ):
        if num_rows < batch_size:
            raise ValueError(
                f"The training set has {num_rows} rows and a batch {batch_size}; lower per_device_train_batch_size."
            )
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.hard_negatives = hard_negatives or [[]] * num_rows
        self.source_sizes = source_sizes or [num_rows]
        if min(self.source_sizes) < 1 or sum(self.source_sizes) != num_rows:
            raise ValueError(
                f"The sources have {', '.join(map(str, self.source_sizes))} rows and the training set {num_rows}; they "
                "must add up, and none may be empty."
            )
        self.source_shares = None
        if source_weights is not None:
            self.source_shares = _shares(source_weights, len(self.source_sizes), num_rows)
        self.first_batch = 0

    @property
    def batches_per_epoch(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, skipped = divmod(self.first_batch, self.batches_per_epoch)
        for epoch in itertools.count(first_epoch):
            yield from self._batches_of(epoch)[skipped:]
            skipped = 0

    def batch(self, number: int) -> list[tuple[int, int]]:
        """Return a batch by its number, counted from the start of the run."""
        epoch, place = divmod(number, self.batches_per_epoch)
        return self._batches_of(epoch)[place]

    def _batches_of(self, epoch: int) -> list[list[tuple[int, int]]]:
        rows = self._rows_of(epoch)
        generator = np.random.default_rng([self.seed, epoch])
        draws = generator.permutation(self.num_rows).tolist()
        seeds = generator.integers(2**31, size=self.num_rows).tolist()
        order = _chain(_with_hard_negatives(draws, rows, self.hard_negatives), self.batch_size)
        keys = [(rows[draw], seeds[draw]) for draw in order]
        starts = range(0, self.batches_per_epoch * self.batch_size, self.batch_size)
        return [keys[start : start + self.batch_size] for start in starts]

    def _rows_of(self, epoch: int) -> list[int]:
        """The row of each of an epoch's draws, before they are shuffled."""
        if self.source_shares is None:
            return list(range(self.num_rows))
        rows, first_row = [], 0
        for source, (size, share) in enumerate(zip(self.source_sizes, self.source_shares, strict=True)):
            passes, start = divmod(epoch * share, size)
            order = itertools.chain.from_iterable(self._pass(source, number) for number in itertools.count(passes))
            rows += [first_row + row for row in itertools.islice(order, start, start + share)]
            first_row += size
        return rows

    def _pass(self, source: int, number: int) -> list[int]:
        # A list [seed, source, number] could give a pass the random numbers of an epoch [seed, source].
        generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(source, number)))
        return generator.permutation(self.source_sizes[source]).tolist()


def _shares(weights: list[float], num_sources: int, num_rows: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `num_rows`."""
    if len(weights) != num_sources:
        raise ValueError(f"There are {len(weights)} weights for {num_sources} sources; give one a source.")
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"The weights of the sources are {', '.join(map(str, weights))}; none may be negative and one at least "
            "must be positive."
        )
    ends = np.cumsum(weights)
    return np.diff(np.round(num_rows * (ends / ends[-1])).astype(int), prepend=0).tolist()


def distractor_rows(table: datasets.Dataset) -> list[list[int]]:
    """Return for each row of a table the rows of the video that its `distractor` names.

    Raises:
        ValueError: The table has no column `distractor`.
    """
    if "distractor" not in table.column_names:
        raise ValueError("group_distractors needs a column `distractor` in the training annotations.")
    rows_of = defaultdict(list)
    for number, video_id in enumerate(table["video_id"][:]):
        rows_of[video_id].append(number)
    return [rows_of.get(distractor, []) for distractor in table["distractor"][:]]


def _with_hard_negatives(
    draws: list[int], rows: list[int], hard_negatives: list[list[int]]
) -> Iterator[tuple[int, ...]]:
    draws_of = defaultdict(list)
    for draw, row in enumerate(rows):
        draws_of[row].append(draw)
    taken: set[int] = set()
    for draw in draws:
        if draw not in taken:
            others = itertools.chain.from_iterable(draws_of[row] for row in hard_negatives[rows[draw]])
            group = (draw, *[other for other in others if other not in taken][:1])
            taken.update(group)
            yield group


def _chain(groups: Iterable[tuple[int, ...]], batch_size: int) -> list[int]:
    """Join rows and pairs of rows to one order whose batches break as few pairs as possible."""
    groups = list(groups)
    singles: deque[tuple[int, ...]] = deque(group for group in groups if len(group) == 1)
    placed: set[tuple[int, ...]] = set()
    order: list[int] = []
    for group in groups:
        if group in placed:
            continue
        if len(group) > batch_size - len(order) % batch_size:
            # A pair before the last place of a batch: a later single goes first, or else half of this pair.
            while singles and singles[0] in placed:
                singles.popleft()
            if not singles:
                singles.extend([group[:1], group[1:]])
                placed.add(group)
            placed.add(singles[0])
            order += singles.popleft()
        if group not in placed:
            placed.add(group)
            order += group
    return order + [row for single in singles if single not in placed for row in single]
