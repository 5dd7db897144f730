import csv
import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_testa.data.annotations import (
    answer_candidates,
    build_table,
    clean_caption,
    clean_question,
    load_annotations,
)


ROW = {"video": "a.mp4", "video_id": "a", "text": "A dog runs."}
QUESTION = {"video": "a.mp4", "video_id": "a", "question": "Who (exactly) runs?", "answers": ["Dog "]}
CHOICE = {"video": "a.mp4", "video_id": "a", "question": "Who runs?", "choices": ["a Dog", "a cat "], "label": 1}


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


def write_csv(folder, *rows, name="train.csv"):
    file = folder / name
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(
            {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
            for row in rows
        )
    return file


def test_jsonl_and_csv_give_the_same_table(folder):
    rows = [{**ROW, "start": 1.5, "distractor": "b"}, {"video": "b.mp4", "video_id": "b", "text": 'Cats, "two"'}]
    table = load_annotations(write_jsonl(folder, *rows))
    assert load_annotations(write_csv(folder, *rows)).to_list() == table.to_list()
    assert table.to_list() == [
        {"video": str(folder / "a.mp4"), "video_id": "a", "text": "a dog runs.", "start": 1.5, "distractor": "b"},
        {"video": str(folder / "b.mp4"), "video_id": "b", "text": "cats, two", "start": None, "distractor": None},
    ]


def test_videos_start_from_video_root_and_texts_keep_max_words(folder, tmp_path_factory):
    file = write_jsonl(tmp_path_factory.mktemp("elsewhere"), ROW)
    (row,) = load_annotations(file, video_root=folder, max_words=2)
    assert row == {"video": str(folder / "a.mp4"), "video_id": "a", "text": "a dog"}


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_columns_of_other_names_are_read_as_ours(folder, write):
    file = write(folder, {"file": "a.mp4", "video_id": "a", "caption": "A dog", "text": "not this"})
    columns = {"video": "file", "text": "caption"}
    table = load_annotations(file, columns=columns)
    assert table["text"] == ["a dog"] and table["video"] == [str(folder / "a.mp4")]
    with pytest.raises(ValueError, match="no row has `begin`, which columns says is `start`"):
        load_annotations(file, columns={**columns, "start": "begin"})
    with pytest.raises(ValueError, match="`caption` is no column of the task 'text'; those are video, "):
        load_annotations(file, columns={"caption": "text"})


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
        ([ROW, {**ROW, "text": " ! "}], "line 2: `text` is ' ! '; at least one word"),
        ([{**ROW, "video": "gone.mp4"}], "None of the 1 videos .*gone.mp4.*video_root"),
        ([ROW, {**ROW, "video": "b.mp4"}], "line 2: `video_id` 'a' stands for .*b.mp4 .*line 1 for .*a.mp4"),
        ([ROW, {**ROW, "start": 3}], "line 2: `video_id` 'a' stands for .* from 3.0"),
        ([{**ROW, "end": "soon"}], "line 1: `end` is 'soon'; a number of seconds"),
        ([{**ROW, "start": -1}], "line 1: `start` is -1; a number of seconds is needed, at least 0"),
        ([{**ROW, "start": float("nan")}], "line 1: `start` is nan; a number of seconds"),
        ([{**ROW, "start": 3, "end": 3}], "line 1: `end` is 3; a clip ends later than it starts, at 3.0 s"),
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


def test_blank_lines_are_no_rows(folder):
    file = write_jsonl(folder, ROW)
    file.write_text(f"\n{file.read_text()}  \n\n")
    assert load_annotations(file)["video_id"] == ["a"]


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_a_file_that_is_not_encoded_as_utf8_is_named(folder, write):
    file = write(folder, ROW)
    file.write_bytes(file.read_bytes().replace(b"dog", "d\u00f6g".encode("latin-1")))
    with pytest.raises(ValueError, match=rf"{file.name} is not encoded as UTF-8"):
        load_annotations(file)


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


def test_a_csv_text_cut_at_its_comma_is_named(folder):
    (folder / "train.csv").write_text("video,video_id,text\na.mp4,a,a dog, running\n")
    with pytest.raises(ValueError, match=r"train.csv, line 2: 1 more fields than the header has; .*quotes"):
        load_annotations(folder / "train.csv")


def test_files_that_are_missing_or_of_another_kind_are_refused(folder):
    with pytest.raises(ValueError, match=r"nothing.jsonl doesn't exist"):
        load_annotations(folder / "nothing.jsonl")
    with pytest.raises(ValueError, match=r"not .mp4"):
        load_annotations(folder / "a.mp4")


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_open_questions_have_ids_clean_answers_and_a_weight_for_each(folder, write):
    rows = [
        {**QUESTION, "question_id": 7, "answers": ["Dog ", "a cat"], "answer_weights": [0.6, 2], "question_type": 3},
        {**QUESTION, "video": "b.mp4", "video_id": "b", "answers": "Two Cats", "start": 1.5},
        {**QUESTION, "answers": ["2", "two"]},
    ]
    line = 2 if write is write_csv else 1
    assert load_annotations(write(folder, *rows), task="question").to_list() == [
        {
            **{"video": str(folder / "a.mp4"), "video_id": "a", "question_id": "7", "question": "who exactly runs?"},
            **{"answers": ["dog", "a cat"], "answer_weights": [0.6, 2.0], "question_type": "3", "start": None},
        },
        {
            **{"video": str(folder / "b.mp4"), "video_id": "b", "question_id": f"b-{line + 1}"},
            **{"question": "who exactly runs?", "answers": ["two cats"], "answer_weights": [1.0]},
            **{"question_type": None, "start": 1.5},
        },
        {
            **{"video": str(folder / "a.mp4"), "video_id": "a", "question_id": f"a-{line + 2}"},
            **{"question": "who exactly runs?", "answers": ["2", "two"], "answer_weights": [1.0, 1.0]},
            **{"question_type": None, "start": None},
        },
    ]


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_multiple_choice_questions_have_choices_and_the_index_of_the_right_one(folder, write):
    file = write(folder, {**CHOICE, "question_id": "q", "question_type": "CW"})
    assert load_annotations(file, task="choice").to_list() == [
        {
            **{"video": str(folder / "a.mp4"), "video_id": "a", "question_id": "q", "question": "who runs?"},
            **{"choices": ["a Dog", "a cat"], "label": 1, "question_type": "CW"},
        }
    ]


def test_the_demo_worlds_questions_can_be_read(folder):
    row = {
        **{"video": "a.mp4", "video_id": "train-00000", "question_id": "train-00000-0", "question": "what is red?"},
        **{"answers": ["the circle"], "answer_weights": [1.0], "question_type": "what"},
    }
    table = load_annotations(write_jsonl(folder, row, name="train_qa.jsonl"), task="question")
    assert table.to_list() == [{**row, "video": str(folder / "a.mp4")}]


def test_a_question_keeps_fifty_words_or_max_words(folder):
    file = write_jsonl(folder, {**QUESTION, "question": "why " * 60})
    for max_words, words in ((None, 50), (3, 3)):
        (question,) = load_annotations(file, max_words=max_words, task="question")["question"]
        assert len(question.split()) == words


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            "question",
            [{**QUESTION, "answers": None}],
            "line 1: `answers` is missing .an unanswered question.; the row",
        ),
        ("question", [QUESTION, {**QUESTION, "answers": []}], r"line 2: `answers` is \[\]; .* an unanswered question"),
        ("question", [{**QUESTION, "answers": " "}], "line 1: `answers` is ' '; this is an unanswered question"),
        ("question", [{**QUESTION, "answers": ["a", " "]}], "line 1: `answers` is .*; a list of strings .* empty"),
        ("question", [{**QUESTION, "answers": [3]}], r"line 1: `answers` is \[3\]; a list of strings"),
        ("question", [{**QUESTION, "answers": 3}], "line 1: `answers` is 3; a list is needed"),
        ("question", [{**QUESTION, "answers": "[a"}], r"line 1: `answers` is '\[a'; a JSON list is needed"),
        ("question", [{**QUESTION, "answer_weights": [1, 1]}], "line 1: `answer_weights` .* of the 1 answers"),
        ("question", [{**QUESTION, "answer_weights": [0]}], "line 1: `answer_weights` .* positive numbers"),
        ("question", [{**QUESTION, "answer_weights": [float("nan")]}], "line 1: `answer_weights` .* positive numbers"),
        ("question", [{**QUESTION, "answer_weights": ["1"]}], "line 1: `answer_weights` .* positive numbers"),
        ("question", [{**QUESTION, "question": "..."}], "line 1: `question` is '...'; at least one word"),
        ("question", [ROW], "line 1: `question` is missing; the row has video, video_id, text"),
        (
            "question",
            [{**QUESTION, "question_id": 1}, {**QUESTION, "question_id": "1"}],
            "line 2: `question_id` '1' is that of .*train.jsonl, line 1 too",
        ),
        ("question", [QUESTION, {**QUESTION, "video": "b.mp4"}], "line 2: `video_id` 'a' stands for .*two clips need"),
        ("choice", [{**CHOICE, "label": 2}], "line 1: `label` is 2; .* from 0 to 1"),
        ("choice", [{**CHOICE, "label": -1}], "line 1: `label` is -1; .* from 0 to 1"),
        ("choice", [{**CHOICE, "label": 0.5}], "line 1: `label` is 0.5; .* from 0 to 1"),
        ("choice", [{**CHOICE, "label": None}], "line 1: `label` is missing"),
        ("choice", [{**CHOICE, "choices": ["a"]}], "line 1: `choices` .* at least two"),
        ("choice", [{**CHOICE, "choices": "a dog"}], "line 1: `choices` is 'a dog'; a JSON list"),
        ("choice", [{**CHOICE, "choices": ["a", ""]}], "line 1: `choices` .* none of them empty"),
        (
            "choice",
            [CHOICE, {**CHOICE, "choices": ["a", "b", "c"]}],
            "line 2: there are 3 `choices`, but 2 in .*train.jsonl, line 1",
        ),
        ("choices", [CHOICE], "no task 'choices'; there are text, question, choice"),
    ],
)
def test_a_broken_question_is_named_by_file_and_line(folder, task, rows, message):
    with pytest.raises(ValueError, match=message if task == "choices" else "train.jsonl, " + message):
        load_annotations(write_jsonl(folder, *rows), task=task)


