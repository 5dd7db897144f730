"""Paragraph-to-video retrieval: train a model, evaluate it, search your own videos with it.

    python run_retrieval.py hub_configs/testa-demo/recipe.yaml
    accelerate launch run_retrieval.py recipe.yaml --learning_rate 2e-5 --output_dir runs/2e-5
    python run_retrieval.py --model_name_or_path runs/2e-5 --index_folder videos --gallery_dir gallery \
        --query "first a dog runs along the beach, then it sleeps"

A recipe is a YAML or JSON file of arguments; arguments on the command line override it. Training goes on from the
newest checkpoint in output_dir, if there is one.
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import transformers
from accelerate.utils import set_seed
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCardData
from torch.utils.data import DataLoader

from transformers_testa import TestaForRetrieval
from transformers_testa.arguments import DataArguments, ModelArguments, TrainingArguments, as_recipe, parse_arguments
from transformers_testa.data.annotations import clean_caption
from transformers_testa.data.datasets import (
    collate_texts,
    collate_training_samples,
    collate_videos,
    distinct_videos,
    distractor_rows,
)
from transformers_testa.gallery import Gallery
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.retrieval import RetrievalDetails, VideoSearch, evaluate_retrieval, index_videos
from transformers_testa.training import (
    Progress,
    build_model,
    create_accelerator,
    create_loader,
    describe_run,
    load_split,
    run_identity,
    train,
    video_dataset,
    write_model_card,
)


HEADLINE = "text_to_video_recall@1"
USAGE = """Finds videos by a paragraph that tells what happens in them, and paragraphs by a video.

```bash
python run_retrieval.py --model_name_or_path {folder} --index_folder videos --gallery_dir gallery --query "..."
```"""


@dataclass
class RetrievalArguments:
    free: ClassVar[tuple[str, ...]] = (
        *("rerank_k", "num_example_queries", "index_folder", "gallery_dir", "query", "top_k"),
    )

    rerank_k: int = field(default=128, metadata={"help": "Candidates that the matching head reads; 0: no re-ranking."})
    num_example_queries: int = field(default=0, metadata={"help": "Searches to show after an evaluation."})
    index_folder: str | None = field(default=None, metadata={"help": "Folder of videos to add to the gallery."})
    gallery_dir: str | None = field(default=None, metadata={"help": "Where the gallery of embedded videos is kept."})
    query: list[str] | None = field(default=None, metadata={"help": "One or more texts to search the gallery for."})
    top_k: int = field(default=10, metadata={"help": "Videos to show for a query."})

    def __post_init__(self):
        if (self.index_folder or self.query) and self.gallery_dir is None:
            raise ValueError("gallery_dir is missing: the folder where the gallery of embedded videos is kept.")


def main(command_line: list[str]):
    arguments = parse_arguments((ModelArguments, DataArguments, RetrievalArguments, TrainingArguments), command_line)
    model_args, data_args, retrieval_args, args = arguments
    splits = [split for split, asked in (("validation", args.do_eval), ("test", args.do_predict)) if asked]
    if not (args.do_train or splits or retrieval_args.gallery_dir):
        raise ValueError("Nothing to do: pass do_train, do_eval, do_predict, or index_folder or query.")
    accelerator = create_accelerator(args)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("transformers_testa").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)
    model, processor = build_model(TestaForRetrieval, model_args, data_args)
    model.to(accelerator.device)
    evaluator = Evaluator(accelerator, model, processor, splits, *arguments)

    progress, moment = Progress(), "as loaded"
    if args.do_train:
        table = load_split(data_args, "train")
        dataset = video_dataset(
            table, processor.video_processor, data_args, args, accelerator, data_args.train_frame_sampling
        )
        collate = partial(collate_training_samples, processor=processor, max_words=data_args.max_words)
        hard_negatives = distractor_rows(table) if data_args.group_distractors else None
        identity = run_identity(model, dataset, *arguments)
        accelerator.init_trackers(
            "retrieval", config={name: str(value) for name, value in as_recipe(*arguments).items()}
        )
        evaluate = evaluator if splits else None
        progress = train(args, accelerator, model, dataset, collate, identity, evaluate, HEADLINE, hard_negatives)
        accelerator.end_training()
        moment = "after training"
    for split in splits:
        if split not in evaluator.details:
            evaluator.evaluate(progress, moment, split)
    if accelerator.is_main_process:
        if args.output_dir:
            report(evaluator, processor, progress, moment, arguments)
        if retrieval_args.gallery_dir:
            search(model, processor, retrieval_args, args)


class Evaluator:
    """Evaluates a model on some splits and writes the metrics into the progress of a run."""

    def __init__(self, accelerator, model, processor, splits, model_args, data_args, retrieval_args, args):
        self.accelerator, self.model, self.rerank_k = accelerator, model, retrieval_args.rerank_k
        self.tables = {split: load_split(data_args, split) for split in splits}
        self.loaders: dict[str, tuple[DataLoader, DataLoader]] = {}
        self.details: dict[str, RetrievalDetails] = {}
        loader = partial(create_loader, batch_size=args.per_device_eval_batch_size * accelerator.num_processes)
        collate = partial(collate_texts, processor=processor, max_words=data_args.max_words)
        for split, table in self.tables.items():
            videos = video_dataset(distinct_videos(table), processor.video_processor, data_args, args, accelerator)
            texts = [{**row, "index": number} for number, row in enumerate(table)]
            self.loaders[split] = accelerator.prepare(
                loader(videos, partial(collate_videos, processor=processor), args.num_workers),
                loader(texts, collate, 0),
            )

    def __call__(self, progress: Progress, moment: str) -> dict[str, float]:
        """Evaluate on all splits, or in the middle of training on the first, and return the first one's metrics."""
        splits = list(self.tables)[: 1 if moment.startswith("step") else None]
        for split in splits:
            self.evaluate(progress, moment, split)
        return progress.results[splits[0]][moment]

    def evaluate(self, progress: Progress, moment: str, split: str):
        videos, texts = self.loaders[split]
        videos = progress.broken_videos.filter(videos)
        with self.accelerator.autocast():
            metrics, self.details[split] = evaluate_retrieval(
                self.model, videos, texts, rerank_k=self.rerank_k, accelerator=self.accelerator
            )
        progress.results.setdefault(split, {})[moment] = metrics


