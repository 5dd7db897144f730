"""The models under the tools people already use: `transformers.Trainer`, the adapters of peft, quantized weights."""

import contextlib
import copy
import io
import json
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torchao.quantization as torchao
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, PeftModel, get_peft_model
from retrieval_world import read_rows, tiny_config, tiny_processor, write_questions, write_rows, write_stories
from torch.utils.data import DataLoader
from transformers import TorchAoConfig, Trainer, TrainingArguments

from transformers_testa import (
    TestaForCaptioning,
    TestaForMultipleChoiceVideoQA,
    TestaForRetrieval,
    TestaForVideoQA,
)
from transformers_testa.data.annotations import load_annotations
from transformers_testa.data.datasets import (
    BrokenVideos,
    VideoTextDataset,
    cache_frames,
    collate_choice_samples,
    collate_question_samples,
    collate_texts,
    collate_training_samples,
    collate_videos,
)
from transformers_testa.metrics import RetrievalMetric, VideoQAAccuracy
from transformers_testa.retrieval import evaluate_retrieval


torch.set_num_threads(1)

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "quantization.py"
VIDEO_LAYERS = ["qkv", "proj", "temporal_fc", "fc1", "fc2"]
FEW_LAYERS = ["qkv", "proj", "query", "value"]
TEXT_LAYERS = ["query", "key", "value", "output", "intermediate"]
PROCESSOR = tiny_processor()


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_stories(tmp_path_factory.mktemp("world") / "stories", num_train=8, num_validation=6)
    write_questions(folder, "train", "validation")
    # An answer of its own for each question, as a Trainer's metrics see answers one by one.
    questions = read_rows(folder / "validation_questions.jsonl")
    write_rows(folder / "validation_questions.jsonl", [row for row in questions if row["question_type"] != "any"])
    return folder


def collate_captions(samples, processor, max_words):
    batch = collate_training_samples(samples, processor, max_words)
    del batch["pair_ids"]
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


@dataclass
class Setup:
    """What a Trainer of a model needs; `label_names` only where its labels aren't called so."""

    file: str
    task: str
    collate: Callable
    label_names: list[str] | None = None


SETUPS = {
    TestaForRetrieval: Setup("", "text", partial(collate_training_samples, max_words=16), ["pair_ids"]),
    TestaForVideoQA: Setup(
        "_questions", "question", partial(collate_question_samples, max_question_tokens=16), ["answer_input_ids"]
    ),
    TestaForMultipleChoiceVideoQA: Setup(
        "_choices", "choice", partial(collate_choice_samples, max_question_tokens=16)
    ),
    TestaForCaptioning: Setup("", "text", partial(collate_captions, max_words=16)),
}


def create_model(model_class, dropout=0.1):
    torch.manual_seed(0)
    config = tiny_config()
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = dropout
    return model_class(config)


