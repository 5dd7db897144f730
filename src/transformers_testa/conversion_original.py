"""Weights of the released TESTA code as models of this package."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from .configuration_testa import TestaConfig, TestaTextConfig, TestaVideoConfig
from .conversion_weights import (
    check_weights,
    choose_architecture,
    load_weights,
    model_outline,
    naming,
    read_checkpoint,
    rename,
)
from .modeling_testa import TestaForPreTraining, TestaForRetrieval, TestaForVideoQA, TestaVideoModel


_VIDEO_NAMES = (
    (r"^cls_token$", "embeddings.class_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^time_embed$", "embeddings.time_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.(\d+)\.temporal_norm1\.", r"layers.\1.temporal.norm."),
    (r"^blocks\.(\d+)\.temporal_attn\.", r"layers.\1.temporal.attention."),
    (r"^blocks\.(\d+)\.temporal_fc\.", r"layers.\1.temporal.temporal_fc."),
    (r"^blocks\.(\d+)\.temporal_scaling$", r"layers.\1.temporal.temporal_scaling"),
    (r"^blocks\.(\d+)\.norm1\.", r"layers.\1.spatial.norm."),
    (r"^blocks\.(\d+)\.attn\.", r"layers.\1.spatial.attention."),
    (r"^blocks\.(\d+)\.norm2\.", r"layers.\1.norm."),
    (r"^blocks\.(\d+)\.mlp\.", r"layers.\1.mlp."),
)
_TEXT_NAMES = (
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.self\.", ".self_attention."),
    (r"\.attention\.output\.dense\.", ".self_attention.output."),
    (r"\.attention\.output\.LayerNorm\.", ".self_attention.layer_norm."),
    (r"\.crossattention\.self\.", ".cross_attention."),
    (r"\.crossattention\.output\.dense\.", ".cross_attention.output."),
    (r"\.crossattention\.output\.LayerNorm\.", ".cross_attention.layer_norm."),
    (r"\.intermediate\.dense\.", ".mlp.intermediate."),
    (r"\.output\.dense\.", ".mlp.output."),
    (r"\.output\.LayerNorm\.", ".mlp.layer_norm."),
    (r"\.LayerNorm\.", ".layer_norm."),
)
_DECODER_NAMES = (
    (r"^cls\.predictions\.transform\.dense\.", "prediction_head.transform."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "prediction_head.layer_norm."),
    (r"^cls\.predictions\.decoder\.", "prediction_head.decoder."),
)
_HEAD_NAMES = (
    (r"^vision_proj\.", "video_projection."),
    (r"^text_proj\.", "text_projection."),
    (r"^itm_head\.", "matching_head."),
    (r"^temp$", "temperature"),
)
# What a checkpoint holds besides the model's own weights, by the reason why it is left out.
_DROPPED = {
    "momentum teacher, training state": r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.",
    "feature queue, training state": r"^((image|text|idx)_queue|ptr_queue|queue_ptr)$",
    "position numbers, not learned": r"\.position_ids$",
    "second name of the decoder's bias": r"cls\.predictions\.bias$",
}


def load_original_checkpoint(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    architecture: str,
    config: TestaVideoConfig | TestaConfig | None = None,
) -> PreTrainedModel:
    """Build a model from weights under the released code's names.

    Args:
        path_or_state_dict: A released .pth file (a dict with the key `model`, or the state dict itself; opened with
            `weights_only=True`), or a state dict.
        architecture: "video" (the encoder alone, names without prefix), "retrieval", "videoqa" or "pretraining".
        config: The model's configuration; inferred from the shapes where None. Shapes don't tell the number of merged
            tokens, which is 0 then, nor the size of an attention head, which is 64 as in all released models.

    Returns:
        A [`TestaVideoModel`], [`TestaForRetrieval`], [`TestaForVideoQA`] or [`TestaForPreTraining`], in evaluation mode.

    Raises:
        FileNotFoundError: Where the file doesn't exist.
        ValueError: Where the architecture is unknown, the file can't be read without executing code or is no dict of
            tensors, or tensors are left over, missing, of another shape, or different where modules share a weight.
    """
    model, _ = convert_original(path_or_state_dict, architecture, config)
    return model


def convert_original(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    architecture: str,
    config: TestaVideoConfig | TestaConfig | None = None,
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """Do what [`load_original_checkpoint`] does, and return the names of the tensors left out as well, by reason."""
    model_class, new_name, infer_config = choose_architecture(architecture, _ARCHITECTURES)
    tensors, source = read_checkpoint(path_or_state_dict)
    kept, dropped = split_dropped(tensors)
    if config is None:
        with naming(source):
            config = infer_config(kept, source)
    weights = {new_name(name): tensor for name, tensor in kept.items()}
    # Before it takes memory: a few bytes can name sizes that no machine has.
    check_weights(model_outline(model_class, config), weights, source)
    with no_init_weights():  # every weight is in the file
        model = model_class(config)
    model.tie_weights()
    load_weights(model, weights, source)
    return model.eval(), dropped


def split_dropped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Part tensors from those that are left out of every model: these are named, by reason."""
    kept: dict[str, Tensor] = {}
    dropped: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        reason = next((reason for reason, pattern in _DROPPED.items() if re.search(pattern, name)), None)
        if reason is None:
            kept[name] = tensor
        else:
            dropped.setdefault(reason, []).append(name)
    return kept, dropped


# --- Names and shapes ------------------------------------------------------------------------------------------------


