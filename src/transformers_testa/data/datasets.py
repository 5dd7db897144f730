"""From the annotation table to batches: decoding, augmentation, caching, collation."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import ChannelDimension

from transformers_testa.data.augmentation import VideoAugmentation
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.video_decoding_testa import RANDOM_FRAME_SAMPLING, Timeline, VideoDecodingError
from transformers_testa.video_processing_testa import TestaVideoProcessor


if TYPE_CHECKING:
    import pyarrow as pa


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Of the formats that Pillow can open, some run another program (PostScript), whatever the file is called.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# Settings of a video processor that choose frames and don't change them.
CHOOSING_SETTINGS = ("num_frames", "fps", "frame_sampling", "do_sample_frames", "strict", "start", "end", "seed")


class VideoTextDataset(torch.utils.data.Dataset):
    """Rows of an annotation table with their frames, decoded when asked for.

    An item is the row as a dict plus `frames` (uint8 `[T, C, H, W]`), `index` (int, the row's number) and `pair_id`
    (int, equal for rows of one video), or, where the video can't be decoded, with `error` (why) instead of `frames`.
    A `video` that is an image file (its name ends in one of `IMAGE_SUFFIXES`) stands still for all frames.

    Args:
        table: What [`load_annotations`] returns, for any task.
        video_processor: Decodes and samples the frames.
        frames: What [`cache_frames`] or [`cache_videos`] returned for this table and video processor: nothing is decoded
            then.
        augmentation: Changes the frames, at every access with its seed; the cache holds them unchanged.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        video_processor: TestaVideoProcessor,
        frames: datasets.Dataset | None = None,
        augmentation: VideoAugmentation | None = None,
    ):
        self.table = table
        self.video_processor = video_processor
        self.frames = frames
        self.augmentation = augmentation
        self.pair_ids = {video_id: number for number, video_id in enumerate(dict.fromkeys(table["video_id"][:]))}
        if frames is not None and "video" in frames.column_names:
            self._videos = frames.with_format("arrow")
            self._row_of_video = {video: number for number, video in enumerate(frames["video"][:])}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: int | tuple[int, int | None]) -> dict:
        """Return a row; `key` is its number, or its number and the seed of its frame sampling and augmentation.

        Raises:
            ValueError: There is an augmentation and no seed, or its crop is larger than the frames.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int | None]]) -> list[dict]:
        """Return the rows of a batch, as a loader asks for them: the table is read once for all."""
        numbers, seeds = _split_keys(keys)
        if self.augmentation and None in seeds:
            raise ValueError(
                f"Row {numbers[seeds.index(None)]} is asked for without a seed, which augmentation needs: ask for "
                f"(row, seed)."
            )
        rows = self._read(numbers)
        samples = []
        for row, found, number, seed in zip(rows, self._find_frames(rows, seeds), numbers, seeds, strict=True):
            if self.augmentation and seed is not None and "frames" in found:
                found["frames"] = self.augmentation(found["frames"], seed)
            samples.append({**row, **found, "index": number, "pair_id": self.pair_ids[row["video_id"]]})
        return samples

    def _read(self, numbers: list[int]) -> list[dict]:
        columns = self.table[numbers]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _find_frames(self, rows: list[dict], seeds: list[int | None]) -> Iterator[dict]:
        if self.frames is None:
            for row, seed in zip(rows, seeds, strict=True):
                yield _decode(row, self.video_processor, seed=seed)
        elif "video" in self.frames.column_names:
            cached = self._videos[[self._row_of_video[row["video"]] for row in rows]]
            for place, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
                yield _take(row, cached.slice(place, 1), self.video_processor, seed)
        else:
            cached = self.frames[[self.pair_ids[row["video_id"]] for row in rows]]
            for pixels, shape, error in zip(cached["frames"], cached["shape"], cached["error"], strict=True):
                yield {"error": error} if error else {"frames": _from_bytes(pixels, shape)}

    def video_ids(self, rows: list[int]) -> list[str]:
        """Return the `video_id` of each of these items."""
        return self.table.select(rows)["video_id"]

    def digest(self) -> str:
        """Return a short hash of the rows, which doesn't change when the videos lie in another folder."""
        digest = hashlib.sha256()
        for name in sorted(set(self.table.column_names) - {"video"}):
            digest.update(json.dumps([name, self.table[name][:]]).encode())
        return digest.hexdigest()[:16]


