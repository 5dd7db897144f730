"""A run that meets numbers that are none, a full disk, a hostile checkpoint, or the death of a process."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import set_seed
from retrieval_world import tiny_config, tiny_processor, write_questions, write_stories
from safetensors.torch import load_file

from transformers_testa import TestaForRetrieval
from transformers_testa.arguments import TrainingArguments
from transformers_testa.data.annotations import load_annotations
from transformers_testa.data.datasets import VideoTextDataset, collate_training_samples
from transformers_testa.data.sampling import EpochBatchSampler
from transformers_testa.training import create_accelerator, run_identity, train


ROOT = Path(__file__).parents[2]
SCRIPTS = ("run_retrieval", "run_videoqa", "run_pretraining")


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return write_stories(tmp_path_factory.mktemp("stories"), num_train=8)


def run(stories: Path, output_dir: Path, model: TestaForRetrieval | None = None, damage=None, **kwargs):
    """Train a tiny model on the stories, each batch changed by `damage` (batch, video ids); return the model."""
    settings = {"max_train_steps": 6, "save_steps": 2, "logging_steps": 10, "learning_rate": 1e-3, "seed": 3, **kwargs}
    args = TrainingArguments(output_dir=str(output_dir), per_device_train_batch_size=2, **settings)
    accelerator = create_accelerator(args)
    set_seed(args.seed)
    model = model or TestaForRetrieval(tiny_config())
    processor = tiny_processor()
    dataset = VideoTextDataset(load_annotations(stories / "train.jsonl"), processor.video_processor)
    sampler = EpochBatchSampler(len(dataset), 2, args.seed)

    def collate(samples):
        batch = collate_training_samples(samples, processor, max_words=16)
        if damage:
            damage(batch, [sample["video_id"] for sample in samples])
        return batch

    train(args, accelerator, model, dataset, sampler, collate, run_identity(model, dataset, args))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return model


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# --- Numbers that are none -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_no_number_stops_before_the_weights_with_the_videos_named(
    stories, tmp_path, number, accumulation
):
    seen = []

    def damage(batch, video_ids):
        seen.append(video_ids)
        if len(seen) == 4:
            batch["pixel_values_videos"][0] = number

    model, before = TestaForRetrieval(tiny_config()), []
    model.register_forward_pre_hook(lambda module, inputs: before.append(weights(module).clone()))
    with pytest.raises(FloatingPointError) as caught:
        run(stories, tmp_path, model, damage, gradient_accumulation_steps=accumulation)
    step = 4 // accumulation
    assert f"The loss is nan at step {step}, where the batch has the videos {', '.join(seen[3])}." in str(caught.value)
    assert len(before) == 4 and weights(model).equal(before[-1])


def test_a_gradient_that_is_not_finite_stops_too(stories, tmp_path):
    model = TestaForRetrieval(tiny_config())
    model.testa.text_model.embeddings.word_embeddings.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = weights(model).clone()
    with pytest.raises(FloatingPointError, match=r"gradient isn't finite at step 1, .* videos (train-\d(, |\.)){2}"):
        run(stories, tmp_path, model)
    assert weights(model).equal(before)


# --- A full disk -----------------------------------------------------------------------------------------------------


# The weights take 337 kB, the optimiser's state twice that.
@pytest.mark.parametrize("bytes_a_file", [200_000, 500_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_when_there_is_room(
    stories, tmp_path, bytes_a_file
):
    whole = run(stories, tmp_path / "whole")

    def fill_disk(batch, video_ids, batches=[0]):  # noqa: B006
        batches[0] += 1
        # It is made while the third step is taken.
        if batches[0] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError) as caught:
            run(stories, tmp_path / "full", damage=fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "The checkpoint of step 4 could not be written" in str(caught.value)
    assert f"The last whole one is {tmp_path / 'full' / 'checkpoint-2'}; make room" in str(caught.value)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["checkpoint-2"]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert weights(run(stories, tmp_path / "full")).equal(weights(whole))


# --- A hostile checkpoint ------------------------------------------------------------------------------------------------


class Payload:
    """A pickle that makes a file when it is opened by careless code."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_no_file_of_a_checkpoint_runs_code(stories, tmp_path):
    run(stories, tmp_path / "run", max_train_steps=2)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    files = {file.name for file in checkpoint.iterdir()}
    assert files >= {"model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "progress.json"}
    for file in map(checkpoint.joinpath, files):
        content = file.read_bytes()
        for write in (lambda file: torch.save(Payload(tmp_path / "executed"), file), _pickle_payload(tmp_path)):
            write(file)
            with pytest.raises(ValueError, match=f"The checkpoint {checkpoint} is damaged; delete it"):
                run(stories, tmp_path / "run", max_train_steps=2)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        file.write_bytes(content)
    assert not (tmp_path / "executed").exists()


def _pickle_payload(folder: Path):
    return lambda file: file.write_bytes(pickle.dumps(Payload(folder / "executed")))


# --- Killed processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Stories and questions, a tiny configuration, and a recipe for each script."""
    folder = write_stories(tmp_path_factory.mktemp("world"), num_train=10, num_validation=4)
    write_questions(folder, "train", "validation")
    tiny_config().save_pretrained(folder / "tiny")
    tiny_processor().save_pretrained(folder / "tiny")
    files = {
        "run_retrieval": ("train", "validation"),
        "run_videoqa": ("train_questions", "validation_questions"),
        "run_pretraining": ("train", "validation"),
    }
    for script, (train_file, validation_file) in files.items():
        recipe = {
            **{"config_name": str(folder / "tiny"), "train_file": str(folder / f"{train_file}.jsonl")},
            **{"validation_file": str(folder / f"{validation_file}.jsonl"), "do_train": True, "do_eval": True},
            **{"max_train_steps": 12, "eval_steps": 3, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3},
            **{"per_device_train_batch_size": 4},
        }
        (folder / f"{script}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_killed_at_random_points_end_with_the_bits_of_one_that_was_not(world, tmp_path, script):
    """Half of the points are random moments, the others while a checkpoint is being written."""
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), script, str(world / f"{script}.yaml")]
    finished = subprocess.run(
        [*command, str(tmp_path), "20"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    killed = 0
    for line in finished.stdout.splitlines():
        point = json.loads(line)
        killed += point["killed"]
        resumed = load_file(tmp_path / point["folder"] / "model.safetensors")
        assert resumed.keys() == whole.keys() and all(resumed[name].equal(whole[name]) for name in whole), point
        print(point)
    assert killed >= 15


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_of_two_processes_ends_the_other_within_a_minute(world, tmp_path, victim):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "run_retrieval.py"), str(world / "run_retrieval.yaml"), "--output_dir", str(tmp_path)]
    command += ["--max_train_steps", "100000", "--eval_steps", "100000", "--per_device_train_batch_size", "2"]
    launcher = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not list(tmp_path.glob("checkpoint-*")):
            assert launcher.poll() is None, launcher.stderr.read()[-3000:]
            time.sleep(0.05)
        workers = psutil.Process(launcher.pid).children()
        ranks = {worker.environ()["LOCAL_RANK"]: worker for worker in workers if "LOCAL_RANK" in worker.environ()}
        ranks[str(victim)].send_signal(signal.SIGKILL)
        start = time.monotonic()
        _, message = launcher.communicate(timeout=60)
        print(f"\nended after {time.monotonic() - start:.1f} s")
        assert launcher.returncode != 0 and "Signal 9 (SIGKILL)" in message
        assert not any(worker.is_running() for worker in workers)
    finally:
        launcher.kill()
