import importlib
import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoProcessor

import transformers_testa
from transformers_testa import TestaModel, TestaProcessor
from transformers_testa.arguments import as_recipe, parse_arguments
from transformers_testa.data.sprites import digit_kinds, shape_kinds
from transformers_testa.data.stories import World, plan_story
from transformers_testa.data.storytelling import FINDING_FORMS, NAMING_FORMS, QUESTION_FORMS, ask, tell
from transformers_testa.flops import count_video_gflops


ROOT = Path(__file__).parents[1]
FOLDERS = sorted(
    path for path in (ROOT / "hub_configs").iterdir() if path.is_dir() and not path.name.endswith("-space")
)
BASE_FOLDERS = [folder for folder in FOLDERS if folder.name.startswith("testa-base")]
SCRIPTS = {
    "TestaForPreTraining": "run_pretraining",
    "TestaForRetrieval": "run_retrieval",
    "TestaForVideoQA": "run_videoqa",
}
# By architecture and number of frames; weights that two modules share count once.
PARAMETERS = {
    ("TestaForPreTraining", 8): 287_902_111,
    ("TestaForRetrieval", 32): 258_930_947,
    ("TestaForRetrieval", 96): 258_980_099,
    ("TestaForVideoQA", 32): 396_416_828,
    ("TestaForVideoQA", 96): 396_465_980,
}
GFLOPS = {8: 195.85, 32: 419.8, 96: 1381.4}  # by number of frames; those with aggregation are the paper's

every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
every_base_folder = pytest.mark.parametrize("folder", BASE_FOLDERS, ids=lambda folder: folder.name)


@every_folder
def test_auto_classes_load_every_repository(folder):
    config = AutoConfig.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is TestaProcessor
    assert processor.video_processor.num_frames == config.video_config.num_frames
    assert dict(processor.video_processor.size)["height"] == config.video_config.image_size
    tokenizer, text_config = processor.tokenizer, config.text_config
    assert len(tokenizer) == text_config.vocab_size
    assert tokenizer.model_max_length <= text_config.max_position_embeddings
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[DEC]", "[ENC]", "[SEP]"]) == [
        text_config.pad_token_id,
        text_config.bos_token_id,
        text_config.enc_token_id,
        text_config.sep_token_id,
    ]
    assert tokenizer.decode([text_config.bos_token_id, text_config.enc_token_id], skip_special_tokens=True) == ""
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)) is TestaModel


def test_base_repositories_read_text_as_bert_does():
    tokenizer = AutoProcessor.from_pretrained(BASE_FOLDERS[0]).tokenizer
    assert tokenizer("hello world")["input_ids"] == [101, 7592, 2088, 102]
    assert tokenizer("Hello, WORLD! Café.")["input_ids"] == [101, 7592, 1010, 2088, 999, 7668, 1012, 102]
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[DEC]", "[ENC]"]) == [0, 30522, 30523]
    assert tokenizer.decode([30522, 7592, 2088, 102], skip_special_tokens=True) == "hello world"


def test_base_repositories_hold_the_same_tokenizer():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert len({(folder / name).read_bytes() for folder in BASE_FOLDERS}) == 1


@every_base_folder
def test_base_models_have_the_size_and_cost_of_the_released_ones(folder):
    config = AutoConfig.from_pretrained(folder)
    (architecture,), num_frames = config.architectures, config.video_config.num_frames
    with torch.device("meta"):
        model = getattr(transformers_testa, architecture)(config)
    assert model.num_parameters() == PARAMETERS[architecture, num_frames]
    assert count_video_gflops(config.video_config) == pytest.approx(GFLOPS[num_frames], rel=0.005)


@every_base_folder
def test_base_models_differ_in_frames_merges_and_heads_only(folder):
    config, start = (
        json.loads((place / "config.json").read_text("utf-8")) for place in (folder, folder.with_name("testa-base"))
    )
    del config["architectures"], start["architectures"]
    for name in ("num_frames", "merged_frames_per_layer", "merged_patches_per_layer", "use_temporal_scaling"):
        del config["video_config"][name], start["video_config"][name]
    assert config == start


@every_base_folder
def test_a_recipe_trains_the_model_of_its_repository(folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    video_config = AutoConfig.from_pretrained(folder).video_config
    assert recipe["num_frames"] == video_config.num_frames
    assert recipe.get("merged_frames_per_layer", 0) == video_config.merged_frames_per_layer
    assert recipe.get("merged_patches_per_layer", 0) == video_config.merged_patches_per_layer
    assert recipe["output_dir"] == f"runs/{folder.name}"


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "hub_configs").rglob("recipe*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}"
)
def test_the_command_above_a_recipe_is_one_that_its_script_understands(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    commands = re.findall(r"^# (?:python|accelerate launch) (\w+)\.py (.+)$", recipe.read_text("utf-8"), re.MULTILINE)
    commands = {arguments.split()[0]: (script, shlex.split(arguments)) for script, arguments in commands}
    script, arguments = commands[recipe.relative_to(ROOT).as_posix()]
    (architecture,) = AutoConfig.from_pretrained(recipe.parent).architectures
    assert script == SCRIPTS[architecture] or recipe.parent.name == "testa-demo"  # which has recipes for all scripts
    parsed = as_recipe(*parse_arguments(importlib.import_module(script).ARGUMENT_CLASSES, arguments))
    assert parsed["do_train"] and parsed["output_dir"]


@every_base_folder
def test_a_model_card_claims_no_measurement_of_the_papers_figures(folder):
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["license"], data["language"]) == ("transformers", "apache-2.0", "en")
    assert data["pipeline_tag"] == "video-text-to-text"
    assert "model-index" not in data
    assert "not measured with this package" in " ".join(card.text.split())
    gflops = count_video_gflops(AutoConfig.from_pretrained(folder).video_config)
    assert f"costs {gflops:.1f} GFLOPs" in card.text


@every_base_folder
def test_the_code_of_a_model_card_uses_its_repository_and_names_that_exist(folder):
    text = (folder / "README.md").read_text("utf-8")
    (architecture,) = AutoConfig.from_pretrained(folder).architectures
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for program in programs:
        compile(program, folder.name, "exec")
        exec("\n".join(line for line in program.splitlines() if line.startswith("from ")), {})
        assert set(re.findall(r'"(?:hub_configs/)?(testa-base[\w-]*)"', program)) == {folder.name}
    assert architecture == "TestaForPreTraining" or f"{architecture}.from_pretrained" in programs[0]


def test_the_demo_knows_every_word_of_its_world():
    tokenizer = AutoProcessor.from_pretrained(ROOT / "hub_configs" / "testa-demo").tokenizer
    world = World(kinds=shape_kinds() + digit_kinds("test"))
    for seed in range(200):
        rng = random.Random(seed)
        story = plan_story(world, rng)
        asked = [
            question for forms in (QUESTION_FORMS, FINDING_FORMS, NAMING_FORMS) for question in ask(story, rng, forms)
        ]
        texts = [tell(story, rng), *(text for question in asked for text in (question.question, question.answer))]
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert len(ids) <= tokenizer.model_max_length