class VideoQuestionsDataset(VideoTextDataset):
    """Videos with several of their questions each, so that a video is encoded once for all of them.

    An item is that of the first row of a video in [`VideoTextDataset`], plus `questions`: a list of
    `questions_per_video` rows of that video, each with its `index`. Asked for with a seed, they are drawn with it, else
    they are in order; again from the first where a video has fewer.

    Args:
        table: What [`load_annotations`] returns for questions or choices.
        questions_per_video: Rows of each item.
        all_questions: Whether a video with more questions makes several items, so that each question is in one.
        kwargs: The other arguments of [`VideoTextDataset`].
    """

    def __init__(
        self,
        table: datasets.Dataset,
        *args: Any,
        questions_per_video: int = 1,
        all_questions: bool = False,
        **kwargs: Any,
    ):
        super().__init__(table, *args, **kwargs)
        self.questions_per_video = questions_per_video
        self.rows_of_video: list[list[int]] = [[] for _ in self.pair_ids]
        for row, video_id in enumerate(table["video_id"][:]):
            self.rows_of_video[self.pair_ids[video_id]].append(row)
        if all_questions:
            self.rows_of_video = [
                rows[first : first + questions_per_video]
                for rows in self.rows_of_video
                for first in range(0, len(rows), questions_per_video)
            ]

    def __len__(self) -> int:
        return len(self.rows_of_video)

    def video_ids(self, rows: list[int]) -> list[str]:
        """Return the `video_id` of each of these items."""
        return super().video_ids([self.rows_of_video[row][0] for row in rows])

    def __getitems__(self, keys: Sequence[int | tuple[int, int | None]]) -> list[dict]:
        """Return videos; a key is a number, or a number and the seed of the questions, frames and augmentation."""
        numbers, seeds = _split_keys(keys)
        of_videos = [self.rows_of_video[number] for number in numbers]
        videos = super().__getitems__([(rows[0], seed) for rows, seed in zip(of_videos, seeds, strict=True)])
        chosen = np.concatenate(
            [
                np.resize(
                    rows if seed is None else np.random.default_rng(seed).permutation(rows), self.questions_per_video
                )
                for rows, seed in zip(of_videos, seeds, strict=True)
            ]
        ).tolist()
        questions = ({**row, "index": number} for row, number in zip(self._read(chosen), chosen, strict=True))
        return [{**video, "questions": list(islice(questions, self.questions_per_video))} for video in videos]


def _split_keys(keys: Sequence[int | tuple[int, int | None]]) -> tuple[list[int], list[int | None]]:
    pairs = [key if isinstance(key, tuple) else (key, None) for key in keys]
    return [number for number, _ in pairs], [seed for _, seed in pairs]


def _decode(
    row: dict, video_processor: TestaVideoProcessor, seed: int | None = None, decoding_threads: int | None = None
) -> dict:
    try:
        if row["video"].lower().endswith(IMAGE_SUFFIXES):
            return {"frames": _static_video(_read_image(row["video"]), video_processor)}
        return {
            "frames": video_processor.decode(
                row["video"],
                start=row.get("start"),
                end=row.get("end"),
                seed=seed,
                decoding_threads=decoding_threads,
            )
        }
    except VideoDecodingError as error:
        return {"error": str(error)}


