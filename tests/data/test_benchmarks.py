import csv
import io
import json
import logging
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transformers_testa.data.benchmarks import (
    BENCHMARKS,
    load_benchmark,
    load_candidates,
    load_hub_dataset,
    read_plain_pickle,
    write_similarity_matrix,
)


LONG_CAPTION = "A (long) " + "word " * 200
QUERYD_PICKLE = "raw_captions_combined_filtered.pkl"
ANSWERS = {f"answer{number}": answer for number, answer in enumerate(["Cat", "dog", "cat ", "cow", "dog"], start=1)}
IVQA_ROW = {"video_id": "a", "start": "3", "end": "12", "question": "What's that?", **ANSWERS}
NEXTQA_ROW = {"video": "101", "question": "Why?", "a0": "A", "a1": "b", "a2": "c", "a3": "d", "a4": "e", "answer": "4"}

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_json(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def write_jsonl(folder, name, *rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(folder, name, *rows):
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_queryd(folder, captions, lines="video-1/a.mp4\n", split="train"):
    (folder / QUERYD_PICKLE).write_bytes(pickle.dumps(captions))
    (folder / f"exists_{split}_list.txt").write_text(lines)


def write_activitynetqa(folder, split="train", answers=None):
    questions = [
        {"video_name": "a", "question": "Is it (red)?", "question_id": "a_0"},
        {"video_name": "b", "question": "who is it " * 20, "question_id": "b_0"},
    ]
    answers = answers or [
        {"question_id": "b_0", "answer": "A Man", "type": 7},
        {"question_id": "a_0", "answer": "yes", "type": 3},
    ]
    write_json(folder, f"{split}_q.json", questions)
    write_json(folder, f"{split}_a.json", answers)


# --- Layouts -----------------------------------------------------------------------------------------------------------


def test_the_benchmarks_have_their_tasks_and_usual_words():
    assert {name: (benchmark.task, benchmark.max_words) for name, benchmark in BENCHMARKS.items()} == {
        "didemo": ("text", 64),
        "queryd": ("text", 128),
        "activitynet": ("text", 64),
        "condensedmovies": ("text", 32),
        "msrvtt": ("text", 30),
        "activitynetqa": ("question", 50),
        "ivqa": ("question", 50),
        "nextqa": ("choice", 50),
        "webvid": ("text", 30),
        "cc3m": ("text", 30),
    }


@pytest.mark.parametrize(("dataset_name", "words"), [("didemo", 64), ("msrvtt", 30)])
def test_clip_names_are_mp4_files(tmp_path, dataset_name, words):
    touch(tmp_path, "a.mp4", "b.mp4")
    write_jsonl(
        tmp_path, "val.jsonl", {"clip_name": "a", "caption": LONG_CAPTION}, {"clip_name": "b", "caption": "Cats"}
    )
    table = load_benchmark(dataset_name, tmp_path, "validation")
    assert table["video"] == [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]
    assert table["video_id"] == ["a", "b"]
    assert table["text"][0].startswith("a long word") and len(table["text"][0].split()) == words


def test_queryd_looks_captions_up_by_path_and_joins_the_sentences(tmp_path):
    touch(tmp_path, "video-1/a.mp4", "video-2")
    captions = {"video-2": [["word"] * 90] * 2, "video-1/a.mp4": [["A", "Man"], ["he", "runs!"]], "video-3": [["no"]]}
    write_queryd(tmp_path, captions, "video-1/a.mp4\nvideo-2\n", split="val")
    first, second = load_benchmark("queryd", tmp_path, "validation")
    assert first == {
        "video": str(tmp_path / "video-1/a.mp4"),
        "video_id": "video-1/a.mp4",
        "text": "a man he runs",
    }
    assert second["video"] == str(tmp_path / "video-2") and second["text"] == " ".join(["word"] * 128)


@pytest.mark.parametrize(
    ("split", "name"), [("train", "train.json"), ("validation", "val.json"), ("test", "val.json")]
)
def test_activitynet_captions_test_on_val_and_drop_missing_videos(tmp_path, caplog, split, name):
    touch(tmp_path, "videos/v_a.mp4")
    entries = [
        {"video": "v_gone.mp4", "caption": ["Nobody."]},
        {"video": "v_a.mp4", "caption": ["A man runs.", "He (slowly) stops." + " word" * 80]},
    ]
    write_json(tmp_path, name, entries)
    with caplog.at_level(logging.WARNING):
        (row,) = load_benchmark("activitynet", tmp_path, split, video_root=tmp_path / "videos")
    assert row["video"] == str(tmp_path / "videos/v_a.mp4") and row["video_id"] == "v_a.mp4"
    assert row["text"].startswith("a man runs. he slowly stops. word") and len(row["text"].split()) == 64
    assert "1 of 2 rows are dropped" in caplog.text


def test_condensed_movies_splits_are_chosen_by_column(tmp_path):
    touch(tmp_path, "a.mkv", "b.mkv", "c.mkv")
    write_csv(
        tmp_path,
        "train_val_challf0.csv",
        {"videoid": "a", "caption": LONG_CAPTION, "split": "train"},
        {"videoid": "b", "caption": "A fight, outside.", "split": "val"},
    )
    write_csv(tmp_path, "test_challf0.csv", {"videoid": "c", "caption": "The end.", "split": "test"})
    (train,), (validation,), (test,) = (
        load_benchmark("condensedmovies", tmp_path, split) for split in ("train", "validation", "test")
    )
    assert train["video_id"] == "a" and len(train["text"].split()) == 32
    assert validation == {"video": str(tmp_path / "b.mkv"), "video_id": "b", "text": "a fight, outside."}
    assert test == {"video": str(tmp_path / "c.mkv"), "video_id": "c", "text": "the end."}


@pytest.mark.parametrize(("split", "name", "weight"), [("train", "train", 0.2), ("validation", "val", 1.0)])
def test_activitynetqa_joins_questions_and_answers_and_finds_mp4_or_webm(tmp_path, split, name, weight):
    touch(tmp_path, "v_a.webm", "v_b.mp4", "v_b.webm")
    write_activitynetqa(tmp_path, name)
    first, second = load_benchmark("activitynetqa", tmp_path, split)
    assert first == {
        **{"video": str(tmp_path / "v_a.webm"), "video_id": "a", "question_id": "a_0", "question": "is it red?"},
        **{"answers": ["yes"], "answer_weights": [weight], "question_type": "3"},
    }
    assert second["video"] == str(tmp_path / "v_b.mp4") and len(second["question"].split()) == 50
    assert second["answers"] == ["a man"] and second["question_type"] == "7"


def test_ivqa_weights_are_shares_of_five_and_clips_have_ids_of_their_own(tmp_path):
    touch(tmp_path, "a_3_12.webm", "a_20_31.webm")
    write_csv(tmp_path, "test.csv", IVQA_ROW, {**IVQA_ROW, "start": "20", "end": "31"})
    table = load_benchmark("ivqa", tmp_path, "test")
    assert table["video"] == [str(tmp_path / "a_3_12.webm"), str(tmp_path / "a_20_31.webm")]
    assert table[0] == {
        **{"video": str(tmp_path / "a_3_12.webm"), "video_id": "a_3_12", "question_id": "a_3_12-2"},
        **{"question": "what's that?", "answers": ["cat", "dog", "cow"], "answer_weights": [0.4, 0.4, 0.2]},
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.lists(st.sampled_from(["cat", "Cat", " dog", "cow", "hen", "owl"]), min_size=5, max_size=5))
def test_ivqa_weights_sum_to_one(tmp_path, answers):
    touch(tmp_path, "a_3_12.webm")
    write_csv(
        tmp_path, "train.csv", IVQA_ROW | {f"answer{number}": answer for number, answer in enumerate(answers, 1)}
    )
    (row,) = load_benchmark("ivqa", tmp_path, "train")
    assert sum(row["answer_weights"]) == pytest.approx(1)
    assert set(row["answers"]) == {answer.lower().strip() for answer in answers}


def test_nextqa_has_five_choices_and_finds_videos_through_its_map(tmp_path):
    touch(tmp_path, "videos/1164/3238.mp4")
    write_csv(tmp_path, "val.csv", NEXTQA_ROW, {**NEXTQA_ROW, "answer": "0"})
    write_json(tmp_path, "map_vid_vidorID.json", {"101": "1164/3238", "102": "0/1"})
    first, second = load_benchmark("nextqa", tmp_path, "validation", video_root=tmp_path / "videos")
    assert first == {
        **{"video": str(tmp_path / "videos/1164/3238.mp4"), "video_id": "101", "question_id": "101-2"},
        **{"question": "why?", "choices": ["A", "b", "c", "d", "e"], "label": 4},
    }
    assert second["label"] == 0


@pytest.mark.parametrize("dataset_name", ["webvid", "cc3m"])
@pytest.mark.parametrize(("split", "name"), [("train", "train.json"), ("validation", "val.json")])
def test_pretraining_pairs_are_videos_or_images(tmp_path, dataset_name, split, name):
    touch(tmp_path, "1/a.mp4", "b.jpg")
    entries = [{"path": "1/a.mp4", "caption": LONG_CAPTION}, {"path": "b.jpg", "caption": "Red #car"}]
    write_json(tmp_path, name, entries)
    first, second = load_benchmark(dataset_name, tmp_path, split)
    assert first["video_id"] == "1/a.mp4" and len(first["text"].split()) == 30
    assert second == {"video": str(tmp_path / "b.jpg"), "video_id": "b.jpg", "text": "red car"}


def test_max_words_overrides_the_usual_number(tmp_path):
    touch(tmp_path, "a.mp4")
    write_jsonl(tmp_path, "train.jsonl", {"clip_name": "a", "caption": LONG_CAPTION})
    assert load_benchmark("didemo", tmp_path, "train", max_words=3)["text"] == ["a long word"]


# --- Candidate answers and the challenge's matrix ----------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [["Cat", "dog", "cat "], {"Cat": 0, "dog": 1}])
def test_ivqa_candidates_are_its_vocabulary(tmp_path, vocabulary):
    write_csv(tmp_path, "test.csv", IVQA_ROW)
    write_json(tmp_path, "vocab.json", vocabulary)
    assert load_candidates("ivqa", tmp_path, "test") == ["cat", "dog"]


def test_other_candidates_are_the_distinct_answers_of_the_split_with_those_of_missing_videos(tmp_path):
    answers = [{"question_id": f"{name}_0", "answer": "Yes ", "type": 3} for name in "ab"]
    write_activitynetqa(tmp_path, "test", answers)
    write_activitynetqa(tmp_path, "val")
    assert load_candidates("activitynetqa", tmp_path, "test") == ["yes"]
    assert load_candidates("activitynetqa", tmp_path, "validation") == ["yes", "a man"]


def test_candidates_that_are_missing_or_empty_are_refused(tmp_path):
    write_csv(tmp_path, "test.csv", IVQA_ROW)
    with pytest.raises(ValueError, match=r"vocab.json doesn't exist"):
        load_candidates("ivqa", tmp_path, "test")
    write_json(tmp_path, "vocab.json", ["cat", ""])
    with pytest.raises(ValueError, match=r"vocab.json: '' is no answer"):
        load_candidates("ivqa", tmp_path, "test")
    write_json(tmp_path, "vocab.json", "cat")
    with pytest.raises(ValueError, match=r"vocab.json: a JSON list or dict is needed, this is str"):
        load_candidates("ivqa", tmp_path, "test")
    write_jsonl(tmp_path, "test.jsonl", {"clip_name": "a", "caption": "dog"})
    with pytest.raises(ValueError, match="didemo has no open-ended questions"):
        load_candidates("didemo", tmp_path, "test")


def test_a_similarity_matrix_is_read_back_from_the_challenges_zip(tmp_path):
    similarities = np.random.default_rng(0).normal(size=(3, 4))
    write_similarity_matrix(tmp_path / "submission.zip", similarities)
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert archive.namelist() == ["sim_matrix_test.npy"]
        matrix = np.load(io.BytesIO(archive.read("sim_matrix_test.npy")))
    assert matrix.dtype == np.float32 and np.array_equal(matrix, similarities.astype(np.float32))


@pytest.mark.parametrize("similarities", [np.zeros(3), np.array([[0.0, np.nan]])])
def test_a_similarity_matrix_without_its_shape_or_numbers_is_refused(tmp_path, similarities):
    with pytest.raises(ValueError, match=r"finite numbers of shape \[texts, videos\]"):
        write_similarity_matrix(tmp_path / "submission.zip", similarities)
    assert not (tmp_path / "submission.zip").exists()


# --- Errors ------------------------------------------------------------------------------------------------------------


def test_unknown_names_splits_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no dataset `didimo`; there are activitynet, .*didemo"):
        load_benchmark("didimo", tmp_path, "test")
    with pytest.raises(ValueError, match="no split `val`; there are train, validation, test"):
        load_benchmark("didemo", tmp_path, "val")
    (tmp_path / QUERYD_PICKLE).write_bytes(pickle.dumps({}))
    for dataset_name, name in {
        "didemo": "test.jsonl",
        "queryd": "exists_test_list.txt",
        "activitynet": "val.json",
        "condensedmovies": "test_challf0.csv",
        "activitynetqa": "test_q.json",
        "ivqa": "test.csv",
        "nextqa": "test.csv",
        "webvid": "test.json",
    }.items():
        with pytest.raises(ValueError, match=f"{name} doesn't exist"):
            load_benchmark(dataset_name, tmp_path, "test")


@pytest.mark.parametrize(
    ("dataset_name", "content", "message"),
    [
        ("activitynet", [{"video": "a.mp4"}], "train.json, entry 1: `caption` is missing; the row has video"),
        ("activitynet", [{"video": "a.mp4", "caption": "One."}], "entry 1: `caption` is 'One.'; a list of sentences"),
        ("activitynet", [{"video": "a.mp4", "caption": ["!"]}], "train.json, entry 1: `text` is '!'; at least one"),
        ("webvid", [{"path": "a.mp4", "caption": "a"}] * 2 + [{"path": "b"}], "entry 3: `caption` is missing"),
        ("webvid", ["a.mp4"], "train.json, entry 1: a JSON object is needed, this is str"),
        ("webvid", {"path": "a.mp4", "caption": "a"}, "train.json: a JSON list is needed, this is dict"),
        ("webvid", [], "train.json has no rows"),
    ],
)
def test_a_broken_entry_of_a_json_list_is_named_by_its_number(tmp_path, dataset_name, content, message):
    touch(tmp_path, "a.mp4")
    write_json(tmp_path, "train.json", content)
    with pytest.raises(ValueError, match=message):
        load_benchmark(dataset_name, tmp_path, "train")


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "train.json").write_text("[{]")
    with pytest.raises(ValueError, match=r"train.json: not JSON"):
        load_benchmark("cc3m", tmp_path, "train")


@pytest.mark.parametrize(
    ("dataset_name", "row", "message"),
    [
        ("didemo", {"clip_name": "a"}, "train.jsonl, line 1: `caption` is missing; the row has clip_name"),
        ("condensedmovies", {"videoid": "a", "caption": "a", "split": "dev"}, "line 2: `split` is 'dev'; train, val"),
        ("condensedmovies", {"videoid": "a", "caption": "", "split": "train"}, "line 2: `caption` is missing"),
        ("ivqa", {**IVQA_ROW, "answer3": ""}, "train.csv, line 2: `answer3` is missing"),
        ("ivqa", {**IVQA_ROW, "answer3": " "}, "train.csv, line 2: `answers` .* none of them empty"),
        ("nextqa", {**NEXTQA_ROW, "a2": ""}, "train.csv, line 2: `a2` is missing"),
        ("nextqa", {**NEXTQA_ROW, "answer": "5"}, "train.csv, line 2: `label` is '5'; .* from 0 to 4"),
        ("nextqa", {**NEXTQA_ROW, "video": "9"}, "line 2: `video` '9' has no path in .*map_vid_vidorID.json"),
    ],
)
def test_a_broken_benchmark_row_is_named_by_file_and_line(tmp_path, dataset_name, row, message):
    touch(tmp_path, "a_3_12.webm")
    write_json(tmp_path, "map_vid_vidorID.json", {"101": "a"})
    if dataset_name == "didemo":
        write_jsonl(tmp_path, "train.jsonl", row)
    else:
        write_csv(tmp_path, "train_val_challf0.csv" if dataset_name == "condensedmovies" else "train.csv", row)
    with pytest.raises(ValueError, match=message):
        load_benchmark(dataset_name, tmp_path, "train")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "test_q.json, entry 1: an unanswered question; .*test_a.json has no `question_id` 'a_0'"),
        ([{"question_id": "a_0", "type": 3}], "test_a.json, entry 1: `answer` is missing"),
        (
            [{"question_id": "a_0", "answer": "a", "type": 3}] * 2,
            "test_a.json, entry 2: .*'a_0' has an answer already",
        ),
        (
            [{"question_id": f"{name}_0", "answer": "", "type": 3} for name in "ab"],
            "test_q.json, entry 1: `answers` is .* none of them empty",
        ),
    ],
)
def test_an_activitynetqa_question_without_one_answer_is_named(tmp_path, answers, message):
    write_activitynetqa(tmp_path, "test")
    write_json(tmp_path, "test_a.json", answers)
    with pytest.raises(ValueError, match=message):
        load_benchmark("activitynetqa", tmp_path, "test")


