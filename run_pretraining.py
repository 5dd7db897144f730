"""Pre-training on videos and images with texts: contrast, matching and captioning.

    accelerate launch run_pretraining.py hub_configs/testa-base/recipe.yaml --data_dir webvid cc3m
    python run_pretraining.py hub_configs/testa-demo/recipe_pretraining.yaml

A recipe is a YAML or JSON file of arguments; arguments on the command line override it. Training goes on from the
newest checkpoint in output_dir, if there is one. Evaluation is retrieval without fine-tuning. The model that a run
leaves can be fine-tuned for every task: pass its folder as model_name_or_path to the other scripts.
"""

import sys
from functools import partial

import transformers
from accelerate.utils import set_seed

from transformers_testa import TestaForPreTraining
from transformers_testa.arguments import (
    DataArguments,
    ModelArguments,
    ObjectiveArguments,
    TrainingArguments,
    as_recipe,
    parse_arguments,
)
from transformers_testa.data.datasets import collate_training_samples
from transformers_testa.evaluation import RetrievalEvaluator
from transformers_testa.reporting import (
    describe_run,
    figures_for_hub,
    markdown_table,
    publish,
    report_results,
    retrieval_table,
    set_up_logging,
)
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


USAGE = """Pre-trained for retrieval, question answering and captioning, each of which it is to be fine-tuned for.

```bash
python run_retrieval.py --model_name_or_path {folder} --do_train --train_file train.jsonl --output_dir runs/retrieval
```"""

TASK_TYPE = "text-to-video-retrieval"
ARGUMENT_CLASSES = (ModelArguments, DataArguments, ObjectiveArguments, TrainingArguments)
Arguments = tuple[ModelArguments, DataArguments, ObjectiveArguments, TrainingArguments]


def main(command_line: list[str]) -> None:
    arguments: Arguments = parse_arguments(ARGUMENT_CLASSES, command_line)
    model_args, data_args, objective_args, args = arguments
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("Nothing to do: pass do_train, do_eval or do_predict.")
    accelerator = create_accelerator(args)
    set_up_logging(accelerator)
    set_seed(args.seed)
    model, processor = build_model(TestaForPreTraining, model_args, data_args, args.gradient_checkpointing)
    model.to(accelerator.device)
    evaluator: RetrievalEvaluator[TestaForPreTraining] = RetrievalEvaluator(
        *(accelerator, model, processor, evaluation_tables(data_args, args), data_args, args),
        rerank_k=0,
        max_tokens=data_args.max_words,
    )

    progress, moment = Progress(), "as loaded"
    if args.do_train:
        dataset, sampler = training_set(processor, data_args, args, accelerator)
        objective = create_objective(model, objective_args, args, sampler)
        accelerator.init_trackers(
            "pretraining", config={name: str(value) for name, value in as_recipe(*arguments).items()}
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
    accelerator.end_training()


def report(
    folder: str,
    evaluator: RetrievalEvaluator[TestaForPreTraining],
    progress: Progress,
    moment: str,
    arguments: Arguments,
) -> None:
    """Print the losses and results; write them and, after training, the model and its card."""
    _, data_args, _, args = arguments
    tables = losses_table(progress.losses), retrieval_table(progress.results)
    table = "\n\n".join(filter(None, tables))
    definition = describe_run(evaluator, progress, data_args, args)
    report_results(folder, table, definition, progress)
    if args.do_train:
        publish(
            folder,
            evaluator.model,
            evaluator.processor,
            title="Pre-trained TESTA",
            introduction=USAGE,
            results=table,
            definition=definition,
            recipe=as_recipe(*arguments),
            tag="pretraining",
            figures=figures_for_hub(progress.results, moment, definition["data"], TASK_TYPE, "text_to_video_recall"),
        )


def losses_table(losses: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of the first and the last mean losses, or nothing where there was no training."""
    if not losses:
        return ""
    shown = {step: losses[step] for step in (next(iter(losses)), list(losses)[-1])}
    columns = ("up to step", "contrast", "matching", "captioning")
    names = ("loss_vtc", "loss_vtm", "loss_caption")
    return markdown_table(columns, [[step, *(f"{of[name]:.3f}" for name in names)] for step, of in shown.items()])


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_warning()
    main(sys.argv[1:])
