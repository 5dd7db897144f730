"""Public benchmarks in the files their authors give, and datasets of the Hub, as the table of `annotations`."""

import io
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset

from transformers_testa.data.annotations import (
    Rows,
    Task,
    build_table,
    check_column_names,
    clean_answer,
    existing_file,
    missing_field,
    parse_json,
    read_csv,
    read_jsonl,
    read_text,
    task_columns,
)


# What the splits are called in the files of the benchmarks.
_SPLITS = {"train": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Benchmark:
    """How a public benchmark is read.

    Args:
        task: "text", "question" or "choice".
        max_words: Words kept of each text or question.
        read: From the benchmark's folder and a split (train, val or test) to the annotation file and its numbered
            rows, in the columns of [`load_annotations`].
        suffixes: What follows the names in the column `video`; the first for which there is a file, or the last.
        answers_file: The file of the candidate answers, where they aren't the distinct answers of the split.
    """

    task: Task
    max_words: int
    read: Callable[[Path, str], tuple[Path, Rows]]
    suffixes: tuple[str, ...] = ("",)
    answers_file: str | None = None


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
        max_words: Words kept of each text or question; the benchmark's usual number if not given.

    Returns:
        The table described at [`load_annotations`], for the benchmark's task.

    Raises:
        ValueError: The name or split is unknown, a file is missing, or a row is broken.
    """
    benchmark, file, rows = _read_split(dataset_name, folder, split)
    video_root = Path(video_root or folder)
    for _, row in rows:
        *names, last = [f"{row['video']}{suffix}" for suffix in benchmark.suffixes]
        # Not Path.is_file, which fails for a name that is too long.
        row["video"] = next((name for name in names if os.path.isfile(video_root / name)), last)
    return build_table(rows, file, video_root, max_words or benchmark.max_words, benchmark.task, _unit(file))


def load_candidates(dataset_name: str, folder: str | Path, split: str) -> list[str]:
    """Return the answers to choose from in a benchmark of open-ended questions.

    They are the benchmark's vocabulary, if it has one, or else the distinct answers of the split, with those of videos
    that are missing here, in the order of their first appearance.

    Args:
        dataset_name: A key of `BENCHMARKS`.
        folder: Holds the benchmark's annotation files.
        split: "train", "validation" or "test".

    Raises:
        ValueError: The benchmark has no open-ended questions, a file is missing or broken, or an answer is empty.
    """
    benchmark, file, rows = _read_split(dataset_name, folder, split)
    if benchmark.task != "question":
        raise ValueError(f"{dataset_name} has no open-ended questions, so there are no candidate answers.")
    if benchmark.answers_file:
        file = Path(folder) / benchmark.answers_file
        answers = list(_read_json(file, list, dict))
    else:
        answers = [answer for _, row in rows for answer in row["answers"]]
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{file}: {answer!r} is no answer; strings that aren't empty are needed.")
    return list(dict.fromkeys(map(clean_answer, answers)))


def _read_split(dataset_name: str, folder: str | Path, split: str) -> tuple[Benchmark, Path, Rows]:
    if dataset_name not in BENCHMARKS:
        raise ValueError(f"There is no dataset `{dataset_name}`; there are {', '.join(sorted(BENCHMARKS))}.")
    if split not in _SPLITS:
        raise ValueError(f"There is no split `{split}`; there are {', '.join(_SPLITS)}.")
    benchmark = BENCHMARKS[dataset_name]
    return benchmark, *benchmark.read(Path(folder), _SPLITS[split])


# --- Files -------------------------------------------------------------------------------------------------------------


def _unit(file: Path) -> str:
    """Return what a row's number counts: a JSON list is all on one line."""
    return "entry" if file.suffix == ".json" else "line"


def _read_rows(file: Path, *fields: str) -> tuple[Path, Rows]:
    """Read a .jsonl, .csv or .json file whose rows have all of `fields`."""
    readers = {".jsonl": read_jsonl, ".csv": read_csv, ".json": _read_json_list}
    rows = readers[file.suffix](existing_file(file))
    for number, row in rows:
        for field in fields:
            if row.get(field) is None:
                raise missing_field(field, row, f"{file}, {_unit(file)} {number}")
    return file, rows


def _read_json_list(file: Path) -> Rows:
    rows = list(enumerate(_read_json(file, list), start=1))
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{file}, entry {number}: a JSON object is needed, this is {type(row).__name__}.")
    return rows


def _read_json(file: Path, *kinds: type) -> Any:
    text = read_text(file)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}).") from error
    if not isinstance(content, kinds):
        needed = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{file}: a JSON {needed} is needed, this is {type(content).__name__}.")
    return content


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings and numbers only: everything else is looked up here, and nothing may be."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(file: Path) -> Any:
    """Read a pickle of lists, tuples, dicts, sets, strings, bytes, numbers, booleans and None; it can run no code.

    Raises:
        ValueError: The file is malformed, or asks for a class or function (named) of any other kind.
    """
    try:
        return _PlainUnpickler(io.BytesIO(existing_file(file).read_bytes())).load()
    except Exception as error:  # pickle gives no full list of what a malformed file raises
        raise ValueError(f"{file}: not a pickle of plain containers, strings and numbers: {error}.") from error


