import contextlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard
from retrieval_world import read_rows, tiny_config, tiny_processor, write_stories
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from transformers_testa import TestaForRetrieval


SCRIPT = Path(__file__).parents[1] / "run_retrieval.py"
sys.path.insert(0, str(SCRIPT.parent))
from run_retrieval import main  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(*arguments) -> str:
    """Run the script in this process, with one thread as its subprocesses have, and return what it prints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([str(argument) for argument in arguments])
    torch.set_num_threads(threads)
    return printed.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with stories, a configuration without weights, and a recipe that trains it for eight steps."""
    folder = write_stories(tmp_path_factory.mktemp("world"), num_train=10, num_validation=4, num_test=6)
    tiny_config().save_pretrained(folder / "tiny")
    tiny_processor().save_pretrained(folder / "tiny")
    recipe = {
        "config_name": str(folder / "tiny"),
        **{f"{split}_file": str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
        **{"do_train": True, "do_eval": True, "do_predict": True, "eval_before_training": True},
        **{"max_train_steps": 8, "eval_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "group_distractors": True},
        **{"train_frame_sampling": "jitter", "num_example_queries": 2, "max_words": 16, "rerank_k": 3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def trained(world):
    """A finished run of the recipe: its output folder and what it printed."""
    return world / "trained", run(world / "recipe.yaml", "--output_dir", world / "trained")


def test_a_run_prints_recalls_before_and_after_training_and_re_ranking(trained):
    _, printed = trained
    for split in ("validation", "test"):
        for moment in ("before training", "after training"):
            for ranked_by in ("similarity", "re-ranked"):
                assert f"| {split}, {moment} | {ranked_by} | " in printed
    assert "GFLOPs per video: " in printed
    assert printed.count("a text of test-") == 2 and "  1. " in printed


def test_a_run_saves_a_model_that_can_be_used(trained):
    folder, _ = trained
    model = TestaForRetrieval.from_pretrained(folder)
    assert model.config.video_config.num_hidden_layers == 2
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "results.json"} <= {
        file.name for file in folder.iterdir()
    }


def test_the_model_card_holds_the_figures_and_what_defines_them(trained):
    folder, printed = trained
    card = ModelCard.load(folder / "README.md")
    for line in printed.splitlines():
        if line.startswith("| test, after training"):
            assert line in card.text
    for fact in (
        "test split: 6 texts, 6 videos",
        "6 a video, uniform sampling",
        "height 32, width 32 pixels",
        "the 3 most similar",
    ):
        assert fact in card.text
    results = json.loads((folder / "results.json").read_text())["results"]["test"]["after training"]
    figures = {(figure.dataset_split, figure.metric_type): figure.metric_value for figure in card.data.eval_results}
    assert figures["test", "reranked_text_to_video_recall@1"] == round(results["reranked_text_to_video_recall@1"], 2)


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(world, trained, caplog):
    folder = world / "killed"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(world / "recipe.yaml"), "--output_dir", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (folder / "checkpoint-2").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (folder / "checkpoint-8").exists()

    with caplog.at_level(logging.INFO):
        run(world / "recipe.yaml", "--output_dir", folder)
    assert "Going on from" in caplog.text and "of 8" in caplog.text
    resumed, whole = load_file(folder / "model.safetensors"), load_file(trained[0] / "model.safetensors")
    assert resumed.keys() == whole.keys() and all(resumed[name].equal(whole[name]) for name in whole)


def test_training_needs_no_evaluation(world, tmp_path):
    off = ("--do_eval", "no", "--do_predict", "no", "--max_train_steps", 2)
    printed = run(world / "recipe.yaml", "--output_dir", tmp_path, *off)
    assert "training: 2 steps of 8 samples, seed 42" in printed and (tmp_path / "model.safetensors").exists()


def test_a_finished_run_is_reported_again_without_training(world, trained):
    folder, printed = trained
    weights = (folder / "model.safetensors").read_bytes()
    again = run(world / "recipe.yaml", "--output_dir", folder)
    without_seconds = [
        [line.rpartition("| ")[0] for line in text.splitlines() if "training |" in line] for text in (again, printed)
    ]
    assert without_seconds[0] == without_seconds[1] and len(without_seconds[0]) == 8
    assert (folder / "model.safetensors").read_bytes() == weights


def test_another_recipe_does_not_go_on_from_a_checkpoint(world, trained):
    with pytest.raises(ValueError, match=r"`learning_rate` is 0.001 there and 0.1 here.*overwrite_output_dir"):
        run(world / "recipe.yaml", "--output_dir", trained[0], "--learning_rate", "0.1")


def test_a_misspelt_field_of_a_recipe_is_named(tmp_path):
    (tmp_path / "wrong.yaml").write_text("learning_rte: 1")
    with pytest.raises(ValueError, match=r"has `learning_rte`, which is no argument; did you mean `learning_rate`\?"):
        run(tmp_path / "wrong.yaml")


def test_a_folder_of_videos_is_indexed_once_and_searched(world, trained):
    command = ("--model_name_or_path", trained[0], "--gallery_dir", world / "gallery", "--top_k", 3)
    query = ("--query", "First red, then green, finally blue", "White")
    first = run(*command, "--index_folder", world / "videos", *query)
    assert "20 videos added, 0 were there, 0 could not be read." in first
    again = run(*command, "--index_folder", world / "videos", *query)
    assert "0 videos added, 20 were there" in again
    assert again.splitlines()[1:] == first.splitlines()[1:]
    assert run(*command, *query).splitlines() == first.splitlines()[1:]
    ranked = [line.split() for line in first.splitlines() if line.endswith(".mp4")]
    assert [line[0] for line in ranked] == ["1.", "2.", "3."] * 2
    scores = [float(line[1]) for line in ranked]
    assert scores[:3] == sorted(scores[:3], reverse=True) and all(Path(line[2]).is_file() for line in ranked)


def test_a_damaged_gallery_is_repaired_on_request(world, trained, tmp_path):
    command = ("--model_name_or_path", trained[0], "--gallery_dir", tmp_path / "gallery")
    videos = shutil.copytree(world / "videos", tmp_path / "videos")
    run(*command, "--index_folder", videos, "--gallery_dtype", "int8", "--per_device_eval_batch_size", 8)
    shard = tmp_path / "gallery" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is missing or cut short: repair .*--repair"):
        run(*command, "--query", "White")
    printed = run(*command, "--repair", "--query", "White")
    assert "1 damaged files found, 8 videos embedded again, 0 could not be read any more" in printed
    assert "  1. " in printed
    with pytest.raises(ValueError, match=r"stores torch\.int8: leave it out"):
        run(*command, "--index_folder", videos, "--gallery_dtype", "bfloat16")


def scores_by_name(printed):
    """The results of one search, best first, as it prints them: name → score."""
    lines = [line.split() for line in printed.splitlines() if line.endswith(".mp4")]
    return {name: float(score) for _, score, name in lines}


def test_videos_are_removed_from_a_gallery_by_the_names_that_a_search_shows(world, trained, tmp_path):
    command = ("--model_name_or_path", trained[0], "--gallery_dir", tmp_path / "gallery", "--top_k", 20)
    shown = run(*command, "--index_folder", world / "videos", "--query", "White")
    scores = scores_by_name(shown)
    names = list(scores)
    printed = run(*command, "--remove", names[0], names[7], "--query", "White")
    assert printed.startswith("2 videos removed, 18 are left.")
    # All but equal videos may change places; each keeps its score.
    left = {name: score for name, score in scores.items() if name not in (names[0], names[7])}
    assert scores_by_name(printed) == pytest.approx(left, abs=2e-3)
    with pytest.raises(ValueError, match=f"id '{names[0]}' is not in the gallery"):
        run(*command, "--remove", names[0])


def test_a_trained_model_is_evaluated_again_with_cached_frames(world, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = ("--model_name_or_path", trained[0], "--do_predict", "--test_file", world / "test.jsonl")
    run(*arguments, "--max_words", 16, "--rerank_k", 3, "--cache_frames", "--output_dir", tmp_path)
    measured = json.loads((tmp_path / "results.json").read_text())["results"]["test"]["as loaded"]
    in_training = json.loads((trained[0] / "results.json").read_text())["results"]["test"]["after training"]
    in_training["seconds_per_video"] = measured["seconds_per_video"]
    assert measured == pytest.approx(in_training)
    assert list((tmp_path / "cache").rglob("frames-*.arrow")) and not (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a `bert` model; a `testa` model is needed"):
        run("--model_name_or_path", tmp_path, "--gallery_dir", tmp_path, "--query", "red")


def test_the_best_step_by_validation_is_taken(trained):
    folder, _ = trained
    progress = json.loads((folder / "checkpoint-8" / "progress.json").read_text())
    by_step = {
        int(moment.split()[1]): metrics["reranked_text_to_video_mean_recall"]
        for moment, metrics in progress["results"]["validation"].items()
        if moment.startswith("step")
    }
    assert list(by_step) == [4, 8]
    assert progress["best_value"] == max(by_step.values()) == by_step[progress["best_step"]]
    best = load_file(folder / f"checkpoint-{progress['best_step']}" / "model.safetensors")
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == best.keys() and all(saved[name].equal(best[name]) for name in best)


def test_a_run_that_stops_evaluating_is_reported_as_far_as_it_did(world, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "copy")
    printed = run(world / "recipe.yaml", "--output_dir", tmp_path / "copy", "--do_eval", "no")
    assert "| validation, before training | " in printed and "| validation, after training | " not in printed
    figures = ModelCard.load(tmp_path / "copy" / "README.md").data.eval_results
    assert {figure.dataset_split for figure in figures} == {"test"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (("--num_frames", 4), "`num_frames` is None there and 4 here"),
        (("--merged_patches_per_layer", 0), "`merged_patches_per_layer` is None there and 0 here"),
        (("--train_frame_sampling", "random"), "`train_frame_sampling` is 'jitter' there and 'random' here"),
        (("--max_words", 8), "`max_words` is 16 there and 8 here"),
        (("--momentum", 0.9), "`momentum` is None there and 0.9 here"),
    ],
)
def test_what_would_change_the_weights_does_not_go_on_from_a_checkpoint(world, trained, setting, message):
    with pytest.raises(ValueError, match=f"checkpoint-8 was made by another run: {message}"):
        run(world / "recipe.yaml", "--output_dir", trained[0], *setting)


def test_a_run_with_a_teacher_and_a_queue_saves_the_model_alone(world, trained, tmp_path):
    teacher = ("--momentum", 0.9, "--queue_size", 6, "--max_train_steps", 2)
    printed = run(world / "recipe.yaml", "--output_dir", tmp_path, *teacher)
    assert "| test, after training | re-ranked | " in printed
    assert "momentum: 0.9" in ModelCard.load(tmp_path / "README.md").text
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == load_file(trained[0] / "model.safetensors").keys()
    checkpoint = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert checkpoint["step"] == 2 and (checkpoint["queue.pair_ids"] >= 0).all()
    teacher = checkpoint["teacher.video_projection.weight"]
    assert not teacher.equal(checkpoint["model.video_projection.weight"])


def test_a_queue_shorter_than_the_batch_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="queue_size is 3; at least a batch over all processes is needed: 4"):
        run(world / "recipe.yaml", "--output_dir", tmp_path, "--momentum", 0.9, "--queue_size", 3)


def test_condensed_movies_leaves_the_matrix_of_the_challenge_in_the_order_of_its_file(world, trained, tmp_path):
    rows = read_rows(world / "test.jsonl")
    for row in rows:
        (tmp_path / row["video_id"]).with_suffix(".mkv").symlink_to(world / row["video"])
    matrices = []
    for order in (rows, rows[::-1]):
        lines = [f'{row["video_id"]},"{row["text"]}",test\n' for row in order]
        (tmp_path / "test_challf0.csv").write_text("videoid,caption,split\n" + "".join(lines))
        arguments = ("--dataset_name", "condensedmovies", "--data_dir", tmp_path, "--do_predict", "--rerank_k", 0)
        run("--model_name_or_path", trained[0], *arguments, "--output_dir", tmp_path / "out")
        with zipfile.ZipFile(tmp_path / "out/similarities_test.zip") as archive:
            matrices.append(np.load(io.BytesIO(archive.read("sim_matrix_test.npy"))))
    assert matrices[0].shape == (6, 6) and np.ptp(matrices[0]) > 0
    np.testing.assert_allclose(matrices[1][::-1, ::-1], matrices[0], atol=1e-6)


def test_videos_that_cannot_be_decoded_are_counted_in_the_results(world, trained, tmp_path):
    rows = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()]
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    rows[0]["video"] = str(tmp_path / "broken.mp4")
    (world / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--model_name_or_path", trained[0], "--do_predict", "--test_file", world / "broken.jsonl")
    printed = run(*arguments, "--output_dir", tmp_path)
    assert "videos that could not be decoded: 1" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["broken_videos"]) == [str(tmp_path / "broken.mp4")]
    assert results["results"]["test"]["as loaded"]["texts_without_video"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to do"),
        (["--query", "red"], "gallery_dir is missing"),
        (["--repair"], "gallery_dir is missing"),
        (["--remove", "a.mp4"], "gallery_dir is missing"),
        (["--remove", "a.mp4", "--gallery_dir", "{empty}/galery"], "galery, which is no folder"),
        (["--do_train", "--output_dir", "out"], "train_file is missing"),
        (["--do_train"], "output_dir is missing"),
        (["--index_folder", "{empty}", "--gallery_dir", "{empty}/gallery"], "holds no video"),
        (["--do_eval", "--output_dir", "out", "--validation_file", "{empty}/no.jsonl"], "no.jsonl doesn't exist"),
        (
            ["--do_eval", "--dataset_name", "didemo", "--output_dir", "out"],
            "data_dir names 0 folders for 1 benchmarks",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(world, tmp_path, arguments, message):
    arguments = [argument.format(empty=tmp_path) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        run("--config_name", world / "tiny", *arguments)
