"""The paper's ablations on the stories of the demo: what aggregation costs in recall, and what it saves.

    python -m transformers_testa.data.demo --output_dir demo_stories
    python benchmarks/ablation.py --data_dir demo_stories --output_dir runs/ablation
    python benchmarks/ablation.py --data_dir demo_stories --output_dir runs/ablation --rows none "trained, both" --seeds 0

    python -m transformers_testa.data.demo --output_dir demo_elsewhere --backgrounds PHOTOGRAPHS --num_train 2
    python benchmarks/ablation.py --data_dir demo_stories --output_dir runs/ablation \
        --rows none "off the shelf, geometry" "trained, both" --test_file demo_elsewhere/test.jsonl

    python benchmarks/ablation.py --config_dir hub_configs/testa-demo-photographs --data_dir demo_photographs --seeds 0 \
        --output_dir runs/photographs --rows none "trained, both"
    python -m transformers_testa.data.demo --output_dir demo_retold --objects objects --backgrounds backgrounds \
        --min_scenes 3 --max_scenes 6 --num_train 200 --num_validation 2 --num_test 2 --seed 1
    python benchmarks/ablation.py --config_dir hub_configs/testa-demo-photographs --data_dir demo_photographs --seeds 0 \
        --output_dir runs/photographs --rows none "trained, both" --test_file demo_retold/train.jsonl

A row is a configuration of the video encoder. All rows with one kind of attention share two lessons without merging, on
clips and on stories of 12 frames, as the paper's share their pre-training. Then each is trained for the same steps on 24
frames, merging as it says. Rows "off the shelf" merge with the weights of the row "none", without training. Each run is one of
run_retrieval.py in a folder of its own, with its log: the command goes on where it was when it is given again. Budgets are
near 57 % of the GFLOPs without aggregation; each row says its own. The first lesson starts from new weights, or from the
model that its recipe names.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import runpy
import statistics
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from measuring import alternate, describe_machine, markdown_table, peak_memory, save_json
from tqdm import tqdm
from transformers import AutoConfig

from transformers_testa import TestaVideoConfig, TestaVideoModel
from transformers_testa.flops import count_video_gflops


ROOT = Path(__file__).resolve().parent.parent
CONFIG_DIR = ROOT / "hub_configs" / "testa-demo"
# About three frames a scene: with one, as in the demo's own recipe, frames hold nothing twice that could be merged.
NUM_FRAMES = 24
NUM_VIDEOS = 16
# Each run is a process of its own. Forked from one that has imported what all of them need, it starts at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["transformers_testa.training", "transformers_testa.retrieval"])
# The recipe's eager attention is as fast for 12 frames, slower for 24, and for joint attention by half.
ATTENTION = ("--attn_implementation", "sdpa")
UNTESTED = ("--do_eval", False, "--do_predict", False)
MARKERS = {"off the shelf": "o", "joint": "s", "trained": "^"}
FIGURES = {
    "R@1": "text_to_video_recall@1",
    "mean recall": "text_to_video_mean_recall",
    "R@1 re-ranked": "reranked_text_to_video_recall@1",
    "order of twins": "distractor_accuracy",
}


@dataclass(frozen=True)
class Row:
    """What is compared.

    Args:
        name: Of the row, and of its folder.
        table: The paper's table or figure that it belongs to.
        changes: Fields of the video encoder's configuration that differ from the demo's, which then merges nothing.
        is_trained: Whether the weights were trained with them; else they are those of the row that merges nothing.
        num_frames: How many are seen of each video.
    """

    name: str
    table: str
    changes: dict[str, Any] = field(default_factory=dict)
    is_trained: bool = True
    num_frames: int = NUM_FRAMES

    @property
    def attention_type(self) -> str:
        return self.changes.get("attention_type", "divided_space_time")


def _merges(frames: int | list[int], patches: int | list[int], **changes: Any) -> dict[str, Any]:
    return {"merged_frames_per_layer": frames, "merged_patches_per_layer": patches, **changes}


BOTH = _merges(4, 3)
JOINT = {"attention_type": "joint_space_time"}
UNMERGED = Row("none", "5")
ROWS = (
    UNMERGED,
    Row("off the shelf, pruning", "5", {**BOTH, "aggregation_strategy": "prune"}, False),
    Row("off the shelf, importance", "5", {**BOTH, "aggregation_strategy": "importance"}, False),
    Row("off the shelf, geometry", "5", BOTH, False),
    Row("off the shelf, consecutive frames", "details", {**BOTH, "frame_matching": "consecutive"}, False),
    Row("trained, importance", "5", {**BOTH, "aggregation_strategy": "importance"}),
    Row("trained, frames only", "5", _merges(7, 0)),
    Row("trained, patches only", "5", _merges(0, 5)),
    Row("trained, both", "5", BOTH),
    Row("joint, none", "6", JOINT),
    Row("joint, trained", "6", _merges(0, 127, **JOINT)),
    Row("trained, vote", "details", {**BOTH, "frame_matching": "vote"}),
    Row("trained, consecutive frames", "details", {**BOTH, "frame_matching": "consecutive"}),
    Row("trained, proportional attention", "details", {**BOTH, "proportional_attention": True}),
    *(
        Row(f"off the shelf, {frames} and {patches}", "figures", _merges(frames, patches), False)
        for frames, patches in itertools.product((0, 2, 4, 6), (0, 1, 2, 3, 4))
        if frames or patches
    ),
    *(
        Row(f"off the shelf, {number} frames{merging}", "figures", changes, False, num_frames=number)
        for number in (6, 12, 36, 48)
        for merging, changes in (("", {}), (", both", _merges(number // 6, 3)))
    ),
)

# Lines of the plot, as in the paper's figures 5 to 7: by panel and line, the rows, each with what it is labelled by.
CURVES = {
    "frames (lines) and patches (labels)\nmerged a block, off the shelf": {
        f"{frames} frames": {
            str(patches): f"off the shelf, {frames} and {patches}" if frames or patches else UNMERGED.name
            for patches in range(5)
        }
        for frames in (0, 2, 4, 6)
    },
    "frames seen (labels), off the shelf": {
        "nothing merged": {"24": UNMERGED.name, **{str(n): f"off the shelf, {n} frames" for n in (6, 12, 36, 48)}},
        "frames and patches merged": {
            "24": "off the shelf, geometry",
            **{str(n): f"off the shelf, {n} frames, both" for n in (6, 12, 36, 48)},
        },
    },
}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="What transformers_testa.data.demo made.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the runs.")
    parser.add_argument(
        "--config_dir", type=Path, default=CONFIG_DIR, help="Folder of the model's configuration and the recipes."
    )
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", help="Which rows; else all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="One training each.")
    parser.add_argument("--clip_steps", type=int, default=600, help="Steps of the lesson on clips, without merging.")
    parser.add_argument(
        "--story_steps", type=int, default=400, help="Steps of the lesson on stories, without merging."
    )
    parser.add_argument("--row_steps", type=int, default=150, help="Steps of each row, on stories, as it merges.")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="Runs at a time, of one thread each: models this small gain little by more.",
    )
    parser.add_argument(
        "--test_file", type=Path, help="Told of these texts and videos; by default of the test split of --data_dir."
    )
    parser.add_argument("--report", type=Path, help="Markdown file for the table and, beside it, the plot.")
    args = parser.parse_args(arguments)

    rows = [row for row in ROWS if row.name in (args.rows or names)]
    configs = {row.name: _video_config(row, args.config_dir) for row in ROWS}
    results = run_rows(rows, configs, args)
    speeds = milliseconds_a_video({row.name: configs[row.name] for row in rows})
    table = [
        summarise(row, configs[row.name], [results[row.name, seed] for seed in args.seeds], speeds[row.name])
        for row in rows
    ]
    machine = describe_machine()
    shown = markdown_table([{name: _with_spread(value) for name, value in entry.items()} for entry in table])
    seeds = "one seed" if len(args.seeds) == 1 else f"{len(args.seeds)} seeds: mean ± standard deviation"
    print(f"\n{machine}\n{seeds}\n\n{shown}")
    save_json(results_folder(args) / "ablation.json", machine, table)
    if args.report:
        write_report(args.report, table, shown, machine, seeds)


def run_rows(
    rows: list[Row], configs: dict[str, TestaVideoConfig], args: argparse.Namespace
) -> dict[tuple[str, int], dict[str, float]]:
    """Train and evaluate what isn't there yet; return the metrics of the test split by row and seed.

    First the lessons, on clips and on stories, then the rows that are trained, then those off the shelf.
    """
    # The longest first, so that none is left to run alone at the end.
    ordered = sorted(ROWS, key=lambda row: count_video_gflops(configs[row.name]), reverse=True)
    off_the_shelf = [row for row in ordered if row in rows and not row.is_trained]
    trained = [row for row in ordered if row.is_trained and (row in rows or (off_the_shelf and row == UNMERGED))]
    one_of_each_attention = list({row.attention_type: row for row in trained}.values())
    stages = (
        (run_clips, one_of_each_attention),
        (run_stories, one_of_each_attention),
        (run_trained, trained),
        (run_off_the_shelf, off_the_shelf),
    )
    results = {}
    total = len(args.seeds) * sum(len(its_rows) for _, its_rows in stages)
    with tqdm(total=total, desc="Ablation", unit="run") as progress:
        for run, its_rows in stages:
            jobs = list(itertools.product(its_rows, args.seeds))
            threads = max(1, args.processes // max(1, len(jobs)))
            with ProcessPoolExecutor(args.processes, PROCESSES, max_tasks_per_child=1) as pool:
                runs = {pool.submit(run, row, seed, args, threads): (row.name, seed) for row, seed in jobs}
                for ended in as_completed(runs):
                    if error := ended.exception():
                        pool.shutdown(cancel_futures=True)
                    if isinstance(error, BrokenProcessPool):
                        raise RuntimeError(
                            f"A run was killed from outside, perhaps for want of memory: one in {args.output_dir} with a "
                            "log.txt and no results.json. The same command goes on."
                        ) from error
                    results[runs[ended]] = ended.result()
                    progress.update()
    return results


def run_clips(row: Row, seed: int, args: argparse.Namespace, threads: int):
    """Train on clips with the attention of this row, without merging."""
    recipe = args.config_dir / "recipe_clips.yaml"
    is_new = "model_name_or_path" not in yaml.safe_load(recipe.read_text())
    _run(
        *(threads, _lesson("clips", row, seed, args), recipe, *UNTESTED, "--eval_before_training", False),
        *(("--config_name", args.config_dir) if is_new else ()),
        *(*_as_options({"attention_type": row.attention_type}), "--seed", seed),
        *("--train_file", args.data_dir / "train_clips.jsonl", "--max_train_steps", args.clip_steps),
    )


def run_stories(row: Row, seed: int, args: argparse.Namespace, threads: int):
    """Go on from the lesson on clips with stories, without merging."""
    clips, stories = (_lesson(name, row, seed, args) for name in ("clips", "stories"))
    _run(
        *(threads, stories, args.config_dir / "recipe.yaml", *UNTESTED, *ATTENTION, "--model_name_or_path", clips),
        *("--train_file", args.data_dir / "train.jsonl", "--max_train_steps", args.story_steps, "--seed", seed),
    )


def _lesson(name: str, row: Row, seed: int, args: argparse.Namespace) -> Path:
    """Return the folder of a lesson, which all rows with the same attention share."""
    return args.output_dir / f"seed{seed}" / f"{name}, {row.attention_type}"


def run_trained(row: Row, seed: int, args: argparse.Namespace, threads: int) -> dict[str, float]:
    """Train as the row merges, and return the metrics of the test split, or of `--test_file`."""
    folder = args.output_dir / f"seed{seed}" / row.name
    tested = _run(
        *(threads, folder, args.config_dir / "recipe.yaml", *ATTENTION, *_as_options(row.changes)),
        *("--model_name_or_path", _lesson("stories", row, seed, args), "--num_frames", row.num_frames),
        *("--seed", seed, "--max_train_steps", args.row_steps, "--train_file", args.data_dir / "train.jsonl"),
        *("--do_eval", False, "--test_file", args.data_dir / "test.jsonl"),
    )
    return _evaluate(threads, row, seed, folder, args) if args.test_file else tested


def run_off_the_shelf(row: Row, seed: int, args: argparse.Namespace, threads: int) -> dict[str, float]:
    """Return the metrics of the weights that were trained without merging, merging as the row does."""
    return _evaluate(threads, row, seed, args.output_dir / f"seed{seed}" / UNMERGED.name, args)


def _evaluate(threads: int, row: Row, seed: int, model: Path, args: argparse.Namespace) -> dict[str, float]:
    return _run(
        *(threads, results_folder(args) / f"seed{seed}" / row.name, "--model_name_or_path", model, "--do_predict"),
        *("--test_file", args.test_file or args.data_dir / "test.jsonl", "--max_words", 160, "--rerank_k", 16),
        *("--num_frames", row.num_frames, "--cache_frames", "--per_device_eval_batch_size", 50),
        *_as_options(row.changes),
    )


def results_folder(args: argparse.Namespace) -> Path:
    """Return where results are kept: those of another test file in a folder below, named as the file's folder."""
    return args.output_dir / args.test_file.parent.name if args.test_file else args.output_dir