def _read_image(file: str) -> np.ndarray:
    """Return the upright picture as uint8 `[H, W, 3]`."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    # What Pillow raises for damaged files of these formats.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoDecodingError(f"{file} cannot be read as an image: {error}") from error


def _static_video(image: np.ndarray, video_processor: TestaVideoProcessor) -> torch.Tensor:
    frame = video_processor.decode(image[None], do_sample_frames=False, input_data_format=ChannelDimension.LAST)
    return frame.repeat(video_processor.num_frames, 1, 1, 1)


def distinct_videos(table: datasets.Dataset) -> datasets.Dataset:
    """Return the first row of each video, in the order of their first appearance."""
    first_rows: dict[str, int] = {}
    for number, video_id in enumerate(table["video_id"][:]):
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
        num_proc: Processes that decode, with one thread each; if not given, this one, with all its threads.

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
    identity = [video_processor.to_json_string(), [_clip_identity(row) for row in videos]]
    return _decode_to_file(videos, _decode_to_bytes, {}, "frames", identity, video_processor, cache_dir, num_proc)


def cache_videos(
    table: datasets.Dataset,
    video_processor: TestaVideoProcessor,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Decode each file of a table once and whole, into a memory-mapped file that later runs find again.

    Any frames of any clips can be taken from it, drawn at random too: it is named after the files (path, size, time of
    change) and what the video processor makes of a frame, not after what it chooses. It is for many clips of short
    videos: every frame is kept, uncompressed, in the size that the video processor gives it.

    Args:
        table, cache_dir, num_proc: As for [`cache_frames`].
        video_processor: Decodes the frames.

    Returns:
        One row a file: `video`, `frames` (uint8, as bytes), `shape` `[T, C, H, W]`, `times` (when each frame is shown)
        and `duration`, in seconds, and `error` (None, or why the video can't be decoded).
    """
    videos = datasets.Dataset.from_dict({"video": sorted(set(table["video"][:]))})
    video_processor = deepcopy(video_processor)
    video_processor.start = video_processor.end = None
    settings = {name: value for name, value in video_processor.to_dict().items() if name not in CHOOSING_SETTINGS}
    identity = [settings, [_clip_identity(row) for row in videos]]
    columns = {
        "video": datasets.Value("string"),
        "times": datasets.List(datasets.Value("float64")),
        "duration": datasets.Value("float64"),
    }
    return _decode_to_file(videos, _decode_whole, columns, "videos", identity, video_processor, cache_dir, num_proc)


def _decode_to_file(
    videos: datasets.Dataset,
    decode: Callable[..., dict],
    columns: dict[str, Any],
    kind: str,
    identity: list,
    video_processor: TestaVideoProcessor,
    cache_dir: str | Path | None,
    num_proc: int | None,
) -> datasets.Dataset:
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "transformers_testa")
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return videos.map(
        decode,
        fn_kwargs={"video_processor": video_processor, "decoding_threads": 1 if num_proc else None},
        remove_columns=videos.column_names,
        features=datasets.Features(
            frames=datasets.Value("large_binary"),
            shape=datasets.List(datasets.Value("int32")),
            error=datasets.Value("string"),
            **columns,
        ),
        writer_batch_size=16,
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"{kind}-{fingerprint}.arrow"),
        desc="Decoding videos",
    )


def _clip_identity(row: dict) -> list:
    clip = [row["video"], row.get("start"), row.get("end")]
    if "://" in row["video"]:
        return clip
    status = os.stat(row["video"])
    return [*clip, status.st_size, status.st_mtime_ns]


def _decode_to_bytes(row: dict, video_processor: TestaVideoProcessor, decoding_threads: int | None) -> dict:
    found = _decode(row, video_processor, decoding_threads=decoding_threads)
    frames = found.get("frames", torch.empty(0, dtype=torch.uint8))
    return {"frames": frames.numpy().tobytes(), "shape": list(frames.shape), "error": found.get("error")}


def _from_bytes(pixels: bytes, shape: list[int]) -> torch.Tensor:
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(shape)


def _decode_whole(row: dict, video_processor: TestaVideoProcessor, decoding_threads: int | None) -> dict:
    unreadable = {"frames": b"", "shape": [0], "times": [], "duration": 0.0}
    try:
        if row["video"].lower().endswith(IMAGE_SUFFIXES):
            frames = _static_video(_read_image(row["video"]), video_processor)[:1]
            times, duration = [0.0], 0.0
        else:
            unfinished = {"do_sample_frames": False, "do_rescale": False, "do_normalize": False}
            outputs = video_processor(
                row["video"], decoding_threads=decoding_threads, return_metadata=True, **unfinished
            )
            (frames,), (metadata,) = outputs["pixel_values_videos"], outputs["video_metadata"]
            times, duration = metadata.timestamps, metadata.duration
    except VideoDecodingError as error:
        return {**row, **unreadable, "error": str(error)}
    return {
        "video": row["video"],
        "frames": frames.contiguous().numpy().tobytes(),
        "shape": list(frames.shape),
        "times": times,
        "duration": duration,
        "error": None,
    }


def _take(row: dict, cached: "pa.Table", video_processor: TestaVideoProcessor, seed: int | None) -> dict:
    """The chosen frames of a row of [`cache_videos`], which is read only where they lie."""
    error, shape, times, duration = (cached[name][0] for name in ("error", "shape", "times", "duration"))
    if error.is_valid:
        return {"error": error.as_py()}
    pixels = np.frombuffer(cached["frames"][0].as_buffer(), np.uint8).reshape(shape.as_py())
    if row["video"].lower().endswith(IMAGE_SUFFIXES):
        return {"frames": torch.from_numpy(pixels.repeat(video_processor.num_frames, axis=0))}
    timeline = Timeline(row["video"], times.values.to_numpy(), duration.as_py())
    try:
        indices = video_processor.choose_frames(timeline, start=row.get("start"), end=row.get("end"), seed=seed)
    except VideoDecodingError as error:
        return {"error": str(error)}
    return {"frames": torch.from_numpy(pixels[indices])}


