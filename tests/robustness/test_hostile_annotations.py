"""Whatever stands in an annotation file or a recipe, it is read, or refused with a ValueError that names the file.

More examples than usual are tried with

    TESTA_EXAMPLES=500 python -m pytest tests/robustness/test_hostile_annotations.py
"""

import csv
import io
import json
import os
import pickle
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transformers_testa.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from transformers_testa.data.annotations import load_annotations
from transformers_testa.data.benchmarks import BENCHMARKS, load_benchmark, load_candidates


FIELDS = {
    "text": ("video", "video_id", "text", "start", "end", "distractor"),
    "question": ("video", "video_id", "question", "answers", "answer_weights", "question_id", "question_type"),
    "choice": ("video", "video_id", "question", "choices", "label", "start", "end"),
}
BENCHMARK_FIELDS = (
    *("clip_name", "caption", "path", "video", "videoid", "split", "video_name", "question", "question_id", "answer"),
    *("type", "video_id", "start", "end", "answer1", "answer2", "answer3", "answer4", "answer5", "a0", "a1", "a2"),
    *("a3", "a4"),
)
FILES = {
    "didemo": ("train.jsonl",),
    "queryd": ("raw_captions_combined_filtered.pkl", "exists_train_list.txt"),
    "activitynet": ("train.json",),
    "condensedmovies": ("train_val_challf0.csv",),
    "msrvtt": ("train.jsonl",),
    "activitynetqa": ("train_q.json", "train_a.json"),
    "ivqa": ("train.csv", "vocab.json"),
    "nextqa": ("train.csv", "map_vid_vidorID.json"),
    "webvid": ("train.json",),
    "cc3m": ("train.json",),
}

# Lone surrogates too, which JSON can spell and UTF-8 can't.
text = st.text(st.characters(), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -1, 0, 3, 1e308])
    | st.floats()
    | text
    | st.sampled_from(["a.mp4", "b.mp4", "train", "val", "", " ", "0", "[", '["x", "y"]', "[" * 5000, "x" * 300, "\0"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)
table_settings = settings(
    max_examples=int(os.environ.get("TESTA_EXAMPLES", "8")),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def rows(fields):
    """Lists of rows with some of the fields; half of the values are such as a field may have."""
    usual = st.sampled_from(["a.mp4", "b.mp4", "a dog", "1", 1, 2, ["x", "y"], ["x"], [1.0, 0.5]])
    return st.lists(st.dictionaries(st.sampled_from(fields), usual | values, min_size=2), max_size=3)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    return tmp_path


@contextmanager
def refused_by_name(folder):
    """Let nothing pass but a ValueError that names a file of the folder."""
    try:
        yield
    except ValueError as error:
        assert type(error) is ValueError, repr(error)
        assert str(folder) in str(error), str(error)


def as_csv(table: list[dict], fields: tuple[str, ...]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fields)
    writer.writeheader()
    lists = (list, dict)
    writer.writerows(
        {name: json.dumps(value) if isinstance(value, lists) else value for name, value in row.items()}
        for row in table
    )
    return file.getvalue().encode(errors="surrogatepass")


def as_jsonl(table: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in table).encode()


# --- Our own files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", FIELDS)
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@table_settings
@given(data=st.data())
def test_any_rows_are_read_or_refused_by_name(folder, task, suffix, data):
    table = data.draw(rows(FIELDS[task]))
    file = folder / f"rows.{suffix}"
    file.write_bytes(as_jsonl(table) if suffix == "jsonl" else as_csv(table, FIELDS[task]))
    with refused_by_name(folder):
        assert len(load_annotations(file, task=task)) <= len(table)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@table_settings
@given(content=st.binary(max_size=60) | text.map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes_are_read_or_refused_by_name(folder, suffix, content):
    (folder / f"bytes.{suffix}").write_bytes(content)
    with refused_by_name(folder):
        load_annotations(folder / f"bytes.{suffix}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.jsonl", b'{"video": ' + b"[" * 100_000),
        ("digits.jsonl", b'{"video": ' + b"9" * 5000 + b"}"),
        ("long_path.jsonl", json.dumps({"video": "x" * 5000, "video_id": "x", "text": "a dog"}).encode()),
        ("long_field.csv", b"video,video_id,text\na.mp4,a," + b"x" * 200_000),
        ("latin.csv", "video,video_id,text\na.mp4,a,ein süßer Hund".encode("latin-1")),
        ("deep.csv", b'video,video_id,question,answers\na.mp4,a,Why?,"' + b"[" * 100_000 + b'"'),
        ("zeros.csv", bytes(100)),
    ],
)
def test_what_readers_stumble_over_is_refused_by_name(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as caught:
        load_annotations(folder / name, task="question" if "deep" in name else "text")
    assert type(caught.value) is ValueError


# --- Files of the benchmarks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset_name", BENCHMARKS)
@table_settings
@given(data=st.data())
def test_any_files_of_a_benchmark_are_read_or_refused_by_name(folder, dataset_name, data):
    usual = {
        ".jsonl": rows(BENCHMARK_FIELDS).map(as_jsonl),
        ".json": (rows(BENCHMARK_FIELDS) | values).map(lambda content: json.dumps(content).encode()),
        ".csv": rows(BENCHMARK_FIELDS).map(partial(as_csv, fields=BENCHMARK_FIELDS)),
        ".pkl": (values | st.dictionaries(st.just("a.mp4"), st.lists(st.lists(text)))).map(pickle.dumps),
        ".txt": st.sampled_from([b"a.mp4\n", b"", b"\xff"]),
    }
    for name in FILES[dataset_name]:
        (folder / name).write_bytes(data.draw(usual[Path(name).suffix] | st.binary(max_size=30)))
    with refused_by_name(folder):
        load_benchmark(dataset_name, folder, "train")
    if BENCHMARKS[dataset_name].task == "question":
        with refused_by_name(folder):
            load_candidates(dataset_name, folder, "train")


# --- Recipes -----------------------------------------------------------------------------------------------------------


@table_settings
@given(
    content=st.binary(max_size=40)
    | text.map(lambda text: text.encode(errors="surrogatepass"))
    | st.sampled_from(
        [b"a: 2000-99-99", b"? [a]\n: b", b"- a", b"&a [*a]", b"[" * 5000, b"!!python/object/apply:os.system [ls]"]
    )
)
def test_a_recipe_that_is_none_is_refused_by_name(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    groups = (ModelArguments, DataArguments, TrainingArguments)
    with pytest.raises(ValueError) as caught:
        parse_arguments(groups, [str(tmp_path / "recipe.yaml")])
    # An empty recipe is one, and leaves out what is needed.
    assert "recipe.yaml" in str(caught.value) or "model_name_or_path" in str(caught.value)
