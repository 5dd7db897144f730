"""BLIP, a model of images and texts, as the start of a TESTA model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .configuration_testa import TestaConfig, TestaTextConfig, TestaVideoConfig
from .conversion_original import projection_size, rename_all, split_dropped, text_sizes, video_sizes
from .conversion_weights import (
    check_weights,
    choose_architecture,
    load_weights,
    model_outline,
    naming,
    own_names,
    read_checkpoint,
    read_transformers_model,
    rename,
    resize_positions,
)
from .modeling_testa import TestaForCaptioning, TestaForPreTraining, TestaForRetrieval, TestaForVideoQA


logger = logging.get_logger(__name__)

# Transformers renamed the original's image encoder; texts and heads kept their names.
_VISION_NAMES = (
    (r"^vision_model\.", "visual_encoder."),
    (r"^visual_encoder\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^visual_encoder\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^visual_encoder\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^visual_encoder\.encoder\.layers\.(\d+)\.", r"visual_encoder.blocks.\1."),
    (r"^visual_encoder\.post_layernorm\.", "visual_encoder.norm."),
    (r"\.self_attn\.qkv\.", ".attn.qkv."),
    (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
)
# Parts that BLIP's checkpoints and our architectures have or have not, by the beginning of their names here.
_PARTS = {
    "testa.text_model.": "text encoder",
    "text_decoder.": "text decoder",
    "video_projection.": "contrastive head",
    "text_projection.": "contrastive head",
    "temperature": "contrastive head",
    "matching_head.": "matching head",
}
_TEXT_MODELS = ("testa.text_model.", "text_decoder.text_model.")
_POSITIONS = "testa.video_model.embeddings.position_embeddings"
_ARCHITECTURES = {
    "pretraining": TestaForPreTraining,
    "retrieval": TestaForRetrieval,
    "videoqa": TestaForVideoQA,
    "captioning": TestaForCaptioning,
}


def from_blip(
    path_or_model: str | Path | Mapping[str, Tensor] | PreTrainedModel,
    architecture: str = "pretraining",
    config: TestaConfig | None = None,
) -> PreTrainedModel:
    """Start a TESTA model from a BLIP model: before any training it sees what BLIP sees in each frame.

    Temporal attention begins as a copy of the spatial attention of its layer, behind a layer of zeros; time embeddings
    begin at zero. Where only one of text encoder and text decoder is there, the other begins as its copy. Other parts
    that the checkpoint lacks stay newly initialised; one warning names them.

    Args:
        path_or_model: An original BLIP .pth file or its state dict; or a `BlipForImageTextRetrieval`,
            `BlipForQuestionAnswering` or `BlipForConditionalGeneration` of Transformers, or where one is saved (a
            folder or Hub id).
        architecture: "pretraining", "retrieval", "videoqa" or "captioning".
        config: The new model's configuration. For images of another size position embeddings are resized. Where None:
            BLIP's sizes, and TESTA's own defaults in all that concerns time, pooling and training. A .pth file doesn't
            tell the size of an attention head, which is 64 then as in all released models.

    Returns:
        A [`TestaForPreTraining`], [`TestaForRetrieval`], [`TestaForVideoQA`] or [`TestaForCaptioning`], in evaluation
        mode.

    Raises:
        FileNotFoundError: Where the .pth file doesn't exist.
        ValueError: Where the architecture is unknown, the file can't be read without executing code, the source is no
            BLIP model, or its tensors don't fit the configuration.
    """
    model, _ = convert_blip(path_or_model, architecture, config)
    return model


def convert_blip(
    path_or_model: str | Path | Mapping[str, Tensor] | PreTrainedModel,
    architecture: str = "pretraining",
    config: TestaConfig | None = None,
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """Do what [`from_blip`] does, and return the names of the tensors left out as well, by reason."""
    model_class = choose_architecture(architecture, _ARCHITECTURES)
    tensors, source, blip_config = _read_blip(path_or_model)
    tensors, dropped = split_dropped(tensors)
    if config is None:
        with naming(source):
            config = _infer_config(tensors, source, blip_config)
    # Weights are compared with it before the model takes memory: a few bytes can name sizes that no machine has.
    outline = model_outline(model_class, config)

    blip_names = {rename_all(name): name for name in tensors}
    weights = {rename_all(name): tensor for name, tensor in tensors.items()}
    lacking = tuple(part for part in _PARTS if not any(name.startswith(part) for name in weights))
    expected = outline.state_dict()
    copied = _copy_text_model(weights, expected)
    _add_time(weights, expected)
    if _POSITIONS in weights:
        weights[_POSITIONS] = resize_positions(weights[_POSITIONS], config.video_config.num_patches)
    for name, reason in _drop_unused(weights, outline).items():
        dropped.setdefault(reason, []).append(blip_names[name])
    check_weights(outline, weights, source, may_miss=lacking)
    model = model_class(config)
    load_weights(model, weights, source, may_miss=lacking)

    shared = own_names(model)
    new = sorted(set(shared.values()) - {shared[name] for name in weights})
    if copied or new:
        notes = [copied] if copied else []
        if new:
            notes.append(f"newly initialised, to be trained: {', '.join(new)}")
        logger.warning(f"{source} lacks parts of {model_class.__name__}: {'; '.join(notes)}.")
    return model.eval(), dropped


def _read_blip(
    path_or_model: str | Path | Mapping[str, Tensor] | PreTrainedModel,
) -> tuple[dict[str, Tensor], str, PreTrainedConfig | None]:
    """Return tensors under the original's names, what to call their source, and the configuration where there is one."""
    if isinstance(path_or_model, Mapping) or (
        isinstance(path_or_model, str | Path)
        and (Path(path_or_model).is_file() or Path(path_or_model).suffix in (".pth", ".pt"))
    ):
        return *read_checkpoint(path_or_model), None
    blip, source = read_transformers_model(
        path_or_model, BlipForImageTextRetrieval, BlipForQuestionAnswering, BlipForConditionalGeneration
    )
    return {rename(name, _VISION_NAMES): tensor for name, tensor in blip.state_dict().items()}, source, blip.config