def rename_video(name: str) -> str:
    """Return the name in [`TestaVideoModel`] of a tensor of the released video encoder."""
    return rename(name, _VIDEO_NAMES)


def rename_text(name: str) -> str:
    """Return the name in [`TestaTextModel`] of a tensor of BERT, or of the released text encoder."""
    return rename(name, _TEXT_NAMES)


def rename_all(name: str) -> str:
    """Return the name in a model with a head of a tensor of a released model, or of a BLIP model."""
    prefix, _, rest = name.partition(".")
    if prefix == "visual_encoder":
        return f"testa.video_model.{rename(rest, _VIDEO_NAMES)}"
    if prefix == "text_encoder":
        return f"testa.text_model.{rename_text(rest)}"
    if prefix == "text_decoder" and rest.startswith("bert."):
        return f"text_decoder.text_model.{rename_text(rest.removeprefix('bert.'))}"
    if prefix == "text_decoder":
        return f"text_decoder.{rename(rest, _DECODER_NAMES)}"
    return rename(name, _HEAD_NAMES)


def video_sizes(tensors: Mapping[str, Tensor], source: str, prefix: str = "") -> dict[str, Any]:
    """Return those fields of [`TestaVideoConfig`] that the tensors of an encoder tell, of images or videos."""
    hidden_size, num_channels, patch_size, _ = _find(tensors, f"{prefix}patch_embed.proj.weight", source, ndim=4)
    grid = math.isqrt(max(0, _find(tensors, f"{prefix}pos_embed", source, ndim=3)[1] - 1))
    return {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
        "hidden_size": hidden_size,
        "num_hidden_layers": _count_layers(tensors, rf"^{prefix}blocks\.(\d+)\."),
        "num_attention_heads": max(hidden_size // 64, 1),
        "intermediate_size": _find(tensors, f"{prefix}blocks.0.mlp.fc1.weight", source, ndim=2)[0],
        "qkv_bias": f"{prefix}blocks.0.attn.qkv.bias" in tensors,
    }


def text_sizes(tensors: Mapping[str, Tensor], source: str, prefix: str) -> dict[str, Any]:
    """Return those fields of [`TestaTextConfig`] that the tensors of a text encoder or decoder tell."""
    vocab_size, hidden_size = _find(tensors, f"{prefix}embeddings.word_embeddings.weight", source, ndim=2)
    layer = f"{prefix}encoder.layer.0"
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "encoder_hidden_size": _find(tensors, f"{layer}.crossattention.self.key.weight", source, ndim=2)[1],
        "num_hidden_layers": _count_layers(tensors, rf"^{prefix}encoder\.layer\.(\d+)\."),
        "num_attention_heads": max(hidden_size // 64, 1),
        "intermediate_size": _find(tensors, f"{layer}.intermediate.dense.weight", source, ndim=2)[0],
        "max_position_embeddings": _find(tensors, f"{prefix}embeddings.position_embeddings.weight", source, ndim=2)[0],
        # The original appends its two tokens to the vocabulary in this order.
        "bos_token_id": vocab_size - 2,
        "enc_token_id": vocab_size - 1,
    }


def projection_size(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the field `projection_dim` of [`TestaConfig`], or nothing where a model has no projections."""
    if "text_proj.weight" not in tensors:
        return {}
    return {"projection_dim": _find(tensors, "text_proj.weight", source, ndim=2)[0]}


def _infer_video_config(tensors: Mapping[str, Tensor], source: str, prefix: str = "") -> TestaVideoConfig:
    has_time = f"{prefix}time_embed" in tensors
    attention_type = "joint_space_time" if has_time else "space_only"
    if f"{prefix}blocks.0.temporal_fc.weight" in tensors:
        attention_type = "divided_space_time"
    return TestaVideoConfig(
        **video_sizes(tensors, source, prefix),
        num_frames=_find(tensors, f"{prefix}time_embed", source, ndim=3)[1] if has_time else 32,
        attention_type=attention_type,
        frame_matching="vote",
        use_temporal_scaling=f"{prefix}blocks.0.temporal_scaling" in tensors,
    )


def _infer_config(tensors: Mapping[str, Tensor], source: str) -> TestaConfig:
    return TestaConfig(
        text_config=TestaTextConfig(**text_sizes(tensors, source, "text_encoder.")),
        video_config=_infer_video_config(tensors, source, "visual_encoder."),
        **projection_size(tensors, source),
    )


def _find(tensors: Mapping[str, Tensor], name: str, source: str, ndim: int) -> tuple[int, ...]:
    """Return the shape of a tensor, or raise ValueError where it is missing or has another number of dimensions."""
    if name not in tensors:
        raise ValueError(f"{source} has no tensor {name!r}: it is no checkpoint of this kind.")
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"{source} has a tensor {name!r} of shape {shape}; {ndim} sizes are needed, none of them 0.")
    return shape


def _count_layers(names: Mapping[str, Tensor], pattern: str) -> int:
    # Not the highest number, which a name can make any: a gap shows when the names are compared.
    return len({match[1] for name in names if (match := re.search(pattern, name))})


_ARCHITECTURES = {
    "video": (TestaVideoModel, rename_video, _infer_video_config),
    "retrieval": (TestaForRetrieval, rename_all, _infer_config),
    "videoqa": (TestaForVideoQA, rename_all, _infer_config),
    "pretraining": (TestaForPreTraining, rename_all, _infer_config),
}
