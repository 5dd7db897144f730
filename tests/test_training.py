import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from retrieval_world import tiny_config, tiny_processor, write_stories
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel

from transformers_testa import TestaForRetrieval, TestaForVideoQA, TestaVideoModel
from transformers_testa.arguments import (
    DataArguments,
    ModelArguments,
    ObjectiveArguments,
    TrainingArguments,
    as_recipe,
    parse_arguments,
)
from transformers_testa.data.annotations import load_annotations
from transformers_testa.data.datasets import VideoTextDataset, collate_training_samples
from transformers_testa.data.sampling import EpochBatchSampler
from transformers_testa.flops import count_video_gflops
from transformers_testa.initialization import imitate_trained_attention
from transformers_testa.muon import Float32Muon, orthogonalise
from transformers_testa.reporting import write_model_card
from transformers_testa.training import (
    Checkpoints,
    Progress,
    build_model,
    create_accelerator,
    create_objective,
    create_optimizers,
    create_scheduler,
    join_sources,
    run_identity,
    train,
)


@dataclass
class GreetingArguments:
    free: ClassVar[tuple[str, ...]] = ("greeting",)

    greeting: str = "hello"
    names: list[str] | None = None


CLASSES = (GreetingArguments, TrainingArguments)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


# --- Recipes -----------------------------------------------------------------------------------------------------------


def test_the_command_line_overrides_the_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "learning_rate: 2e-5\nseed: 7\nnames: [ann, bob]\ndo_train: true\noutput_dir: o\n"
    )
    greeting, training = parse_arguments(CLASSES, [str(tmp_path / "recipe.yaml"), "--seed", "8", "--greeting", "hi"])
    assert (training.learning_rate, training.seed, training.do_train) == (2e-5, 8, True)
    assert training.mixed_precision == "no"
    assert (greeting.greeting, greeting.names) == ("hi", ["ann", "bob"])


@pytest.mark.skipif(
    torch.cuda.is_available() or not Path("/proc/cpuinfo").is_file(), reason="reads what Linux says of the CPU"
)
def test_automatic_precision_takes_bf16_where_the_cpu_has_instructions_for_it():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = "bf16" if flags & {"amx_bf16", "avx512_bf16", "bf16", "svebf16"} else "no"
    assert TrainingArguments(mixed_precision="auto").mixed_precision == expected


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(ValueError, match="model_name_or_path is 'runs/absent', which is no folder"):
        build_model(TestaForRetrieval, ModelArguments(model_name_or_path="runs/absent"), DataArguments())


def test_new_weights_and_time_embeddings_are_as_the_arguments_say(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    model_args = ModelArguments(config_name=str(tmp_path), initializer_range=0.5, time_embeddings=9)
    model, processor = build_model(TestaForRetrieval, model_args, DataArguments(num_frames=3))
    assert processor.video_processor.num_frames == 3
    assert model.testa.video_model.embeddings.time_embeddings.shape[1] == 9
    assert model.video_projection.weight.std().item() == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ValueError, match=r"initializer_range is 0.5, but .* has its weights"):
        ModelArguments(model_name_or_path=str(tmp_path), initializer_range=0.5)


