import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from retrieval_world import (
    WORDS,
    kill_script,
    read_rows,
    run_script,
    tiny_config,
    tiny_processor,
    write_pictures,
    write_questions,
    write_rows,
    write_stories,
)
from safetensors.torch import load_file
from transformers import BlipConfig, BlipForImageTextRetrieval

from transformers_testa import TestaForPreTraining, TestaForRetrieval, TestaForVideoQA


SCRIPT = Path(__file__).parents[1] / "run_pretraining.py"
sys.path.insert(0, str(SCRIPT.parent))
import run_retrieval  # noqa: E402
import run_videoqa  # noqa: E402
from run_pretraining import main  # noqa: E402


LOSSES = ("loss_vtc", "loss_vtm", "loss_caption")
NO_EVALUATION = ("--do_eval", "no", "--do_predict", "no", "--eval_before_training", "no")
# So small a rate leaves the weights as they were, up to what float32 can tell.
STAND_STILL = ("--do_train", "--max_train_steps", 1, "--learning_rate", 1e-12, "--per_device_train_batch_size", 4)


def run(*arguments) -> str:
    return run_script(main, *arguments)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with stories and pictures, a configuration without weights, and a recipe of six steps."""
    folder = write_stories(tmp_path_factory.mktemp("world"), num_train=10, num_validation=4, num_test=6)
    write_questions(folder, "train")
    pictures = write_pictures(folder, 6)
    tiny_config(merged_frames_per_layer=0, merged_patches_per_layer=0, use_temporal_scaling=True).save_pretrained(
        folder / "tiny"
    )
    tiny_processor().save_pretrained(folder / "tiny")
    recipe = {
        "config_name": str(folder / "tiny"),
        **{"train_file": [str(folder / "train.jsonl"), str(pictures)], "train_weights": [2, 1]},
        **{f"{split}_file": str(folder / f"{split}.jsonl") for split in ("validation", "test")},
        **{"do_train": True, "do_eval": True, "do_predict": True, "eval_before_training": True},
        **{"max_train_steps": 6, "eval_steps": 3, "save_steps": 2, "logging_steps": 1, "learning_rate": 3e-3},
        **{"per_device_train_batch_size": 4, "train_frame_sampling": "head_tail", "max_words": 16},
        **{"crop_from": 40, "random_flip": True, "rand_augment_ops": 1},
        **{"momentum": 0.9, "queue_size": 6, "distillation_ramp_epochs": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def trained(world):
    """A finished run of the recipe: its output folder and what it printed."""
    return world / "trained", run(world / "recipe.yaml", "--output_dir", world / "trained")


# --- A run -------------------------------------------------------------------------------------------------------------


def test_a_run_prints_its_three_losses_and_what_retrieval_gives_without_fine_tuning(trained):
    folder, printed = trained
    losses = results_of(folder)["losses"]
    assert list(losses) == ["1", "2", "3", "4", "5", "6"]
    for of in losses.values():
        assert of["loss"] == pytest.approx(sum(of[name] for name in LOSSES), abs=1e-5)
    assert "| up to step | contrast | matching | captioning |" in printed
    for step in ("1", "6"):
        assert f"| {step} | " + " | ".join(f"{losses[step][name]:.3f}" for name in LOSSES) + " |" in printed
    assert losses["6"]["loss_caption"] < losses["1"]["loss_caption"]
    for split in ("validation", "test"):
        for moment in ("before training", "after training"):
            assert f"| {split}, {moment} | similarity | " in printed
    assert "re-ranked" not in printed


def test_the_model_card_holds_losses_recalls_and_recipe(trained):
    folder, printed = trained
    card = ModelCard.load(folder / "README.md")
    assert "pretraining" in card.data.tags and f"--model_name_or_path {folder} --do_train" in card.text
    assert all(line in card.text for line in printed.splitlines() if line.startswith("|"))
    for fact in ("training: 6 steps of 4 samples, seed 42", "crop_from: 40", "rand_augment_ops: 1", "momentum: 0.9"):
        assert fact in card.text
    results = results_of(folder)["results"]["test"]["after training"]
    figures = {(figure.dataset_split, figure.metric_type): figure.metric_value for figure in card.data.eval_results}
    assert figures["test", "text_to_video_recall@1"] == round(results["text_to_video_recall@1"], 2)


def test_a_run_saves_a_model_without_its_teacher_and_queue(trained):
    folder, _ = trained
    model = TestaForPreTraining.from_pretrained(folder)
    assert model.config.video_config.use_temporal_scaling
    saved = load_file(folder / "model.safetensors")
    assert not any(name.startswith(("teacher.", "queue.")) for name in saved)
    checkpoint = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert {name.partition(".")[0] for name in checkpoint} == {"model", "teacher", "queue", "step"}


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(world, trained, caplog):
    folder = world / "killed"
    kill_script(SCRIPT, world / "recipe.yaml", folder, step=2)
    assert not (folder / "checkpoint-6").exists()
    with caplog.at_level(logging.INFO):
        run(world / "recipe.yaml", "--output_dir", folder)
    assert "Going on from" in caplog.text and "of 6" in caplog.text
    # The checkpoint holds teacher and queue too.
    for file in ("model.safetensors", "checkpoint-6/model.safetensors"):
        resumed, whole = load_file(folder / file), load_file(trained[0] / file)
        assert resumed.keys() == whole.keys() and all(resumed[name].equal(whole[name]) for name in whole)
    assert results_of(folder)["losses"] == results_of(trained[0])["losses"]


def test_a_run_without_evaluation_shows_its_losses_only_which_are_the_same(world, trained, tmp_path):
    printed = run(world / "recipe.yaml", "--output_dir", tmp_path, *NO_EVALUATION, "--max_train_steps", 2)
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 4 and table[0] == "| up to step | contrast | matching | captioning |"
    assert results_of(tmp_path)["losses"]["1"] == results_of(trained[0])["losses"]["1"]


def test_augmentation_changes_what_is_trained_on_and_not_what_is_evaluated(world, trained, tmp_path):
    plain = ("--random_flip", "no", "--rand_augment_ops", 0)
    run(world / "recipe.yaml", "--output_dir", tmp_path, *plain, "--max_train_steps", 1)
    runs = [results_of(folder) for folder in (tmp_path, trained[0])]
    for results in runs:
        del results["results"]["test"]["before training"]["seconds_per_video"]
    assert runs[0]["results"]["test"]["before training"] == runs[1]["results"]["test"]["before training"]
    assert runs[0]["losses"]["1"] != runs[1]["losses"]["1"]


def test_gradient_checkpointing_saves_memory_and_changes_no_loss(world, tmp_path):
    losses, kept = {}, {}
    for switch in ("no", "yes"):
        numbers = []

        def keep(tensor, numbers=numbers):
            numbers.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            arguments = ("--output_dir", tmp_path / switch, "--gradient_checkpointing", switch)
            run(world / "recipe.yaml", *arguments, *NO_EVALUATION, "--max_train_steps", 2)
        losses[switch], kept[switch] = results_of(tmp_path / switch)["losses"], sum(numbers)
    assert kept["yes"] < kept["no"] / 2
    for step in ("1", "2"):
        assert losses["yes"][step] == pytest.approx(losses["no"][step], rel=1e-5)


def test_a_picture_that_does_not_open_is_counted_where_its_source_is_drawn_from(world, tmp_path):
    rows = read_rows(world / "pictures.jsonl")
    (world / "broken.png").write_bytes(b"broken")
    rows[0]["video"] = "broken.png"
    write_rows(world / "broken.jsonl", rows)
    arguments = (world / "recipe.yaml", *NO_EVALUATION, "--train_file", world / "train.jsonl", world / "broken.jsonl")
    # An epoch has 16 rows: 10 stories and all 6 pictures, or stories alone.
    for weights, broken in (((10, 6), [str(world / "broken.png")]), ((1, 0), [])):
        folder = tmp_path / str(len(broken))
        printed = run(*arguments, "--train_weights", *weights, "--max_train_steps", 4, "--output_dir", folder)
        assert f"videos that could not be decoded: {len(broken)}" in printed
        assert list(results_of(folder)["broken_videos"]) == broken
        assert list(results_of(folder)["losses"])[-1] == "4"


def test_two_benchmarks_are_mixed_in_the_files_of_their_authors(world, tmp_path):
    for name, table in (("webvid", "train"), ("cc3m", "pictures")):
        rows = [{"path": row["video"], "caption": row["text"]} for row in read_rows(world / f"{table}.jsonl")]
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text(json.dumps(rows))
    arguments = ("--config_name", world / "tiny", "--dataset_name", "webvid", "cc3m", "--train_weights", 2, 1)
    arguments = (*arguments, "--data_dir", tmp_path / "webvid", tmp_path / "cc3m", "--video_root", world)
    printed = run(*arguments, *STAND_STILL, "--output_dir", tmp_path / "out")
    assert "data: webvid, cc3m" in printed and "text: the first 30 words" in printed
    assert "videos that could not be decoded: 0" in printed and "training: 1 steps of 4 samples" in printed


# --- What it starts from, and what starts from it ----------------------------------------------------------------------


def test_a_pre_trained_model_is_fine_tuned_for_retrieval_with_other_frames_and_merging(world, trained, tmp_path):
    arguments = ("--model_name_or_path", trained[0], "--train_file", world / "train.jsonl", *STAND_STILL)
    shape = ("--num_frames", 4, "--merged_frames_per_layer", 1, "--merged_patches_per_layer", 1)
    evaluation = ("--do_predict", "--test_file", world / "test.jsonl", "--rerank_k", 3)
    printed = run_script(run_retrieval.main, *arguments, *shape, *evaluation, "--output_dir", tmp_path)
    assert "frames: 4 a video" in printed and "| test, after training | re-ranked |" in printed
    tuned = TestaForRetrieval.from_pretrained(tmp_path).state_dict()
    start = TestaForPreTraining.from_pretrained(trained[0]).state_dict()
    assert not any(name.endswith("temporal_scaling") for name in tuned)
    time_embeddings = "testa.video_model.embeddings.time_embeddings"
    assert tuned.pop(time_embeddings).shape == (1, 4, 32) and start[time_embeddings].shape == (1, 6, 32)
    for name, weight in tuned.items():
        torch.testing.assert_close(weight, start[name], atol=1e-8, rtol=0)


def test_a_pre_trained_model_keeps_its_temporal_scaling_where_no_frames_merge(world, trained, tmp_path):
    arguments = ("--model_name_or_path", trained[0], "--train_file", world / "train.jsonl", *STAND_STILL)
    run_script(run_retrieval.main, *arguments, "--num_frames", 3, "--output_dir", tmp_path)
    tuned = TestaForRetrieval.from_pretrained(tmp_path)
    start = load_file(trained[0] / "model.safetensors")
    assert tuned.config.video_config.use_temporal_scaling and tuned.config.video_config.num_frames == 3
    name = "testa.video_model.layers.1.temporal.temporal_scaling"
    torch.testing.assert_close(tuned.state_dict()[name], start[name][:, ::2], atol=1e-8, rtol=0)


def test_a_pre_trained_model_is_fine_tuned_for_questions_with_its_decoder(world, trained, tmp_path):
    arguments = ("--model_name_or_path", trained[0], "--train_file", world / "train_questions.jsonl", *STAND_STILL)
    run_script(run_videoqa.main, *arguments, "--num_frames", 4, "--output_dir", tmp_path)
    tuned = TestaForVideoQA.from_pretrained(tmp_path).state_dict()
    start = TestaForPreTraining.from_pretrained(trained[0]).state_dict()
    for name, weight in tuned.items():
        if not name.endswith(("time_embeddings", "temporal_scaling")):
            torch.testing.assert_close(weight, start[name], atol=1e-8, rtol=0)


def test_pre_training_starts_from_a_blip_model(world, tmp_path):
    blip = BlipForImageTextRetrieval(
        BlipConfig(
            text_config={"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            | {"intermediate_size": 64, "max_position_embeddings": 32, "encoder_hidden_size": 32},
            vision_config={"image_size": 48, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2}
            | {"num_attention_heads": 2, "intermediate_size": 64},
            image_text_hidden_size=16,
        )
    )
    blip.save_pretrained(tmp_path / "blip")
    arguments = (world / "recipe.yaml", "--init_from_blip", tmp_path / "blip", *STAND_STILL)
    run(*arguments, *NO_EVALUATION, "--output_dir", tmp_path / "out")
    model = TestaForPreTraining.from_pretrained(tmp_path / "out")
    layer, blip_layer = model.testa.video_model.layers[1], blip.vision_model.encoder.layers[1]
    pairs = [
        (layer.mlp.fc1.weight, blip_layer.mlp.fc1.weight),
        (model.video_projection.weight, blip.vision_proj.weight),
        (model.text_projection.weight, blip.text_proj.weight),
        (model.matching_head.weight, blip.itm_head.weight),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=0)
    assert set(results_of(tmp_path / "out")["losses"]["1"]) == {"loss", *LOSSES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Nothing to do"),
        ("--do_train", "output_dir is missing"),
        ("--do_train --output_dir {out}", "train_file is missing"),
        (
            "--do_train --output_dir {out} --train_file {train} --train_weights 1 2",
            "train_weights has 2 numbers for 1 sources",
        ),
        (
            "--do_train --output_dir {out} --train_file {train} --momentum 0.9 --queue_size 3 "
            "--per_device_train_batch_size 4",
            "queue_size is 3; at least a batch over all processes is needed: 4",
        ),
        (
            "--do_train --output_dir {out} --dataset_name ivqa --data_dir {out}",
            "ivqa has no `text` annotations but `question`",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(world, tmp_path, arguments, message):
    places = {"out": tmp_path, "train": world / "train.jsonl"}
    with pytest.raises(ValueError, match=message):
        run("--config_name", world / "tiny", *(word.format(**places) for word in arguments.split()))
