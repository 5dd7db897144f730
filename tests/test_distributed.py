"""Runs of several processes, as a user starts them: with torchrun, here over gloo on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from retrieval_world import tiny_config, tiny_processor, write_stories
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def launch(num_processes: int, script: str, *arguments) -> str:
    """Run a script in some processes and return what it prints."""
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command += [str(ROOT / script), *map(str, arguments)]
    finished = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Stories, a tiny model without dropout, and a recipe that trains it with a teacher and a queue."""
    folder = write_stories(tmp_path_factory.mktemp("world"), num_train=12, num_test=6)
    config = tiny_config()
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
    config.save_pretrained(folder / "tiny")
    tiny_processor().save_pretrained(folder / "tiny")
    recipe = {
        **{"config_name": str(folder / "tiny"), "train_file": str(folder / "train.jsonl"), "do_train": True},
        **{"max_train_steps": 20, "save_steps": 20, "logging_steps": 1, "learning_rate": 1e-4, "max_words": 16},
        **{"momentum": 0.9, "queue_size": 9, "distillation_ramp_epochs": 3, "train_frame_sampling": "jitter"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def losses(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "results.json").read_text())["losses"]


@pytest.mark.parametrize("script", ["run_retrieval.py", "run_pretraining.py"])
def test_two_processes_train_as_one_with_a_batch_twice_as_large(world, tmp_path, script):
    for num_processes, batch_size in ((1, 4), (2, 2)):
        launch(
            *(num_processes, script, world / "recipe.yaml"),
            *("--per_device_train_batch_size", batch_size, "--output_dir", tmp_path / str(num_processes)),
        )
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert list(one) == [str(step) for step in range(1, 21)] == list(two)
    for step, of_one in one.items():
        assert two[step] == pytest.approx(of_one, abs=1e-4), step
    assert len({of_one["loss"] for of_one in one.values()}) == 20


def test_fsdp_trains_saves_and_goes_on_as_plain_processes_do(world, tmp_path):
    arguments = (
        *(world / "recipe.yaml", "--per_device_train_batch_size", 2, "--max_train_steps", 3, "--save_steps", 2),
        *("--do_predict", "--test_file", world / "test.jsonl", "--rerank_k", 2),
    )
    launch(2, "run_retrieval.py", *arguments, "--output_dir", tmp_path / "plain")
    sharded = (2, "tests/fsdp_worker.py", ROOT / "run_retrieval.py", *arguments, "--output_dir", tmp_path / "fsdp")
    launch(*sharded)
    plain, fsdp = losses(tmp_path / "plain"), losses(tmp_path / "fsdp")
    for step in ("1", "2", "3"):
        assert fsdp[step] == pytest.approx(plain[step], abs=1e-4)
    results = [json.loads((tmp_path / run / "results.json").read_text())["results"] for run in ("plain", "fsdp")]
    recalls = [result["test"]["after training"]["text_to_video_mean_recall"] for result in results]
    assert recalls[0] == recalls[1]
    trained = load_file(tmp_path / "fsdp" / "model.safetensors")
    for name, weight in load_file(tmp_path / "plain" / "model.safetensors").items():
        torch.testing.assert_close(trained[name], weight, atol=1e-4, rtol=1e-4)

    # From the sharded checkpoint of step 2 the run comes to the same end.
    shutil.rmtree(tmp_path / "fsdp" / "checkpoint-3")
    launch(*sharded)
    again = load_file(tmp_path / "fsdp" / "model.safetensors")
    assert again.keys() == trained.keys()
    assert all(torch.equal(again[name], weight) for name, weight in trained.items())


def test_two_processes_index_a_folder_and_what_is_found_is_what_one_finds(world, tmp_path):
    found = []
    for num_processes in (1, 2):
        printed = launch(
            *(num_processes, "run_retrieval.py", "--config_name", world / "tiny", "--index_folder", world / "videos"),
            *("--gallery_dir", tmp_path / str(num_processes), "--query", "White", "--top_k", 20),
        )
        assert printed.count("18 videos added, 0 were there, 0 could not be read.") == 1
        ranked = [line.split() for line in printed.splitlines() if line.endswith(".mp4")]
        found.append({path: float(score) for _, score, path in ranked})
    assert len(found[0]) == 18 and found[1] == pytest.approx(found[0], abs=2e-3)
    assert {path.name for path in (tmp_path / "2").glob("part-*")} == {"part-0", "part-1"}
