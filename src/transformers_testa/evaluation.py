"""Evaluate a model on the splits of a run: retrieval and question answering."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from transformers_testa.arguments import DataArguments, TrainingArguments
from transformers_testa.data.datasets import (
    VideoTextDataset,
    collate_choices,
    collate_questions,
    collate_texts,
    collate_videos,
    distinct_videos,
)
from transformers_testa.metrics import VideoQAAccuracy
from transformers_testa.modeling_testa import TestaForMultipleChoiceVideoQA, TestaForVideoQA
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.retrieval import RetrievalDetails, RetrievalModel, evaluate_retrieval, inference
from transformers_testa.training import Progress, create_loader, video_dataset, whole_model


Model = TypeVar("Model", bound=nn.Module)
Retriever = TypeVar("Retriever", bound=RetrievalModel)


class Evaluator(ABC, Generic[Model]):
    """Evaluates a model on some splits and writes the metrics into the progress of a run.

    Subclasses say in `loaders_of` and `metrics_of` what is read and measured.

    Args:
        accelerator: Splits the work over the processes.
        model: What is evaluated.
        processor: Its processor.
        tables: Annotation table of each split; the first is that of validation during training.
        data_args: What is taken of videos and texts.
        args: Batch size and workers.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Model,
        processor: TestaProcessor,
        tables: dict[str, Dataset],
        data_args: DataArguments,
        args: TrainingArguments,
    ):
        self.accelerator, self.trained_model, self.processor = accelerator, model, processor
        self.model = model
        self.tables, self.data_args, self.args = tables, data_args, args
        self.loaders = {split: self.loaders_of(table) for split, table in tables.items()}

    def __call__(self, progress: Progress, moment: str) -> dict[str, float]:
        """Evaluate on all splits, or in the middle of training on the first, and return the first one's metrics."""
        self.gather_model()
        splits = list(self.tables)
        for split in splits[:1] if moment.startswith("step") else splits:
            with self.accelerator.autocast():
                metrics = self.metrics_of(split, progress)
            progress.results.setdefault(split, {})[moment] = metrics
        return progress.results[splits[0]][moment]

    def gather_model(self) -> None:
        """Let `model` be whole, with the weights of now. All processes have to call this together."""
        self.model = whole_model(self.trained_model)

    @abstractmethod
    def loaders_of(self, table: Dataset) -> tuple[DataLoader, ...]:
        """Return the loaders that the metrics of a split are computed from."""

    @abstractmethod
    def metrics_of(self, split: str, progress: Progress) -> dict[str, float]:
        """Compute the metrics of a split; videos that can't be decoded go into the progress."""

    def create_loader(
        self, dataset: Any, collate: Callable, num_workers: int, rows_per_sample: int = 1, **collate_settings: Any
    ) -> DataLoader:
        """Return a loader whose batches are split over the processes."""
        samples = self.args.per_device_eval_batch_size // rows_per_sample
        return self.accelerator.prepare(
            create_loader(
                dataset,
                partial(collate, processor=self.processor, **collate_settings),
                num_workers,
                batch_size=samples * self.accelerator.num_processes,
            )
        )

    def video_dataset(self, table: Dataset, questions_per_video: int | None = None) -> VideoTextDataset:
        """Return the data set of a table, sampled as in use."""
        return video_dataset(
            *(table, self.processor.video_processor, self.data_args, self.args, self.accelerator),
            questions_per_video=questions_per_video,
        )


class RetrievalEvaluator(Evaluator[Retriever]):
    """Recall of videos by text and of texts by video.

    Args:
        rerank_k: Candidates of each query that the matching head reads; 0: no re-ranking.
        max_tokens: Tokens kept of a text; all where None.
    """

    def __init__(self, *args: Any, rerank_k: int, max_tokens: int | None):
        self.rerank_k, self.max_tokens = rerank_k, max_tokens
        self.details: dict[str, RetrievalDetails] = {}
        super().__init__(*args)

    @property
    def best_by(self) -> str:
        """The metric by which the paper chooses the best epoch."""
        return f"{'reranked_' if self.rerank_k else ''}text_to_video_mean_recall"

    def loaders_of(self, table: Dataset) -> tuple[DataLoader, DataLoader]:
        texts = [{**row, "index": number} for number, row in enumerate(table)]
        return (
            self.create_loader(self.video_dataset(distinct_videos(table)), collate_videos, self.args.num_workers),
            self.create_loader(texts, collate_texts, 0, max_words=self.max_tokens),
        )

    def metrics_of(self, split: str, progress: Progress) -> dict[str, float]:
        videos, texts = self.loaders[split]
        metrics, self.details[split] = evaluate_retrieval(
            self.model,
            progress.broken_videos.filter(videos),
            texts,
            rerank_k=self.rerank_k,
            accelerator=self.accelerator,
        )
        return metrics


