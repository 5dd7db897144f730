"""Long-form video question answering: train a model, evaluate it.

    python run_videoqa.py hub_configs/testa-demo/recipe_videoqa.yaml
    accelerate launch run_videoqa.py recipe.yaml --learning_rate 1e-5 --output_dir runs/1e-5
    python run_videoqa.py --model_name_or_path runs/1e-5 --do_predict --test_file test_qa.jsonl --output_dir results

Open-ended questions are answered by ranking candidate answers or in free text; a table with `choices` is multiple
choice. A recipe is a YAML or JSON file of arguments; arguments on the command line override it. Training goes on from
the newest checkpoint in output_dir, if there is one.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import transformers
from accelerate.utils import set_seed
from datasets import Dataset

from transformers_testa import TestaForMultipleChoiceVideoQA, TestaForVideoQA
from transformers_testa.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    as_recipe,
    parse_arguments,
)
from transformers_testa.data.annotations import answer_candidates
from transformers_testa.data.benchmarks import BENCHMARKS, load_candidates
from transformers_testa.data.datasets import check_answers, collate_choice_samples, collate_question_samples
from transformers_testa.evaluation import QuestionEvaluator
from transformers_testa.reporting import (
    describe_run,
    figures_for_hub,
    markdown_table,
    publish,
    report_results,
    set_up_logging,
)
from transformers_testa.training import (
    Progress,
    build_model,
    create_accelerator,
    evaluation_tables,
    run_identity,
    train,
    training_set,
)


USAGE = """Answers questions about videos.

