"""What a run leaves behind for people: a table of results, a results file, and a model with its card."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from transformers_testa.arguments import DataArguments, TrainingArguments
from transformers_testa.baselines import Baseline
from transformers_testa.evaluation import Evaluator
from transformers_testa.flops import count_video_gflops
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.training import Progress
from transformers_testa.video_processing_testa import TestaVideoProcessor


def set_up_logging(accelerator: Accelerator) -> None:
    """Print what the package reports, on the main process."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("transformers_testa").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    # It warns at every checkpoint that shared weights are stored once, which is meant.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def markdown_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def retrieval_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a Markdown table: recalls and twins told apart in percent, with and without re-ranking; empty without any."""
    columns = (
        "split, moment",
        "ranked by",
        "text-to-video R@1 / 5 / 10",
        "video-to-text R@1 / 5 / 10",
        "order of twins",
        "seconds per video",
    )
    rows = []
    for split, moments in results.items():
        for moment, metrics in moments.items():
            for ranked_by, prefix in (("similarity", ""), ("re-ranked", "reranked_")):
                if moment.startswith("step") or f"{prefix}text_to_video_recall@1" not in metrics:
                    continue
                recalls = [
                    " / ".join(f"{metrics[f'{prefix}{direction}_recall@{k}']:.1f}" for k in (1, 5, 10))
                    for direction in ("text_to_video", "video_to_text")
                ]
                accuracy = metrics.get(f"{prefix}distractor_accuracy")
                twins = "–" if accuracy is None else f"{accuracy:.1f}"
                rows.append([f"{split}, {moment}", ranked_by, *recalls, twins, f"{metrics['seconds_per_video']:.3f}"])
    return markdown_table(columns, rows) if rows else ""


def report_results(folder: str | Path, table: str, definition: dict[str, Any], progress: Progress) -> None:
    """Print a table of results with what defines them, and write all that was measured to `results.json`."""
    print(f"\n{table}\n", *(f"{name}: {value}" for name, value in definition.items()), sep="\n")
    summary = {
        "results": progress.results,
        "losses": progress.losses,
        "definition": definition,
        "broken_videos": progress.broken_videos,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "results.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")


def figures_for_hub(
    results: dict[str, dict[str, dict[str, float]]], moment: str, data: str, task_type: str, *metrics: str
) -> list[EvalResult]:
    """Return the figures of a moment whose names begin with one of `metrics`, as the Hub shows them."""
    return [
        EvalResult(
            task_type=task_type,
            dataset_type=data,
            dataset_name=data,
            dataset_split=split,
            metric_type=name,
            metric_value=round(value, 2),
        )
        for split, moments in results.items()
        for name, value in moments.get(moment, {}).items()  # a run that goes on may evaluate fewer splits
        if name.removeprefix("reranked_").startswith(metrics)
    ]


def describe_run(
    evaluator: Evaluator, progress: Progress, data_args: DataArguments, args: TrainingArguments
) -> dict[str, Any]:
    """Return what the figures of a run depend on, whatever its task, and the GFLOPs of a video."""
    accelerator = evaluator.accelerator
    videos = evaluator.processor.video_processor
    device = accelerator.device
    splits = (data_args.train_file, data_args.validation_file, data_args.test_file)
    files = [file for files in splits for file in files or ()]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {
        **{
            f"{split} split": f"{len(rows)} {'texts' if 'text' in rows.column_names else 'questions'}, "
            f"{len(set(rows['video_id']))} videos"
            for split, rows in evaluator.tables.items()
        },
        "data": ", ".join(
            data_args.dataset_name or dict.fromkeys(Path(file).absolute().parent.name for file in files)
        ),
        "videos that could not be decoded": len(progress.broken_videos),
        "frames": f"{videos.num_frames} a video, {videos.frame_sampling} sampling",
        "resolution": ", ".join(f"{name} {pixels}" for name, pixels in dict(videos.size).items() if pixels)
        + " pixels",
        "text": f"the first {data_args.max_words} words",
        **_describe_encoder(evaluator.model, videos),
        "computed on": f"{device_name}, {accelerator.num_processes} processes, mixed precision {args.mixed_precision}",
        "seconds per video": "encoding alone, frames cached"
        if data_args.cache_frames or data_args.cache_videos
        else "decoding and encoding",
        "training": f"{progress.step} steps of {batch} samples, seed {args.seed}"
        if progress.step
        else "none in this run",
    }


def _describe_encoder(model: PreTrainedModel | Baseline, videos: TestaVideoProcessor) -> dict[str, Any]:
    if isinstance(model, Baseline):
        gflops = model.count_video_gflops(videos.num_frames, videos.size["height"], videos.size["width"])
        return {"GFLOPs per video": round(gflops, 2)}
    config = model.config.video_config
    return {
        "merged in each block": f"frames (R_T): {config.merged_frames_per_layer}, patches of each frame (R_S): "
        f"{config.merged_patches_per_layer}",
        "GFLOPs per video": round(count_video_gflops(config, videos.num_frames), 2),
    }


def publish(
    folder: str | Path,
    model: PreTrainedModel,
    processor: TestaProcessor,
    title: str,
    introduction: str,
    results: str,
    definition: dict[str, Any],
    recipe: dict[str, Any],
    tag: str,
    figures: list[EvalResult],
) -> None:
    """Save a trained model and its processor with a model card, as a repository of the Hub has them.

    Args:
        folder: Where; its name is the model's.
        model: What was trained.
        processor: Its processor.
        title: Of the card, in front of the model's name.
        introduction: What the model is for, in Markdown; `{folder}` in it becomes the folder.
        results, definition, recipe: As for [`write_model_card`].
        tag: What the model does, beside "testa".
        figures: What [`figures_for_hub`] returns.
    """
    name = Path(folder).absolute().name
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    metadata = ModelCardData(
        library_name="transformers", tags=["testa", tag], model_name=name, eval_results=figures or None
    )
    introduction = introduction.format(folder=folder)
    write_model_card(folder, f"{title}: {name}", introduction, results, definition, recipe, metadata)


def write_model_card(
    folder: str | Path,
    title: str,
    introduction: str,
    results: str,
    definition: dict[str, Any],
    recipe: dict[str, Any],
    metadata: ModelCardData,
) -> None:
    """Write `README.md` and `recipe.yaml` next to a saved model.

    Args:
        folder: The model's folder.
        title: Of the card.
        introduction: What the model is for, and how it is used, in Markdown.
        results: The measured figures, in Markdown.
        definition: What the figures depend on: split, number of items, frames, sampling, ...
        recipe: What [`as_recipe`] returns.
        metadata: The card's header, with the figures for the Hub.
    """
    recipe_text = yaml.safe_dump(recipe, sort_keys=False)
    lines = [f"- {name}: {value}" for name, value in definition.items()]
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        introduction,
        "## Results",
        results,
        "\n".join(lines),
        "## Recipe",
        f"```yaml\n{recipe_text}```",
    ]
    Path(folder, "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    Path(folder, "recipe.yaml").write_text(recipe_text, encoding="utf-8")
