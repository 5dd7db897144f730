"""Repositories of the Hub: what the auto classes give, and folders that load where this package isn't installed.

    export_folder(model, processor, "my-model")

saves a folder to upload as it is, with `hf upload my-name/my-model my-model`. `model.push_to_hub` and
`processor.push_to_hub` upload the same without the code, for people who have this package.
"""

import inspect
import json
import shutil
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME

from .configuration_testa import TestaConfig, TestaTextConfig, TestaVideoConfig
from .modeling_testa import (
    TestaForCaptioning,
    TestaForMultipleChoiceVideoQA,
    TestaForPreTraining,
    TestaForVideoQA,
    TestaModel,
    TestaTextModel,
    TestaVideoModel,
)
from .processing_testa import TestaProcessor
from .video_processing_testa import TestaVideoProcessor


# The library has no auto class for retrieval: `TestaForRetrieval` is loaded by its name.
AUTO_CLASSES: dict[type[PreTrainedConfig], dict[str, type]] = {
    TestaConfig: {
        "AutoConfig": TestaConfig,
        "AutoModel": TestaModel,
        "AutoModelForPreTraining": TestaForPreTraining,
        "AutoModelForVisualQuestionAnswering": TestaForVideoQA,
        "AutoModelForMultipleChoice": TestaForMultipleChoiceVideoQA,
        "AutoModelForMultimodalLM": TestaForCaptioning,
        "AutoProcessor": TestaProcessor,
        "AutoVideoProcessor": TestaVideoProcessor,
    },
    TestaVideoConfig: {
        "AutoConfig": TestaVideoConfig,
        "AutoModel": TestaVideoModel,
        "AutoVideoProcessor": TestaVideoProcessor,
    },
    TestaTextConfig: {"AutoConfig": TestaTextConfig, "AutoModel": TestaTextModel},
}

CARD = """\
---
library_name: transformers
tags:
- testa
---

# {name}

A `{architecture}` of [TESTA](https://arxiv.org/abs/2310.19060), which reads long videos by merging what is alike in
them. It needs `pip install transformers torch torchvision av`, and runs the code that is in this repository:

```python
from transformers import {auto_processor}
{import_line}

processor = {auto_processor}.from_pretrained("{name}", trust_remote_code=True)
model = {model_line}
```
"""


def load_config(argument: str, source: str) -> PreTrainedConfig:
    """Load the configuration of a folder or of a repository of the Hub, which `argument` named.

    Raises:
        ValueError: There is none.
    """
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        raise ValueError(
            f"{argument} is {source!r}, which is no folder with a config.json, nor can it be had from the Hub: {error}"
        ) from error


def register_auto_classes() -> None:
    """Tell the auto classes of Transformers about the configurations, models and processors of this package."""
    for config_class, classes in AUTO_CLASSES.items():
        for auto_class, registered_class in classes.items():
            key = config_class.model_type if auto_class == "AutoConfig" else config_class
            getattr(transformers, auto_class).register(key, registered_class, exist_ok=True)


def export_folder(
    model: PreTrainedModel,
    processor: TestaProcessor | TestaVideoProcessor | PreTrainedTokenizerBase,
    folder: str | Path,
    card: str | None = None,
) -> None:
    """Save a model, its processor and its card so that they load where this package isn't installed.

    Args:
        model: Any model of this package.
        processor: Its processor; of one encoder alone, the video processor or the tokenizer.
        folder: Where; its name is the model's.
        card: Text of `README.md`. Without it, a card that the folder has already stays; where there is none, one is
            written that tells how to load the model.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    add_code(folder)
    if card is None and not (folder / "README.md").exists():
        card = _describe(model, processor, folder.absolute().name)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def add_code(folder: str | Path) -> None:
    """Make a saved model load with `trust_remote_code=True` where this package isn't installed.

    Adds the files of code, and to the configuration and the processor's settings the `auto_map` that leads to them.

    Args:
        folder: What `save_pretrained` of a model, and of its processor, wrote.

    Raises:
        ValueError: Where the folder holds no model of this package.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    classes = AUTO_CLASSES.get(type(config))
    if classes is None:
        known = ", ".join(config_class.model_type for config_class in AUTO_CLASSES)
        raise ValueError(f"{folder / CONFIG_NAME} is of a {config.model_type!r} model; this package has {known}.")
    for source in {Path(inspect.getfile(code)) for code in classes.values()}:
        for file in (str(source), *get_relative_import_files(source)):
            shutil.copy(file, folder)

    auto_map = {auto_class: _reference(code) for auto_class, code in classes.items()}
    for name in (CONFIG_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text("utf-8"))
            for part in (settings, settings.get("video_processor")):
                if part is not None:
                    part["auto_map"] = auto_map
            text = json.dumps(settings, indent=2, sort_keys=True)
            (folder / name).write_text(f"{text}\n", encoding="utf-8")


def _describe(
    model: PreTrainedModel, processor: TestaProcessor | TestaVideoProcessor | PreTrainedTokenizerBase, name: str
) -> str:
    auto_classes = {code: auto_class for classes in AUTO_CLASSES.values() for auto_class, code in classes.items()}
    if type(model) in auto_classes:
        auto_class = auto_classes[type(model)]
        import_line = f"from transformers import {auto_class}"
        model_line = f'{auto_class}.from_pretrained("{name}", trust_remote_code=True)'
    else:
        import_line = "from transformers.dynamic_module_utils import get_class_from_dynamic_module"
        model_line = f'get_class_from_dynamic_module("{_reference(type(model))}", "{name}").from_pretrained("{name}")'
    return CARD.format(
        name=name,
        architecture=type(model).__name__,
        auto_processor=auto_classes.get(type(processor), "AutoTokenizer"),
        import_line=import_line,
        model_line=model_line,
    )


def _reference(code: type) -> str:
    """Return how the library refers to a class in the files of a repository."""
    return f"{code.__module__.rpartition('.')[2]}.{code.__name__}"
