"""Configurations of the video encoder, the text encoder/decoder, and the model that holds both."""

import os
from dataclasses import InitVar, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .budgets import plan_merges


class _TestaBaseConfig(PreTrainedConfig):
    _arguments: ClassVar[tuple[str, ...]] = ()  # that aren't fields

    def __post_init__(self, **kwargs: Any) -> None:
        # The base class stores any unknown argument as an attribute: a misspelt field would silently do nothing.
        names = [*(field.name for field in fields(self)), *self._arguments]
        for argument in kwargs:
            if close := get_close_matches(argument, names, n=1, cutoff=0.88):
                raise ValueError(f"{type(self).__name__} has no field `{argument}`; did you mean `{close[0]}`?")
        super().__post_init__(**kwargs)
        # Called here as well as by @strict, which would wrap the error into one that is no ValueError.
        self.validate_architecture()

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            # The base class would go on with the default of every field.
            raise OSError(
                f"{pretrained_model_name_or_path} has no config.json. Give a folder that `save_pretrained` of a model wrote."
            )
        return config_dict, kwargs

    def _require(self, condition: bool, field: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}.{field} is {getattr(self, field)!r}; {allowed}.")

    def _require_one_of(self, field: str, *allowed: str) -> None:
        self._require(getattr(self, field) in allowed, field, f"allowed are {', '.join(map(repr, allowed))}")

    def _require_positive(self, *names: str) -> None:
        for field in names:
            self._require(getattr(self, field) > 0, field, "a positive number is needed")