def create_trainer(model, world, output_dir, broken_videos=None, metrics=None, **settings):
    """Return a Trainer of a model, whose adapters may be all that is trained."""
    setup = SETUPS[type(model.get_base_model() if isinstance(model, PeftModel) else model)]
    broken_videos = BrokenVideos() if broken_videos is None else broken_videos

    def collate(samples):
        batch = setup.collate(samples, processor=PROCESSOR)
        broken_videos.take_from(batch)
        return batch

    splits = []
    for split in ("train", "validation"):
        table = load_annotations(world / f"{split}{setup.file}.jsonl", task=setup.task)
        frames = cache_frames(table, PROCESSOR.video_processor, world / "frames")
        splits.append(VideoTextDataset(table, PROCESSOR.video_processor, frames))
    defaults = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 2e-3}
    defaults |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(
        output_dir=output_dir,
        remove_unused_columns=False,  # the collator reads columns that the model doesn't
        label_names=setup.label_names,
        **{**defaults, **settings},
    )
    return Trainer(
        model, args, train_dataset=splits[0], eval_dataset=splits[1], data_collator=collate, **(metrics or {})
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def example(model_class):
    """A batch of two samples of the world, with new videos."""
    generator = torch.Generator().manual_seed(1)
    batch = {"pixel_values_videos": torch.randn(2, 6, 3, 32, 32, generator=generator)}
    batch["input_ids"] = torch.tensor([[2, 7, 10, 8, 11, 3], [2, 7, 12, 8, 13, 3]])
    if model_class is TestaForVideoQA:
        batch["answer_input_ids"] = torch.tensor([[2, 10, 3], [2, 12, 3]])
    return batch


def outputs_of(model, model_class):
    with torch.no_grad():
        output = model.eval()(**example(model_class))
    return output.logits if model_class is TestaForVideoQA else torch.cat([output.video_embeds, output.text_embeds])


# --- Trainer -----------------------------------------------------------------------------------------------------------


def recalls(prediction):
    video_embeds, text_embeds = prediction.predictions
    _, first_rows, video_of_text = np.unique(prediction.label_ids, return_index=True, return_inverse=True)
    return RetrievalMetric().compute(predictions=text_embeds @ video_embeds[first_rows].T, references=video_of_text)


def accuracy(prediction):
    """Answers that are likeliest word by word, each given the right words before it: generation says just the same."""
    is_word = prediction.label_ids[:, 1:] > PROCESSOR.tokenizer.pad_token_id
    answers, predicted = (
        PROCESSOR.tokenizer.batch_decode(np.where(is_word, ids, PROCESSOR.tokenizer.pad_token_id))
        for ids in (prediction.label_ids[:, 1:], prediction.predictions[:, :-1])
    )
    return VideoQAAccuracy().compute(predictions=predicted, references=answers)


ANSWER_METRICS = {
    "compute_metrics": accuracy,
    "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(dim=-1),
}


@pytest.mark.parametrize("model_class", SETUPS)
def test_every_model_learns_under_a_trainer(model_class, world, tmp_path):
    trainer = create_trainer(create_model(model_class), world, tmp_path, max_steps=40, learning_rate=5e-3)
    trainer.train()
    losses = logged(trainer, "loss")
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_trainer_evaluates_retrieval_as_the_package_does(world, tmp_path):
    trainer = create_trainer(
        create_model(TestaForRetrieval), world, tmp_path, max_steps=6, metrics={"compute_metrics": recalls}
    )
    trainer.train()
    found = trainer.evaluate()
    table = load_annotations(world / "validation.jsonl")
    videos = DataLoader(trainer.eval_dataset, 4, collate_fn=partial(collate_videos, processor=PROCESSOR))
    texts = [{**row, "index": number} for number, row in enumerate(table)]
    texts = DataLoader(texts, 4, collate_fn=partial(collate_texts, processor=PROCESSOR, max_words=16))
    expected, _ = evaluate_retrieval(trainer.model, videos, texts, rerank_k=0)
    compared = {name for name in expected if "_to_" in name}
    assert "text_to_video_recall@1" in compared and "dual_softmax_video_to_text_mrr" in compared
    assert {name: found[f"eval_{name}"] for name in compared} == {name: expected[name] for name in compared}


def test_a_trainer_counts_the_answers_that_the_model_would_generate(world, tmp_path):
    trainer = create_trainer(
        create_model(TestaForVideoQA), world, tmp_path, max_steps=30, learning_rate=5e-3, metrics=ANSWER_METRICS
    )
    trainer.train()
    found = trainer.evaluate()["eval_accuracy"]
    answers, references = [], []
    for batch in trainer.get_eval_dataloader():
        questions = {name: batch[name] for name in ("pixel_values_videos", "input_ids", "attention_mask")}
        answers += trainer.model.generate(**questions, max_new_tokens=4)
        references += batch["answer_input_ids"]
    decode = partial(PROCESSOR.tokenizer.batch_decode, skip_special_tokens=True)
    expected = VideoQAAccuracy().compute(predictions=decode(answers), references=decode(references))
    assert found == expected["accuracy"]
    assert found > 0


# A contrastive loss, unlike these, is another one in a smaller batch.
@pytest.mark.parametrize("model_class", [TestaForVideoQA, TestaForMultipleChoiceVideoQA, TestaForCaptioning])
def test_accumulated_batches_weigh_as_one_large_batch(model_class, world, tmp_path):
    norms = []
    for steps in (1, 2):
        trainer = create_trainer(
            create_model(model_class, dropout=0.0),
            world,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=4 // steps,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        norms += logged(trainer, "grad_norm")
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("model_class", [TestaForRetrieval, TestaForVideoQA])
def test_a_resumed_trainer_ends_with_the_bits_of_one_that_went_through(model_class, world, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    through = create_trainer(create_model(model_class), world, tmp_path, **settings)
    through.train()
    resumed = create_trainer(create_model(model_class), world, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed.model, through.model)
    through.save_model(tmp_path / "saved")
    assert_same_weights(model_class.from_pretrained(tmp_path / "saved"), through.model)


def test_a_video_that_cannot_be_decoded_is_reported_and_training_goes_on(world, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    rows = [{**row, "video": str(world / row["video"])} for row in read_rows(world / "train.jsonl")]
    rows[3]["video"] = str(tmp_path / "broken.mp4")
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    broken_videos = BrokenVideos()
    trainer = create_trainer(create_model(TestaForRetrieval), tmp_path, tmp_path, broken_videos, max_steps=2)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2
    assert list(broken_videos) == [str(tmp_path / "broken.mp4")]


# --- Adapters ----------------------------------------------------------------------------------------------------------


def with_adapters(model, **settings):
    """A model with adapters on all named layers that change its outputs from the start."""
    settings = {"r": 4, "target_modules": VIDEO_LAYERS + TEXT_LAYERS, "init_lora_weights": False, **settings}
    return get_peft_model(model, LoraConfig(**settings))


@pytest.mark.parametrize("layer", VIDEO_LAYERS + TEXT_LAYERS)
@pytest.mark.parametrize("model_class", [TestaForRetrieval, TestaForVideoQA])
def test_every_named_layer_takes_adapters_that_learn(model_class, layer):
    model = with_adapters(create_model(model_class), target_modules=[layer])
    batch = example(model_class) | ({"return_loss": True} if model_class is TestaForRetrieval else {})
    model(**batch).loss.backward()
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapters and all(f".{layer}.lora_" in name for name in adapters)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapters.values())


@pytest.mark.parametrize("layers", ["all-linear", VIDEO_LAYERS + TEXT_LAYERS], ids=["all layers", "named layers"])
@pytest.mark.parametrize("model_class", [TestaForRetrieval, TestaForVideoQA])
def test_adapters_are_saved_loaded_and_merged_with_the_same_outputs(model_class, layers, tmp_path):
    create_model(model_class).save_pretrained(tmp_path / "base")
    base = model_class.from_pretrained(tmp_path / "base")
    without_adapters = outputs_of(base, model_class)
    settings = {"target_modules": layers}
    if model_class is TestaForVideoQA:  # the layer that predicts words is the table that reads them, too
        settings["exclude_modules"] = ["decoder"]
    elif layers != "all-linear":
        settings["modules_to_save"] = ["video_projection", "text_projection", "matching_head"]
    adapted = with_adapters(base, **settings)
    expected = outputs_of(adapted, model_class)
    assert not torch.allclose(without_adapters, expected, atol=1e-3)

    adapted.save_pretrained(tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapters")
    torch.testing.assert_close(outputs_of(loaded, model_class), expected)
    by_their_folder = model_class.from_pretrained(tmp_path / "adapters")
    torch.testing.assert_close(outputs_of(by_their_folder, model_class), expected)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = model_class.from_pretrained(tmp_path / "merged")
    assert merged.state_dict().keys() == create_model(model_class).state_dict().keys()
    torch.testing.assert_close(outputs_of(merged, model_class), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_class", [TestaForRetrieval, TestaForVideoQA])
def test_a_trainer_of_adapters_leaves_the_rest_as_it_was(model_class, world, tmp_path, capsys):
    adapted = with_adapters(create_model(model_class), target_modules=FEW_LAYERS, init_lora_weights=True)
    before = copy.deepcopy(adapted.state_dict())
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = create_trainer(adapted, world, tmp_path, **settings)
    trainer.train()
    changed = {name for name, weight in adapted.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}

    again = with_adapters(create_model(model_class), target_modules=FEW_LAYERS, init_lora_weights=True)
    resumed = create_trainer(again, world, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(again, adapted)

    adapted.print_trainable_parameters()
    trained, total = adapted.get_nb_trainable_parameters()
    assert 0 < trained < 0.1 * total
    assert f"trainable params: {trained:,} || all params: {total:,}" in capsys.readouterr().out


@pytest.mark.parametrize("model_class", [TestaForRetrieval, TestaForVideoQA])
def test_adapters_learn_the_same_with_gradient_checkpointing(model_class, world, tmp_path):
    models = []
    for checkpointing in (False, True):
        models.append(with_adapters(create_model(model_class)))
        trainer = create_trainer(models[-1], world, tmp_path, max_steps=2, activation_checkpointing=checkpointing)
        trainer.train()
        assert models[-1].base_model.model.is_activation_checkpointing is checkpointing
    for name, weight in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], weight, atol=1e-5, rtol=1e-4, msg=name)


# --- Quantization ------------------------------------------------------------------------------------------------------


QUANTIZATIONS = {
    "int8 weights": (torchao.Int8WeightOnlyConfig(), 0.02),
    "int8 weights and inputs": (torchao.Int8DynamicActivationInt8WeightConfig(), 0.02),
    "int4 weights": (torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32)), 0.2),
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("model_class", [TestaForRetrieval, TestaForVideoQA])
def test_a_quantized_model_gives_close_outputs(model_class, name, tmp_path):
    quantization, tolerance = QUANTIZATIONS[name]
    model = create_model(model_class)
    model.save_pretrained(tmp_path / "model")
    expected = outputs_of(model, model_class)
    quantized = model_class.from_pretrained(tmp_path / "model", quantization_config=TorchAoConfig(quantization))
    found = outputs_of(quantized, model_class)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < tolerance * expected.norm()

    quantized.save_pretrained(tmp_path / "quantized")
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("model", "quantized")]
    assert sizes[1] < 0.7 * sizes[0]
    if model_class is TestaForVideoQA:  # torchao can't read a file with a parameter of no module: the temperature
        assert torch.equal(outputs_of(model_class.from_pretrained(tmp_path / "quantized"), model_class), found)


def test_the_benchmark_compares_precisions(world, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    create_model(TestaForRetrieval).save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    main = runpy.run_path(str(BENCHMARK))["main"]
    settings = ["--model_name_or_path", str(tmp_path / "model"), "--test_file", str(world / "validation.jsonl")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([*settings, "--output", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["machine"] in printed.getvalue()
    rows = {row["precision"]: row for row in figures["results"]["rows"]}
    assert list(rows) == ["fp32", "bf16", "int8"]
    assert rows["fp32"]["MB"] > rows["bf16"]["MB"]
    assert rows["fp32"]["MB"] > rows["int8"]["MB"]
    for precision, row in rows.items():
        assert f"| {precision} | {row['MB']:.3g} | {row['seconds per video']:.3g} |" in printed.getvalue()
        assert row["re-ranked R@10"] == 100
