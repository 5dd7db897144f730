"""From the annotation table to batches: decoding, caching, batches with hard negatives, collation."""

import hashlib
import itertools
import json
import logging
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import Sampler

from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.video_decoding_testa import RANDOM_FRAME_SAMPLING, VideoDecodingError
from transformers_testa.video_processing_testa import TestaVideoProcessor


logger = logging.getLogger(__name__)


class VideoTextDataset(torch.utils.data.Dataset):
    """Rows of an annotation table with their frames, decoded when asked for.

    An item is the row as a dict plus `frames` (uint8 `[T, C, H, W]`) and `pair_id` (int, equal for rows of one video),
    or, where the video can't be decoded, plus `error` (why) instead of `frames`.

    Args:
        table: What [`load_annotations`] returns.
        video_processor: Decodes and samples the frames.
        frames: What [`cache_frames`] returned for this table and video processor: nothing is decoded then.
    """

    def __init__(
        self, table: datasets.Dataset, video_processor: TestaVideoProcessor, frames: datasets.Dataset | None = None
    ):
        self.table = table
        self.video_processor = video_processor
        self.frames = frames
        self.pair_ids = {video_id: number for number, video_id in enumerate(dict.fromkeys(table["video_id"]))}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        """Return a row; `key` is its number, or its number and the seed of its frame sampling."""
        number, seed = key if isinstance(key, tuple) else (key, None)
        row = self.table[number]
        pair_id = self.pair_ids[row["video_id"]]
        if self.frames is None:
            found = _decode(row, self.video_processor, seed)
        else:
            cached = self.frames[pair_id]
            found = {"error": cached["error"]} if cached["error"] else {"frames": _from_bytes(cached)}
        return {**row, **found, "pair_id": pair_id}

    def digest(self) -> str:
        """Return a short hash of the rows, which doesn't change when the videos lie in another folder."""
        rows = [{name: value for name, value in row.items() if name != "video"} for row in self.table]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _decode(row: dict, video_processor: TestaVideoProcessor, seed: int | None = None) -> dict:
    try:
        return {"frames": video_processor.decode(row["video"], start=row.get("start"), end=row.get("end"), seed=seed)}
    except VideoDecodingError as error:
        return {"error": str(error)}


def distinct_videos(table: datasets.Dataset) -> datasets.Dataset:
    """Return the first row of each video, in the order of their first appearance."""
    first_rows = {}
    for number, video_id in enumerate(table["video_id"]):
        first_rows.setdefault(video_id, number)
    return table.select(list(first_rows.values()))