```bash
python run_videoqa.py --model_name_or_path {folder} --do_predict --test_file questions.jsonl --output_dir answers
```"""


@dataclass
class QuestionArguments:
    free: ClassVar[tuple[str, ...]] = ("answer_mode", "rank_k", "num_beams", "max_new_tokens")

    task: Literal["question", "choice"] = field(
        default="question", metadata={"help": "question: open-ended; choice: multiple choice."}
    )
    questions_per_video: int | None = field(
        default=None,
        metadata={"help": "In training, so many questions of a video share its frames; else each has its own."},
    )
    answer_mode: Literal["rank", "generate"] = field(
        default="rank", metadata={"help": "rank: choose among the candidate answers of the split; or generate."}
    )
    rank_k: int = field(
        default=128, metadata={"help": "Candidates with the likeliest first token, which are compared in full."}
    )
    num_beams: int = field(default=3, metadata={"help": "Beams of generated answers."})
    max_new_tokens: int = field(default=10, metadata={"help": "Longest generated answer."})
    max_question_tokens: int | None = field(
        default=None, metadata={"help": "Tokens kept of a question (35) or of a question and a choice (50)."}
    )
    max_answer_tokens: int = field(default=30, metadata={"help": "Tokens that an answer to learn may have."})

    def __post_init__(self) -> None:
        if self.max_question_tokens is None:
            self.max_question_tokens = 50 if self.task == "choice" else 35
        numbers = ("rank_k", "num_beams", "max_new_tokens", "max_question_tokens", "max_answer_tokens")
        for name in (*numbers, "questions_per_video"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; at least 1 is needed.")


ARGUMENT_CLASSES = (ModelArguments, DataArguments, QuestionArguments, TrainingArguments)
Arguments = tuple[ModelArguments, DataArguments, QuestionArguments, TrainingArguments]


def main(command_line: list[str]) -> None:
    arguments: Arguments = parse_arguments(ARGUMENT_CLASSES, command_line)
    model_args, data_args, question_args, args = arguments
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("Nothing to do: pass do_train, do_eval or do_predict.")
    accelerator = create_accelerator(args)
    set_up_logging(accelerator)
    set_seed(args.seed)
    is_choice = question_args.task == "choice"
    model_class = TestaForMultipleChoiceVideoQA if is_choice else TestaForVideoQA
    model, processor = build_model(model_class, model_args, data_args, args.gradient_checkpointing)
    model.to(accelerator.device)
    tables = evaluation_tables(data_args, args, question_args.task)
    is_ranked = not is_choice and question_args.answer_mode == "rank"
    evaluator = QuestionEvaluator(
        *(accelerator, model, processor, tables, data_args, args),
        max_question_tokens=question_args.max_question_tokens,
        candidates={split: candidates(data_args, split, tables[split]) for split in tables} if is_ranked else None,
        rank_k=question_args.rank_k,
        generation={"num_beams": question_args.num_beams, "max_new_tokens": question_args.max_new_tokens},
    )

    progress, moment = Progress(), "as loaded"
    if args.do_train:
        dataset, sampler = training_set(
            processor, data_args, args, accelerator, question_args.task, question_args.questions_per_video
        )
        if not is_choice:
            check_answers(dataset.table, processor.tokenizer, question_args.max_answer_tokens)
        collate = collate_choice_samples if is_choice else collate_question_samples
        accelerator.init_trackers(
            "videoqa", config={name: str(value) for name, value in as_recipe(*arguments).items()}
        )
        progress = train(
            *(args, accelerator, model, dataset, sampler),
            collate=partial(collate, processor=processor, max_question_tokens=question_args.max_question_tokens),
            identity=run_identity(model, dataset, *arguments),
            evaluate=evaluator if tables else None,
            best_by=evaluator.best_by if args.do_eval else None,
        )
        evaluator.gather_model()
        moment = "after training"
    if tables:
        evaluator(progress, moment)
    if accelerator.is_main_process and args.output_dir:
        report(args.output_dir, evaluator, progress, moment, arguments)
    accelerator.end_training()


def candidates(data_args: DataArguments, split: str, table: Dataset) -> list[str]:
    """Return the answers to choose from: those of a benchmark, or the distinct answers of a table."""
    names, folders = data_args.dataset_name or [], data_args.data_dir or []
    if len(names) == 1 and names[0] in BENCHMARKS:
        return load_candidates(names[0], folders[0], split)
    return answer_candidates(table)


def report(folder: str, evaluator: QuestionEvaluator, progress: Progress, moment: str, arguments: Arguments) -> None:
    """Print the results; write them, the answers given and, after training, the model and its card."""
    _, data_args, question_args, args = arguments
    table = results_table(progress.results)
    how = {
        "rank": f"the likeliest of a split's answers, among the {question_args.rank_k} with the likeliest first token",
        "generate": f"generated with {question_args.num_beams} beams, at most {question_args.max_new_tokens} tokens",
    }
    definition = {
        "answers": "one of the choices" if question_args.task == "choice" else how[question_args.answer_mode],
        **describe_run(evaluator, progress, data_args, args),
    }
    report_results(folder, table, definition, progress)
    evaluator.save_predictions(folder)
    if args.do_train:
        publish(
            folder,
            evaluator.model,
            evaluator.processor,
            title="TESTA for video question answering",
            introduction=USAGE,
            results=table,
            definition=definition,
            recipe=as_recipe(*arguments),
            tag="video-question-answering",
            figures=figures_for_hub(
                progress.results, moment, definition["data"], "visual-question-answering", "accuracy"
            ),
        )


def results_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a Markdown table of accuracies in percent, overall and by the type of question; empty without any."""
    shown = {
        f"{split}, {moment}": metrics
        for split, moments in results.items()
        for moment, metrics in moments.items()
        if not moment.startswith("step")
    }
    types = sorted({name for metrics in shown.values() for name in metrics if name.startswith("accuracy_")})
    columns = ("split, moment", "accuracy", *(name.removeprefix("accuracy_") for name in types))
    rows = [
        [row, *(f"{metrics[name]:.1f}" if name in metrics else "–" for name in ("accuracy", *types))]
        for row, metrics in shown.items()
    ]
    return markdown_table(columns, rows) if rows else ""


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_warning()
    main(sys.argv[1:])
