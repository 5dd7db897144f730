"""Paragraph-to-video retrieval: train a model, evaluate it, search your own videos with it.

    python run_retrieval.py hub_configs/testa-demo/recipe.yaml
    accelerate launch run_retrieval.py recipe.yaml --learning_rate 2e-5 --output_dir runs/2e-5
    python run_retrieval.py --model_name_or_path runs/2e-5 --index_folder videos --gallery_dir gallery \
        --query "first a dog runs along the beach, then it sleeps"

    python run_retrieval.py --baseline clip --model_name_or_path openai/clip-vit-base-patch32 --do_predict \
        --test_file test.jsonl --num_frames 32 --output_dir runs/clip

A recipe is a YAML or JSON file of arguments; arguments on the command line override it. Training goes on from the
newest checkpoint in output_dir, if there is one.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset

from transformers_testa import TestaForRetrieval
from transformers_testa.arguments import (
    DataArguments,
    ModelArguments,
    ObjectiveArguments,
    TrainingArguments,
    as_recipe,
    parse_arguments,
)
from transformers_testa.baselines import BASELINES, Baseline, count_long_texts, load_baseline
from transformers_testa.data.annotations import clean_caption
from transformers_testa.data.benchmarks import write_similarity_matrix
from transformers_testa.data.datasets import collate_training_samples
from transformers_testa.evaluation import RetrievalEvaluator
from transformers_testa.gallery import Gallery
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.reporting import (
    describe_run,
    figures_for_hub,
    publish,
    report_results,
    retrieval_table,
    set_up_logging,
)
from transformers_testa.retrieval import RetrievalDetails, VideoSearch, index_videos_together, repair_gallery
from transformers_testa.training import (
    Progress,
    build_model,
    create_accelerator,
    create_objective,
    evaluation_tables,
    run_identity,
    train,
    training_set,
)


USAGE = """Finds videos by a paragraph that tells what happens in them, and paragraphs by a video.

