import inspect
import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from hub_server import hub_server
from retrieval_world import tiny_config, tiny_processor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    BertConfig,
    BertModel,
)
from video_files import write_video

import transformers_testa
from transformers_testa import (
    TestaConfig,
    TestaForRetrieval,
    TestaForVideoQA,
    TestaModel,
    TestaProcessor,
    TestaTextModel,
    TestaVideoModel,
    TestaVideoProcessor,
)
from transformers_testa.hub import AUTO_CLASSES, add_code, export_folder


ARCHITECTURES = [
    "TestaModel",
    "TestaForRetrieval",
    "TestaForPreTraining",
    "TestaForVideoQA",
    "TestaForMultipleChoiceVideoQA",
    "TestaForCaptioning",
]
CODE = {
    "aggregation_testa.py",
    "budgets.py",
    "configuration_testa.py",
    "flops.py",
    "modeling_testa.py",
    "objectives.py",
    "processing_testa.py",
    "video_decoding_testa.py",
    "video_processing_testa.py",
}
SAVED = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(python: str | Path, program: str, *arguments: object, **environment: str):
    # What the interpreter of the tests has on its path is no part of another environment.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(argument) for argument in (python, "-c", program, *arguments)]
    result = subprocess.run(command, env=inherited | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- Auto classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", AUTO_CLASSES)
def test_every_auto_class_knows_the_models_of_a_configuration(config_class):
    assert type(AutoConfig.for_model(config_class.model_type)) is config_class
    for name, registered in AUTO_CLASSES[config_class].items():
        if name.startswith("AutoModel"):
            with torch.device("meta"):
                assert type(getattr(transformers, name).from_config(config_class())) is registered


def test_an_auto_class_gives_its_own_model_whatever_the_checkpoint_was_saved_from(tmp_path):
    """As for every model of the library, the auto class decides, not the architecture that the checkpoint names."""
    TestaForRetrieval(tiny_config()).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is TestaModel
    assert type(AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path)) is TestaForVideoQA


def test_auto_classes_load_each_part_of_a_processor(tmp_path):
    processor = tiny_processor()
    TestaModel(tiny_config()).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)
    assert AutoVideoProcessor.from_pretrained(tmp_path).to_dict() == processor.video_processor.to_dict()
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()


# --- Without this package --------------------------------------------------------------------------------------------


def compute(models: dict, processor, videos: list[str]) -> dict:
    """Return what models and their processor give for two videos. Runs here, and where this package isn't installed."""
    inputs = processor(videos=videos, text=["first red", "then blue finally"], padding=True, return_tensors="pt")
    pixels, ids, mask = inputs["pixel_values_videos"], inputs["input_ids"], inputs["attention_mask"]
    answers = {"answer_input_ids": ids, "answer_attention_mask": mask}
    retrieval, answering = models["TestaForRetrieval"], models["TestaForVideoQA"]
    with torch.no_grad():
        retrieved = retrieval(**inputs)
        return {
            **inputs,
            "video tokens": models["TestaVideoModel"](pixels).last_hidden_state,
            "video features": models["TestaModel"].get_video_features(pixels).pooler_output,
            "text features": models["TestaTextModel"](ids, mask).pooler_output,
            "similarities": retrieved.logits_per_video,
            "matches": retrieval.match(retrieved.video_model_output.last_hidden_state, ids, mask),
            "similarities in pre-training": models["TestaForPreTraining"](**inputs).logits_per_video,
            "answers": answering.generate(**inputs, max_new_tokens=8, num_beams=2),
            "scores of answers": answering.score_answers(**inputs, **answers),
            "captions": models["TestaForCaptioning"].generate(pixels, max_new_tokens=8),
            "choices": models["TestaForMultipleChoiceVideoQA"](pixels, ids[:, None], mask[:, None]).logits,
        }


# Loads every model as its card says, from `place`.
ELSEWHERE = f"""
import importlib.util
import re
import sys
from pathlib import Path

import torch

assert importlib.util.find_spec("transformers_testa") is None

{inspect.getsource(compute)}

folder, place, output, num_threads, *videos = sys.argv[1:]
torch.set_num_threads(int(num_threads))
models, processors = {{}}, {{}}
for card in Path(folder).glob("*/README.md"):
    name = card.parent.name
    (program,) = re.findall("```python\\n(.*?)```", card.read_text("utf-8"), re.DOTALL)
    names = {{}}
    exec(program.replace(f'"{{name}}"', f'"{{place}}/{{name}}"'), names)
    models[name], processors[name] = names["model"], names["processor"]
torch.save(compute(models, processors["TestaForRetrieval"], videos), output)
"""


