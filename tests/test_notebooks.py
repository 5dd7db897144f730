"""The notebooks: each runs from the first cell to the last as its reader would run it, and is stored with what it shows."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest
from retrieval_world import run_script

from transformers_testa.data.demo import DemoArguments, make_demo


ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DEMO = ROOT / "hub_configs" / "testa-demo"
# Enough to go through all the README's commands.
FEW_STEPS = {"max_train_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 1, "num_workers": 0}
WITHOUT_EVALUATION = {"do_eval": "no", "do_predict": "no", "eval_before_training": "no", "cache_frames": "no"}
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<-])/\w[\w.-]*/\w|\b[A-Za-z]:\\\\?\w")

every_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


@pytest.fixture(scope="session")
def readers_folders(tmp_path_factory):
    """The folders that the README's commands make, `runs` and `demo_stories`, with less of everything."""
    folder = tmp_path_factory.mktemp("reader")
    stories, runs = folder / "demo_stories", folder / "runs"
    sizes = {"num_train": 8, "num_validation": 4, "num_test": 8, "min_scenes": 3, "max_scenes": 4, "num_processes": 1}
    make_demo(DemoArguments(output_dir=str(stories), fps=4, image_size=64, **sizes))

    def train(script: str, recipe: str, train_file: str, output_dir: str, **options):
        options |= {"train_file": stories / train_file, "output_dir": runs / output_dir}
        run(script, DEMO / recipe, **options, **FEW_STEPS, **WITHOUT_EVALUATION)

    train("run_retrieval.py", "recipe_clips.yaml", "train_clips.jsonl", "testa-demo-clips")
    start = runs / "testa-demo-clips"
    train("run_retrieval.py", "recipe.yaml", "train.jsonl", "testa-demo", model_name_or_path=start)
    scenes = runs / "testa-demo-videoqa-scenes"
    train("run_videoqa.py", "recipe_videoqa_scenes.yaml", "train_scenes_qa.jsonl", scenes.name)
    train("run_videoqa.py", "recipe_videoqa.yaml", "train_qa.jsonl", "testa-demo-videoqa", model_name_or_path=scenes)
    return runs, stories


def run(script: str, *arguments, **options):
    """Run a script of the repository with a command line."""
    command_line = [*arguments, *(part for name, value in options.items() for part in (f"--{name}", value))]
    run_script(runpy.run_path(str(ROOT / script))["main"], *command_line)


@every_notebook
def test_a_notebook_runs_after_the_commands_of_the_readme(file, readers_folders, monkeypatch):
    runs, stories = readers_folders
    monkeypatch.setenv("TESTA_RUNS", str(runs))
    monkeypatch.setenv("TESTA_STORIES", str(stories))
    monkeypatch.setenv("HF_HOME", str(runs.parent / "cache"))
    executed = runpy.run_path(str(ROOT / "notebooks" / "execute.py"))["execute"](file)
    stored = nbformat.read(file, as_version=4)
    assert [shows(cell) for cell in executed.cells] == [shows(cell) for cell in stored.cells]


@every_notebook
def test_a_notebook_is_stored_with_what_it_shows(file):
    stored = nbformat.read(file, as_version=4)
    nbformat.validate(stored)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = set().union(*map(shows, code))
    assert "error" not in kinds and {"text/plain", "image/jpeg"} <= kinds


@every_notebook
def test_a_stored_notebook_tells_nothing_of_the_machine_it_ran_on(file):
    for cell in nbformat.read(file, as_version=4).cells:
        assert "execution" not in cell.metadata
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr"
            for text in texts_of(output):
                assert not ABSOLUTE_PATH.search(text), text


def shows(cell) -> set[str]:
    """The kinds of things that a cell shows."""
    return {kind for output in cell.get("outputs", ()) for kind in output.get("data", [output.output_type])}


def texts_of(output) -> list[str]:
    """What an output says: of pictures, nothing."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    return [text for kind, text in data.items() if kind.startswith("text/")]