```bash
python run_retrieval.py --model_name_or_path {folder} --index_folder videos --gallery_dir gallery --query "..."
```"""


@dataclass
class RetrievalArguments:
    free: ClassVar[tuple[str, ...]] = (
        *("baseline", "rerank_k", "num_example_queries", "query", "top_k"),
        *("index_folder", "gallery_dir", "gallery_dtype", "repair", "remove"),
    )

    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Evaluate another model than TESTA, as it is: model_name_or_path holds one of this kind.",
            "choices": list(BASELINES),
        },
    )
    rerank_k: int | None = field(
        default=None,
        metadata={
            "help": "Candidates that the matching head reads; 0: no re-ranking. 128 if not given, where there is such a head."
        },
    )
    num_example_queries: int = field(default=0, metadata={"help": "Searches to show after an evaluation."})
    index_folder: str | None = field(default=None, metadata={"help": "Folder of videos to add to the gallery."})
    gallery_dir: str | None = field(default=None, metadata={"help": "Where the gallery of embedded videos is kept."})
    gallery_dtype: str | None = field(
        default=None,
        metadata={
            "help": "How token features are stored: float32, bfloat16 or int8; bfloat16 in a new gallery.",
            "choices": list(Gallery.DTYPES),
        },
    )
    repair: bool = field(default=False, metadata={"help": "Make damaged files of the gallery anew from the videos."})
    remove: list[str] | None = field(
        default=None, metadata={"help": "Videos to remove from the gallery, each by the name that a search shows."}
    )
    query: list[str] | None = field(default=None, metadata={"help": "One or more texts to search the gallery for."})
    top_k: int = field(default=10, metadata={"help": "Videos to show for a query."})

    def __post_init__(self) -> None:
        can_rerank = self.baseline is None or BASELINES[self.baseline].has_matching_head
        if self.rerank_k is None:
            self.rerank_k = 128 if can_rerank else 0
        if self.rerank_k and not can_rerank:
            raise ValueError(
                f"rerank_k is {self.rerank_k}, but {self.baseline} has no matching head; only 0 is possible."
            )
        if (self.index_folder or self.query or self.repair or self.remove) and self.gallery_dir is None:
            raise ValueError("gallery_dir is missing: the folder where the gallery of embedded videos is kept.")
        if self.gallery_dir and not (self.index_folder or self.baseline or Path(self.gallery_dir).is_dir()):
            raise ValueError(
                f"gallery_dir is {self.gallery_dir}, which is no folder; index_folder makes a gallery there."
            )


TASK_TYPE = "text-to-video-retrieval"
SHOWN_METRICS = ("text_to_video_recall", "distractor_accuracy")
ARGUMENT_CLASSES = (ModelArguments, DataArguments, ObjectiveArguments, RetrievalArguments, TrainingArguments)
Arguments = tuple[ModelArguments, DataArguments, ObjectiveArguments, RetrievalArguments, TrainingArguments]


def main(command_line: list[str]) -> None:
    arguments: Arguments = parse_arguments(ARGUMENT_CLASSES, command_line)
    model_args, data_args, objective_args, retrieval_args, args = arguments
    if not (args.do_train or args.do_eval or args.do_predict or retrieval_args.gallery_dir):
        raise ValueError(
            "Nothing to do: pass do_train, do_eval, do_predict, or index_folder, repair, remove or query."
        )
    accelerator = create_accelerator(args)
    set_up_logging(accelerator)
    set_seed(args.seed)
    model: TestaForRetrieval | Baseline
    max_tokens = data_args.max_words
    if retrieval_args.baseline:
        model, processor = build_baseline(retrieval_args.baseline, model_args, data_args, retrieval_args, args)
        max_tokens = processor.longest_text(model.model)
    else:
        model, processor = build_model(TestaForRetrieval, model_args, data_args, args.gradient_checkpointing)
    model.to(accelerator.device)
    evaluator: RetrievalEvaluator[TestaForRetrieval | Baseline] = RetrievalEvaluator(
        *(accelerator, model, processor, evaluation_tables(data_args, args), data_args, args),
        rerank_k=retrieval_args.rerank_k or 0,
        max_tokens=max_tokens,
    )

    progress, moment = Progress(), "as loaded"
    if args.do_train:
        assert isinstance(model, TestaForRetrieval)  # `build_baseline` refuses to train, and to search
        dataset, sampler = training_set(processor, data_args, args, accelerator)
        objective = create_objective(model, objective_args, args, sampler)
        accelerator.init_trackers(
            "retrieval", config={name: str(value) for name, value in as_recipe(*arguments).items()}
        )
        progress = train(
            *(args, accelerator, objective, dataset, sampler),
            collate=partial(collate_training_samples, processor=processor, max_words=data_args.max_words),
            identity=run_identity(model, dataset, *arguments),
            evaluate=evaluator if evaluator.tables else None,
            best_by=evaluator.best_by if args.do_eval else None,
            smallest_batch=2,  # hard negatives need a second video
        )
        evaluator.gather_model()
        moment = "after training"
    if evaluator.tables:
        evaluator(progress, moment)
    if accelerator.is_main_process and args.output_dir:
        report(args.output_dir, evaluator, progress, moment, arguments)
    if retrieval_args.gallery_dir:
        assert isinstance(evaluator.model, TestaForRetrieval)
        fill_gallery(retrieval_args.gallery_dir, accelerator, evaluator.model, processor, retrieval_args, args)
        if accelerator.is_main_process and retrieval_args.query:
            gallery = Gallery(retrieval_args.gallery_dir, evaluator.model)
            search(VideoSearch(evaluator.model, processor, gallery), retrieval_args.query, retrieval_args)
    accelerator.end_training()


def build_baseline(
    baseline: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    retrieval_args: RetrievalArguments,
    args: TrainingArguments,
) -> tuple[Baseline, TestaProcessor]:
    """Load the model that TESTA is compared with. Raises ValueError where an argument is for TESTA alone."""
    given = {**vars(model_args), **vars(retrieval_args), "do_train": args.do_train}
    meant = ("model_name_or_path", "attn_implementation", "baseline", "rerank_k", "num_example_queries")
    defaults = {
        argument.name: argument.default for group in ARGUMENT_CLASSES for argument in dataclasses.fields(group)
    }
    for name, value in given.items():
        if name not in meant and value != defaults[name]:
            raise ValueError(
                f"{name} is {value!r}, which is for TESTA; leave it out with baseline {baseline}, which is "
                "evaluated as it is, neither trained nor searched with."
            )
    assert model_args.model_name_or_path is not None  # config_name is refused above
    return load_baseline(
        baseline,
        model_args.model_name_or_path,
        model_args.attn_implementation,
        num_frames=data_args.num_frames,
        frame_sampling=data_args.frame_sampling,
        decoding_time_limit=data_args.decoding_time_limit,
        decoding_memory_limit=data_args.decoding_memory_limit,
    )


def describe_cuts(evaluator: RetrievalEvaluator) -> dict[str, str]:
    """Tell how many texts of each split are longer than what a baseline reads, and cut there."""
    if evaluator.max_tokens is None:
        return {}
    cuts = {}
    for split, table in evaluator.tables.items():
        number = count_long_texts(table["text"], evaluator.processor.tokenizer, evaluator.max_tokens)
        cuts[f"texts cut, {split} split"] = f"{number} of {len(table)}, after {evaluator.max_tokens} tokens"
    return cuts


def report(folder: str, evaluator: RetrievalEvaluator, progress: Progress, moment: str, arguments: Arguments) -> None:
    """Print the results and some searches; write the results and, after training, the model and its card."""
    _, data_args, _, retrieval_args, args = arguments
    table = retrieval_table(progress.results)
    reranking = f"the {retrieval_args.rerank_k} most similar candidates of a query, by similarity + match logit"
    definition = {
        "re-ranking": reranking if retrieval_args.rerank_k else "none",
        **describe_run(evaluator, progress, data_args, args),
    }
    if retrieval_args.baseline:
        name = f"{retrieval_args.baseline}, {evaluator.model.config._name_or_path}"
        definition = {"baseline": name, **definition, **describe_cuts(evaluator)}
    report_results(folder, table, definition, progress)
    for split, details in list(evaluator.details.items())[-1:]:
        show_examples(details, evaluator.tables[split], retrieval_args.num_example_queries)
    if "condensedmovies" in (data_args.dataset_name or ()) and "test" in evaluator.details:
        write_challenge_file(evaluator, Path(folder, "similarities_test.zip"))
    if args.do_train:
        assert isinstance(evaluator.model, TestaForRetrieval)
        publish(
            folder,
            evaluator.model,
            evaluator.processor,
            title="TESTA for paragraph-to-video retrieval",
            introduction=USAGE,
            results=table,
            definition=definition,
            recipe=as_recipe(*arguments),
            tag="video-retrieval",
            figures=figures_for_hub(progress.results, moment, definition["data"], TASK_TYPE, *SHOWN_METRICS),
        )


def write_challenge_file(evaluator: RetrievalEvaluator, file: Path) -> None:
    """Write the similarities of the test split as the Condensed Movies challenge takes them, in the order of its file."""
    details, wanted = evaluator.details["test"], list(dict.fromkeys(evaluator.tables["test"]["video_id"]))
    columns = {video_id: column for column, video_id in enumerate(details.video_ids)}
    if missing := [video_id for video_id in wanted if video_id not in columns]:
        print(f"{file} is not written: {len(missing)} videos of the challenge are not there, {missing[0]} for one.")
        return
    write_similarity_matrix(file, details.similarities[:, [columns[video_id] for video_id in wanted]].numpy())


def show_examples(details: RetrievalDetails, table: Dataset, num_queries: int) -> None:
    scores = details.similarities if details.text_to_video_scores is None else details.text_to_video_scores
    for row in range(min(num_queries, len(scores))):
        example = table[details.text_indices[row]]
        print(f"\n“{' '.join(example['text'].split()[:16])} …”, a text of {example['video_id']}:")
        best = scores[row].argsort(descending=True)[:3].tolist()
        for rank, column in enumerate(best, start=1):
            print(f"{rank:3}. {scores[row, column]:8.3f}  {details.video_ids[column]}")


def fill_gallery(
    folder: str,
    accelerator: Accelerator,
    model: TestaForRetrieval,
    processor: TestaProcessor,
    retrieval_args: RetrievalArguments,
    args: TrainingArguments,
) -> None:
    """Repair the gallery, remove videos from it, and add a folder of videos to it, on all processes."""
    dtype = Gallery.DTYPES[retrieval_args.gallery_dtype] if retrieval_args.gallery_dtype else None
    if retrieval_args.repair and accelerator.is_main_process:
        with Gallery(folder, model, writable=True, dtype=dtype, damaged=True) as gallery:
            mended = repair_gallery(model, processor, gallery)
        print(
            f"{len(mended.damages)} damaged files found, {mended.repaired} videos embedded again, "
            f"{len(mended.failed)} could not be read any more and are removed."
        )
    if retrieval_args.remove and accelerator.is_main_process:
        with Gallery(folder, model, writable=True, dtype=dtype) as gallery:
            gallery.remove(retrieval_args.remove)
            print(f"{len(set(retrieval_args.remove))} videos removed, {len(gallery)} are left.")
    accelerator.wait_for_everyone()
    if retrieval_args.index_folder:
        done = index_videos_together(
            model,
            processor,
            retrieval_args.index_folder,
            folder,
            accelerator,
            dtype=dtype,
            batch_size=args.per_device_eval_batch_size,
        )
        accelerator.print(
            f"{done.added} videos added, {done.skipped} were there, {len(done.failed)} could not be read."
        )


def search(video_search: VideoSearch, queries: list[str], retrieval_args: RetrievalArguments) -> None:
    """Print what is found in the gallery for each query: rank, score, path."""
    cleaned = [clean_caption(query) for query in queries]
    results = video_search.search(cleaned, retrieval_args.top_k, retrieval_args.rerank_k or 0)
    for query, found in zip(queries, results, strict=True):
        print(f"\n{query}")
        for rank, result in enumerate(found, start=1):
            print(f"{rank:3}. {result.score:8.3f}  {result.id}")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_warning()
    main(sys.argv[1:])