def _as_options(changes: dict[str, Any]) -> list[Any]:
    """Return options of the script for a configuration that differs from one without merging in this."""
    options = []
    for name, value in {**_merges(0, 0), **changes}.items():
        options += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return options


def _run(threads: int, output_dir: Path, *options: Any) -> dict[str, float]:
    """Be run_retrieval.py, unless it has written its results, and return those of the test split at the end."""
    results_file = output_dir / "results.json"
    if not results_file.is_file():
        output_dir.mkdir(parents=True, exist_ok=True)
        script = ROOT / "run_retrieval.py"
        # Workers would only take turns with a run on its core.
        sys.argv = list(map(str, (script, *options, "--num_workers", 0, "--output_dir", output_dir)))
        torch.set_num_threads(threads)
        with (output_dir / "log.txt").open("ab") as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
        try:
            runpy.run_path(str(script), run_name="__main__")
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise RuntimeError(f"The run in {output_dir} failed; log.txt there says why.") from error
    tested = json.loads(results_file.read_text())["results"].get("test", {"": {}})
    return list(tested.values())[-1]


def summarise(
    row: Row, config: TestaVideoConfig, results: list[dict[str, float]], milliseconds: float
) -> dict[str, Any]:
    """Return a row of the table: figures of all seeds, GFLOPs, milliseconds and memory."""
    return {
        "table": row.table,
        "row": row.name,
        "GFLOPs": count_video_gflops(config),
        **{figure: [result[name] for result in results] for figure, name in FIGURES.items()},
        "ms a video": milliseconds,
        "peak MB of 16 videos": _peak_megabytes(config),
    }


