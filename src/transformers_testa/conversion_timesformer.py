"""TimeSformer and TESTA's video encoder as each other: without aggregation they compute the same."""

from pathlib import Path

import torch.nn.functional as F
from transformers import PreTrainedModel, TimesformerConfig, TimesformerForVideoClassification, TimesformerModel

from .configuration_testa import TestaVideoConfig
from .conversion_weights import load_weights, read_transformers_model, rename, resize_positions
from .modeling_testa import TestaVideoModel


_NAMES = (
    (r"^embeddings\.cls_token$", "embeddings.class_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embeddings."),
    (r"^encoder\.layer\.", "layers."),
    (r"\.temporal_layernorm\.", ".temporal.norm."),
    (r"\.temporal_attention\.attention\.", ".temporal.attention."),
    (r"\.temporal_attention\.output\.dense\.", ".temporal.attention.proj."),
    (r"\.temporal_dense\.", ".temporal.temporal_fc."),
    (r"\.layernorm_before\.", ".spatial.norm."),
    (r"\.(\d+)\.attention\.attention\.", r".\1.spatial.attention."),
    (r"\.(\d+)\.attention\.output\.dense\.", r".\1.spatial.attention.proj."),
    (r"\.layernorm_after\.", ".norm."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
_POSITIONS, _TIMES = "embeddings.position_embeddings", "embeddings.time_embeddings"
# Stochastic depth is not among them: TimesformerConfig takes whole numbers for it.
_FIELDS = (
    *("image_size", "patch_size", "num_channels", "num_frames", "attention_type", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "intermediate_size", "hidden_act", "qkv_bias", "layer_norm_eps", "initializer_range"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
)


def from_timesformer(
    path_or_model: str | Path | PreTrainedModel, config: TestaVideoConfig | None = None
) -> TestaVideoModel:
    """Build a video encoder that computes what a TimeSformer does.

    Tokens of divided attention come frame by frame here, and patch position by patch position there.

    Args:
        path_or_model: A `TimesformerModel` or `TimesformerForVideoClassification` (whose classifier is left out) of
            Transformers, or where one is saved (a folder or Hub id).
        config: The encoder's configuration; the TimeSformer's, without aggregation, where None. For images of another
            size position embeddings are resized, and time embeddings for another number of frames.

    Returns:
        A [`TestaVideoModel`], in evaluation mode.

    Raises:
        ValueError: Where the source is no TimeSformer, or doesn't fit the configuration.
    """
    timesformer, source = read_transformers_model(path_or_model, TimesformerModel, TimesformerForVideoClassification)
    if isinstance(timesformer, TimesformerForVideoClassification):
        timesformer = timesformer.timesformer
    if config is None:
        config = TestaVideoConfig(**{name: getattr(timesformer.config, name) for name in _FIELDS})
    model = TestaVideoModel(config)
    weights = {rename(name, _NAMES): tensor for name, tensor in timesformer.state_dict().items()}
    weights[_POSITIONS] = resize_positions(weights[_POSITIONS], config.num_patches)
    if _TIMES in weights:
        times = F.interpolate(weights[_TIMES].transpose(1, 2), size=config.num_frames, mode="nearest")
        weights[_TIMES] = times.transpose(1, 2)
    load_weights(model, weights, source)
    return model.eval()


def to_timesformer(model: TestaVideoModel) -> TimesformerModel:
    """Build a TimeSformer that computes what a video encoder without aggregation does.

    Args:
        model: The encoder, such as `model.testa.video_model` of a model with a head.

    Returns:
        A `TimesformerModel` of Transformers, in evaluation mode.

    Raises:
        ValueError: Where the encoder merges tokens or scales temporal attention, which a TimeSformer can't.
    """
    config = model.config
    for field in ("merged_frames_per_layer", "merged_patches_per_layer", "use_temporal_scaling"):
        value = getattr(config, field)
        if any(value) if isinstance(value, list) else value:
            raise ValueError(f"{field} is {value}; a TimeSformer has nothing like it. Load the model without.")
    timesformer = TimesformerModel(TimesformerConfig(**{name: getattr(config, name) for name in _FIELDS}))
    weights = model.state_dict()
    renamed = {name: weights[rename(name, _NAMES)] for name in timesformer.state_dict()}
    load_weights(timesformer, renamed, "the video encoder")
    return timesformer.eval()