# --- QuerYD's pickle ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], "raw_captions_combined_filtered.pkl: a dict of captions is needed, this is list"),
        ({"b.mp4": [["a"]]}, "exists_train_list.txt, line 1: 'video-1/a.mp4' has no captions in .*filtered.pkl"),
        ({"video-1/a.mp4": "a man"}, "filtered.pkl: 'video-1/a.mp4' needs a list of sentences, each a list of words"),
        ({"video-1/a.mp4": ["a man"]}, "filtered.pkl: 'video-1/a.mp4' needs a list of sentences"),
        ({"video-1/a.mp4": [["a", 3]]}, "filtered.pkl: 'video-1/a.mp4' needs a list of sentences"),
        ({"video-1/a.mp4": []}, "exists_train_list.txt, line 1: `text` is ''; at least one word"),
    ],
)
def test_queryd_captions_of_another_shape_are_named_by_file_and_key(tmp_path, captions, message):
    touch(tmp_path, "video-1/a.mp4")
    write_queryd(tmp_path, captions)
    with pytest.raises(ValueError, match=message):
        load_benchmark("queryd", tmp_path, "train")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plain, st.integers(3, pickle.HIGHEST_PROTOCOL))
def test_plain_containers_are_read_back_from_a_pickle(tmp_path, content, protocol):
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(content, protocol))
    assert read_plain_pickle(tmp_path / "plain.pkl") == content