def check_answers(table: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_answer_tokens: int) -> None:
    """Make sure that no answer of a table is longer than a model may learn: answers are never truncated.

    Args:
        table: Has the columns `question_id` and `answers`.
        tokenizer: Counts the tokens, its own first and last ones included.
        max_answer_tokens: How many an answer may have.

    Raises:
        ValueError: An answer has more.
    """
    question_of: dict[str, str] = {}
    for question_id, answers in zip(table["question_id"][:], table["answers"][:], strict=True):
        for answer in answers:
            question_of.setdefault(answer, question_id)
    tokens = tokenizer(list(question_of))["input_ids"]
    for (answer, question_id), length in zip(question_of.items(), map(len, tokens), strict=True):
        if length > max_answer_tokens:
            raise ValueError(
                f"Question {question_id!r}: the answer {answer!r} has {length} tokens, and max_answer_tokens is "
                f"{max_answer_tokens}; raise it, or leave the question out."
            )


def collate_training_samples(samples: list[dict], processor: TestaProcessor, max_words: int | None) -> dict:
    """Make a training batch of the samples whose video could be decoded.

    Args:
        samples: Items of [`VideoTextDataset`].
        processor: Tokenizes the texts and normalises the frames.
        max_words: Tokens kept of each text; all where None.

    Returns:
        `pixel_values_videos` (float `[B, T, C, H, W]`), `input_ids` and `attention_mask` (int64 `[B, N]`), `pair_ids`
        (int64 `[B]`, equal for samples of one video), and `broken_videos`, a list of (path, reason). Only the last
        where no video could be decoded.
    """
    decoded, batch = _collate_frames(samples, processor)
    if decoded:
        batch |= _tokenize([sample["text"] for sample in decoded], processor, max_words)
        batch["pair_ids"] = torch.tensor([sample["pair_id"] for sample in decoded])
    return batch


def collate_question_samples(samples: list[dict], processor: TestaProcessor, max_question_tokens: int | None) -> dict:
    """Make a training batch of questions and their answers, as [`collate_training_samples`] does of texts.

    Args:
        samples: Items of a [`VideoTextDataset`] of questions, or of a [`VideoQuestionsDataset`].
        processor: Tokenizes the texts and normalises the frames.
        max_question_tokens: Tokens kept of each question; all where None. Answers are kept whole, see [`check_answers`].

    Returns:
        `pixel_values_videos`, `input_ids` and `attention_mask` (int64 `[Q, N]`, the questions: those of the first
        video, of the second, ...), `answer_input_ids` and `answer_attention_mask` (int64 `[A, M]`, the answers of the
        first question, the second, ...), `answer_weights` (float32 `[A]`), `answers_per_question` (int64 `[Q]`) and
        `broken_videos`.
    """
    decoded, batch = _collate_frames(samples, processor)
    if decoded:
        rows = _questions(decoded)
        batch |= _tokenize([row["question"] for row in rows], processor, max_question_tokens)
        answers = _tokenize([answer for row in rows for answer in row["answers"]], processor)
        batch |= {f"answer_{name}": value for name, value in answers.items()}
        weights = [weight for row in rows for weight in row["answer_weights"]]
        batch["answer_weights"] = torch.tensor(weights, dtype=torch.float32)
        batch["answers_per_question"] = torch.tensor([len(row["answers"]) for row in rows])
    return batch


def collate_choice_samples(samples: list[dict], processor: TestaProcessor, max_question_tokens: int | None) -> dict:
    """Make a training batch of multiple-choice questions, as [`collate_training_samples`] does of texts.

    Args:
        samples: Items of a [`VideoTextDataset`] of choices, as many in each row, or of a [`VideoQuestionsDataset`].
        processor: Tokenizes the texts and normalises the frames.
        max_question_tokens: Tokens kept of each text "question? choice"; all where None.

    Returns:
        `pixel_values_videos`, `input_ids` and `attention_mask` (int64 `[Q, choices, N]`), `labels` (int64 `[Q]`, the
        number of the right choice) and `broken_videos`.
    """
    decoded, batch = _collate_frames(samples, processor)
    if decoded:
        rows = _questions(decoded)
        batch |= _tokenize_choices(rows, processor, max_question_tokens)
        batch["labels"] = torch.tensor([row["label"] for row in rows])
    return batch