def milliseconds_a_video(configs: dict[str, TestaVideoConfig]) -> dict[str, float]:
    """Return the median of each row's encoder, 16 videos at a time, all rows taking turns."""
    encoders = {name: _encoder(config) for name, config in configs.items()}
    seconds = alternate(encoders, repeats=15)
    return {name: 1000 * statistics.median(runs) / NUM_VIDEOS for name, runs in seconds.items()}


def _video_config(row: Row, config_dir: Path) -> TestaVideoConfig:
    config = AutoConfig.from_pretrained(config_dir).video_config
    for name, value in {"num_frames": row.num_frames, **_merges(0, 0), **row.changes}.items():
        setattr(config, name, value)
    return config


def _encoder(config: TestaVideoConfig) -> Callable[[], Any]:
    """Return a function that encodes 16 videos; weights and pixels change nothing about time and memory."""
    model = TestaVideoModel(config).eval()
    size = config.image_size
    videos = torch.zeros(NUM_VIDEOS, config.num_frames, config.num_channels, size, size)
    return torch.no_grad()(partial(model, videos))


def _peak_megabytes(config: TestaVideoConfig) -> float:
    return peak_memory(_encoder(config)) / 2**20


def _with_spread(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) == 1:
        return f"{value[0]:.1f}"
    return f"{statistics.mean(value):.1f} ± {statistics.stdev(value):.1f}"