# --- The benchmarks ----------------------------------------------------------------------------------------------------


def _texts(rows: Rows, video: str, text: str) -> Rows:
    """Return rows of our columns from those of two fields; the video's name is its id."""
    return [(number, {"video": row[video], "video_id": row[video], "text": row[text]}) for number, row in rows]


def _read_clip_names(folder: Path, split: str) -> tuple[Path, Rows]:
    file, rows = _read_rows(folder / f"{split}.jsonl", "clip_name", "caption")
    return file, _texts(rows, "clip_name", "caption")


def _read_pretraining_pairs(folder: Path, split: str) -> tuple[Path, Rows]:
    file, rows = _read_rows(folder / f"{split}.json", "path", "caption")
    return file, _texts(rows, "path", "caption")


def _read_queryd(folder: Path, split: str) -> tuple[Path, Rows]:
    captions_file = folder / "raw_captions_combined_filtered.pkl"
    captions = read_plain_pickle(captions_file)
    if not isinstance(captions, dict):
        raise ValueError(f"{captions_file}: a dict of captions is needed, this is {type(captions).__name__}.")
    file = folder / f"exists_{split}_list.txt"
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        path = line.strip()
        if not path:
            continue
        if path not in captions:
            raise ValueError(f"{file}, line {number}: {path!r} has no captions in {captions_file}.")
        sentences = captions[path]
        if not _is_list_of(list, sentences) or not all(_is_list_of(str, sentence) for sentence in sentences):
            raise ValueError(f"{captions_file}: {path!r} needs a list of sentences, each a list of words.")
        rows.append((number, {"path": path, "text": " ".join(map(" ".join, sentences))}))
    return file, _texts(rows, "path", "text")


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _read_activitynet(folder: Path, split: str) -> tuple[Path, Rows]:
    # The test captions aren't public: val is the test split of everyone's results.
    file, rows = _read_rows(folder / f"{'val' if split == 'test' else split}.json", "video", "caption")
    for number, row in rows:
        if not _is_list_of(str, row["caption"]):
            raise ValueError(
                f"{file}, entry {number}: `caption` is {row['caption']!r}; a list of sentences is needed."
            )
        row["caption"] = " ".join(row["caption"])
    return file, _texts(rows, "video", "caption")


def _read_condensed_movies(folder: Path, split: str) -> tuple[Path, Rows]:
    name = "test_challf0.csv" if split == "test" else "train_val_challf0.csv"
    file, rows = _read_rows(folder / name, "videoid", "caption", "split")
    for line, row in rows:
        if row["split"] not in _SPLITS.values():
            raise ValueError(f"{file}, line {line}: `split` is {row['split']!r}; train, val or test is needed.")
    rows = [(line, row) for line, row in rows if row["split"] == split]
    return file, _texts(rows, "videoid", "caption")


def _read_activitynetqa(folder: Path, split: str) -> tuple[Path, Rows]:
    file, questions = _read_rows(folder / f"{split}_q.json", "video_name", "question", "question_id")
    answers_file, answers = _read_rows(folder / f"{split}_a.json", "question_id", "answer", "type")
    answer_of: dict[str, dict] = {}
    for number, row in answers:
        if answer_of.setdefault(str(row["question_id"]), row) is not row:
            raise ValueError(
                f"{answers_file}, entry {number}: `question_id` {row['question_id']!r} has an answer already."
            )
    rows = []
    for number, question in questions:
        answer = answer_of.get(str(question["question_id"]))
        if answer is None:
            raise ValueError(
                f"{file}, entry {number}: an unanswered question; {answers_file} has no `question_id` "
                f"{question['question_id']!r}."
            )
        row = {
            "video": f"v_{question['video_name']}",
            "video_id": question["video_name"],
            "question_id": question["question_id"],
            "question": question["question"],
            "answers": [answer["answer"]],
            # The weight that the released model was trained with.
            "answer_weights": [0.2 if split == "train" else 1.0],
            "question_type": answer["type"],
        }
        rows.append((number, row))
    return file, rows


def _read_ivqa(folder: Path, split: str) -> tuple[Path, Rows]:
    answer_fields = [f"answer{number}" for number in range(1, 6)]
    file, lines = _read_rows(folder / f"{split}.csv", "video_id", "start", "end", "question", *answer_fields)
    rows = []
    for line, row in lines:
        # The file is the clip from start to end, so the table needs no columns for these.
        clip = f"{row['video_id']}_{row['start']}_{row['end']}"
        counts = Counter(clean_answer(row[field]) for field in answer_fields)
        row = {
            "video": clip,
            "video_id": clip,
            "question": row["question"],
            "answers": list(counts),
            "answer_weights": [count / 5 for count in counts.values()],
        }
        rows.append((line, row))
    return file, rows