@strict
class TestaVideoConfig(_TestaBaseConfig):
    """Configuration of [`TestaVideoModel`]. The defaults are the base model without aggregation.

    Args:
        image_size: Height and width of a frame, in pixels.
        patch_size: Height and width of a patch, in pixels; divides `image_size`.
        num_channels: Colour channels of a frame.
        num_frames: Frames of a video, the length of the learned time embedding.
        hidden_size: Width of the tokens.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads of each attention; divides `hidden_size`.
        intermediate_size: Width inside the MLP.
        hidden_act: Activation of the MLP.
        qkv_bias: Whether queries, keys and values have a bias.
        attention_probs_dropout_prob: Dropout of attention probabilities.
        hidden_dropout_prob: Dropout after the embeddings, projections and MLPs.
        drop_path_rate: Stochastic depth of the last block; earlier blocks ramp up to it linearly from 0.
        layer_norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of new weights.
        attention_type: "divided_space_time" (TESTA), "joint_space_time" (all tokens attend to all) or "space_only"
            (each frame by itself).
        merged_frames_per_layer: Frames each block merges away (the paper's R_T): one number, or one a block. Divided
            attention only.
        merged_patches_per_layer: Patches each block merges away in every frame (the paper's R_S): one number, or one
            a block. With joint attention: tokens of the whole video.
        aggregation_strategy: "geometry" pairs neighbouring tokens (the paper's choice), "importance" merges the tokens
            that receive the least attention (the paper's Eq. 1), "prune" drops them.
        frame_matching: "mean" compares frames by the mean of their patches (the paper's text), "vote" lets every patch
            position propose a partner frame (the released weights). "consecutive" lets frames join the one before them,
            as alike as their patches are place by place, and keeps all in order; with "geometry" only.
        proportional_attention: Whether the log of each token's size is added to its attention logits, so that a
            merged token counts as the patches it stands for.
        chunk_size_feed_forward: Tokens that go through the MLP at a time, say 4096: as fast, with two thirds of the memory
            in inference; 0 for all.
        use_temporal_scaling: Whether each frame has a learned gain on its temporal attention, as in the paper's
            pre-training. Needs divided attention and no frame merging.
        keep_ratio: Instead of counts of merges: what a video may cost, as a share of the GFLOPs without merging. Counts
            are chosen for `num_frames` by [`plan_merges`] and stored; this and the next two arguments are not.
        max_gflops: The same, in GFLOPs.
        merge_schedule: How the chosen merges spread over the blocks: "constant", "decreasing" or "increasing".
    """

    model_type = "testa_video_model"
    base_config_key = "video_config"
    _arguments: ClassVar = ("keep_ratio", "max_gflops", "merge_schedule")

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    num_frames: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    attention_probs_dropout_prob: float | int = 0.0
    hidden_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_type: str = "divided_space_time"
    merged_frames_per_layer: int | list[int] = 0
    merged_patches_per_layer: int | list[int] = 0
    aggregation_strategy: str = "geometry"
    frame_matching: str = "mean"
    proportional_attention: bool = False
    use_temporal_scaling: bool = False
    keep_ratio: InitVar[float | None] = None
    max_gflops: InitVar[float | None] = None
    merge_schedule: InitVar[str | None] = None

    def __post_init__(
        self,
        keep_ratio: float | None = None,
        max_gflops: float | None = None,
        merge_schedule: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__post_init__(**kwargs)
        if keep_ratio is None and max_gflops is None:
            if merge_schedule is not None:
                raise ValueError(f"merge_schedule is {merge_schedule!r}; it needs a keep_ratio or max_gflops.")
            return
        for field in ("merged_frames_per_layer", "merged_patches_per_layer"):
            self._require(not getattr(self, field), field, "give either counts of merges or a budget for them")
        merges = plan_merges(self, keep_ratio, max_gflops, merge_schedule or "constant")
        self.merged_frames_per_layer, self.merged_patches_per_layer = merges
        self.validate_architecture()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "TestaVideoConfig":
        # The base class sets what is given beside a dictionary after making the object, too late for a budget.
        if any(name in kwargs for name in cls._arguments):
            names = {*cls._arguments, *(field.name for field in fields(cls))}
            config_dict = {
                **config_dict,
                **{"merged_frames_per_layer": 0, "merged_patches_per_layer": 0},
                **{name: kwargs.pop(name) for name in names & set(kwargs)},
            }
        return super().from_dict(config_dict, **kwargs)

    @property
    def num_patches(self) -> int:
        """Patches of a frame."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def merged_frames(self) -> list[int]:
        """Frames to merge away, one number a block."""
        return self._per_layer(self.merged_frames_per_layer)

    @property
    def merged_patches(self) -> list[int]:
        """Patches to merge away, one number a block."""
        return self._per_layer(self.merged_patches_per_layer)

    def _per_layer(self, merged: int | list[int]) -> list[int]:
        return list(merged) if isinstance(merged, (list, tuple)) else [merged] * self.num_hidden_layers

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Raises ValueError for fields that exclude each other."""
        self._require_one_of("attention_type", "divided_space_time", "joint_space_time", "space_only")
        self._require_one_of("aggregation_strategy", "geometry", "importance", "prune")
        self._require_one_of("frame_matching", "mean", "vote", "consecutive")
        self._require(
            self.frame_matching != "consecutive" or self.aggregation_strategy == "geometry",
            "frame_matching",
            f"it needs aggregation_strategy='geometry', not {self.aggregation_strategy!r}",
        )
        self._require_positive(
            "image_size", "patch_size", "num_channels", "num_frames", "hidden_size", "num_attention_heads"
        )
        self._require(
            self.image_size % self.patch_size == 0,
            "image_size",
            f"a multiple of patch_size={self.patch_size} is needed",
        )
        self._require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            f"a multiple of num_attention_heads={self.num_attention_heads} is needed",
        )
        divided = self.attention_type == "divided_space_time"
        self._require(
            divided or not any(self.merged_frames),
            "merged_frames_per_layer",
            f"frames merge only with attention_type='divided_space_time', not {self.attention_type!r}",
        )
        self._require(
            not self.use_temporal_scaling or (divided and not any(self.merged_frames)),
            "use_temporal_scaling",
            "it needs attention_type='divided_space_time' and merged_frames_per_layer=0",
        )
        # Undivided attention was released with counts meant for a whole video; each step caps them to half its tokens.
        tokens = self.num_patches if divided else self.num_patches * self.num_frames
        for field, merged, limit, unit in (
            ("merged_frames_per_layer", self.merged_frames, self.num_frames, "frames"),
            ("merged_patches_per_layer", self.merged_patches, tokens, "patches"),
        ):
            self._require(
                len(merged) == self.num_hidden_layers, field, f"one entry a layer is needed: {self.num_hidden_layers}"
            )
            self._require(min(merged, default=0) >= 0, field, "counts of 0 or more are needed")
            self._require(
                sum(merged) < limit or not any(merged),
                field,
                f"that merges {sum(merged)} of {limit} {unit} over all layers; at least one must be left",
            )


