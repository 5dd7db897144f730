"""Weights of the released TESTA code as models of this package."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .configuration_testa import TestaConfig, TestaTextConfig, TestaVideoConfig
from .modeling_testa import TestaForRetrieval, TestaVideoModel


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
_HEAD_NAMES = (
    (r"^vision_proj\.", "video_projection."),
    (r"^text_proj\.", "text_projection."),
    (r"^itm_head\.", "matching_head."),
    (r"^temp$", "temperature"),
)
# What a release holds besides the model's own weights, by the reason why it is left out.
_DROPPED = {
    "momentum teacher, training state": r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.",
    "feature queue, training state": r"^((image|text|idx)_queue|ptr_queue|queue_ptr)$",
    "position numbers, not learned": r"\.position_ids$",
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
        architecture: "video" (the encoder alone, names without prefix) or "retrieval".
        config: The model's configuration; inferred from the shapes where None. Shapes don't tell the number of merged
            tokens, which is 0 then, nor the size of an attention head, which is 64 as in all released models.

    Returns:
        A [`TestaVideoModel`] or a [`TestaForRetrieval`], in evaluation mode.

    Raises:
        ValueError: Where the architecture is unknown, or tensors are left over, missing or of another shape.
    """
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"Unknown architecture {architecture!r}; known are {', '.join(map(repr, _ARCHITECTURES))}.")
    model_class, rename, infer_config = _ARCHITECTURES[architecture]
    state_dict = path_or_state_dict
    source = "the state dict"
    if not isinstance(path_or_state_dict, Mapping):
        source = str(path_or_state_dict)
        state_dict = torch.load(path_or_state_dict, map_location="cpu", weights_only=True)
    state_dict = state_dict.get("model", state_dict)

    kept = {name: tensor for name, tensor in state_dict.items() if dropped_reason(name) is None}
    model = model_class(config if config is not None else infer_config(kept, source))
    renamed = {rename(name): tensor for name, tensor in kept.items()}
    _check_fit(model, renamed, architecture, source)
    model.load_state_dict(renamed)
    return model.eval()


def dropped_reason(name: str) -> str | None:
    """Return why a tensor of a release is left out, or None where it is used."""
    return next((reason for reason, pattern in _DROPPED.items() if re.search(pattern, name)), None)


def _check_fit(model: PreTrainedModel, tensors: Mapping[str, Tensor], architecture: str, source: str):
    expected = model.state_dict()
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "left over": sorted(tensors.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & tensors.keys())
            if tensors[name].shape != expected[name].shape
        ],
    }
    found = "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in problems.items() if names)
    if found:
        raise ValueError(f"{source} doesn't fit the {architecture!r} architecture and its configuration ({found}).")


def _rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def _rename_video(name: str) -> str:
    return _rename(name, _VIDEO_NAMES)


def _rename_retrieval(name: str) -> str:
    prefix, _, rest = name.partition(".")
    if prefix == "visual_encoder":
        return f"testa.video_model.{_rename(rest, _VIDEO_NAMES)}"
    if prefix == "text_encoder":
        return f"testa.text_model.{_rename(rest, _TEXT_NAMES)}"
    return _rename(name, _HEAD_NAMES)


def _infer_video_config(tensors: Mapping[str, Tensor], source: str, prefix: str = "") -> TestaVideoConfig:
    patch = _find(tensors, f"{prefix}patch_embed.proj.weight", source)
    hidden_size, num_channels, patch_size = patch.shape[:3]
    grid = round((_find(tensors, f"{prefix}pos_embed", source).shape[1] - 1) ** 0.5)
    has = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    attention_type = "joint_space_time" if "time_embed" in has else "space_only"
    if "blocks.0.temporal_fc.weight" in has:
        attention_type = "divided_space_time"
    return TestaVideoConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        num_channels=num_channels,
        num_frames=tensors[f"{prefix}time_embed"].shape[1] if "time_embed" in has else 32,
        hidden_size=hidden_size,
        num_hidden_layers=_count_layers(has, r"^blocks\.(\d+)\."),
        num_attention_heads=max(hidden_size // 64, 1),
        intermediate_size=_find(tensors, f"{prefix}blocks.0.mlp.fc1.weight", source).shape[0],
        qkv_bias="blocks.0.attn.qkv.bias" in has,
        attention_type=attention_type,
        frame_matching="vote",
        use_temporal_scaling="blocks.0.temporal_scaling" in has,
    )


def _infer_config(tensors: Mapping[str, Tensor], source: str) -> TestaConfig:
    words = _find(tensors, "text_encoder.embeddings.word_embeddings.weight", source)
    layer = "text_encoder.encoder.layer.0"
    vocab_size, hidden_size = words.shape
    text_config = TestaTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        encoder_hidden_size=_find(tensors, f"{layer}.crossattention.self.key.weight", source).shape[1],
        num_hidden_layers=_count_layers(tensors, r"^text_encoder\.encoder\.layer\.(\d+)\."),
        num_attention_heads=max(hidden_size // 64, 1),
        intermediate_size=_find(tensors, f"{layer}.intermediate.dense.weight", source).shape[0],
        max_position_embeddings=_find(tensors, "text_encoder.embeddings.position_embeddings.weight", source).shape[0],
        # The original appends its two tokens to the vocabulary in this order.
        bos_token_id=vocab_size - 2,
        enc_token_id=vocab_size - 1,
    )
    return TestaConfig(
        video_config=_infer_video_config(tensors, source, "visual_encoder."),
        text_config=text_config,
        projection_dim=_find(tensors, "text_proj.weight", source).shape[0],
    )


def _find(tensors: Mapping[str, Tensor], name: str, source: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{source} has no tensor {name!r}: it is no TESTA checkpoint of this architecture.")
    return tensors[name]


def _count_layers(names: Mapping[str, Tensor] | set[str], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in names if (match := re.search(pattern, name)))


_ARCHITECTURES = {
    "video": (TestaVideoModel, _rename_video, _infer_video_config),
    "retrieval": (TestaForRetrieval, _rename_retrieval, _infer_config),
}