def write_report(file: Path, table: list[dict[str, Any]], shown: str, machine: str, seeds: str):
    """Write the table as Markdown, and a plot of recall against GFLOPs."""
    plot_recall(file.with_suffix(".png"), table)
    file.write_text(
        "# Ablations on the demo's stories\n\n"
        f"`python benchmarks/ablation.py`, {seeds}, on {machine}.\n\n"
        f"![Recall against GFLOPs]({file.with_suffix('.png').name})\n\n{shown}\n",
        encoding="utf-8",
    )


def plot_recall(file: Path, table: list[dict[str, Any]]):
    """Draw recall against GFLOPs: of all rows, with their Pareto front, and along the `CURVES`."""
    points = {entry["row"]: (entry["GFLOPs"], statistics.mean(entry["R@1"])) for entry in table}
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    of_all, *of_curves = figure.subplots(1, 1 + len(CURVES), sharey=True)
    for kind, marker in MARKERS.items():
        if chosen := [point for row, point in points.items() if _kind(row) == kind]:
            of_all.plot(*zip(*chosen, strict=True), marker, label=kind)
    front = [x for x in points.values() if not any(o[0] <= x[0] and o[1] > x[1] for o in points.values())]
    of_all.plot(*zip(*sorted(front), strict=True), color="grey", linewidth=1, label="Pareto front")
    of_all.set(title="all rows", ylabel="text-to-video R@1, %")
    for axes, (title, lines) in zip(of_curves, CURVES.items(), strict=True):
        axes.set(title=title)
        for name, rows in lines.items():
            labelled = sorted((*points[row], label) for label, row in rows.items() if row in points)
            axes.plot([x for x, _, _ in labelled], [y for _, y, _ in labelled], "o-", markersize=4, label=name)
            for gflops, recall, label in labelled:
                axes.annotate(label, (gflops, recall), xytext=(3, -9), textcoords="offset points", fontsize=8)
    for axes in (of_all, *of_curves):
        axes.set(xlabel="GFLOPs a video")
        axes.legend()
    figure.savefig(file, dpi=100)


def _kind(row: str) -> str:
    return next((kind for kind in MARKERS if row.startswith(kind)), "trained")


if __name__ == "__main__":
    main()