def report(evaluator: Evaluator, processor: TestaProcessor, progress: Progress, moment: str, arguments: tuple):
    """Print the results and some searches; write the results and, after training, the model and its card."""
    _, data_args, retrieval_args, args = arguments
    folder = Path(args.output_dir)
    table = results_table(progress.results)
    definition = {
        **{
            f"{split} split": f"{len(rows)} texts, {len(set(rows['video_id']))} videos"
            for split, rows in evaluator.tables.items()
        },
        "re-ranking": f"the {retrieval_args.rerank_k} most similar candidates of a query, by similarity + match logit",
        **describe_run(evaluator.accelerator, evaluator.model, processor, progress, data_args, args),
    }
    print(f"\n{table}\n", *(f"{name}: {value}" for name, value in definition.items()), sep="\n")
    for split, details in list(evaluator.details.items())[-1:]:
        show_examples(details, evaluator.tables[split], retrieval_args.num_example_queries)
    folder.mkdir(parents=True, exist_ok=True)
    summary = {"results": progress.results, "definition": definition, "broken_videos": progress.broken_videos}
    (folder / "results.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    if not args.do_train:
        return
    evaluator.model.save_pretrained(folder)
    processor.save_pretrained(folder)
    figures = [
        EvalResult(
            task_type="text-to-video-retrieval",
            dataset_type=definition["data"],
            dataset_name=definition["data"],
            dataset_split=split,
            metric_type=name,
            metric_value=round(value, 2),
        )
        for split, moments in progress.results.items()
        for name, value in moments[moment].items()
        if name.removeprefix("reranked_").startswith(("text_to_video_recall", "distractor_accuracy"))
    ]
    tags = ["testa", "video-retrieval"]
    metadata = ModelCardData(library_name="transformers", tags=tags, model_name=folder.name, eval_results=figures)
    title = f"TESTA for paragraph-to-video retrieval: {folder.name}"
    write_model_card(folder, title, USAGE.format(folder=folder), table, definition, as_recipe(*arguments), metadata)


def results_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a Markdown table: recalls and twins told apart in percent, with and without re-ranking."""
    columns = (
        "split, moment",
        "ranked by",
        "text-to-video R@1 / 5 / 10",
        "video-to-text R@1 / 5 / 10",
        "order of twins",
    )
    rows = [(*columns, "seconds per video"), ["---"] * 6]
    for split, moments in results.items():
        for moment, metrics in moments.items():
            for ranked_by, prefix in (("similarity", ""), ("re-ranked", "reranked_")):
                if moment.startswith("step") or prefix + HEADLINE not in metrics:
                    continue
                recalls = [
                    " / ".join(f"{metrics[f'{prefix}{direction}_recall@{k}']:.1f}" for k in (1, 5, 10))
                    for direction in ("text_to_video", "video_to_text")
                ]
                twins = metrics.get(f"{prefix}distractor_accuracy")
                twins = "–" if twins is None else f"{twins:.1f}"
                rows.append([f"{split}, {moment}", ranked_by, *recalls, twins, f"{metrics['seconds_per_video']:.3f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def show_examples(details: RetrievalDetails, table: Dataset, num_queries: int):
    scores = details.similarities if details.text_to_video_scores is None else details.text_to_video_scores
    for row in range(min(num_queries, len(scores))):
        example = table[details.text_indices[row]]
        print(f"\n“{' '.join(example['text'].split()[:16])} …”, a text of {example['video_id']}:")
        best = scores[row].argsort(descending=True)[:3].tolist()
        for rank, column in enumerate(best, start=1):
            print(f"{rank:3}. {scores[row, column]:8.3f}  {details.video_ids[column]}")


def search(
    model: TestaForRetrieval, processor: TestaProcessor, retrieval_args: RetrievalArguments, args: TrainingArguments
):
    """Add a folder of videos to the gallery, and print what is found for each query: rank, score, path."""
    if retrieval_args.index_folder:
        with Gallery(retrieval_args.gallery_dir, model, writable=True) as gallery:
            done = index_videos(
                model, processor, retrieval_args.index_folder, gallery, args.per_device_eval_batch_size
            )
        print(f"{done.added} videos added, {done.skipped} were there, {len(done.failed)} could not be read.")
    if retrieval_args.query:
        video_search = VideoSearch(model, processor, Gallery(retrieval_args.gallery_dir, model))
        queries = [clean_caption(query) for query in retrieval_args.query]
        results = video_search.search(queries, retrieval_args.top_k, retrieval_args.rerank_k)
        for query, found in zip(retrieval_args.query, results, strict=True):
            print(f"\n{query}")
            for rank, result in enumerate(found, start=1):
                print(f"{rank:3}. {result.score:8.3f}  {result.id}")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_warning()
    main(sys.argv[1:])