def collate_questions(samples: list[dict], processor: TestaProcessor, max_question_tokens: int | None) -> dict:
    """Make an evaluation batch of questions; their answers stand in the table.

    Args:
        samples, processor, max_question_tokens: As for [`collate_question_samples`].

    Returns:
        `pixel_values_videos`, `input_ids`, `attention_mask` and `broken_videos` as in training, and lists:
        `question_id` and `index`, the number of each question's row in the table.
    """
    decoded, batch = _collate_frames(samples, processor)
    if decoded:
        rows = _questions(decoded)
        batch |= _tokenize([row["question"] for row in rows], processor, max_question_tokens)
        batch |= _names(rows, "question_id", "index")
    return batch


def collate_choices(samples: list[dict], processor: TestaProcessor, max_question_tokens: int | None) -> dict:
    """Make an evaluation batch of multiple-choice questions; their labels stand in the table.

    Args:
        samples, processor, max_question_tokens: As for [`collate_choice_samples`].

    Returns:
        The same as [`collate_questions`], with `input_ids` and `attention_mask` `[B, choices, N]`.
    """
    decoded, batch = _collate_frames(samples, processor)
    if decoded:
        rows = _questions(decoded)
        batch |= _tokenize_choices(rows, processor, max_question_tokens)
        batch |= _names(rows, "question_id", "index")
    return batch


def collate_videos(samples: list[dict], processor: TestaProcessor) -> dict:
    """Make a batch of videos: `pixel_values_videos`, `video_id` (list of str) and `broken_videos`, as in training."""
    decoded, batch = _collate_frames(samples, processor)
    return batch | _names(decoded, "video_id") if decoded else batch


def collate_texts(rows: list[dict], processor: TestaProcessor, max_words: int | None) -> dict:
    """Make a batch of texts.

    Args:
        rows: Rows of the annotation table, each with its number as `index`.
        processor: Tokenizes the texts.
        max_words: Tokens kept of each text; all where None.

    Returns:
        `input_ids` and `attention_mask` (int64 `[B, N]`), and lists: `video_id`, `distractor` (None where a row names
        none) and `index`.
    """
    names = _names(rows, "video_id", "distractor", "index")
    return _tokenize([row["text"] for row in rows], processor, max_words) | names


def _questions(samples: list[dict]) -> list[dict]:
    return [row for sample in samples for row in sample.get("questions", [sample])]


def _names(rows: list[dict], *columns: str) -> dict[str, list]:
    return {column: [row.get(column) for row in rows] for column in columns}


def _collate_frames(samples: list[dict], processor: TestaProcessor) -> tuple[list[dict], dict]:
    """Return the samples whose video could be decoded, and a batch of their frames and of the broken videos."""
    decoded = [sample for sample in samples if "frames" in sample]
    batch = {"broken_videos": [(sample["video"], sample["error"]) for sample in samples if "error" in sample]}
    if decoded:
        # As one video, since each would take its own time.
        frames = torch.stack([sample["frames"] for sample in decoded])
        unchanged = {"do_sample_frames": False, "do_resize": False, "return_tensors": "pt"}
        pixels = processor.video_processor(frames.flatten(0, 1), **unchanged)["pixel_values_videos"]
        batch["pixel_values_videos"] = pixels.view(frames.shape)
    return decoded, batch


def _tokenize(texts: list[str], processor: TestaProcessor, max_tokens: int | None = None) -> dict:
    truncation = {"truncation": max_tokens is not None, "max_length": max_tokens}
    encoded = processor.tokenizer(texts, padding=True, return_tensors="pt", return_attention_mask=True, **truncation)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _tokenize_choices(samples: list[dict], processor: TestaProcessor, max_tokens: int | None) -> dict:
    texts = [f"{sample['question'].rstrip('? ')}? {choice}" for sample in samples for choice in sample["choices"]]
    encoded = _tokenize(texts, processor, max_tokens)
    # [B*choices, N] -> [B, choices, N]
    return {name: value.unflatten(0, (len(samples), -1)) for name, value in encoded.items()}


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
