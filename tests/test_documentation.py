"""What README.md and docs/ tell a reader to type is what the scripts understand."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoConfig

from transformers_testa.arguments import as_recipe, parse_arguments
from transformers_testa.flops import count_video_gflops
from transformers_testa.training import configure


ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "hub_configs").glob("*/README.md")),
]


def commands_in(page: Path) -> list[tuple[str, list[str]]]:
    """The scripts of a page, each with its arguments, but for "..." and what a loop fills in."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("&&", "\n").splitlines()
    found = [re.search(r"(?:python|accelerate launch) (run_\w+)\.py (.*)", line.split("||")[0]) for line in lines]
    return [
        (match[1], [word for word in shlex.split(match[2]) if word != "..."])
        for match in found
        if match and "$" not in match[2]
    ]


COMMANDS = [pytest.param(*command, id=f"{page.stem}, {command[0]}") for page in PAGES for command in commands_in(page)]


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_a_command_is_one_that_its_script_understands(script, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    parsed = as_recipe(*parse_arguments(importlib.import_module(script).ARGUMENT_CLASSES, arguments))
    assert parsed["do_train"] or parsed["do_eval"] or parsed["do_predict"] or parsed.get("gallery_dir")


def ablation_rows() -> list[tuple[str, float]]:
    """Options and GFLOPs of the table of ablations."""
    section = (ROOT / "docs" / "reproduce.md").read_text("utf-8").split("## 5. The ablations")[1].split("## 6.")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return [
        (options, float(gflops.split()[0]))
        for _, cell, gflops in rows
        if gflops[0].isdigit()
        for options in re.findall("`(.+?)`", cell) or [""]
    ]


@pytest.mark.parametrize(("options", "gflops"), ablation_rows())
def test_a_row_of_the_ablations_costs_what_the_table_says(options, gflops, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    recipe = "hub_configs/testa-base-queryd-f96/recipe.yaml"
    classes = importlib.import_module("run_retrieval").ARGUMENT_CLASSES
    arguments = [recipe, "--data_dir", "QUERYD", *shlex.split(options)]
    model_args, data_args, *_ = parse_arguments(classes, arguments)
    config = AutoConfig.from_pretrained("hub_configs/testa-base")
    configure(config, model_args, data_args)
    assert count_video_gflops(config.video_config) == pytest.approx(gflops, abs=0.5)