def test_a_new_text_encoder_starts_from_bert_where_one_is_named(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    bert = BertModel(BertConfig(**{name: getattr(config.text_config, name) for name in sizes}))
    bert.save_pretrained(tmp_path / "bert")
    model_args = ModelArguments(config_name=str(tmp_path), init_text_from_bert=str(tmp_path / "bert"))
    model, _ = build_model(TestaForRetrieval, model_args, DataArguments())
    words = model.testa.text_model.embeddings.word_embeddings.weight
    torch.testing.assert_close(words, bert.embeddings.word_embeddings.weight)


def test_a_written_recipe_gives_the_same_arguments(tmp_path):
    arguments = (
        GreetingArguments(names=["ann"]),
        TrainingArguments(output_dir="o", do_train=True, learning_rate=3e-7, warmup_steps=0),
    )
    write_model_card(tmp_path, "title", "", "", {}, as_recipe(*arguments), ModelCardData())
    assert parse_arguments(CLASSES, [str(tmp_path / "recipe.yaml")]) == arguments


@pytest.mark.parametrize(
    ("recipe", "command_line", "message"),
    [
        (
            "learning_rat: 1",
            [],
            r"recipe.yaml has `learning_rat`, which is no argument; did you mean `learning_rate`\?",
        ),
        ("seed: 1", ["--learning-rat", "1"], r"command line has `learning-rat`.*did you mean `learning_rate`\?"),
        ("seed: 1", ["--seed", "2", "--seed", "3"], "command line has --seed 2 times; give all its values after one"),
        ("seed: 1", ["--num-workers=2", "--num_workers", "3"], "command line has --num_workers 2 times"),
        ("seed: 1", ["stray"], "'stray', which belongs to no argument"),
        ("- seed", [], "must be a mapping"),
        ("seed: [", [], "can't be read"),
        ("per_device_train_batch_size: 0", [], "per_device_train_batch_size is 0; at least 1"),
        ("num_train_epochs: 0", [], "num_train_epochs is 0; at least 1"),
        ("warmup_ratio: 2", [], "warmup_ratio is 2.0; a share"),
        ("do_train: true", [], "output_dir"),
    ],
)
def test_a_mistake_in_the_arguments_is_named(tmp_path, recipe, command_line, message):
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(ValueError, match=message):
        parse_arguments(CLASSES, [str(tmp_path / "recipe.yaml"), *command_line])


@pytest.mark.parametrize(
    ("command_line", "replaced", "expected"),
    [
        ("--keep_ratio 0.4", {"merged_frames_per_layer": None, "merged_patches_per_layer": None}, 0.4),
        ("--max_gflops=900", {"merged_frames_per_layer": None, "merged_patches_per_layer": None}, 900),
        ("--num-train-epochs 3", {"max_train_steps": None}, 3),
        ("--warmup_ratio 0.2", {"warmup_steps": None}, 0.2),
        ("--model_name_or_path mine", {"config_name": None, "mimetic_initialization": False}, "mine"),
        ("--test_file mine.jsonl", {"dataset_name": None, "data_dir": None}, ["mine.jsonl"]),
        ("--dataset_name owner/name", {"data_dir": None, "train_file": None}, ["owner/name"]),
    ],
)
def test_an_argument_takes_the_place_of_what_excludes_it_in_the_recipe(tmp_path, command_line, replaced, expected):
    (tmp_path / "recipe.yaml").write_text(
        "config_name: new\nmimetic_initialization: true\nmerged_frames_per_layer: 4\nmerged_patches_per_layer: [8, 4]\n"
        "dataset_name: queryd\ndata_dir: QUERYD\nmax_train_steps: 7\nwarmup_steps: 2\noptimizer: muon\n"
    )
    classes = (ModelArguments, DataArguments, TrainingArguments)
    parsed = parse_arguments(classes, [str(tmp_path / "recipe.yaml"), *command_line.split()])
    arguments = as_recipe(*parsed)
    assert replaced.items() <= arguments.items()
    assert arguments[command_line[2:].replace("-", "_").replace("=", " ").split()[0]] == expected
    assert arguments["optimizer"] == "muon"


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("--keep_ratio 0.4 --merged_frames_per_layer 1", "either merged_frames_per_layer or keep_ratio"),
        ("--dataset_name owner/name --test_file mine.jsonl", "either dataset_name or test_file"),
        ("--model_name_or_path mine --config_name new", "either model_name_or_path"),
        (
            "--dataset_name didemo --data_dir DIDEMO --columns text=caption",
            "columns is for files and data sets of the Hub",
        ),
        ("--dataset_config_name large --train_file mine.jsonl", "for data sets of the Hub; .* it is not given"),
    ],
)
def test_arguments_of_a_command_line_that_do_not_go_together_are_named(tmp_path, command_line, message):
    (tmp_path / "recipe.yaml").write_text("config_name: new\nkeep_ratio: 0.5\n")
    with pytest.raises(ValueError, match=message):
        parse_arguments((ModelArguments, DataArguments), [str(tmp_path / "recipe.yaml"), *command_line.split()])