@strict
class TestaTextConfig(_TestaBaseConfig):
    """Configuration of [`TestaTextModel`], a BERT with cross-attention in every layer. The defaults are the base model.

    Args:
        vocab_size: Size of the vocabulary: BERT's, plus [DEC] and [ENC].
        hidden_size: Width of the tokens.
        encoder_hidden_size: Width of the states that cross-attention reads.
        num_hidden_layers: Number of layers.
        num_attention_heads: Heads of each attention; divides `hidden_size`.
        intermediate_size: Width inside the MLP.
        hidden_act: Activation of the MLP.
        max_position_embeddings: Longest text, in tokens.
        hidden_dropout_prob: Dropout after the embeddings, projections and MLPs.
        attention_probs_dropout_prob: Dropout of attention probabilities.
        layer_norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of new weights.
        is_decoder: Whether self-attention is causal and keeps a key/value cache.
        label_smoothing: Share of a target's probability that all tokens get, where a decoder's loss is computed.
        tie_word_embeddings: Whether a decoder predicts tokens by the embeddings it reads them with.
        use_cache: Whether a decoder returns its cache by default.
        pad_token_id: Id of [PAD].
        bos_token_id: Id of [DEC], the first token of a text to be generated.
        enc_token_id: Id of [ENC], the first token of a text read together with a video.
        sep_token_id: Id of [SEP], the last token of every text.
        eos_token_id: Id that ends generation; [SEP] where it is None.
    """

    model_type = "testa_text_model"
    base_config_key = "text_config"

    vocab_size: int = 30524
    hidden_size: int = 768
    encoder_hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    is_decoder: bool = False
    label_smoothing: float | int = 0.1
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int = 30522
    enc_token_id: int = 30523
    sep_token_id: int = 102
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.eos_token_id is None:
            self.eos_token_id = self.sep_token_id
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Raises ValueError for fields that exclude each other."""
        self._require_positive("vocab_size", "hidden_size", "encoder_hidden_size", "num_attention_heads")
        self._require(0 <= self.label_smoothing < 1, "label_smoothing", "a share from 0 to below 1 is needed")
        self._require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            f"a multiple of num_attention_heads={self.num_attention_heads} is needed",
        )


if TYPE_CHECKING:
    Config = TypeVar("Config", bound=_TestaBaseConfig)

    class _SubConfig(Generic[Config]):
        """A field that is given as a configuration, its fields or nothing, and read as a configuration."""

        def __get__(self, instance: object, owner: type) -> Config: ...

        def __set__(self, instance: object, value: Config | dict[str, Any] | None) -> None: ...


@strict
class TestaConfig(_TestaBaseConfig):
    """Configuration of [`TestaModel`] and of the models with a head.

    Args:
        video_config: The video encoder, a [`TestaVideoConfig`] or its fields as a dict.
        text_config: The text encoder, a [`TestaTextConfig`] or its fields as a dict.
        projection_dim: Width of the embeddings in which videos and texts are compared.
        video_pooling: "mean" of all output tokens (the released weights) or "cls", the class token (the paper's text).
        temperature_init: Initial temperature of the contrastive similarities.
        initializer_range: Standard deviation of new weights outside the two encoders.
        tie_word_embeddings: Whether the decoder of [`TestaForPreTraining`] shares all weights but those of
            self-attention with the text encoder.
    """

    model_type = "testa"
    sub_configs_defaults = {
        "video_config": SubConfigSpec(TestaVideoConfig),
        "text_config": SubConfigSpec(TestaTextConfig),
    }
    # What a Trainer leaves out of the predictions that it gathers: whatever is nested or belongs to a batch.
    keys_to_ignore_at_inference = [
        *("loss_vtc", "loss_vtm", "loss_caption", "logits_per_video", "logits_per_text"),
        *("video_model_output", "text_model_output", "question_hidden_states"),
    ]

    if TYPE_CHECKING:
        video_config: _SubConfig[TestaVideoConfig] = _SubConfig()
        text_config: _SubConfig[TestaTextConfig] = _SubConfig()
    else:
        video_config: dict | TestaVideoConfig | None = None
        text_config: dict | TestaTextConfig | None = None
    projection_dim: int = 256
    video_pooling: str = "mean"
    temperature_init: float = 0.07
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Raises ValueError for fields that exclude each other."""
        self._require_one_of("video_pooling", "mean", "cls")
        self._require_positive("projection_dim", "temperature_init")
        self.text_config._require(
            self.text_config.encoder_hidden_size == self.video_config.hidden_size,
            "encoder_hidden_size",
            f"the hidden_size of the video encoder is needed: {self.video_config.hidden_size}",
        )
        self._require(
            self.video_pooling == "mean" or self.video_config.attention_type != "space_only",
            "video_pooling",
            "attention_type='space_only' has a class token a frame, none for the video: use 'mean'",
        )


__all__ = ["TestaConfig", "TestaTextConfig", "TestaVideoConfig"]
