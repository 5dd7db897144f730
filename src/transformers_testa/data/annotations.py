"""From annotation files to one table of videos with texts, open-ended questions or multiple-choice questions."""

import csv
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TextIO

from datasets import Dataset


logger = logging.getLogger(__name__)

Task = Literal["text", "question", "choice"]
# The number of each row in its file, for messages, and the row.
Rows = list[tuple[int, dict]]


# --- Cleaning ----------------------------------------------------------------------------------------------------------


def clean_caption(text: str, max_words: int | None = None) -> str:
    """Lower-case a caption, turn `! " ( ) * # ~` into spaces, and keep its first `max_words` words."""
    return _first_words(re.sub(r"[!\"()*#~]", " ", text.lower()), max_words)


def clean_question(text: str, max_words: int | None = 50) -> str:
    """Lower-case a question, delete `. ! " ( ) * # : ; ~`, and keep its first `max_words` words."""
    return _first_words(re.sub(r"[.!\"()*#:;~]", "", text.lower()), max_words)


def clean_answer(text: str) -> str:
    """Lower-case an answer and strip the spaces around it."""
    return text.lower().strip()


def _first_words(text: str, max_words: int | None) -> str:
    return " ".join(text.split()[:max_words])


# --- Files -------------------------------------------------------------------------------------------------------------


def load_annotations(
    file: str | Path,
    video_root: str | Path | None = None,
    max_words: int | None = None,
    task: Task = "text",
    columns: Mapping[str, str] = {},
) -> Dataset:
    """Read a JSONL or CSV file of videos and their texts or questions.

    Rows whose video is missing are dropped, with one warning that counts them. Each row has `video` (a path or a URL)
    and `video_id`, may have `start` and `end` (seconds), and the columns of its task:

    - "text" (retrieval, captioning): `text`, and optionally `distractor` (the `video_id` of the video that is hardest
      to tell from this one);
    - "question" (open-ended): `question`, `answers` (a list, or one answer as a string), and optionally
      `answer_weights` (one positive number an answer; each is 1 if not given);
    - "choice" (multiple choice): `question`, `choices` (a list, of one length in the whole file) and `label` (the
      right choice, counted from 0).

    Questions may also have `question_type`, and `question_id`, which is `<video_id>-<line>` if not given.

    Args:
        file: A `.jsonl` file of one object a line, or a `.csv` file with a header, in which a list is a JSON list.
        video_root: Folder that relative paths in `video` start from; the folder of `file` if not given.
        max_words: Words kept of each text (all if not given) or question (50 if not given).
        task: "text", "question" or "choice".
        columns: From our column names to those of the file, for columns that are called differently there.

    Returns:
        A `datasets.Dataset` with the columns of the task, `video` as an absolute path or a URL, texts, questions and
        answers cleaned, `answers` a list of str, `answer_weights` a list of float, `label` an int. Of `start`, `end`,
        `distractor` and `question_type` it has those that the file has; None where a row leaves them out.

    Raises:
        ValueError: The file doesn't exist or is empty, a column or row is broken (named by its line), or no video exists.
    """
    file = existing_file(file)
    readers = {".jsonl": read_jsonl, ".csv": read_csv}
    if file.suffix not in readers:
        raise ValueError(
            f"{file}: annotations are .jsonl or .csv files, not {file.suffix or 'files without an ending'}."
        )
    rows = readers[file.suffix](file)
    check_column_names(columns, task)
    for column, theirs in columns.items():
        if not any(theirs in row for _, row in rows):
            raise ValueError(f"{file}: no row has `{theirs}`, which columns says is `{column}`.")
    rows = [(number, _rename(row, columns)) for number, row in rows]
    return build_table(rows, file, video_root or file.parent, max_words, task)


def _rename(row: dict, columns: Mapping[str, str]) -> dict:
    kept = {name: value for name, value in row.items() if name not in columns}
    return kept | {column: row[theirs] for column, theirs in columns.items() if theirs in row}


def existing_file(file: str | Path) -> Path:
    """Return the path of an annotation file, or raise ValueError if there is no such file."""
    if not Path(file).is_file():
        raise ValueError(f"The annotation file {file} doesn't exist.")
    return Path(file)


def read_jsonl(file: Path) -> Rows:
    """Return the objects of a JSONL file and their lines; a line that is no object is a ValueError."""
    rows = []
    with _open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: not a JSON object ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: a JSON object is needed, this is {type(row).__name__}.")
            rows.append((number, row))
    return rows


@contextmanager
def _open_text(file: Path, encoding: str = "utf-8", newline: str | None = None) -> Iterator[TextIO]:
    """Open a file whose lines may turn out to be no text, or no CSV: that is a ValueError then."""
    try:
        with file.open(encoding=encoding, newline=newline) as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not encoded as UTF-8 ({error}).") from error
    except csv.Error as error:
        raise ValueError(f"{file} can't be read as CSV ({error}).") from error


def read_text(file: str | Path) -> str:
    """Return what an annotation file holds, or raise ValueError where it doesn't exist or is no UTF-8."""
    with _open_text(existing_file(file)) as lines:
        return lines.read()