def test_what_belongs_to_a_teacher_needs_one():
    with pytest.raises(ValueError, match="queue_size is 64, and there is no teacher: it needs momentum"):
        ObjectiveArguments(queue_size=64)


def test_a_value_of_the_wrong_type_is_named(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("seed: tomorrow")
    with pytest.raises(SystemExit):
        parse_arguments(CLASSES, [str(tmp_path / "recipe.yaml")])
    assert "argument --seed: invalid int value: 'tomorrow'" in capsys.readouterr().err


# --- The model ---------------------------------------------------------------------------------------------------------


def test_a_budget_chooses_merges_for_the_frames_of_the_run_and_tells_them(tmp_path, caplog):
    TestaForRetrieval(tiny_config(num_hidden_layers=3)).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    caplog.set_level("INFO", logger="transformers_testa")
    model_args = ModelArguments(model_name_or_path=str(tmp_path), keep_ratio=0.7, merge_schedule="decreasing")
    model, _ = build_model(TestaForRetrieval, model_args, DataArguments(num_frames=12))
    config = model.config.video_config
    unmerged = count_video_gflops(config, num_frames=12, merges=([0] * 3, [0] * 3))
    assert 0.6 * unmerged < count_video_gflops(config) <= 0.7 * unmerged
    assert (
        f"Blocks merge {config.merged_frames} frames and {config.merged_patches} patches of each frame" in caplog.text
    )
    assert model.get_video_features(torch.zeros(1, 12, 3, 32, 32)).last_hidden_state.shape[1] < 12 * 4


def test_attention_begins_like_that_of_trained_models():
    torch.manual_seed(0)
    config = tiny_config(image_size=32, patch_size=8, hidden_size=32, num_attention_heads=2)
    model = TestaVideoModel(config.video_config)
    imitate_trained_attention(model)
    attention = model.layers[0].spatial.attention
    query, key, value = attention.qkv.weight.view(3, 2, 16, 32).unbind()
    similarities = query.mT @ key
    assert (similarities.diagonal(dim1=1, dim2=2).mean(1) > 0.3).all()
    assert (attention.proj.weight @ value.flatten(0, 1)).diagonal().mean() < -0.3
    patches = model.embeddings.position_embeddings[0, 1:]
    distances = torch.cdist(patches, patches)
    assert distances[0, 1] < distances[0, 2] < distances[0, 3] and distances[0, 4] < distances[0, 8] < distances[0, 12]


def test_merges_are_one_number_or_one_a_block(tmp_path):
    TestaForRetrieval(tiny_config(num_hidden_layers=3)).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    merges = ["--merged_frames_per_layer", "1", "--merged_patches_per_layer", "2", "0", "1"]
    (model_args,) = parse_arguments((ModelArguments,), ["--model_name_or_path", str(tmp_path), *merges])
    model, _ = build_model(TestaForRetrieval, model_args, DataArguments(num_frames=6))
    assert model.config.video_config.merged_frames == [1, 1, 1]
    assert model.config.video_config.merged_patches == [2, 0, 1]


def test_trained_weights_merge_and_attend_as_the_command_line_says(tmp_path):
    trained = TestaForRetrieval(tiny_config(num_frames=4, merged_frames_per_layer=0, use_temporal_scaling=True))
    trained.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)

    def build(*options):
        (model_args,) = parse_arguments((ModelArguments,), ["--model_name_or_path", str(tmp_path), *options])
        model, _ = build_model(TestaForRetrieval, model_args, DataArguments())
        return model.testa.video_model

    strategy = ("--aggregation_strategy", "importance", "--proportional_attention", "true")
    encoder = build("--merged_frames_per_layer", "1", "--frame_matching", "vote", *strategy)
    config = encoder.config
    assert (config.aggregation_strategy, config.frame_matching) == ("importance", "vote")
    assert config.proportional_attention and not config.use_temporal_scaling
    joint = build("--attention_type", "joint_space_time", "--merged_patches_per_layer", "3")
    pixels = torch.randn(2, 4, 3, 32, 32)
    assert joint(pixels).last_hidden_state.shape[1] < 1 + joint.config.num_patches * 4
    own = trained.testa.video_model.layers[0]
    for built in (encoder.layers[0], joint.layers[0]):
        assert built.spatial.attention.qkv.weight.equal(own.spatial.attention.qkv.weight)
    with pytest.raises(ValueError, match="it needs aggregation_strategy='geometry', not 'prune'"):
        build("--aggregation_strategy", "prune", "--frame_matching", "consecutive")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0.5, "merged_patches_per_layer": 3}, "either merged_patches_per_layer or keep_ratio"),
        (
            {"mimetic_initialization": True, "init_from_blip": "blip.pth"},
            "mimetic_initialization is for new weights: it needs config_name, and no init_from_blip",
        ),
        (
            {"init_text_from_bert": "MiniLM", "init_from_blip": "blip.pth"},
            "init_text_from_bert is for new weights: it needs config_name, and no init_from_blip",
        ),
        ({"merge_schedule": "increasing"}, "merge_schedule is 'increasing'; it needs keep_ratio or max_gflops"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(config_name="folder", **settings)


# --- Optimiser and schedule --------------------------------------------------------------------------------------------


def test_biases_norms_embeddings_and_scalars_are_not_decayed():
    model = TestaForRetrieval(tiny_config())
    (optimizer,) = create_optimizers(model, TrainingArguments(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert decayed | free == set(names.values()) and not decayed & free
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert {"video_projection.weight", "matching_head.weight"} <= decayed
    assert not any("position_embeddings" in name or "word_embeddings" in name for name in decayed)
    assert {"temperature", "video_projection.bias"} <= free


def test_muon_in_float32_goes_where_that_of_pytorch_goes():
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in [(12, 30), (30, 12), (16, 16), (12, 30)]]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.3}
    optimizers = (
        Float32Muon(ours, **settings),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings),
    )
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = other.grad = torch.randn_like(one)
        for optimizer in optimizers:
            optimizer.step()
    for start, one, other in zip(starts, ours, theirs, strict=True):
        # bfloat16 keeps 8 bits of a number.
        bound = 2**-6 * (other - start).abs().max().item()
        torch.testing.assert_close(one - start, other - start, rtol=0, atol=bound)
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


