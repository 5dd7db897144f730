"""Tensors on their way from a file into a model: read safely, renamed, resized, checked, loaded."""

import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def choose_architecture(architecture: str, known: Mapping[str, Any]) -> Any:
    """Look up what belongs to an architecture, or raise ValueError."""
    if architecture not in known:
        raise ValueError(f"Unknown architecture {architecture!r}; known are {', '.join(map(repr, known))}.")
    return known[architecture]


def read_checkpoint(path_or_state_dict: str | Path | Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a .pth file or a state dict by name, and what to call their source in a message.

    Raises:
        FileNotFoundError: Where the file doesn't exist.
        ValueError: Where it can't be read without executing code, or holds anything but named tensors.
    """
    source, state_dict = "the state dict", path_or_state_dict
    if not isinstance(path_or_state_dict, Mapping):
        source, path = str(path_or_state_dict), Path(path_or_state_dict)
        if not path.is_file():
            raise FileNotFoundError(f"{source} is no file. Give the path of a .pth file.")
        try:
            # Mapped into memory, what is dropped (often as much as what is used) is never read.
            state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{source} is no plain file of tensors: it is damaged, or it holds code, which is never executed. "
                f"A file that holds the state dict alone can be read. ({error})"
            ) from error
        except Exception as error:  # torch gives no list of what it raises for a malformed file
            raise ValueError(f"{source} is damaged, or no file of torch.save. ({error})") from error
    if isinstance(state_dict, Mapping):
        state_dict = state_dict.get("model", state_dict)
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{source} holds a {type(state_dict).__name__}; a dict of tensors by name is needed.")
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{source} holds a {type(tensor).__name__} under {name!r}; a tensor is needed, or all tensors by name "
                "in a dict under 'model'."
            )
        if not _is_whole(tensor):
            raise ValueError(
                f"{source} holds under {name!r} a tensor that isn't dense, or not with all of its numbers; save "
                "`tensor.to_dense().clone()` of it."
            )
    return dict(state_dict), source


def _is_whole(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are there: a single one can pretend to be a tensor of any size."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def read_transformers_model(
    path_or_model: str | Path | PreTrainedModel, *classes: type[PreTrainedModel]
) -> tuple[PreTrainedModel, str]:
    """Return a model of one of these classes, loaded where it isn't one already, and what to call it in a message.

    Raises:
        ValueError: Where it is of another class.
    """
    if isinstance(path_or_model, PreTrainedModel):
        name, source = type(path_or_model).__name__, "the model"
    else:
        name, source = AutoConfig.from_pretrained(path_or_model).architectures, str(path_or_model)
        name = name[0] if name else "no architecture"
    known = {model_class.__name__: model_class for model_class in classes}
    if name not in known:
        raise ValueError(f"{source} is a {name}; needed is one of {', '.join(known)}.")
    if isinstance(path_or_model, PreTrainedModel):
        return path_or_model, source
    return known[name].from_pretrained(path_or_model), source


def rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    """Replace all patterns (regular expressions) in a name, one after the other."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def own_names(model: PreTrainedModel) -> dict[str, str]:
    """Return for each name of the model's state dict the first name of that weight: shared weights have several."""
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first_names[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Let an error about a configuration that follows from a file's shapes name the file."""
    try:
        yield
    except ValueError as error:
        if source in str(error):
            raise
        raise ValueError(f"{source} has tensors of which no model can be made: {error}") from error


def model_outline(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model on the meta device, which takes no memory: names and shapes of its weights, whatever they are."""
    with torch.device("meta"), no_init_weights():
        outline = model_class(config)
    outline.tie_weights()
    return outline


def check_weights(
    model: PreTrainedModel, weights: Mapping[str, Tensor], source: str, may_miss: tuple[str, ...] = ()
) -> None:
    """Check that weights under the model's names fit it.

    Args:
        model: The model, or its outline.
        weights: Tensors by name. One name of a weight that modules share is enough.
        source: What to call their origin in an error.
        may_miss: Beginnings of names that stay as they are where there is no tensor for them.

    Raises:
        ValueError: Where tensors are missing, left over, of another shape, or differ though the model shares them.
    """
    expected, shared = model.state_dict(), own_names(model)
    weights = _at_least_vectors(weights)
    given = {shared[name] for name in weights.keys() & shared.keys()}
    fitting = [name for name in weights if name in expected and weights[name].shape == expected[name].shape]
    problems = {
        "missing": [name for name in shared.values() if name not in given and not name.startswith(may_miss)],
        "left over": weights.keys() - expected.keys(),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in expected.keys() & weights.keys() - set(fitting)
        ],
        "different though the model shares them": [
            f"{name} and {shared[name]}"
            for name in fitting
            if shared[name] != name
            and shared[name] in fitting
            and not torch.equal(weights[name], weights[shared[name]])
        ],
    }
    named = {kind: sorted(set(names)) for kind, names in problems.items()}
    found = "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in named.items() if names)
    if found:
        raise ValueError(f"{source} doesn't fit {type(model).__name__} and its configuration ({found}).")


def load_weights(
    model: PreTrainedModel, weights: Mapping[str, Tensor], source: str, may_miss: tuple[str, ...] = ()
) -> None:
    """Check weights as [`check_weights`] does, with its arguments and errors, and load them."""
    check_weights(model, weights, source, may_miss)
    model.load_state_dict(_at_least_vectors(weights), strict=False)


def _at_least_vectors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in weights.items()}


def resize_positions(positions: Tensor, num_patches: int) -> Tensor:
    """Resize position embeddings `[1, 1 + L, D]`, the class token's first, to another square grid of patches."""
    if positions.shape[1] == 1 + num_patches:
        return positions
    class_position, positions = positions.float().split([1, positions.shape[1] - 1], dim=1)
    old, new = math.isqrt(positions.shape[1]), math.isqrt(num_patches)
    grid = positions.transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([class_position, grid.flatten(2).transpose(1, 2)], dim=1)