def parse_json(text: str) -> Any:
    """Return what a JSON text says, or raise ValueError, also for what is nested too deep or a number too long."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_csv(file: Path) -> Rows:
    """Return the rows of a CSV file, without their empty fields, and their lines."""
    rows = []
    with _open_text(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{file}, line {reader.line_num}: {len(row[None])} more fields than the header has; a text with a "
                    "comma needs quotes around it."
                )
            rows.append((reader.line_num, {name: value for name, value in row.items() if value}))
    return rows


# --- Rows to a table ---------------------------------------------------------------------------------------------------


def build_table(
    rows: Rows,
    file: str | Path,
    video_root: str | Path,
    max_words: int | None = None,
    task: Task = "text",
    unit: str = "line",
) -> Dataset:
    """Check rows and make them the table described at [`load_annotations`].

    Args:
        rows: Line numbers, for messages, and rows with the columns of [`load_annotations`].
        file: Where the rows come from, for messages.
        video_root: Folder that relative paths start from.
        max_words: Words kept of each text or question, as in [`load_annotations`].
        task: "text", "question" or "choice".
        unit: What the numbers of the rows count, for messages.

    Raises:
        ValueError: There is no row, a row is broken, or none of the videos exists.
    """
    columns = task_columns(task, Path(video_root), max_words)
    if not rows:
        raise ValueError(f"{file} has no rows.")
    places = [f"{file}, {unit} {number}" for number, _ in rows]
    checked = [_check_row(row, number, place, columns) for (number, row), place in zip(rows, places, strict=True)]
    _check_video_ids(checked, places)
    if task != "text":
        _check_questions(checked, places)
    local_videos = {row["video"] for row in checked if "://" not in row["video"]}
    # Not Path.is_file, which fails for a name that is too long.
    missing = {video for video in local_videos if not os.path.isfile(video)}
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
    used = [name for name in columns if any(row[name] is not None for row in kept)]
    return Dataset.from_list([{name: row[name] for name in used} for row in kept])


def answer_candidates(table: Dataset) -> list[str]:
    """Return the distinct answers of a table of the task "question", in the order of their first appearance."""
    return list(dict.fromkeys(answer for answers in table["answers"][:] for answer in answers))


def missing_field(name: str, row: dict, place: str, note: str = "") -> ValueError:
    """Return the error of a row that lacks a field."""
    return ValueError(f"{place}: `{name}` is missing{note}; the row has {', '.join(map(str, row)) or 'nothing'}.")


def _check_row(row: dict, number: int, place: str, columns: dict[str, "Column"]) -> dict:
    checked: dict[str, Any] = {}
    for name, column in columns.items():
        value = row.get(name)
        if value is not None:
            try:
                checked[name] = _storable(column.read(value, checked))
            except ValueError as error:
                raise ValueError(f"{place}: `{name}` is {value!r}; {error}.") from error
        elif column.default is not None:
            checked[name] = column.default(checked, number)
        else:
            raise missing_field(name, row, place, column.note)
    return checked


def _storable(value: Any) -> Any:
    """Return a value; JSON can spell halves of characters, which no table can hold: these are a ValueError."""
    try:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"that is no text ({error.reason})") from error
    return value


def check_clips(clips: Iterable[tuple[str, tuple[str, float | None, float | None], str]]) -> set[str]:
    """Make sure that no `video_id` stands for two clips.

    Args:
        clips: `video_id`, clip (video, start, end) and place, of each row.

    Returns:
        All `video_id`.

    Raises:
        ValueError: One stands for two.
    """
    seen: dict[str, tuple[tuple, str]] = {}  # by id, the clip and the place of its first row
    for video_id, clip, place in clips:
        first, first_place = seen.setdefault(video_id, (clip, place))
        if first != clip:
            raise ValueError(
                f"{place}: `video_id` {video_id!r} stands for {clip[0]} from {clip[1]} to {clip[2]} s, but in "
                f"{first_place} for {first[0]} from {first[1]} to {first[2]} s; two clips need two ids."
            )
    return set(seen)


def _check_video_ids(rows: list[dict], places: list[str]) -> None:
    video_ids = check_clips(
        (row["video_id"], (row["video"], row["start"], row["end"]), place)
        for row, place in zip(rows, places, strict=True)
    )
    for row, place in zip(rows, places, strict=True):
        distractor = row.get("distractor")
        if distractor is not None and (distractor not in video_ids or distractor == row["video_id"]):
            raise ValueError(f"{place}: `distractor` {distractor!r} is no other video's `video_id` in this file.")


def _check_questions(rows: list[dict], places: list[str]) -> None:
    seen: dict[str, str] = {}
    num_choices = len(rows[0].get("choices", ()))
    for row, place in zip(rows, places, strict=True):
        first_place = seen.setdefault(row["question_id"], place)
        if first_place != place:
            raise ValueError(
                f"{place}: `question_id` {row['question_id']!r} is that of {first_place} too; each question needs its "
                "own."
            )
        if len(row.get("choices", ())) != num_choices:
            raise ValueError(
                f"{place}: there are {len(row['choices'])} `choices`, but {num_choices} in {places[0]}; all questions "
                "need the same number."
            )


# --- The columns of each task ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """How a column is checked.

    Args:
        read: From a value and the columns of its row before this one to the value in the table. Its ValueError goes on
            from "`column` is value; ".
        default: From the columns of the row before this one and the row's number to the value where the row gives
            none; where this is None, such a row is an error.
        note: Added to that error.
    """

    read: Callable[[Any, dict], Any]
    default: Callable[[dict, int], Any] | None = None
    note: str = ""


def task_columns(task: Task, video_root: Path, max_words: int | None) -> dict[str, Column]:
    """Return the columns of a task, in the order in which they are read and stored."""
    string = Column(lambda value, row: str(value))
    video = {"video": Column(partial(_read_video, video_root)), "video_id": string}
    clip = {"start": _optional(_read_seconds), "end": _optional(_read_end)}
    text = Column(partial(_read_words, partial(clean_caption, max_words=max_words)))
    question = {
        "question_id": Column(string.read, lambda row, number: f"{row['video_id']}-{number}"),
        "question": Column(partial(_read_words, partial(clean_question, max_words=max_words or 50))),
    }
    answers = {
        "answers": Column(_read_answers, note=" (an unanswered question)"),
        "answer_weights": Column(_read_weights, lambda row, number: [1.0] * len(row["answers"])),
    }
    choices = {"choices": Column(_read_choices), "label": Column(_read_label)}
    columns = {
        "text": video | {"text": text} | clip | {"distractor": _optional(string.read)},
        "question": video | question | answers | {"question_type": _optional(string.read)} | clip,
        "choice": video | question | choices | {"question_type": _optional(string.read)} | clip,
    }
    if task not in columns:
        raise ValueError(f"There is no task {task!r}; there are {', '.join(columns)}.")
    return columns[task]


def check_column_names(columns: Mapping[str, str], task: Task) -> None:
    """Make sure that all columns to be found under another name are columns of the task, or raise ValueError."""
    known = task_columns(task, Path(), None)
    if unknown := [column for column in columns if column not in known]:
        raise ValueError(f"columns: `{unknown[0]}` is no column of the task {task!r}; those are {', '.join(known)}.")


def _optional(read: Callable[[Any, dict], Any]) -> Column:
    return Column(read, default=lambda row, number: None)


def _read_video(video_root: Path, value: Any, row: dict) -> str:
    return _absolute(video_root, str(value))


@lru_cache  # Rows about one video stand together, and pathlib takes a third of the time that reading them does.
def _absolute(video_root: Path, video: str) -> str:
    return video if "://" in video else str((video_root / video).absolute())


def _read_words(clean: Callable[[str], str], value: Any, row: dict) -> str:
    text = clean(str(value))
    if not text:
        raise ValueError("at least one word is needed")
    return text


def _read_seconds(value: Any, row: dict) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("a number of seconds is needed") from error
    if not 0 <= seconds < math.inf:
        raise ValueError("a number of seconds is needed, at least 0")
    return seconds


def _read_end(value: Any, row: dict) -> float:
    end = _read_seconds(value, row)
    if end <= (row["start"] or 0):
        raise ValueError(f"a clip ends later than it starts, at {row['start'] or 0} s")
    return end


def _read_list(value: Any) -> list:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError(f"a JSON list is needed ({error})") from error
    if not isinstance(value, list):
        raise ValueError("a list is needed")
    return value


def _read_strings(value: Any) -> list[str]:
    strings = _read_list(value)
    if not all(isinstance(string, str) and string.strip() for string in strings):
        raise ValueError("a list of strings is needed, none of them empty")
    return [string.strip() for string in strings]


def _read_answers(value: Any, row: dict) -> list[str]:
    if isinstance(value, str) and not value.lstrip().startswith("["):
        value = [value] if value.strip() else []
    answers = [clean_answer(answer) for answer in _read_strings(value)]
    if not answers:
        raise ValueError("this is an unanswered question, and at least one answer is needed")
    return answers


def _read_weights(value: Any, row: dict) -> list[float]:
    weights = _read_list(value)
    if not all(isinstance(weight, int | float) and 0 < weight <= sys.float_info.max for weight in weights):
        raise ValueError("positive numbers are needed")
    if len(weights) != len(row["answers"]):
        raise ValueError(f"one weight for each of the {len(row['answers'])} answers is needed")
    return [float(weight) for weight in weights]


def _read_choices(value: Any, row: dict) -> list[str]:
    choices = _read_strings(value)
    if len(choices) < 2:
        raise ValueError("at least two choices are needed")
    return choices


def _read_label(value: Any, row: dict) -> int:
    labels = [str(label) for label in range(len(row["choices"]))]
    if str(value) not in labels:
        raise ValueError(f"the number of a choice is needed, from 0 to {labels[-1]}")
    return labels.index(str(value))