def test_questions_about_missing_videos_are_dropped_and_counted(folder, caplog):
    gone = {**QUESTION, "video": "gone.mp4", "video_id": "gone"}
    with caplog.at_level(logging.WARNING):
        table = load_annotations(write_jsonl(folder, gone, QUESTION, gone), task="question")
    assert table["question_id"] == ["a-2"]
    assert "1 videos don't exist" in caplog.text and "2 of 3 rows are dropped" in caplog.text


def test_rows_are_counted_in_the_unit_of_their_source(tmp_path):
    with pytest.raises(ValueError, match=r"train.json, entry 3: `text` is missing"):
        build_table([(3, {"video": "a.mp4", "video_id": "a"})], "train.json", tmp_path, unit="entry")


@given(st.lists(st.lists(st.sampled_from(["Dog", "dog", " cat", "2"]), min_size=1), min_size=1, max_size=5))
def test_candidates_are_the_distinct_answers_in_the_order_of_their_first_appearance(answers):
    rows = [
        (line, {"video": "https://example.org/a.mp4", "video_id": "a", "question": "what?", "answers": some})
        for line, some in enumerate(answers)
    ]
    candidates = answer_candidates(build_table(rows, "train.jsonl", ".", task="question"))
    given_answers = [answer.lower().strip() for some in answers for answer in some]
    assert len(candidates) == len(set(candidates)) and set(candidates) == set(given_answers)
    assert candidates == sorted(candidates, key=given_answers.index)