@dataclass
class Exported:
    """A folder of exported models, one a subfolder, and what they gave for two videos before they were exported."""

    folder: Path
    videos: list[str]
    outputs: dict


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    torch.manual_seed(0)
    folder, processor, config = tmp_path_factory.mktemp("exported"), tiny_processor(), tiny_config()
    models = {name: getattr(transformers_testa, name)(config) for name in ARCHITECTURES}
    models["TestaVideoModel"] = TestaVideoModel(config.video_config)
    models["TestaTextModel"] = TestaTextModel(config.text_config)
    parts = {"TestaVideoModel": processor.video_processor, "TestaTextModel": processor.tokenizer}
    for name, model in models.items():
        for parameter in model.eval().parameters():
            if parameter.ndim > 1:  # new models have zeros, which would hide what gets lost
                torch.nn.init.normal_(parameter, std=0.2)
        export_folder(model, parts.get(name, processor), folder / name)
    videos = tmp_path_factory.mktemp("videos")
    paths = [str(write_video(videos / f"{number}.mp4", 20 + 10 * number)) for number in range(2)]
    return Exported(folder, paths, compute(models, processor, paths))


@pytest.fixture(scope="module")
def python_without_package(tmp_path_factory) -> Path:
    """The interpreter of a new environment in which all that is installed here is installed, but for this package."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    for installed in (Path(path) for path in sys.path if path.endswith("-packages")):
        for package in installed.iterdir():
            if "transformers_testa" not in package.name and not (packages / package.name).exists():
                (packages / package.name).symlink_to(package)
    return environment / "bin" / "python"


def assert_elsewhere_is_as_here(
    exported: Exported, place: Path | str, python: Path, scratch: Path, **environment: str
):
    arguments = exported.folder, place, scratch / "outputs.pt", torch.get_num_threads(), *exported.videos
    run(python, ELSEWHERE, *arguments, HF_MODULES_CACHE=str(scratch / "modules"), **environment)
    torch.testing.assert_close(torch.load(scratch / "outputs.pt"), exported.outputs, atol=0, rtol=0)


def test_a_folder_loads_without_this_package_and_computes_the_same(exported, python_without_package, tmp_path):
    assert_elsewhere_is_as_here(exported, exported.folder, python_without_package, tmp_path)


# --- On the Hub -------------------------------------------------------------------------------------------------------

# What a person does who has something to publish: one folder after the other, and a model by the library's own methods.
PUBLISH = r"""
import sys
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from transformers_testa import TestaForVideoQA, TestaProcessor

folders, plain, saved = sys.argv[1:]
for folder in Path(folders).iterdir():
    HfApi().create_repo(f"someone/{folder.name}")
    HfApi().upload_folder(repo_id=f"someone/{folder.name}", folder_path=folder)
model, processor = TestaForVideoQA.from_pretrained(plain), TestaProcessor.from_pretrained(plain)
card = ModelCard("---\nlibrary_name: transformers\n---\n\n# Answers to questions\n")
for part in (model, processor, card):
    part.push_to_hub("someone/pushed")