def _infer_config(tensors: Mapping[str, Tensor], source: str, blip_config: PreTrainedConfig | None) -> TestaConfig:
    has_encoder = any(name.startswith("text_encoder.") for name in tensors)
    text_fields = text_sizes(tensors, source, "text_encoder." if has_encoder else "text_decoder.bert.")
    video_fields = video_sizes(tensors, source, "visual_encoder.")
    if blip_config is not None:
        video_fields |= _computation(blip_config.vision_config)
        text_fields |= _computation(blip_config.text_config) | {
            name: getattr(blip_config.text_config, name) for name in ("bos_token_id", "pad_token_id", "sep_token_id")
        }
        text_fields["enc_token_id"] = text_fields["bos_token_id"] + 1
    return TestaConfig(
        video_config=TestaVideoConfig(**video_fields),
        text_config=TestaTextConfig(**text_fields),
        **projection_size(tensors, source),
    )


def _computation(blip_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that no shape tells and that weights rely on."""
    return {name: getattr(blip_config, name) for name in ("num_attention_heads", "hidden_act", "layer_norm_eps")}


def _copy_text_model(weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Add copies where the model needs both text encoder and decoder and there is only one; return what was done."""
    for absent, present in (_TEXT_MODELS, _TEXT_MODELS[::-1]):
        if any(name.startswith(absent) for name in weights):
            continue
        copies = {absent + name.removeprefix(present): name for name in weights if name.startswith(present)}
        copies = {copy: name for copy, name in copies.items() if copy in expected}
        weights |= {copy: weights[name] for copy, name in copies.items()}
        if copies:
            return f"{absent.rstrip('.')} starts as a copy of {present.rstrip('.')}"
    return None


def _add_time(weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        spatial_name = name.replace(".temporal.", ".spatial.")
        if name.endswith(".time_embeddings") or ".temporal.temporal_" in name:
            weights[name] = torch.zeros(()).expand(tensor.shape)
        elif ".temporal." in name and spatial_name in weights:
            weights[name] = weights[spatial_name]


def _drop_unused(weights: dict[str, Tensor], model: PreTrainedModel) -> dict[str, str]:
    """Take out the weights that the model has no place for, and return the reason for each name."""
    shared, reasons = own_names(model), {}
    for name, tensor in weights.items():
        part = next((part for part in _PARTS if name.startswith(part)), None)
        own = weights.get(shared.get(name, name), tensor)
        if part is not None and not any(other.startswith(part) for other in shared):
            reasons[name] = f"{_PARTS[part]}, not in this architecture"
        elif own is not tensor and not torch.equal(own, tensor):
            reasons[name] = "the decoder's own weight, in this architecture shared with the text encoder"
    for name in reasons:
        del weights[name]
    return reasons