class QuestionEvaluator(Evaluator[TestaForVideoQA | TestaForMultipleChoiceVideoQA]):
    """Accuracy of answers, overall and by the type of question.

    Args:
        max_question_tokens: Tokens kept of a question, or of a question and a choice; all where None.
        candidates: Answers to choose from, by split; None where answers are generated or chosen from a row's choices.
        rank_k: Candidates with the likeliest first token, whose full probabilities are compared.
        generation: Arguments of `generate`, where answers are generated.
    """

    best_by = "accuracy"

    def __init__(
        self,
        *args: Any,
        max_question_tokens: int | None,
        candidates: dict[str, list[str]] | None = None,
        rank_k: int = 128,
        generation: dict[str, Any] | None = None,
    ):
        self.max_question_tokens, self.candidates, self.rank_k = max_question_tokens, candidates, rank_k
        self.generation = generation or {}
        self.predictions: dict[str, list[dict[str, Any]]] = {}
        super().__init__(*args)

    def loaders_of(self, table: Dataset) -> tuple[DataLoader]:
        collate = collate_choices if "choices" in table.column_names else collate_questions
        # A video with fewer questions repeats some, whose answers are the same; one with more is encoded again.
        mean = math.ceil(len(table) / len(set(table["video_id"][:])))
        questions_per_video = min(mean, self.args.per_device_eval_batch_size)
        return (
            self.create_loader(
                self.video_dataset(table, questions_per_video),
                collate,
                self.args.num_workers,
                rows_per_sample=questions_per_video,
                max_question_tokens=self.max_question_tokens,
            ),
        )

    def metrics_of(self, split: str, progress: Progress) -> dict[str, float]:
        table, (loader,) = self.tables[split], self.loaders[split]
        answers = self.answer_all(loader, self._answer_function(split), progress)
        if not answers:
            raise ValueError(f"None of the {len(table)} questions of the {split} split has a video to look at.")
        self.predictions[split] = [
            {
                "question_id": row["question_id"],
                "question": row["question"],
                "question_type": row.get("question_type"),
                **_truth_and_prediction(row, answer),
            }
            for row, answer in zip(table.select(list(answers)), answers.values(), strict=True)
        ]
        columns = {name: [row[name] for row in self.predictions[split]] for name in self.predictions[split][0]}
        types = columns["question_type"] if "question_type" in table.column_names else None
        accuracies = VideoQAAccuracy().compute(
            predictions=columns["predicted"], references=columns["answers"], question_types=types
        )
        return {**accuracies, "questions_without_video": len(table) - len(answers)}

    def answer_all(self, loader: DataLoader, answer: Callable[..., list], progress: Progress) -> dict[int, Any]:
        """Return the answers of all processes by the number of the question's row, in order."""
        own: list[tuple[int, Any]] = []
        batches = tqdm(loader, desc="Answering", disable=not self.accelerator.is_main_process, leave=False)
        with inference(self.model):
            for batch in progress.broken_videos.filter(batches):
                rows = batch.pop("index")
                del batch["question_id"]
                own += zip(rows, answer(**batch), strict=True)
        # The copies that the data set and a distributed sampler add have the number of their original.
        return dict(sorted(gather_object(own)))

    def _answer_function(self, split: str) -> Callable[..., list]:
        if "choices" in self.tables[split].column_names:
            return self.choose
        if self.candidates is None:
            return self.generate
        return partial(self.rank, self.candidates[split], self._tokenize(self.candidates[split]))

    def rank(self, candidates: list[str], tokens: dict[str, torch.Tensor], **batch: torch.Tensor) -> list[str]:
        """Answer with the likeliest of the candidates."""
        assert isinstance(self.model, TestaForVideoQA)
        chosen = self.model.rank_answers(**batch, **tokens, top_k=self.rank_k)
        return [candidates[number] for number in chosen.tolist()]

    def generate(self, **batch: torch.Tensor) -> list[str]:
        """Answer in free text."""
        assert isinstance(self.model, TestaForVideoQA)
        ids = self.model.generate(**batch, **self.generation)
        return self.processor.tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)  # without [DEC]

    def choose(self, **batch: torch.Tensor) -> list[int]:
        """Answer with the number of a choice."""
        return self.model(**batch).logits.argmax(dim=1).tolist()

    def _tokenize(self, answers: list[str]) -> dict[str, torch.Tensor]:
        encoded = self.processor.tokenizer(answers, padding=True, return_tensors="pt").to(self.accelerator.device)
        return {f"answer_{name}": encoded[name] for name in ("input_ids", "attention_mask")}

    def save_predictions(self, folder: str | Path) -> None:
        """Write `predictions_<split>.jsonl`: what was asked, accepted and answered."""
        for split, rows in self.predictions.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(folder, f"predictions_{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _truth_and_prediction(row: dict, answer: str | int) -> dict[str, Any]:
    """The accepted answers and the given one, in words."""
    if "choices" in row:
        return {"answers": [row["choices"][row["label"]]], "predicted": row["choices"][answer]}
    return {"answers": row["answers"], "predicted": answer}