class Bomb:
    """Unpickled by the usual means, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"video-1/a.mp4": [["a", bomb]]}])
def test_a_pickle_that_would_run_code_runs_none_and_is_refused(tmp_path, protocol, wrap):
    content = pickle.dumps(wrap(Bomb(tmp_path / "exploded")), protocol)
    write_queryd(tmp_path, {})
    (tmp_path / QUERYD_PICKLE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"filtered.pkl: .*{os.mkdir.__module__}.mkdir"):
        load_benchmark("queryd", tmp_path, "train")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(content)
    assert (tmp_path / "exploded").is_dir()


@pytest.mark.parametrize(
    ("content", "message"),
    [(OrderedDict(a=1), "collections.OrderedDict"), (np.zeros(2), "numpy"), (Path("a"), "pathlib")],
)
def test_a_pickled_object_of_another_class_is_named(tmp_path, content, message):
    (tmp_path / "other.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"other.pkl: .*{message}"):
        read_plain_pickle(tmp_path / "other.pkl")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plain, st.data())
def test_a_pickle_that_is_cut_off_is_named(tmp_path, content, data):
    whole = pickle.dumps(content)
    (tmp_path / "broken.pkl").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"broken.pkl: not a pickle of plain containers"):
        read_plain_pickle(tmp_path / "broken.pkl")


@pytest.mark.parametrize("content", [b"", b"no pickle", b"[1, 2]", b".", b"\x80\x04.", b"(lb.", b"I1\nR.", b"Pid\n."])
def test_a_file_that_is_no_pickle_is_named(tmp_path, content):
    (tmp_path / "broken.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken.pkl: not a pickle of plain containers"):
        read_plain_pickle(tmp_path / "broken.pkl")


# --- The Hub -----------------------------------------------------------------------------------------------------------


def write_parquet(folder, name, rows):
    datasets.Dataset.from_list(rows).to_parquet(folder / name)


def test_a_hub_dataset_of_jsonl_files_is_read_with_our_column_names(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    for split, name in (("train", "a"), ("test", "b")):
        row = {"path": f"{name}.mp4", "video_id": name, "text": "", "caption": "A (red) car.", "views": 3}
        write_jsonl(tmp_path, f"{split}.jsonl", row)
    table = load_hub_dataset(str(tmp_path), "test", {"video": "path", "text": "caption"}, max_words=2)
    assert table.to_list() == [{"video": str(tmp_path / "b.mp4"), "video_id": "b", "text": "a red"}]


def test_a_hub_dataset_of_parquet_files_holds_questions(tmp_path):
    touch(tmp_path, "videos/a.mp4")
    rows = [
        {"video": "a.mp4", "video_id": "a", "q": "Who?", "answers": ["Dog"]},
        {"video": "https://example.org/b.mp4", "video_id": "b", "q": "What?", "answers": ["cat", "Cow"]},
    ]
    write_parquet(tmp_path, "train.parquet", rows)
    table = load_hub_dataset(
        str(tmp_path), "train", {"question": "q"}, video_root=tmp_path / "videos", task="question"
    )
    assert table["video"] == [str(tmp_path / "videos/a.mp4"), "https://example.org/b.mp4"]
    assert table["question_id"] == ["a-0", "b-1"] and table["question"] == ["who?", "what?"]
    assert table["answers"] == [["dog"], ["cat", "cow"]] and table["answer_weights"] == [[1.0], [1.0, 1.0]]


def test_a_hub_dataset_of_parquet_files_holds_multiple_choice_questions(tmp_path):
    touch(tmp_path, "a.mp4")
    row = {"video": "a.mp4", "video_id": "a", "question": "Who?", "choices": ["a dog", "a cat"], "label": 1}
    write_parquet(tmp_path, "validation.parquet", [row])
    (read,) = load_hub_dataset(str(tmp_path), "validation", task="choice")
    assert read["choices"] == ["a dog", "a cat"] and read["label"] == 1


def test_a_hub_dataset_with_configurations_is_read_by_name(tmp_path):
    touch(tmp_path, "a.mp4")
    for config in ("short", "long"):
        write_jsonl(tmp_path, f"{config}.jsonl", {"video": "a.mp4", "video_id": "a", "text": f"a {config} text"})
    card = "".join(f"- config_name: {config}\n  data_files: {config}.jsonl\n" for config in ("short", "long"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    assert load_hub_dataset(str(tmp_path), "train", config_name="long")["text"] == ["a long text"]


def test_a_hub_column_of_videos_gives_their_paths(tmp_path):
    touch(tmp_path, "train/a.mp4")
    row = {"file_name": "a.mp4", "video_id": "a", "text": "A dog."}
    write_jsonl(tmp_path, "train/metadata.jsonl", row)
    table = load_hub_dataset(str(tmp_path), "train")
    assert table.to_list() == [{"video": str(tmp_path / "train/a.mp4"), "video_id": "a", "text": "a dog."}]


def test_a_hub_column_of_bytes_without_a_file_is_refused(tmp_path):
    for number, path in enumerate((None, "a.mp4")):
        rows = [{"video": {"bytes": b"video", "path": path}, "video_id": "a", "text": "A dog."}]
        features = datasets.Features(
            video=datasets.Video(decode=False), video_id=datasets.Value("string"), text=datasets.Value("string")
        )
        folder = tmp_path / str(number)
        folder.mkdir()
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
        with pytest.raises(ValueError, match=f"{folder}, split train, row 0: `video` holds the bytes .*save it"):
            load_hub_dataset(str(folder), "train")


def test_missing_and_unknown_hub_columns_are_named_with_those_there_are(tmp_path):
    touch(tmp_path, "a.mp4")
    write_jsonl(tmp_path, "train.jsonl", {"video": "a.mp4", "video_id": "a", "caption": "A dog."})
    with pytest.raises(
        ValueError, match="split train: there is no column `text` for `text`; there are video, video_id, caption"
    ):
        load_hub_dataset(str(tmp_path), "train")
    with pytest.raises(
        ValueError, match="there is no column `captions` for `text`; there are video, video_id, caption"
    ):
        load_hub_dataset(str(tmp_path), "train", {"text": "captions"})
    with pytest.raises(ValueError, match="there is no column `begin` for `start`"):
        load_hub_dataset(str(tmp_path), "train", {"text": "caption", "start": "begin"})
    with pytest.raises(ValueError, match="`caption` is no column of the task 'text'; those are video, video_id, text"):
        load_hub_dataset(str(tmp_path), "train", {"caption": "text"})


def test_a_broken_hub_row_is_named_by_dataset_and_row(tmp_path):
    touch(tmp_path, "a.mp4")
    rows = [{"video": "a.mp4", "video_id": "a", "text": text} for text in ("A dog.", None)]
    write_jsonl(tmp_path, "train.jsonl", *rows)
    with pytest.raises(ValueError, match=f"{tmp_path}, split train, row 1: `text` is missing"):
        load_hub_dataset(str(tmp_path), "train")