def test_an_orthogonal_matrix_keeps_directions_and_loses_sizes():
    torch.manual_seed(0)
    matrix = torch.randn(10, 40) * torch.logspace(-1, 1, 10)[:, None]
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    sizes = torch.diag(left.T @ orthogonalise(matrix[None], (3.4445, -4.7750, 2.0315), steps=5, eps=1e-7)[0] @ right.T)
    assert sizes.min() > 0.6 and sizes.max() < 1.3


def test_muon_takes_the_matrices_and_adamw_all_else():
    model = TestaForVideoQA(tiny_config())
    muon, adamw = create_optimizers(model, TrainingArguments(weight_decay=0.3, optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_muon, of_adamw = (
        {names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in (muon, adamw)
    )
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw
    assert all(model.get_parameter(name).ndim == 2 for name in of_muon)
    # The decoder's last layer is the word embeddings.
    assert {name for name in of_adamw if model.get_parameter(name).ndim == 2} == {
        name for name in of_adamw if "embeddings" in name and model.get_parameter(name).ndim == 2
    }
    assert {group["weight_decay"] for group in muon.param_groups} == {0.3}


def test_the_rate_warms_up_linearly_and_falls_on_a_cosine():
    args = TrainingArguments(
        learning_rate=5e-6, warmup_start_learning_rate=1e-6, min_learning_rate=5e-7, warmup_steps=5
    )
    (optimizer,) = create_optimizers(nn.Linear(1, 1), args)
    scheduler = create_scheduler(optimizer, args, num_steps=25)
    rates = []
    for _ in range(25):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([1e-6, 2e-6, 3e-6, 4e-6, 5e-6])
    cosine = [5e-7 + 4.5e-6 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(1, 21)]
    assert rates[5:] == pytest.approx(cosine)


# --- The loop ----------------------------------------------------------------------------------------------------------


def run(
    folder, output_dir, stop_after=None, model=None, config=None, evaluate=None, best_by=None, momentum=None, **kwargs
):
    """Train a tiny model on the stories of a folder and return it with its progress and its losses."""
    defaults = {"max_train_steps": 6, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "seed": 3}
    args = TrainingArguments(**{**defaults, "output_dir": str(output_dir), "per_device_train_batch_size": 3, **kwargs})
    accelerator = create_accelerator(args)
    set_seed(args.seed)
    model = model or TestaForRetrieval(config or tiny_config(hidden_dropout_prob=0.1))
    processor = tiny_processor()
    processor.video_processor.frame_sampling = "jitter"
    dataset = VideoTextDataset(load_annotations(folder / "train.jsonl"), processor.video_processor)
    sampler = EpochBatchSampler(len(dataset), args.per_device_train_batch_size, args.seed)
    teacher = {"momentum": momentum, "queue_size": 5} if momentum else {}
    objective = create_objective(model, ObjectiveArguments(**teacher), args, sampler)
    losses = []

    def collate(samples):
        if len(losses) == stop_after:
            raise KeyboardInterrupt
        return collate_training_samples(samples, processor, max_words=16)

    hook = objective.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.item()))
    progress = train(
        *(args, accelerator, objective, dataset, sampler, collate, run_identity(model, dataset, args)),
        *(evaluate, best_by),
        smallest_batch=2,
    )
    hook.remove()
    return model, progress, losses


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return write_stories(tmp_path_factory.mktemp("stories"), num_train=8)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(stories, tmp_path, accumulation, momentum):
    kwargs = {"gradient_accumulation_steps": accumulation, "momentum": momentum}
    whole, whole_progress, whole_losses = run(stories, tmp_path / "whole", **kwargs)
    with pytest.raises(KeyboardInterrupt):
        run(stories, tmp_path / "stopped", stop_after=3 * accumulation, **kwargs)
    resumed, progress, losses = run(stories, tmp_path / "stopped", **kwargs)
    assert losses == whole_losses[2 * accumulation :]
    assert torch.equal(weights(resumed), weights(whole)) and progress == whole_progress


def test_a_finished_run_is_not_trained_again(stories, tmp_path):
    first, progress, _ = run(stories, tmp_path)
    again, same_progress, losses = run(stories, tmp_path)
    assert losses == [] and same_progress == progress and torch.equal(weights(first), weights(again))


def test_the_last_two_checkpoints_are_kept_and_nothing_half_written(stories, tmp_path):
    (tmp_path / "checkpoint-1.partial").mkdir()
    run(stories, tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_an_older_checkpoint_can_be_gone_on_from(stories, tmp_path):
    whole, _, whole_losses = run(stories, tmp_path)
    again, _, losses = run(stories, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses == whole_losses[4:] and torch.equal(weights(again), weights(whole))


def test_a_checkpoint_of_another_run_is_refused_unless_overwritten(stories, tmp_path):
    run(stories, tmp_path, max_train_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint-2 .*another run: `learning_rate` is 0.001 there and 0.01 here"):
        run(stories, tmp_path, max_train_steps=2, learning_rate=0.01)
    _, progress, losses = run(stories, tmp_path, max_train_steps=2, learning_rate=0.01, overwrite_output_dir=True)
    assert len(losses) == 2 and progress.step == 2


def test_a_checkpoint_of_another_architecture_is_refused(stories, tmp_path):
    run(stories, tmp_path, max_train_steps=2)
    with pytest.raises(ValueError, match=r"`config.video_config.num_hidden_layers` is 2 there and 1 here"):
        run(stories, tmp_path, max_train_steps=2, config=tiny_config(num_hidden_layers=1))


def test_a_folder_without_a_checkpoint_is_named(stories, tmp_path):
    with pytest.raises(ValueError, match=r"resume_from_checkpoint is .*nowhere', where no checkpoint is"):
        run(stories, tmp_path, resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_accumulated_gradients_step_once(stories, tmp_path):
    _, progress, losses = run(stories, tmp_path, max_train_steps=2, gradient_accumulation_steps=3)
    assert len(losses) == 6 and (progress.step, progress.batches) == (2, 6)


def test_the_loss_falls(stories, tmp_path):
    _, _, losses = run(
        stories, tmp_path, max_train_steps=30, per_device_train_batch_size=8, save_steps=100, learning_rate=3e-3
    )
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def evaluation(values):
    """An evaluation that gives these recalls one after the other."""
    values = iter(values)

    def evaluate(progress, moment):
        metrics = progress.results.setdefault("validation", {})[moment] = {"recall@1": next(values)}
        return metrics

    return evaluate


def test_evaluation_comes_when_asked_and_stays_in_the_checkpoint(stories, tmp_path):
    run(
        *(stories, tmp_path),
        evaluate=evaluation([1.0, 2.0, 3.0]),
        **{"best_by": "recall@1", "do_eval": True, "eval_before_training": True, "eval_steps": 4},
    )
    saved = json.loads((tmp_path / "checkpoint-6" / "progress.json").read_text())
    moments = {"before training": 1.0, "step 4": 2.0, "step 6": 3.0}
    assert saved["results"]["validation"] == {moment: {"recall@1": value} for moment, value in moments.items()}


def test_the_best_step_by_validation_is_kept_and_taken(stories, tmp_path):
    values = [5.0, 9.0, 7.0, 6.0, 8.0, 3.0]
    kwargs = {"best_by": "recall@1", "do_eval": True, "eval_steps": 1, "save_steps": 2}
    model, progress, _ = run(stories, tmp_path / "long", evaluate=evaluation(values), **kwargs)
    assert (progress.best_step, progress.best_value, progress.step) == (2, 9.0, 6)
    folders = sorted(folder.name for folder in (tmp_path / "long").iterdir())
    assert folders == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    again, _, losses = run(stories, tmp_path / "long", evaluate=evaluation([]), **kwargs)
    assert losses == [] and torch.equal(weights(model), weights(again))

    # Another run whose last step is the best one has the weights of step 6, not of step 2.
    last, progress, _ = run(stories, tmp_path / "other", evaluate=evaluation(range(6)), **kwargs)
    assert progress.best_step == 6 and not torch.equal(weights(last), weights(model))


def test_losses_are_recorded_by_step(stories, tmp_path):
    _, progress, losses = run(stories, tmp_path, logging_steps=3, save_steps=6)
    assert list(progress.losses) == ["3", "6"]
    assert progress.losses["3"]["loss"] == pytest.approx(sum(losses[:3]) / 3)
    assert set(progress.losses["6"]) == {"loss", "loss_vtc", "loss_vtm"}


def test_a_teacher_follows_the_model_and_stays_out_of_what_is_published(stories, tmp_path):
    model, _, _ = run(stories, tmp_path, momentum=0.9)
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"model", "teacher", "queue", "step"}
    assert saved["step"] == 6 and saved["queue.pair_ids"].min() >= 0
    projection = "video_projection.weight"
    assert not torch.equal(saved[f"teacher.{projection}"], saved[f"model.{projection}"])
    model.save_pretrained(tmp_path / "published")
    published = load_file(tmp_path / "published" / "model.safetensors")
    assert not any("teacher" in name or "queue" in name for name in published)


def test_a_queue_shorter_than_the_batch_is_refused(stories, tmp_path):
    with pytest.raises(ValueError, match="queue_size is 5; at least a batch over all processes is needed: 8"):
        run(stories, tmp_path, momentum=0.9, per_device_train_batch_size=8)


def test_broken_videos_are_left_out_and_the_steps_made_up(tmp_path):
    folder = write_stories(tmp_path, num_train=6)
    for number in range(3):
        (folder / "videos" / f"train-{number}.mp4").write_bytes(b"broken")
    _, progress, losses = run(folder, tmp_path / "out", max_train_steps=4, per_device_train_batch_size=3)
    assert progress.step == len(losses) == 4 <= progress.batches
    assert len(progress.broken_videos) == 3


def test_a_training_set_of_broken_videos_is_an_error(tmp_path):
    folder = write_stories(tmp_path, num_train=6)
    for video in (folder / "videos").glob("train-*"):
        video.write_bytes(b"broken")
    with pytest.raises(ValueError, match="No batch of the training set has 2 or more videos"):
        run(folder, tmp_path / "out")


def test_a_loss_that_is_no_number_stops_the_run(stories, tmp_path):
    model = TestaForRetrieval(tiny_config())
    nn.init.constant_(model.matching_head.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 1"):
        run(stories, tmp_path, model=model)


def test_bf16_training_keeps_float32_weights(stories, tmp_path):
    model, _, losses = run(stories, tmp_path, max_train_steps=2, mixed_precision="bf16", gradient_checkpointing=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and all(map(math.isfinite, losses))


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(ValueError, match="report_to is 'notebook'; installed are"):
        create_accelerator(TrainingArguments(report_to="notebook", output_dir=str(tmp_path)))


# --- Checkpoints and model cards ---------------------------------------------------------------------------------------


def test_progress_survives_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(create_accelerator(TrainingArguments()), tmp_path, {})
    progress = Progress(step=12, batches=15, results={"test": {"step 3": {"recall@1": 2.0}}})
    progress.broken_videos["a.mp4"] = "no video stream"
    checkpoints.save(progress)
    assert checkpoints.load(checkpoints.find()) == progress


def test_a_model_card_can_be_read_back(tmp_path):
    metadata = ModelCardData(library_name="transformers", tags=["testa"])
    write_model_card(tmp_path, "A model", "What for.", "| a |", {"split": "test, 4 texts"}, {"seed": 1}, metadata)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["testa"]
    assert all(part in card.text for part in ("# A model", "What for.", "| a |", "- split: test, 4 texts", "seed: 1"))


def test_sources_may_share_clips_and_no_id_of_two(tmp_path):
    def source(**columns):
        row = {"video": "a.mp4", "video_id": "a", "text": "a dog", "start": None, "end": None}
        return Dataset.from_list([row, row | {"video_id": "b"} | columns])

    assert len(join_sources([source(), source(text="a cat")])) == 4
    assert len(join_sources([source(start=1.0, end=2.0), source(start=1.0, end=2.0)])) == 4
    with pytest.raises(
        ValueError, match=r"source 2: `video_id` 'b' stands for b.mp4 .* in source 1 for a.mp4 from None"
    ):
        join_sources([source(), source(video="b.mp4")])
    with pytest.raises(ValueError, match=r"'b' stands for a.mp4 from 1.0 to 3.0 s, .* for a.mp4 from 1.0 to 2.0 s"):
        join_sources([source(start=1.0, end=2.0), source(start=1.0, end=3.0)])


def test_frames_are_cached_in_one_way(tmp_path):
    with pytest.raises(ValueError, match="either cache_frames or cache_videos"):
        DataArguments(cache_frames=True, cache_videos=True)