def _read_nextqa(folder: Path, split: str) -> tuple[Path, Rows]:
    choice_fields = [f"a{number}" for number in range(5)]
    file, lines = _read_rows(folder / f"{split}.csv", "video", "question", *choice_fields, "answer")
    map_file = folder / "map_vid_vidorID.json"
    paths = _read_json(map_file, dict)
    rows = []
    for line, row in lines:
        if row["video"] not in paths:
            raise ValueError(f"{file}, line {line}: `video` {row['video']!r} has no path in {map_file}.")
        row = {
            "video": paths[row["video"]],
            "video_id": row["video"],
            "question": row["question"],
            "choices": [row[field] for field in choice_fields],
            "label": row["answer"],
        }
        rows.append((line, row))
    return file, rows


BENCHMARKS = {
    "didemo": Benchmark("text", 64, _read_clip_names, (".mp4",)),
    "queryd": Benchmark("text", 128, _read_queryd),
    "activitynet": Benchmark("text", 64, _read_activitynet),
    "condensedmovies": Benchmark("text", 32, _read_condensed_movies, (".mkv",)),
    "msrvtt": Benchmark("text", 30, _read_clip_names, (".mp4",)),
    "activitynetqa": Benchmark("question", 50, _read_activitynetqa, (".mp4", ".webm")),
    "ivqa": Benchmark("question", 50, _read_ivqa, (".webm",), answers_file="vocab.json"),
    "nextqa": Benchmark("choice", 50, _read_nextqa, (".mp4",)),
    "webvid": Benchmark("text", 30, _read_pretraining_pairs),
    "cc3m": Benchmark("text", 30, _read_pretraining_pairs),
}


def write_similarity_matrix(path: str | Path, similarities: np.ndarray) -> None:
    """Write the similarities of a test split as the Condensed Movies challenge takes them: an .npy file in a zip.

    Args:
        path: The zip file to write.
        similarities: `[texts, videos]`, stored as float32, both in the order of the test file.

    Raises:
        ValueError: The array has another number of dimensions, or numbers that aren't finite.
    """
    if similarities.ndim != 2 or not np.isfinite(similarities).all():
        raise ValueError(
            f"similarities has the shape {similarities.shape}; finite numbers of shape [texts, videos] are needed."
        )
    with zipfile.ZipFile(path, "w") as archive, archive.open("sim_matrix_test.npy", "w") as file:
        np.save(file, similarities.astype(np.float32))


# --- The Hub -----------------------------------------------------------------------------------------------------------


def load_hub_dataset(
    name: str,
    split: str,
    columns: Mapping[str, str] = {},
    config_name: str | None = None,
    video_root: str | Path | None = None,
    max_words: int | None = None,
    task: Task = "text",
) -> Dataset:
    """Read one split of a dataset on the Hub, or in a local folder, as [`load_annotations`] reads a file.

    Args:
        name: The dataset's Hub id, or a folder of files that `datasets.load_dataset` reads.
        split: "train", "validation", "test" or another split that the dataset has.
        columns: From our column names to those of the dataset, for columns that are called differently there.
        config_name: Which configuration of the dataset, where it has several.
        video_root: Folder that relative paths start from; the dataset's folder, or the current one for a Hub id, if
            not given.
        max_words: As in [`load_annotations`].
        task: As in [`load_annotations`].

    Returns:
        The table described at [`load_annotations`]; a question without an id has `<video_id>-<row>`, from row 0.

    Raises:
        ValueError: A column is missing, a row is broken, videos are bytes instead of paths, or no video exists.
    """
    dataset = datasets.load_dataset(name, config_name, split=split)
    source = f"{name}, split {split}"
    video_root = Path(video_root or (name if Path(name).is_dir() else "."))
    known = task_columns(task, video_root, max_words)
    check_column_names(columns, task)
    found = {}
    for column, rule in known.items():
        theirs = columns.get(column, column)
        if theirs in dataset.column_names:
            found[column] = theirs
        elif column in columns or rule.default is None:
            raise ValueError(
                f"{source}: there is no column `{theirs}` for `{column}`; there are {', '.join(dataset.column_names)}."
            )
    if isinstance(dataset.features[found["video"]], datasets.Video):
        dataset = dataset.cast_column(found["video"], datasets.Video(decode=False))
    rows = []
    for number, entry in enumerate(dataset.select_columns(sorted(set(found.values())))):
        row = {column: entry[theirs] for column, theirs in found.items()}
        if isinstance(row["video"], dict):
            row["video"] = _path_of_hub_video(row["video"], f"{source}, row {number}", video_root)
        rows.append((number, row))
    return build_table(rows, source, video_root, max_words, task, unit="row")


def _path_of_hub_video(video: dict, place: str, video_root: Path) -> str | None:
    if video["bytes"] is not None and not (video_root / (video["path"] or "")).is_file():
        raise ValueError(
            f"{place}: `video` holds the bytes of a video ({video['path'] or 'without a path'}); save it as "
            "a file and give its path."
        )
    return video["path"]
