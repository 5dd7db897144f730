"""The paper's ablations on the stories of the demo: what aggregation costs in recall, and what it saves.

    python -m transformers_testa.data.demo --output_dir demo_stories
    python benchmarks/ablation.py --data_dir demo_stories --output_dir runs/ablation
    python benchmarks/ablation.py --data_dir demo_stories --output_dir runs/ablation --rows none "trained, both" --seeds 0

A row is a configuration of the video encoder. Rows "off the shelf" evaluate the weights that were trained without
aggregation; the others are trained, with the same steps. All with divided attention share the first lesson, on clips. Each
run is one of run_retrieval.py in a folder of its own: the command goes on where it was when it is given again, and shows
what there is. Budgets are near 57 % of the GFLOPs without aggregation; each row says its own.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import describe_machine, markdown_table, peak_memory, save_json
from tqdm import tqdm
from transformers import AutoConfig

from transformers_testa import TestaConfig, TestaVideoModel
from transformers_testa.flops import count_video_gflops


ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "hub_configs" / "testa-demo"
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
        is_trained: Whether the weights were trained with them; else they are those of the row "none".
    """

    name: str
    table: str
    changes: dict[str, Any] = field(default_factory=dict)
    is_trained: bool = True

    @property
    def attention_type(self) -> str:
        return self.changes.get("attention_type", "divided_space_time")


def _merges(frames: int | list[int], patches: int | list[int], **changes: Any) -> dict[str, Any]:
    return {"merged_frames_per_layer": frames, "merged_patches_per_layer": patches, **changes}


BOTH = _merges(2, 3)
JOINT = {"attention_type": "joint_space_time"}
ROWS = (
    Row("none", "5"),
    Row("off the shelf, pruning", "5", {**BOTH, "aggregation_strategy": "prune"}, False),
    Row("off the shelf, importance", "5", {**BOTH, "aggregation_strategy": "importance"}, False),
    Row("off the shelf, geometry", "5", BOTH, False),
    Row("trained, importance", "5", {**BOTH, "aggregation_strategy": "importance"}),
    Row("trained, frames only", "5", _merges([4, 3, 1], 0)),
    Row("trained, patches only", "5", _merges(0, 5)),
    Row("trained, both", "5", BOTH),
    Row("joint, none", "6", JOINT),
    Row("joint, trained", "6", _merges(0, 45, **JOINT)),
    Row("trained, vote", "details", {**BOTH, "frame_matching": "vote"}),
    Row("trained, proportional attention", "details", {**BOTH, "proportional_attention": True}),
    *(
        Row(f"off the shelf, {frames} and {patches}", "figures", _merges(frames, patches), False)
        for frames, patches in itertools.product((0, 1, 2, 3), (0, 1, 2, 3, 4))
        if frames or patches
    ),
)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="What transformers_testa.data.demo made.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the runs.")
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help="Which rows; else all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="One training each.")
    parser.add_argument("--clip_steps", type=int, default=600, help="Steps of the first lesson, on clips.")
    parser.add_argument("--story_steps", type=int, default=550, help="Steps of the second, on stories.")
    parser.add_argument("--report", type=Path, help="Markdown file for the table and, beside it, the plot.")
    args = parser.parse_args(arguments)

    rows = [row for row in ROWS if row.name in args.rows]
    runs = list(itertools.product(args.seeds, rows))
    results = {
        (row.name, seed): run_row(row, seed, args) for seed, row in tqdm(runs, desc="Ablation", unit="row", position=1)
    }
    table = [summarise(row, [results[row.name, seed] for seed in args.seeds]) for row in rows]
    machine = describe_machine()
    shown = markdown_table([{name: _with_spread(value) for name, value in entry.items()} for entry in table])
    print(f"\n{machine}\n{len(args.seeds)} seeds: mean ± standard deviation\n\n{shown}")
    save_json(args.output_dir / "ablation.json", machine, table)
    if args.report:
        write_report(args.report, table, shown, machine, len(args.seeds))