model.save_pretrained(saved)
processor.save_pretrained(saved)
card.save(f"{saved}/README.md")
"""


@dataclass
class Hub:
    """What a Hub holds, by repository and file, after all exported folders went there, and a model that is `saved` too."""

    repositories: dict[str, dict[str, bytes]]
    environment: dict[str, str]
    saved: Path


@pytest.fixture(scope="module")
def hub(exported, tmp_path_factory):
    plain, saved, home = (tmp_path_factory.mktemp(name) for name in ("plain", "saved", "home"))
    TestaForVideoQA(tiny_config()).save_pretrained(plain)
    tiny_processor().save_pretrained(plain)
    with hub_server() as server:
        environment = server.environment | {"HF_HOME": str(home)}
        run(sys.executable, PUBLISH, exported.folder, plain, saved, **environment)
        yield Hub(server.repositories, environment, saved)


def test_a_repository_of_the_hub_loads_without_this_package_and_computes_the_same(
    exported, hub, python_without_package, tmp_path
):
    assert_elsewhere_is_as_here(exported, "someone", python_without_package, tmp_path, **hub.environment)


def test_an_exported_folder_is_on_the_hub_as_it_is(exported, hub):
    for folder in exported.folder.iterdir():
        assert hub.repositories[f"someone/{folder.name}"] == files_of(folder)


def test_pushing_a_model_its_processor_and_its_card_gives_the_files_of_save_pretrained(hub):
    assert set(files_of(hub.saved)) == {*SAVED, "README.md"}
    assert hub.repositories["someone/pushed"] == files_of(hub.saved)


# --- What an exported folder holds -----------------------------------------------------------------------------------


def test_an_exported_folder_holds_the_model_its_card_and_the_code_that_it_needs(exported):
    assert set(files_of(exported.folder / "TestaForVideoQA")) == {*SAVED, "README.md", *CODE}
    assert set(files_of(exported.folder / "TestaTextModel")) == {
        *(SAVED - {"processor_config.json"}),
        "README.md",
        *(CODE - {"processing_testa.py", "video_decoding_testa.py", "video_processing_testa.py"}),
    }


def test_auto_map_leads_to_every_class_wherever_the_library_looks_for_it(exported):
    def read(name: str) -> dict:
        return json.loads((exported.folder / "TestaForVideoQA" / name).read_text("utf-8"))

    auto_map = read("config.json")["auto_map"]
    assert auto_map.keys() == AUTO_CLASSES[TestaConfig].keys()
    assert auto_map["AutoModelForVisualQuestionAnswering"] == "modeling_testa.TestaForVideoQA"
    assert auto_map == read("processor_config.json")["auto_map"]
    assert auto_map == read("processor_config.json")["video_processor"]["auto_map"]


@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_an_exported_folder_loads_with_the_classes_of_the_installed_package(exported, trust_remote_code):
    folder = exported.folder / "TestaForVideoQA"
    model = AutoModelForVisualQuestionAnswering.from_pretrained(folder, trust_remote_code=trust_remote_code)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    assert (type(model), type(processor)) == (TestaForVideoQA, TestaProcessor)


def test_a_model_is_saved_without_code_after_an_export(exported, tmp_path):
    TestaForVideoQA(tiny_config()).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert set(files_of(tmp_path)) == SAVED
    assert "auto_map" not in (tmp_path / "config.json").read_text() + (tmp_path / "processor_config.json").read_text()


def test_register_for_auto_class_makes_the_library_save_the_code(tmp_path, monkeypatch):
    for code in (TestaConfig, TestaForVideoQA, TestaProcessor, TestaVideoProcessor):
        monkeypatch.setattr(code, "_auto_class", None)  # and put back after this test
    TestaConfig.register_for_auto_class()
    TestaForVideoQA.register_for_auto_class("AutoModelForVisualQuestionAnswering")
    TestaProcessor.register_for_auto_class()
    TestaVideoProcessor.register_for_auto_class()
    TestaForVideoQA(tiny_config()).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert set(files_of(tmp_path)) == SAVED | CODE


def test_a_card_that_is_given_or_there_already_is_kept(tmp_path):
    model, processor = TestaForRetrieval(tiny_config()), tiny_processor()
    for card in ("# The first card\n", "# Another card: café\n"):
        export_folder(model, processor, tmp_path, card=card)
        export_folder(model, processor, tmp_path)
        assert (tmp_path / "README.md").read_text("utf-8") == card


# --- Loading as with CLIP --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["TestaForRetrieval", "TestaForVideoQA"])
def folder(exported, request) -> Path:
    return exported.folder / request.param


def load(folder: Path, **options):
    return getattr(transformers_testa, folder.name).from_pretrained(folder, **options)


def judge(model) -> torch.Tensor:
    """Return `[2, 2]`, how well videos and texts go together."""
    generator = torch.Generator().manual_seed(0)
    videos, ids = torch.randn(2, 6, 3, 32, 32, generator=generator), torch.tensor([[2, 7, 10, 3], [2, 8, 11, 3]])
    with torch.no_grad():
        if isinstance(model, TestaForRetrieval):
            return model(videos, ids).logits_per_video
        return model.score_answers(videos, ids, None, ids, torch.ones_like(ids))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attn_implementation_reaches_every_part(folder, implementation):
    model = load(folder, attn_implementation=implementation)
    assert {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")} == {
        implementation
    }
    torch.testing.assert_close(judge(model), judge(load(folder)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_reaches_every_part(folder, dtype):
    model = load(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert judge(model).isfinite().all()
    assert load(folder, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map_places_the_model(folder, device_map):
    assert torch.equal(judge(load(folder, device_map=device_map)), judge(load(folder)))


def test_device_map_leaves_parts_on_the_disk(exported, tmp_path):
    folder = exported.folder / "TestaForVideoQA"
    parts = {"testa.video_model": "cpu", "testa.text_model": "disk", "text_decoder": "disk"}
    model = load(folder, device_map=parts, offload_folder=tmp_path)
    assert {parameter.device.type for parameter in model.text_decoder.parameters()} == {"meta"}
    assert torch.equal(judge(model), judge(load(folder)))


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_configuration_is_named(folder, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(OSError, match=rf"{tmp_path} has no config\.json. Give a folder that `save_pretrained`"):
        getattr(transformers_testa, folder.name).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}. Should have a `model_type` key in its config\.json"):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}. Should have a `model_type` key in its config\.json"):
        add_code(tmp_path)


@pytest.mark.parametrize("loader", [AutoModel, AutoProcessor, TestaForRetrieval, TestaConfig])
def test_a_repository_of_the_hub_while_offline_asks_for_a_connection(loader):
    with pytest.raises(OSError, match=r"(?s)couldn't connect .*Check your internet connection or .* offline mode"):
        loader.from_pretrained("someone/testa-base")


def test_the_code_of_this_package_goes_to_no_other_model(tmp_path):
    sizes = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(**sizes, intermediate_size=8)).save_pretrained(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(
        ValueError, match=r"config\.json is of a 'bert' model; this package has testa, testa_video_model"
    ):
        add_code(tmp_path)
    assert files_of(tmp_path) == before