def cache_frames(
    table: datasets.Dataset,
    video_processor: TestaVideoProcessor,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Decode each distinct video of a table once, into a memory-mapped file that later runs find again.

    The file is named after the videos (path, size, time of change, clip) and the video processor's settings: a changed
    video or setting is decoded anew.

    Args:
        table: What [`load_annotations`] returns.
        video_processor: Decodes and samples the frames.
        cache_dir: Where the file goes; a folder of the datasets library's cache if not given.
        num_proc: Processes that decode.

    Returns:
        One row a distinct video, in the order of [`distinct_videos`]: `frames` (uint8, as bytes), `shape`
        `[T, C, H, W]` and `error` (None, or why the video can't be decoded).

    Raises:
        ValueError: The video processor draws frames at random, which a cache would draw once for all epochs.
    """
    if video_processor.frame_sampling in RANDOM_FRAME_SAMPLING:
        raise ValueError(
            f"cache_frames keeps one choice of frames for each video, and frame_sampling="
            f"{video_processor.frame_sampling!r} draws others every time; use uniform or middle sampling, or no cache."
        )
    videos = distinct_videos(table)
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "transformers_testa")
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.dumps([video_processor.to_json_string(), [_clip_identity(row) for row in videos]], sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return videos.map(
        _decode_to_bytes,
        fn_kwargs={"video_processor": video_processor},
        remove_columns=videos.column_names,
        features=datasets.Features(
            frames=datasets.Value("large_binary"),
            shape=datasets.List(datasets.Value("int32")),
            error=datasets.Value("string"),
        ),
        writer_batch_size=16,
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"frames-{fingerprint}.arrow"),
        desc="Decoding videos",
    )


def _clip_identity(row: dict) -> list:
    clip = [row["video"], row.get("start"), row.get("end")]
    if "://" in row["video"]:
        return clip
    status = os.stat(row["video"])
    return [*clip, status.st_size, status.st_mtime_ns]


def _decode_to_bytes(row: dict, video_processor: TestaVideoProcessor) -> dict:
    found = _decode(row, video_processor)
    frames = found.get("frames", torch.empty(0, dtype=torch.uint8))
    return {"frames": frames.numpy().tobytes(), "shape": list(frames.shape), "error": found.get("error")}


def _from_bytes(cached: dict) -> torch.Tensor:
    return torch.frombuffer(bytearray(cached["frames"]), dtype=torch.uint8).reshape(cached["shape"])


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (row number, seed), epoch after epoch; an epoch's order depends on `seed` and its number only.

    Rows that don't fill a last batch are left out of that epoch. Set `first_batch` to go on in the middle of a run.

    Args:
        num_rows: Rows of the table.
        batch_size: Rows of a batch, over all processes.
        seed: Of the order and of the frame sampling.
        hard_negatives: For each row the rows that should share its batch, of which one does if possible, as
            [`distractor_rows`] gives them.

    Raises:
        ValueError: There are fewer rows than a batch needs.
    """

    drop_last = True

    def __init__(self, num_rows: int, batch_size: int, seed: int = 0, hard_negatives: list[list[int]] | None = None):
        if num_rows < batch_size:
            raise ValueError(
                f"The training set has {num_rows} rows and a batch {batch_size}; lower per_device_train_batch_size."
            )
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.hard_negatives = hard_negatives or [[]] * num_rows
        self.first_batch = 0

    @property
    def batches_per_epoch(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, skipped = divmod(self.first_batch, self.batches_per_epoch)
        for epoch in itertools.count(first_epoch):
            yield from self._batches_of(epoch)[skipped:]
            skipped = 0

    def _batches_of(self, epoch: int) -> list[list[tuple[int, int]]]:
        generator = np.random.default_rng([self.seed, epoch])
        rows = generator.permutation(self.num_rows).tolist()
        seeds = generator.integers(2**31, size=self.num_rows).tolist()
        order = _chain(_with_hard_negatives(rows, self.hard_negatives), self.batch_size)
        keys = [(row, seeds[row]) for row in order]
        starts = range(0, self.batches_per_epoch * self.batch_size, self.batch_size)
        return [keys[start : start + self.batch_size] for start in starts]


def distractor_rows(table: datasets.Dataset) -> list[list[int]]:
    """Return for each row of a table the rows of the video that its `distractor` names.

    Raises:
        ValueError: The table has no column `distractor`.
    """
    if "distractor" not in table.column_names:
        raise ValueError("group_distractors needs a column `distractor` in the training annotations.")
    rows_of = defaultdict(list)
    for number, video_id in enumerate(table["video_id"]):
        rows_of[video_id].append(number)
    return [rows_of.get(distractor, []) for distractor in table["distractor"]]


def _with_hard_negatives(rows: list[int], hard_negatives: list[list[int]]) -> Iterator[tuple[int, ...]]:
    taken = set()
    for row in rows:
        if row not in taken:
            partners = (other for other in hard_negatives[row] if other not in taken)
            group = (row, *list(partners)[:1])
            taken.update(group)
            yield group


def _chain(groups: Iterable[tuple[int, ...]], batch_size: int) -> list[int]:
    """Join rows and pairs of rows to one order whose batches break as few pairs as possible."""
    groups = list(groups)
    singles = deque(group for group in groups if len(group) == 1)
    placed, order = set(), []
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


def collate_training_samples(samples: list[dict], processor: TestaProcessor, max_words: int) -> dict:
    """Make a training batch of the samples whose video could be decoded.

    Args:
        samples: Items of [`VideoTextDataset`].
        processor: Tokenizes the texts and normalises the frames.
        max_words: Tokens kept of each text.

    Returns:
        `pixel_values_videos` (float `[B, T, C, H, W]`), `input_ids` and `attention_mask` (int64 `[B, N]`), `pair_ids`
        (int64 `[B]`, equal for samples of one video), and `broken_videos`, a list of (path, reason). Only the last
        where no video could be decoded.
    """
    batch = collate_videos(samples, processor)
    decoded = [sample for sample in samples if "frames" in sample]
    if decoded:
        del batch["video_id"]
        batch |= _tokenize([sample["text"] for sample in decoded], processor, max_words)
        batch["pair_ids"] = torch.tensor([sample["pair_id"] for sample in decoded])
    return batch


def collate_videos(samples: list[dict], processor: TestaProcessor) -> dict:
    """Make a batch of videos: `pixel_values_videos`, `video_id` (list of str) and `broken_videos`, as in training."""
    decoded = [sample for sample in samples if "frames" in sample]
    batch = {"broken_videos": [(sample["video"], sample["error"]) for sample in samples if "error" in sample]}
    if decoded:
        videos = [sample["frames"] for sample in decoded]
        batch |= processor.video_processor(videos, do_sample_frames=False, do_resize=False, return_tensors="pt")
        batch["video_id"] = [sample["video_id"] for sample in decoded]
    return batch


def collate_texts(rows: list[dict], processor: TestaProcessor, max_words: int) -> dict:
    """Make a batch of texts.

    Args:
        rows: Rows of the annotation table, each with its number as `index`.
        processor: Tokenizes the texts.
        max_words: Tokens kept of each text.

    Returns:
        `input_ids` and `attention_mask` (int64 `[B, N]`), and lists: `video_id`, `distractor` (None where a row names
        none) and `index`.
    """
    names = {name: [row.get(name) for row in rows] for name in ("video_id", "distractor", "index")}
    return _tokenize([row["text"] for row in rows], processor, max_words) | names


def _tokenize(texts: list[str], processor: TestaProcessor, max_words: int) -> dict:
    encoded = processor.tokenizer(texts, padding=True, truncation=True, max_length=max_words, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


class BrokenVideos(dict):
    """The videos of a run that couldn't be decoded: path → reason. Each is reported once, when it is first met."""

    def take_from(self, batch: dict) -> int:
        """Move a batch's broken videos here and return how many samples the batch has left."""
        for video, reason in batch.pop("broken_videos"):
            if video not in self:
                logger.warning(f"A video is left out of the run: {reason}")
            self[video] = reason
        return len(batch.get("pixel_values_videos", ()))

    def filter(self, batches: Iterable[dict]) -> Iterator[dict]:
        """Yield the batches that have samples left, without their broken videos."""
        return (batch for batch in batches if self.take_from(batch))
