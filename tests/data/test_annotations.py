import csv
import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_testa.data.annotations import (
    BENCHMARKS,
    clean_caption,
    clean_question,
    load_annotations,
    load_benchmark,
)


ROW = {"video": "a.mp4", "video_id": "a", "text": "A dog runs."}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def write_jsonl(folder, *rows, name="train.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_captions_are_cleaned_as_the_released_models_were_trained():
    assert clean_caption('Hello! (The)  "dog"\n runs: 3.5 #miles;\n') == "hello the dog runs: 3.5 miles;"
    assert clean_caption("one two  three four", max_words=3) == "one two three"


def test_questions_are_cleaned_as_the_released_models_were_trained():
    assert clean_question("What's (the) colour? It is: red; or~blue. ") == "what's the colour? it is red orblue"
    assert len(clean_question("why " * 60).split()) == 50


@given(st.text(), st.integers(1, 10))
def test_cleaning_twice_is_cleaning_once_and_keeps_to_the_words(text, max_words):
    for clean, removed in ((clean_caption, '[!"()*#~]'), (clean_question, '[.!"()*#:;~]')):
        cleaned = clean(text, max_words)
        assert clean(cleaned, max_words) == cleaned
        assert len(cleaned.split(" ")) <= max_words
        assert cleaned == cleaned.strip() and not re.search(removed, cleaned)


def test_jsonl_and_csv_give_the_same_table(folder):
    rows = [{**ROW, "start": 1.5, "distractor": "b"}, {"video": "b.mp4", "video_id": "b", "text": 'Cats, "two"'}]
    table = load_annotations(write_jsonl(folder, *rows))
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["video", "video_id", "text", "start", "distractor"])
        writer.writeheader()
        writer.writerows(rows)
    assert load_annotations(folder / "train.csv").to_list() == table.to_list()
    assert table.to_list() == [
        {"video": str(folder / "a.mp4"), "video_id": "a", "text": "a dog runs.", "start": 1.5, "distractor": "b"},
        {"video": str(folder / "b.mp4"), "video_id": "b", "text": "cats, two", "start": None, "distractor": None},
    ]


def test_videos_start_from_video_root_and_texts_keep_max_words(folder, tmp_path_factory):
    file = write_jsonl(tmp_path_factory.mktemp("elsewhere"), ROW)
    (row,) = load_annotations(file, video_root=folder, max_words=2)
    assert row == {"video": str(folder / "a.mp4"), "video_id": "a", "text": "a dog"}


def test_urls_are_left_alone(folder):
    (row,) = load_annotations(write_jsonl(folder, {**ROW, "video": "https://example.org/a.mp4"}))
    assert row["video"] == "https://example.org/a.mp4"


def test_missing_videos_are_dropped_and_counted(folder, caplog):
    gone = {"video": "gone.mp4", "video_id": "gone", "text": "gone"}
    file = write_jsonl(folder, {**ROW, "distractor": "gone"}, gone, {**gone, "text": "gone too"})
    with caplog.at_level(logging.WARNING):
        table = load_annotations(file)
    assert table["video_id"] == ["a"]
    assert "1 videos don't exist" in caplog.text and "2 of 3 rows are dropped" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([ROW, {"video": "b.mp4", "video_id": "b"}], "line 2: `text` is missing; the row has video, video_id"),
        ([ROW, {**ROW, "text": " ! "}], "line 2: `text` is ' ! ', which has no words"),
        ([{**ROW, "video": "gone.mp4"}], "None of the 1 videos .*gone.mp4.*video_root"),
        ([ROW, {**ROW, "video": "b.mp4"}], "line 2: `video_id` 'a' stands for .*b.mp4 .*line 1 for .*a.mp4"),
        ([ROW, {**ROW, "start": 3}], "line 2: `video_id` 'a' stands for .* from 3.0"),
        ([{**ROW, "end": "soon"}], "line 1: `end` is 'soon'; a number of seconds"),
        ([{**ROW, "distractor": "x"}], "line 1: `distractor` 'x' is no other video"),
        ([{**ROW, "distractor": "a"}], "line 1: `distractor` 'a' is no other video"),
        ([ROW, ["a.mp4"]], "line 2: a JSON object is needed, this is list"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(folder, rows, message):
    with pytest.raises(
        ValueError, match="train.jsonl.*" + message if rows != [{**ROW, "video": "gone.mp4"}] else message
    ):
        load_annotations(write_jsonl(folder, *rows))


def test_a_line_that_is_no_json_is_named(folder):
    file = write_jsonl(folder, ROW)
    file.write_text(file.read_text() + "{'video': 1}\n")
    with pytest.raises(ValueError, match="line 2: not a JSON object"):
        load_annotations(file)


def test_a_missing_csv_column_is_named(folder):
    (folder / "train.csv").write_text("video,video_id,caption\na.mp4,a,dog\n")
    with pytest.raises(
        ValueError, match=r"train.csv, line 2: `text` is missing; the row has video, video_id, caption"
    ):
        load_annotations(folder / "train.csv")


def test_files_that_are_missing_or_of_another_kind_are_refused(folder):
    with pytest.raises(ValueError, match=r"nothing.jsonl doesn't exist"):
        load_annotations(folder / "nothing.jsonl")
    with pytest.raises(ValueError, match=r"not .mp4"):
        load_annotations(folder / "a.mp4")


@pytest.mark.parametrize("dataset_name", ["didemo", "msrvtt"])
def test_benchmarks_are_read_in_their_authors_layout(folder, dataset_name):
    rows = [{"clip_name": "a", "caption": "A (long) " + "word " * 100}, {"clip_name": "b", "caption": "Cats"}]
    write_jsonl(folder, *rows, name="val.jsonl")
    table = load_benchmark(dataset_name, folder, "validation")
    assert table["video"] == [str(folder / "a.mp4"), str(folder / "b.mp4")]
    assert table["video_id"] == ["a", "b"]
    assert table["text"][0].startswith("a long word")
    assert len(table["text"][0].split()) == BENCHMARKS[dataset_name].max_words


def test_unknown_benchmarks_and_broken_benchmark_rows_are_named(folder):
    with pytest.raises(ValueError, match="no dataset `didimo`; there are didemo"):
        load_benchmark("didimo", folder, "test")
    with pytest.raises(ValueError, match=r"test.jsonl doesn't exist"):
        load_benchmark("didemo", folder, "test")
    write_jsonl(folder, {"clip_name": "a"}, name="test.jsonl")
    with pytest.raises(ValueError, match=r"test.jsonl, line 1: `caption` is missing"):
        load_benchmark("didemo", folder, "test")
