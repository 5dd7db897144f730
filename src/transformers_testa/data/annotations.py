"""From annotation files to one table: video, video_id, text and, where the rows have them, start, end, distractor."""

import csv
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset


logger = logging.getLogger(__name__)

_REQUIRED_COLUMNS = ("video", "video_id", "text")
_OPTIONAL_COLUMNS = ("start", "end", "distractor")


def clean_caption(text: str, max_words: int | None = None) -> str:
    """Lower-case a caption, turn `! " ( ) * # ~` into spaces, and keep its first `max_words` words."""
    return _first_words(re.sub(r"[!\"()*#~]", " ", text.lower()), max_words)


def clean_question(text: str, max_words: int | None = 50) -> str:
    """Lower-case a question, delete `. ! " ( ) * # : ; ~`, and keep its first `max_words` words."""
    return _first_words(re.sub(r"[.!\"()*#:;~]", "", text.lower()), max_words)


def _first_words(text: str, max_words: int | None) -> str:
    return " ".join(text.split()[:max_words])


def load_annotations(file: str | Path, video_root: str | Path | None = None, max_words: int | None = None) -> Dataset:
    """Read a JSONL or CSV file of videos and their texts.

    Rows whose video is missing are dropped, with one warning that counts them.

    Args:
        file: A `.jsonl` file of one object a line, or a `.csv` file with a header. Each row has `video` (a path or a
            URL), `video_id` and `text`, and may have `start` and `end` (seconds) and `distractor` (the `video_id` of
            the video that is hardest to tell from this one).
        video_root: Folder that relative paths in `video` start from; the folder of `file` if not given.
        max_words: Words kept of each text; all if not given.

    Returns:
        A `datasets.Dataset` with the columns `video` (absolute path or URL), `video_id`, `text` (cleaned) and those of
        `start`, `end` and `distractor` that the file has; None where a row leaves them out.

    Raises:
        ValueError: The file doesn't exist or is empty, a row is broken (named by its line), or no video exists.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"The annotation file {file} doesn't exist.")
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if file.suffix not in readers:
        raise ValueError(
            f"{file}: annotations are .jsonl or .csv files, not {file.suffix or 'files without an ending'}."
        )
    return build_table(readers[file.suffix](file), file, video_root or file.parent, max_words)


def _read_jsonl(file: Path) -> list[tuple[int, dict]]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not a JSON object ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: a JSON object is needed, this is {type(row).__name__}.")
            rows.append((number, row))
    return rows


def _read_csv(file: Path) -> list[tuple[int, dict]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        return [(reader.line_num, {name: value for name, value in row.items() if value != ""}) for row in reader]


def build_table(
    rows: list[tuple[int, dict]], file: Path, video_root: str | Path, max_words: int | None = None
) -> Dataset:
    """Check rows and make them the table described at [`load_annotations`].

    Args:
        rows: Line numbers, for messages, and rows with the columns of [`load_annotations`].
        file: Where the rows come from, for messages.
        video_root: Folder that relative paths start from.
        max_words: Words kept of each text; all if not given.

    Raises:
        ValueError: There is no row, a row is broken, or none of the videos exists.
    """
    if not rows:
        raise ValueError(f"{file} has no rows.")
    checked = [_check_row(row, f"{file}, line {line}", Path(video_root), max_words) for line, row in rows]
    _check_video_ids(checked, [f"{file}, line {line}" for line, _ in rows])
    missing = {row["video"] for row in checked if "://" not in row["video"] and not Path(row["video"]).is_file()}
    kept = [row for row in checked if row["video"] not in missing]
    if not kept:
        raise ValueError(
            f"None of the {len(missing)} videos of {file} exists, {sorted(missing)[0]} for one; "
            "is `video_root` the folder that their paths start from?"
        )
    if missing:
        logger.warning(
            f"{file}: {len(missing)} videos don't exist, {sorted(missing)[0]} for one; {len(checked) - len(kept)} of "
            f"{len(checked)} rows are dropped."
        )
    optional = [name for name in _OPTIONAL_COLUMNS if any(row[name] is not None for row in kept)]
    return Dataset.from_list([{name: row[name] for name in (*_REQUIRED_COLUMNS, *optional)} for row in kept])


def _check_row(row: dict, place: str, video_root: Path, max_words: int | None) -> dict:
    for name in _REQUIRED_COLUMNS:
        if row.get(name) is None:
            raise ValueError(f"{place}: `{name}` is missing; the row has {', '.join(map(str, row)) or 'nothing'}.")
    text = clean_caption(str(row["text"]), max_words)
    if not text:
        raise ValueError(f"{place}: `text` is {row['text']!r}, which has no words.")
    video = str(row["video"])
    distractor = row.get("distractor")
    return {
        "video": video if "://" in video else str((video_root / video).absolute()),
        "video_id": str(row["video_id"]),
        "text": text,
        "start": _seconds(row, "start", place),
        "end": _seconds(row, "end", place),
        "distractor": None if distractor is None else str(distractor),
    }


def _seconds(row: dict, name: str, place: str) -> float | None:
    if row.get(name) is None:
        return None
    try:
        return float(row[name])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: `{name}` is {row[name]!r}; a number of seconds is needed.") from error


def _check_video_ids(rows: list[dict], places: list[str]):
    seen = {}
    for row, place in zip(rows, places, strict=True):
        clip = (row["video"], row["start"], row["end"])
        first, first_place = seen.setdefault(row["video_id"], (clip, place))
        if first != clip:
            raise ValueError(
                f"{place}: `video_id` {row['video_id']!r} stands for {clip[0]} from {clip[1]} to {clip[2]} s, but in "
                f"{first_place} for {first[0]} from {first[1]} to {first[2]} s; two clips need two ids."
            )
    for row, place in zip(rows, places, strict=True):
        if row["distractor"] is not None and row["distractor"] not in seen.keys() - {row["video_id"]}:
            raise ValueError(
                f"{place}: `distractor` {row['distractor']!r} is no other video's `video_id` in this file."
            )


@dataclass
class Benchmark:
    """How a public benchmark is read.

    Args:
        read: From the benchmark's folder and a split (train, validation or test) to the annotation file and its
            numbered rows, in the columns of [`load_annotations`].
        max_words: Words kept of each text.
    """

    read: Callable[[Path, str], tuple[Path, list[tuple[int, dict]]]]
    max_words: int


def _read_clip_names(folder: Path, split: str) -> tuple[Path, list[tuple[int, dict]]]:
    file = folder / f"{'val' if split == 'validation' else split}.jsonl"
    if not file.is_file():
        raise ValueError(f"The annotation file {file} doesn't exist.")
    rows = []
    for line, row in _read_jsonl(file):
        if missing := {"clip_name", "caption"} - set(row):
            raise ValueError(f"{file}, line {line}: `{min(missing)}` is missing; the row has {', '.join(row)}.")
        rows.append((line, {"video": f"{row['clip_name']}.mp4", "video_id": row["clip_name"], "text": row["caption"]}))
    return file, rows


BENCHMARKS = {
    "didemo": Benchmark(_read_clip_names, max_words=64),
    "msrvtt": Benchmark(_read_clip_names, max_words=30),
}


def load_benchmark(
    dataset_name: str,
    folder: str | Path,
    split: str,
    video_root: str | Path | None = None,
    max_words: int | None = None,
) -> Dataset:
    """Read one split of a public benchmark in the files its authors give.

    Args:
        dataset_name: A key of `BENCHMARKS`.
        folder: Holds the benchmark's annotation files.
        split: "train", "validation" or "test".
        video_root: Holds the videos; `folder` if not given.
        max_words: Words kept of each text; the benchmark's usual number if not given.

    Returns:
        The table described at [`load_annotations`].

    Raises:
        ValueError: The name is unknown, a file is missing, or a row is broken.
    """
    if dataset_name not in BENCHMARKS:
        raise ValueError(f"There is no dataset `{dataset_name}`; there are {', '.join(sorted(BENCHMARKS))}.")
    benchmark = BENCHMARKS[dataset_name]
    file, rows = benchmark.read(Path(folder), split)
    return build_table(rows, file, video_root or folder, max_words or benchmark.max_words)