def run_row(row: Row, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train and evaluate what isn't there yet, and return the metrics of the test split."""
    folder = args.output_dir / f"seed{seed}"
    clips = folder / f"clips, {row.attention_type}"
    test_file = ("--test_file", args.data_dir / "test.jsonl")
    if not row.is_trained:
        run_row(ROWS[0], seed, args)
        return _run(
            *(folder / row.name, "--model_name_or_path", with_changes(folder / "none", row)),
            *("--do_predict", *test_file, "--max_words", 160, "--rerank_k", 16, "--per_device_eval_batch_size", 50),
        )
    start = with_changes(
        RECIPES, Row(clips.name, "", {"attention_type": row.attention_type}), folder / "configurations"
    )
    _run(
        *(clips, RECIPES / "recipe_clips.yaml", "--config_name", start, "--seed", seed),
        *("--train_file", args.data_dir / "train_clips.jsonl", "--max_train_steps", args.clip_steps),
        *("--eval_before_training", False, "--do_predict", False),
    )
    return _run(
        *(folder / row.name, RECIPES / "recipe.yaml", "--model_name_or_path", with_changes(clips, row)),
        *("--seed", seed, "--max_train_steps", args.story_steps, "--train_file", args.data_dir / "train.jsonl"),
        *("--validation_file", args.data_dir / "validation.jsonl", *test_file),
    )


def with_changes(source: Path, row: Row, parent: Path | None = None) -> Path:
    """Copy a model's folder, weights linked, with another configuration of its video encoder."""
    folder = (parent or source.parent / "starts") / row.name
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".json" and file.name != "results.json":
            shutil.copy(file, folder)
        elif file.suffix == ".safetensors" and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text())
    config["video_config"] |= {**_merges(0, 0), **row.changes}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _run(output_dir: Path, *options: Any) -> dict[str, float]:
    """Call run_retrieval.py, unless it has written its results, and return those of the test split at the end."""
    results_file = output_dir / "results.json"
    if not results_file.is_file():
        command = [sys.executable, ROOT / "run_retrieval.py", *options, "--output_dir", output_dir]
        subprocess.run(list(map(str, command)), check=True)
    tested = json.loads(results_file.read_text())["results"].get("test", {"": {}})
    return list(tested.values())[-1]


def summarise(row: Row, results: list[dict[str, float]]) -> dict[str, Any]:
    """Return a row of the table: figures of all seeds, GFLOPs, seconds and memory."""
    config = AutoConfig.from_pretrained(RECIPES)
    for name, value in {**_merges(0, 0), **row.changes}.items():
        setattr(config.video_config, name, value)
    return {
        "table": row.table,
        "row": row.name,
        "GFLOPs": count_video_gflops(config.video_config),
        **{figure: [result[name] for result in results] for figure, name in FIGURES.items()},
        "ms a video": [1000 * result["seconds_per_video"] for result in results],
        "peak MB of 16 videos": _peak_megabytes(config),
    }


@torch.no_grad()
def _peak_megabytes(config: TestaConfig) -> float:
    model = TestaVideoModel(config.video_config).eval()
    size = config.video_config.image_size
    videos = torch.zeros(16, config.video_config.num_frames, config.video_config.num_channels, size, size)
    return peak_memory(lambda: model(videos)) / 2**20


def _with_spread(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    spread = statistics.stdev(value) if len(value) > 1 else 0.0
    return f"{statistics.mean(value):.1f} ± {spread:.1f}"


def write_report(file: Path, table: list[dict[str, Any]], shown: str, machine: str, num_seeds: int):
    """Write the table as Markdown, and a plot of recall against GFLOPs with its Pareto front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = [(entry["GFLOPs"], statistics.mean(entry["R@1"]), entry["row"]) for entry in table]
    front = [point for point in points if not any(o[0] <= point[0] and o[1] > point[1] for o in points)]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, marker in (("off the shelf", "o"), ("joint", "s"), ("trained", "^")):
        if chosen := [(gflops, recall) for gflops, recall, name in points if _kind(name) == kind]:
            axes.plot(*zip(*chosen, strict=True), marker, label=kind)
    axes.plot(*zip(*sorted((x, y) for x, y, _ in front), strict=True), color="grey", linewidth=1, label="Pareto front")
    axes.set(xlabel="GFLOPs a video", ylabel="text-to-video R@1, %")
    axes.legend()
    figure.savefig(file.with_suffix(".png"), dpi=120)
    plt.close(figure)

    file.write_text(
        "# Ablations on the demo's stories\n\n"
        f"`python benchmarks/ablation.py`, {num_seeds} seeds (mean ± standard deviation), on {machine}.\n\n"
        f"![Recall against GFLOPs]({file.with_suffix('.png').name})\n\n{shown}\n",
        encoding="utf-8",
    )


def _kind(row: str) -> str:
    return next((kind for kind in ("off the shelf", "joint") if row.startswith(kind)), "trained")


if __name__ == "__main__":
    main()
