import json
import logging
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from huggingface_hub import ModelCard
from retrieval_world import (
    COLOURS,
    WORDS,
    kill_script,
    read_rows,
    run_script,
    tiny_config,
    tiny_processor,
    write_questions,
    write_rows,
    write_stories,
)
from safetensors.torch import load_file

from transformers_testa import TestaForMultipleChoiceVideoQA, TestaForPreTraining, TestaForVideoQA


SCRIPT = Path(__file__).parents[1] / "run_videoqa.py"
sys.path.insert(0, str(SCRIPT.parent))
from run_videoqa import main  # noqa: E402


def run(*arguments) -> str:
    return run_script(main, *arguments)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def accuracies(predictions):
    """The accuracies of a file of predictions, overall and by type."""
    rows = read_rows(predictions)
    groups = {"accuracy": rows}
    for row in rows:
        groups.setdefault(f"accuracy_{row['question_type']}", []).append(row)
    return {
        name: pytest.approx(100 * sum(row["predicted"] in row["answers"] for row in group) / len(group))
        for name, group in groups.items()
    }


def answers(predictions):
    return [(row["question"], row["predicted"]) for row in read_rows(predictions)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with stories and questions, a configuration without weights, and a recipe of eight steps."""
    folder = write_stories(tmp_path_factory.mktemp("world"), num_train=10, num_validation=4, num_test=6)
    write_questions(folder, "train", "validation", "test")
    tiny_config().save_pretrained(folder / "tiny")
    tiny_processor().save_pretrained(folder / "tiny")
    recipe = {
        "config_name": str(folder / "tiny"),
        **{f"{split}_file": str(folder / f"{split}_questions.jsonl") for split in ("train", "validation", "test")},
        **{"do_train": True, "do_eval": True, "do_predict": True, "eval_before_training": True},
        **{"max_train_steps": 8, "eval_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3},
        **{"per_device_train_batch_size": 6, "train_frame_sampling": "jitter"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def trained(world):
    """A finished run of the recipe: its output folder and what it printed."""
    return world / "trained", run(world / "recipe.yaml", "--output_dir", world / "trained")


@pytest.fixture(scope="module")
def pretrained(world):
    """The folder of a model for pre-training, and its processor."""
    TestaForPreTraining(tiny_config()).save_pretrained(world / "pretrained")
    tiny_processor().save_pretrained(world / "pretrained")
    return world / "pretrained"


# --- Open-ended questions ----------------------------------------------------------------------------------------------


def test_a_run_prints_accuracies_before_and_after_training_by_type_of_question(trained):
    folder, printed = trained
    results = results_of(folder)["results"]
    assert "| split, moment | accuracy | any | finally | first |" in printed
    for split in ("validation", "test"):
        for moment in ("before training", "after training"):
            of = results[split][moment]
            shown = " | ".join(f"{of[f'accuracy{kind}']:.1f}" for kind in ("", "_any", "_finally", "_first"))
            assert f"| {split}, {moment} | {shown} |" in printed
    assert "validation split: 12 questions, 4 videos" in printed and "test split: 18 questions, 6 videos" in printed


def test_training_teaches_and_the_best_step_by_validation_is_taken(trained):
    folder, _ = trained
    losses = [of["loss"] for of in results_of(folder)["losses"].values()]
    assert len(losses) == 8 and losses[-1] < losses[0]
    validation = results_of(folder)["results"]["validation"]
    assert list(validation) == ["before training", "step 4", "step 8", "after training"]
    best = max(("step 4", "step 8"), key=lambda moment: validation[moment]["accuracy"])
    assert validation["after training"] == validation[best]
    weights = load_file(folder / f"checkpoint-{best.split()[1]}" / "model.safetensors")
    saved = load_file(folder / "model.safetensors")
    assert saved and all(weights[name].equal(saved[name]) for name in saved)


def test_what_was_asked_accepted_and_answered_is_written_for_each_split(world, trained):
    folder, _ = trained
    results = results_of(folder)["results"]
    for split in ("validation", "test"):
        rows = read_rows(folder / f"predictions_{split}.jsonl")
        asked = read_rows(world / f"{split}_questions.jsonl")
        assert [row["question"] for row in rows] == [row["question"].lower() for row in asked]
        assert rows[2]["answers"] == asked[2]["answers"] and rows[2]["question_id"] == f"{split}-0-3"
        assert {row["predicted"] for row in rows} <= set(COLOURS)
        after = results[split]["after training"]
        assert after == {**accuracies(folder / f"predictions_{split}.jsonl"), "questions_without_video": 0}


def test_a_run_saves_a_model_that_answers_as_it_was_measured(world, trained, tmp_path):
    folder, _ = trained
    assert TestaForVideoQA.from_pretrained(folder).config.video_config.num_hidden_layers == 2
    arguments = ("--model_name_or_path", folder, "--do_predict", "--test_file", world / "test_questions.jsonl")
    printed = run(*arguments, "--output_dir", tmp_path)
    assert "| test, as loaded | " in printed and "training: none in this run" in printed
    assert (tmp_path / "predictions_test.jsonl").read_bytes() == (folder / "predictions_test.jsonl").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "predictions_test.jsonl"}


def test_the_model_card_holds_the_figures_and_what_defines_them(trained):
    folder, printed = trained
    card = ModelCard.load(folder / "README.md")
    assert f"--model_name_or_path {folder} --do_predict" in card.text
    for line in printed.splitlines():
        if line.startswith("| test, after training"):
            assert line in card.text
    for fact in (
        "answers: the likeliest of a split's answers, among the 128 with the likeliest first token",
        "test split: 18 questions, 6 videos",
        "training: 8 steps of 6 samples, seed 42",
        "max_answer_tokens: 30",
    ):
        assert fact in card.text
    results = results_of(folder)["results"]["test"]["after training"]
    figures = {(figure.dataset_split, figure.metric_type): figure.metric_value for figure in card.data.eval_results}
    assert figures["test", "accuracy"] == round(results["accuracy"], 2)
    assert figures["test", "accuracy_any"] == round(results["accuracy_any"], 2)


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(world, trained, caplog):
    folder = world / "killed"
    kill_script(SCRIPT, world / "recipe.yaml", folder, step=2)
    assert not (folder / "checkpoint-8").exists()
    with caplog.at_level(logging.INFO):
        printed = run(world / "recipe.yaml", "--output_dir", folder)
    assert "Going on from" in caplog.text and "of 8" in caplog.text
    resumed, whole = load_file(folder / "model.safetensors"), load_file(trained[0] / "model.safetensors")
    assert resumed.keys() == whole.keys() and all(resumed[name].equal(whole[name]) for name in whole)
    assert [line for line in printed.splitlines() if line.startswith("|")] == [
        line for line in trained[1].splitlines() if line.startswith("|")
    ]


def test_training_needs_no_evaluation(world, tmp_path):
    off = ("--do_eval", "no", "--do_predict", "no", "--eval_before_training", "no")
    printed = run(world / "recipe.yaml", "--output_dir", tmp_path, *off, "--max_train_steps", 1)
    assert "training: 1 steps of 6 samples, seed 42" in printed and "|" not in printed
    assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("predictions_*"))


def test_answers_are_generated_in_words(world, trained, tmp_path):
    arguments = ("--do_predict", "--test_file", world / "test_questions.jsonl", "--answer_mode", "generate")
    generation = ("--num_beams", 2, "--max_new_tokens", 3)
    words = set(WORDS) - {word for word in WORDS if word.startswith("[")}
    # New weights say anything.
    for source in (("--model_name_or_path", trained[0]), ("--config_name", world / "tiny")):
        printed = run(*source, *arguments, *generation, "--output_dir", tmp_path)
        assert "answers: generated with 2 beams, at most 3 tokens" in printed
        predicted = [row["predicted"].split() for row in read_rows(tmp_path / "predictions_test.jsonl")]
        assert len(predicted) == 18 and all(len(answer) <= 3 and set(answer) <= words for answer in predicted)
        measured = results_of(tmp_path)["results"]["test"]["as loaded"]
        assert measured == {**accuracies(tmp_path / "predictions_test.jsonl"), "questions_without_video": 0}


def test_an_answer_that_is_too_long_to_learn_is_refused_before_training(world, tmp_path):
    with pytest.raises(
        ValueError, match=r"Question 'train-0-1': the answer 'red' has 3 tokens.*max_answer_tokens is 2"
    ):
        run(world / "recipe.yaml", "--output_dir", tmp_path / "out", "--max_answer_tokens", 2)
    assert not (tmp_path / "out").exists()


def test_an_unanswered_question_is_named_by_file_and_line(world):
    rows = read_rows(world / "train_questions.jsonl")
    del rows[1]["answers"]
    write_rows(world / "unanswered.jsonl", rows)
    with pytest.raises(ValueError, match=r"unanswered.jsonl, line 2: `answers` is missing \(an unanswered question\)"):
        run(world / "recipe.yaml", "--output_dir", world / "out", "--train_file", world / "unanswered.jsonl")


def test_questions_about_a_video_that_cannot_be_decoded_are_counted(world, trained, tmp_path):
    rows = read_rows(world / "test_questions.jsonl")
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    for row in rows[:3]:
        row["video"] = str(tmp_path / "broken.mp4")
    write_rows(world / "broken.jsonl", rows)
    arguments = ("--model_name_or_path", trained[0], "--do_predict", "--test_file", world / "broken.jsonl")
    printed = run(*arguments, "--output_dir", tmp_path)
    assert "videos that could not be decoded: 1" in printed
    assert list(results_of(tmp_path)["broken_videos"]) == [str(tmp_path / "broken.mp4")]
    assert results_of(tmp_path)["results"]["test"]["as loaded"]["questions_without_video"] == 3
    # The other questions are answered as they were.
    assert answers(tmp_path / "predictions_test.jsonl") == answers(trained[0] / "predictions_test.jsonl")[3:]


# --- Multiple choice ---------------------------------------------------------------------------------------------------


def test_multiple_choice_is_trained_and_evaluated(world, tmp_path):
    files = [item for split in ("train", "test") for item in (f"--{split}_file", world / f"{split}_choices.jsonl")]
    steps = ("--max_train_steps", 3, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3)
    source = ("--task", "choice", "--config_name", world / "tiny")
    out = tmp_path / "out"
    printed = run(*source, *files, *steps, "--do_train", "--do_predict", "--output_dir", out)
    assert "| split, moment | accuracy | finally | first |" in printed and "answers: one of the choices" in printed
    after = results_of(out)["results"]["test"]["after training"]
    assert after == {**accuracies(out / "predictions_test.jsonl"), "questions_without_video": 0}
    rows, asked = read_rows(out / "predictions_test.jsonl"), read_rows(world / "test_choices.jsonl")
    assert [row["answers"] for row in rows] == [[row["choices"][row["label"]]] for row in asked]
    assert {row["predicted"] for row in rows} <= set(COLOURS)
    assert "max_question_tokens: 50" in ModelCard.load(out / "README.md").text

    assert TestaForMultipleChoiceVideoQA.from_pretrained(out).matching_head.weight.shape == (2, 32)
    again = ("--task", "choice", "--model_name_or_path", out, "--do_predict", *files[2:])
    run(*again, "--output_dir", tmp_path / "again")
    assert answers(tmp_path / "again/predictions_test.jsonl") == answers(out / "predictions_test.jsonl")


def test_multiple_choice_starts_from_blip_by_way_of_a_converted_model(world, tmp_path):
    arguments = ("--task", "choice", "--config_name", world / "tiny", "--init_from_blip", tmp_path, "--do_predict")
    with pytest.raises(ValueError, match=r"no TestaForMultipleChoiceVideoQA.*--from blip --architecture retrieval"):
        run(*arguments, "--test_file", world / "test_choices.jsonl", "--output_dir", tmp_path)


# --- Other sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["question", "choice"])
def test_a_pre_trained_model_answers_without_training_and_without_new_weights(world, pretrained, tmp_path, task):
    arguments = ("--task", task, "--model_name_or_path", pretrained, "--do_eval", "--do_predict")
    files = (f"--{split}_file={world / f'{split}_{task}s.jsonl'}" for split in ("validation", "test"))
    arguments = (*arguments, *files)
    printed = run(*arguments, "--seed", 1, "--output_dir", tmp_path / "1")
    assert "| validation, as loaded | " in printed and "| test, as loaded | " in printed
    run(*arguments, "--seed", 2, "--output_dir", tmp_path / "2")
    for split in ("validation", "test"):
        name = f"predictions_{split}.jsonl"
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_benchmark_is_answered_out_of_the_answers_of_its_whole_split(world, tmp_path):
    """Learn that everything is green, and say it where only a question without a video has that answer."""
    answer_of = {"train": ["green"] * 4, "test": ["red", "red", "green"]}
    for split, answers_of_split in answer_of.items():
        names = [f"{split}{number}" for number in range(len(answers_of_split))]
        ids = [f"{name}_0" for name in names]
        rows = [
            {"video_name": name, "question": "What comes first?", "question_id": question_id}
            for name, question_id in zip(names, ids, strict=True)
        ]
        (tmp_path / f"{split}_q.json").write_text(json.dumps(rows))
        rows = [
            {"question_id": question_id, "answer": answer.title(), "type": 3}
            for question_id, answer in zip(ids, answers_of_split, strict=True)
        ]
        (tmp_path / f"{split}_a.json").write_text(json.dumps(rows))
        for number, name in enumerate(names):
            if name != "test2":
                (tmp_path / f"v_{name}.mp4").symlink_to(world / f"videos/{split}-{number}.mp4")
    arguments = ("--config_name", world / "tiny", "--dataset_name", "activitynetqa", "--data_dir", tmp_path)
    steps = ("--do_train", "--max_train_steps", 12, "--per_device_train_batch_size", 4, "--learning_rate", 1e-2)
    printed = run(*arguments, *steps, "--do_predict", "--output_dir", tmp_path / "out")
    assert "| split, moment | accuracy | 3 |" in printed and "data: activitynetqa" in printed
    assert "test split: 2 questions, 2 videos" in printed and "text: the first 50 words" in printed
    assert answers(tmp_path / "out/predictions_test.jsonl") == [("what comes first?", "green")] * 2
    assert results_of(tmp_path / "out")["results"]["test"]["after training"]["accuracy"] == 0


def test_a_data_set_of_the_hub_gives_what_its_file_gives(world, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = {"video": "clip", "question": "query", "answers": "replies", "question_type": "kind"}
    rows = read_rows(world / "test_questions.jsonl")
    for row in rows:
        row["answers"] = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
        row.setdefault("answer_weights", [1.0])
    (tmp_path / "hub").mkdir()
    write_rows(
        tmp_path / "hub" / "test.jsonl",
        [{names.get(name, name): value for name, value in row.items()} for row in rows],
    )
    columns = [f"{ours}={theirs}" for ours, theirs in names.items()]
    arguments = ("--model_name_or_path", trained[0], "--do_predict", "--dataset_name", tmp_path / "hub")
    run(*arguments, "--video_root", world, "--columns", *columns, "--output_dir", tmp_path / "out")
    assert answers(tmp_path / "out/predictions_test.jsonl") == answers(trained[0] / "predictions_test.jsonl")
    measured = results_of(tmp_path / "out")["results"]["test"]["as loaded"]
    assert measured == results_of(trained[0])["results"]["test"]["after training"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Nothing to do"),
        ("--do_train --output_dir {out}", "train_file is missing"),
        ("--do_predict --output_dir {out} --rank_k 0", "rank_k is 0; at least 1 is needed"),
        (
            "--do_predict --output_dir {out} --dataset_name didemo --data_dir {out}",
            "didemo has no `question` annotations but `text`",
        ),
        (
            "--do_predict --output_dir {out} --task choice --test_file {questions}",
            "test_questions.jsonl, line 1: `choices` is missing",
        ),
        (
            "--do_predict --output_dir {out} --dataset_name owner-name",
            "There is no dataset `owner-name`; there are didemo, .*, and data sets of the Hub",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(world, tmp_path, arguments, message):
    places = {"out": tmp_path, "questions": world / "test_questions.jsonl"}
    with pytest.raises(ValueError, match=message):
        run("--config_name", world / "tiny", *(word.format(**places) for word in arguments.split()))
