"""TESTA models: a video encoder that aggregates tokens, a text encoder/decoder, and the task heads."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .aggregation_testa import (
    compose,
    flatten_frames,
    flatten_patches,
    limit_merges,
    mean_key,
    merge,
    plan_aggregation,
    plan_consecutive,
    received_attention,
)
from .configuration_testa import TestaConfig, TestaTextConfig, TestaVideoConfig
from .objectives import (
    HardNegatives,
    contrastive_loss,
    draw_hard_negatives,
    matching_loss,
    same_pair_targets,
    text_log_likelihoods,
)


logger = logging.get_logger(__name__)


# --- Outputs ---------------------------------------------------------------------------------------------------------


@dataclass
class TestaVideoModelOutput(BaseModelOutputWithPooling):
    """What the video encoder returns.

    Args:
        last_hidden_state: `[B, 1 + T' * L', D]`, the class token, then T' frames of L' patches each (joint attention:
            patch-major; space-only attention: `[B, T * (1 + L'), D]`, each frame's class token before its patches).
        pooler_output: `[B, D]`, mean of all output tokens.
        token_map: `[B, T, L]` (int64), the output token of every input patch, as an index into `last_hidden_state`;
            -1 where pruning dropped it.
        token_sizes: `[B, 1 + T' * L']` (float32), input patches in each output token; 1 for class tokens.
        hidden_states: Tokens before the first and after every block; their number shrinks from block to block.
        attentions: Per block, probabilities of the spatial (or joint) attention `[B * T, heads, 1 + L, 1 + L]`.
        temporal_attentions: Per block, probabilities of the temporal attention `[B * L, heads, T, T]`; recorded with
            `output_temporal_attentions=True`.
    """

    token_map: Tensor | None = None
    token_sizes: Tensor | None = None
    temporal_attentions: tuple[Tensor, ...] | None = None


@dataclass
class TestaModelOutput(ModelOutput):
    """Both encoders' outputs.

    Args:
        video_features: `[B, D]`, pooled video tokens.
        text_features: `[B, D]`, first text token.
        video_model_output: Everything the video encoder returned.
        text_model_output: Everything the text encoder returned.
    """

    video_features: Tensor | None = None
    text_features: Tensor | None = None
    video_model_output: TestaVideoModelOutput | None = None
    text_model_output: BaseModelOutputWithPoolingAndCrossAttentions | None = None


@dataclass
class TestaRetrievalOutput(ModelOutput):
    """What [`TestaForRetrieval`] returns.

    Args:
        loss: Sum of the two losses.
        loss_vtc: Video-text contrastive loss.
        loss_vtm: Video-text matching loss.
        logits_per_video: `[videos, texts]`, cosine similarities over the temperature.
        logits_per_text: `[texts, videos]`.
        video_embeds: `[videos, projection_dim]`, of length 1.
        text_embeds: `[texts, projection_dim]`, of length 1.
        video_model_output: Everything the video encoder returned.
        text_model_output: Everything the text encoder returned.
    """

    loss: Tensor | None = None
    loss_vtc: Tensor | None = None
    loss_vtm: Tensor | None = None
    logits_per_video: Tensor | None = None
    logits_per_text: Tensor | None = None
    video_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    video_model_output: TestaVideoModelOutput | None = None
    text_model_output: BaseModelOutputWithPoolingAndCrossAttentions | None = None


@dataclass
class TestaGroundingOutput(ModelOutput):
    """What [`TestaForRetrieval.ground`] returns.

    Args:
        scores: `[N, T, L]`, cosine similarity of each text to the output token that each input patch is in; -1, the
            least there is, where pruning dropped the patch.
        frame_scores: `[N, T]`, that of the most similar patch of each frame.
        video_model_output: Everything the video encoder returned.
    """

    scores: Tensor | None = None
    frame_scores: Tensor | None = None
    video_model_output: TestaVideoModelOutput | None = None


@dataclass
class TestaPreTrainingOutput(TestaRetrievalOutput):
    """What [`TestaForPreTraining`] returns: the output of [`TestaForRetrieval`], `loss` being the sum of three, and

    Args:
        loss_caption: Captioning loss.
    """

    loss_caption: Tensor | None = None


@dataclass
class TestaVideoQAOutput(ModelOutput):
    """What the question answering models return.

    Args:
        loss: Loss of the answers.
        logits: `[answers, L, vocabulary]`, prediction of each next token of the answers; of multiple choice
            `[B, choices]`.
        video_model_output: Everything the video encoder returned.
        question_hidden_states: `[B, N, D]`, states of the question read with the video (multiple choice:
            `[B * choices, N, D]`).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    video_model_output: TestaVideoModelOutput | None = None
    question_hidden_states: Tensor | None = None


@dataclass
class TestaCaptioningOutput(ModelOutput):
    """What [`TestaForCaptioning`] returns.

    Args:
        loss: Mean loss of the tokens to predict.
        logits: `[B, L, vocabulary]`, prediction of each next token.
        video_model_output: Everything the video encoder returned.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    video_model_output: TestaVideoModelOutput | None = None


# --- Video encoder ---------------------------------------------------------------------------------------------------


class TestaVideoEmbeddings(nn.Module):
    """Patches of all frames plus position and time embeddings, and the class token."""

    def __init__(self, config: TestaVideoConfig):
        super().__init__()
        self.config = config
        self.grid_size = config.image_size // config.patch_size
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.hidden_size))
        if config.attention_type != "space_only":
            self.time_embeddings = nn.Parameter(torch.zeros(1, config.num_frames, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values_videos: Tensor) -> tuple[Tensor, Tensor]:
        """Embed `[B, T, C, H, W]` as class token `[B, 1, D]` and patches `[B, T, L, D]`."""
        if pixel_values_videos.ndim != 5 or pixel_values_videos.shape[2] != self.config.num_channels:
            raise ValueError(
                "pixel_values_videos must be [batch, frames, channels, height, width] with "
                f"{self.config.num_channels} channels; got shape {tuple(pixel_values_videos.shape)}."
            )
        B, T = pixel_values_videos.shape[:2]
        patches = self.patch_embeddings(pixel_values_videos.flatten(0, 1).to(self.patch_embeddings.weight.dtype))
        class_position, patch_positions = self.resize_position_embeddings(*patches.shape[-2:])
        patches = patches.flatten(2).transpose(1, 2).unflatten(0, (B, T))  # [B*T, D, h, w] -> [B, T, L, D]
        patches = self.dropout(patches + patch_positions)
        if self.config.attention_type != "space_only":
            patches = self.dropout(patches + resize_time(self.time_embeddings, T)[:, :, None])
        class_token = self.dropout(self.class_token + class_position)
        return class_token.expand(B, -1, -1), patches

    def resize_position_embeddings(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return position embeddings `[1, 1, D]` of the class token and `[1, L, D]` of a grid of patches."""
        class_position, positions = self.position_embeddings.split([1, self.config.num_patches], dim=1)
        if (height, width) != (self.grid_size, self.grid_size):
            grid = positions.transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))
            grid = F.interpolate(grid, size=(height, width), mode="nearest")
            positions = grid.flatten(2).transpose(1, 2)
        return class_position, positions


def resize_time(values: Tensor, num_frames: int) -> Tensor:
    """Return what is learned for each frame, `[1, T, D]`, for another number of frames."""
    if values.shape[1] == num_frames:
        return values
    return F.interpolate(values.transpose(1, 2), size=num_frames, mode="nearest").transpose(1, 2)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    attention_logits = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        attention_logits = attention_logits + attention_mask
    attention_weights = torch.softmax(attention_logits, dim=-1, dtype=torch.float32).to(query.dtype)
    attention_weights = F.dropout(attention_weights, p=dropout, training=module.training)
    return (attention_weights @ value).transpose(1, 2), attention_weights


class TestaVideoAttention(nn.Module):
    """Attention of tokens within groups: along time at each patch position, or among the patches of each frame."""

    def __init__(self, config: TestaVideoConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        token_sizes: Tensor,
        class_tokens: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        """Attend within each of G groups of S tokens.

        Args:
            hidden_states: `[B, G, S, D]`.
            token_sizes: `[B, G, S]`, read by proportional attention.
            class_tokens: `[B, G, 1, D]`, one a group, or `[B, 1, 1, D]`, one for all groups: its query, key and value
                are computed once, and its outputs are averaged over the groups.

        Returns:
            Tokens `[B, G, S, D]`, attention weights, class tokens in their own shape, queries and keys
            `[B * G, heads, (1 +) S, D / heads]`.
        """
        B, G = hidden_states.shape[:2]
        qkv = self.qkv(hidden_states)
        if class_tokens is not None:
            qkv = torch.cat([self.qkv(class_tokens).expand(-1, G, -1, -1), qkv], dim=2)
        # [B, G, S, 3*D] -> 3 × [B*G, heads, S, D/heads]
        query, key, value = qkv.flatten(0, 1).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, attention_weights = attention_interface(
            self,
            query,
            key,
            value,
            self.size_bias(token_sizes, class_tokens is not None, query.dtype),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        # [B*G, S, heads, D/heads] -> [B, G, S, D]; projected in one piece, since a part would be copied first
        outputs = self.dropout(self.proj(context.flatten(2).unflatten(0, (B, G))))
        if class_tokens is None:
            return outputs, attention_weights, None, query, key
        class_outputs, outputs = outputs[:, :, :1], outputs[:, :, 1:]
        if class_tokens.shape[1] < G:
            class_outputs = class_outputs.mean(dim=1, keepdim=True)
        return outputs, attention_weights, class_outputs, query, key

    def size_bias(self, token_sizes: Tensor, has_class_token: bool, dtype: torch.dtype) -> Tensor | None:
        """Return the bias `[B * G, 1, 1, (1 +) S]` by which a token counts as the patches merged into it."""
        if not self.config.proportional_attention:
            return None
        if self.config._attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f"proportional_attention needs attn_implementation 'sdpa' or 'eager', which take a bias; it is "
                f"{self.config._attn_implementation!r}."
            )
        bias = F.pad(token_sizes.log(), (int(has_class_token), 0))
        return bias.flatten(0, 1)[:, None, None].to(dtype)


class TestaTemporalBlock(nn.Module):
    """Attention along time at every patch position; then similar frames merge."""

    def __init__(self, config: TestaVideoConfig, num_merged: int, drop_path_rate: float):
        super().__init__()
        self.config = config
        self.num_merged = num_merged
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = TestaVideoAttention(config)
        self.temporal_fc = nn.Linear(config.hidden_size, config.hidden_size)
        if config.use_temporal_scaling:
            self.temporal_scaling = nn.Parameter(torch.zeros(1, config.num_frames, 1))
        self.drop_path = StochasticDepth(drop_path_rate, mode="row")

    def forward(
        self, patches: Tensor, token_sizes: Tensor, token_map: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update patches `[B, T, L, D]`, sizes `[B, T, L]` and the map `[B, T0, L0]` of input patches to tokens."""
        # [B, T, L, D] -> [B, L, T, D]; the norm, and nothing else, copies the tokens into this order
        residual, _, _, query, key = self.attention(
            self.norm(patches.transpose(1, 2)), token_sizes.transpose(1, 2), **kwargs
        )
        if self.config.use_temporal_scaling:
            residual = residual * (resize_time(self.temporal_scaling, patches.shape[1]).tanh() + 1)
        patches = patches + self.temporal_fc(self.drop_path(residual)).transpose(1, 2)

        num_frames, num_patches = patches.shape[1:3]
        num_merged = limit_merges(self.num_merged, num_frames)
        if num_merged == 0:
            return patches, token_sizes, token_map
        assignment = self.plan(query, key, num_patches, num_merged)  # [B, T]
        patches, token_sizes = merge(patches, token_sizes, assignment, num_frames - num_merged)
        return patches, token_sizes, _trace(token_map, flatten_frames(assignment, num_patches))

    def plan(self, query: Tensor, key: Tensor, num_patches: int, num_merged: int) -> Tensor:
        """Decide from queries and keys `[B * L, heads, T, D / heads]` which frames merge: `[B, T]`."""
        strategy, matching = self.config.aggregation_strategy, self.config.frame_matching
        if matching == "consecutive":
            # Two frames are as alike as their patches, place by place: the keys of a frame are one long vector.
            return plan_consecutive(
                mean_key(key).unflatten(0, (-1, num_patches)).transpose(1, 2).flatten(2), num_merged
            )
        vote = matching == "vote"
        metric = importance = None
        if strategy != "prune":
            metric = mean_key(key).unflatten(0, (-1, num_patches))  # [B, L, T, D/heads]
            metric = metric if vote else metric.mean(dim=1)
        if strategy != "geometry":
            importance = received_attention(query, key, self.attention.scaling)
            importance = importance.unflatten(0, (-1, num_patches)).mean(dim=1)
        return plan_aggregation(metric, num_merged, strategy, received_attention=importance, vote=vote)


class TestaSpatialBlock(nn.Module):
    """Attention among the patches of each frame (joint attention: of the video); then similar patches merge."""

    def __init__(self, config: TestaVideoConfig, num_merged: int, drop_path_rate: float):
        super().__init__()
        self.config = config
        self.num_merged = num_merged
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = TestaVideoAttention(config)
        self.drop_path = StochasticDepth(drop_path_rate, mode="row")

    def forward(
        self,
        class_tokens: Tensor,
        patches: Tensor,
        token_sizes: Tensor,
        token_map: Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Update class tokens `[B, 1 or G, 1, D]`, patches `[B, G, L, D]`, their sizes and the map."""
        residual, _, class_residual, query, key = self.attention(
            self.norm(patches), token_sizes, class_tokens=self.norm(class_tokens), **kwargs
        )
        patches = patches + self.drop_path(residual)
        class_tokens = class_tokens + self.drop_path(class_residual)

        num_groups, num_patches = patches.shape[1:3]
        num_merged = limit_merges(self.num_merged, num_patches, class_token_ahead=True)
        if num_merged == 0:
            return class_tokens, patches, token_sizes, token_map
        assignment = self.plan(query, key, num_groups, num_merged)  # [B, G, L]
        num_slots = num_patches - num_merged
        patches, token_sizes = merge(patches, token_sizes, assignment, num_slots)
        return class_tokens, patches, token_sizes, _trace(token_map, flatten_patches(assignment, num_slots))

    def plan(self, query: Tensor, key: Tensor, num_groups: int, num_merged: int) -> Tensor:
        """Decide from queries and keys `[B * G, heads, 1 + L, D / heads]` which patches merge: `[B, G, L]`."""
        strategy = self.config.aggregation_strategy
        metric = importance = None
        if strategy != "prune":
            metric = mean_key(key[:, :, 1:]).unflatten(0, (-1, num_groups))
        if strategy != "geometry":
            importance = received_attention(query, key, self.attention.scaling)[:, 1:].unflatten(0, (-1, num_groups))
        return plan_aggregation(metric, num_merged, strategy, received_attention=importance, class_token_ahead=True)


def _trace(token_map: Tensor, assignment: Tensor) -> Tensor:
    return compose(token_map.flatten(1), assignment).view_as(token_map)


class TestaMLP(nn.Module):
    def __init__(self, config: TestaVideoConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.chunk_size:
            return torch.cat([self.feed(tokens) for tokens in hidden_states.split(self.chunk_size, dim=1)], dim=1)
        return self.feed(hidden_states)

    def feed(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(hidden_states)))))


class TestaVideoLayer(GradientCheckpointingLayer):
    """Temporal attention, frame merge (divided attention only), spatial attention, patch merge, MLP."""

    def __init__(self, config: TestaVideoConfig, layer_idx: int):
        super().__init__()
        drop_path_rate = config.drop_path_rate * layer_idx / max(config.num_hidden_layers - 1, 1)
        self.is_divided = config.attention_type == "divided_space_time"
        if self.is_divided:
            self.temporal = TestaTemporalBlock(config, config.merged_frames[layer_idx], drop_path_rate)
        self.spatial = TestaSpatialBlock(config, config.merged_patches[layer_idx], drop_path_rate)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TestaMLP(config)
        self.drop_path = StochasticDepth(drop_path_rate, mode="row")

    def forward(
        self,
        hidden_states: Tensor,
        token_sizes: Tensor,
        token_map: Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Process one block.

        Args:
            hidden_states: `[B, 1 + G * S, D]`, or `[B, G * (1 + S), D]` where every group has its class token.
            token_sizes: `[B, G, S]`, sizes of the patch tokens in G groups: frames, or one group in joint attention.
            token_map: `[B, T, L]`, index into G * S of every input patch.
        """
        hidden_states, token_sizes, token_map = self.attend(hidden_states, token_sizes, token_map, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.mlp(self.norm(hidden_states)))
        return hidden_states, token_sizes, token_map

    def attend(
        self,
        hidden_states: Tensor,
        token_sizes: Tensor,
        token_map: Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do all but the MLP, with the arguments and returns of `forward`."""
        class_tokens, patches = self.split_class_tokens(hidden_states, *token_sizes.shape[1:])
        if self.is_divided:
            patches, token_sizes, token_map = self.temporal(patches, token_sizes, token_map, **kwargs)
        class_tokens, patches, token_sizes, token_map = self.spatial(
            class_tokens, patches, token_sizes, token_map, **kwargs
        )
        return join_class_tokens(class_tokens, patches), token_sizes, token_map

    def split_class_tokens(self, hidden_states: Tensor, num_groups: int, group_size: int) -> tuple[Tensor, Tensor]:
        """Return class tokens `[B, 1 or G, 1, D]` and patches `[B, G, S, D]`."""
        if self.is_divided:
            class_token, patches = hidden_states.split([1, num_groups * group_size], dim=1)
            return class_token[:, None], patches.unflatten(1, (num_groups, group_size))
        return hidden_states.unflatten(1, (num_groups, 1 + group_size)).split([1, group_size], dim=2)


def join_class_tokens(class_tokens: Tensor, patches: Tensor) -> Tensor:
    """Lay class tokens `[B, C, 1, D]` before their share of the patches `[B, G, S, D]`: `[B, C + G * S, D]`."""
    num_class_tokens = class_tokens.shape[1]
    patches = patches.flatten(1, 2).unflatten(1, (num_class_tokens, -1))
    return torch.cat([class_tokens, patches], dim=2).flatten(1, 2)


class TestaPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what the models can do, in one place."""

    config: TestaConfig
    base_model_prefix = "testa"
    main_input_name = "pixel_values_videos"
    input_modalities = ["video", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means over a batch, which a Trainer averages over accumulated ones
    _no_split_modules = ["TestaVideoEmbeddings", "TestaVideoLayer", "TestaTextEmbeddings", "TestaTextLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        try:
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        except ImportError as error:
            if attn_implementation != "flash_attention_2":
                raise
            logger.warning_once(f"{error} Using attn_implementation='sdpa' instead.")
            return "sdpa"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TestaVideoEmbeddings):
            init.trunc_normal_(module.class_token, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
            if hasattr(module, "time_embeddings"):
                # As large as the patches they are added to, or the order of frames goes unnoticed for long.
                init.copy_(module.time_embeddings, 0.5 * sinusoids(*module.time_embeddings.shape[1:])[None])
        elif isinstance(module, TestaTemporalBlock) and module.config.use_temporal_scaling:
            init.zeros_(module.temporal_scaling)
        elif isinstance(module, TestaTextEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1])[None])
            init.copy_(module.position_embeddings.weight, std * sinusoids(*module.position_embeddings.weight.shape))
        elif isinstance(module, TestaForRetrieval):
            init.constant_(module.temperature, module.config.temperature_init)


def sinusoids(length: int, width: int) -> Tensor:
    """Return waves `[length, width]` of mean square 1, from half a period in all to half a period a step."""
    angular_frequency = torch.pi * torch.logspace(0, 1, (width + 1) // 2, base=max(length, 2))
    angles = (torch.arange(length) + 0.5)[:, None] / length * angular_frequency
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


class TestaVideoModel(TestaPreTrainedModel):
    """The video encoder (section 3.2 of the paper), with or without token aggregation."""

    config: TestaVideoConfig  # type: ignore[assignment]  # so the library knows the configuration of each model
    input_modalities = ["video"]
    _input_embed_layer = "patch_embeddings"
    _can_record_outputs = {
        "hidden_states": TestaVideoLayer,
        "attentions": OutputRecorder(TestaVideoAttention, index=1, layer_name="spatial.attention"),
        "temporal_attentions": OutputRecorder(TestaVideoAttention, index=1, layer_name="temporal.attention"),
    }

    def __init__(self, config: TestaVideoConfig):
        super().__init__(config)
        self.embeddings = TestaVideoEmbeddings(config)
        # A ModuleList doesn't tell of what type its modules are.
        self.layers: Sequence[TestaVideoLayer] = nn.ModuleList(  # type: ignore[assignment]
            [TestaVideoLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values_videos: Tensor, **kwargs: Unpack[TransformersKwargs]) -> TestaVideoModelOutput:
        """Encode videos.

        Args:
            pixel_values_videos: `[B, T, C, H, W]`, normalised; T, H and W may differ from the configuration (H and W
                are multiples of the patch size).

        Raises:
            ValueError: Where the input is not five-dimensional or has another number of channels.
        """
        class_token, patches = self.embeddings(pixel_values_videos)
        token_map = _number_tokens(patches)
        class_tokens = class_token[:, None]  # [B, 1, 1, D]
        if self.config.attention_type == "joint_space_time":
            # One group, patch-major, so that neighbours in the sequence are neighbours in time.
            patches = patches.transpose(1, 2).flatten(1, 2)[:, None]
            token_map = _number_tokens(token_map.transpose(1, 2)).transpose(1, 2)
        elif self.config.attention_type == "space_only":
            class_tokens = class_tokens.expand(-1, patches.shape[1], -1, -1)

        hidden_states = join_class_tokens(class_tokens, patches)
        token_sizes = patches.new_ones(patches.shape[:3], dtype=torch.float32)
        del patches  # which would take memory to the end
        for layer in self.layers:
            hidden_states, token_sizes, token_map = layer(hidden_states, token_sizes, token_map, **kwargs)
        hidden_states = self.norm(hidden_states)

        class_sizes = token_sizes.new_ones(*class_tokens.shape[:3], 1)
        tokens_per_class = hidden_states.shape[1] // class_tokens.shape[1] - 1
        output_index = token_map + token_map.div(tokens_per_class, rounding_mode="floor") + 1
        return TestaVideoModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states.mean(dim=1),
            token_map=torch.where(token_map < 0, -1, output_index),
            token_sizes=join_class_tokens(class_sizes, token_sizes[..., None]).squeeze(-1),
        )


def _number_tokens(tokens: Tensor) -> Tensor:
    """Number the tokens of `[B, G, S, ...]` in their order: `[B, G, S]`."""
    B, G, S = tokens.shape[:3]
    return torch.arange(G * S, device=tokens.device).view(1, G, S).expand(B, -1, -1)


# --- Text encoder and decoder ----------------------------------------------------------------------------------------


class TestaTextEmbeddings(nn.Module):
    """BERT's word and position embeddings, without token types."""

    def __init__(self, config: TestaTextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.position_ids = nn.Buffer(torch.arange(config.max_position_embeddings)[None], persistent=False)

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_length: int = 0,
    ) -> Tensor:
        """Embed ids `[B, L]` (or take embeddings `[B, L, D]`) that follow `past_length` cached tokens."""
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if position_ids is None:
            length, longest = inputs_embeds.shape[1] + past_length, self.position_ids.shape[1]
            if length > longest:
                raise ValueError(f"The text has {length} tokens; max_position_embeddings={longest} are the limit.")
            position_ids = self.position_ids[:, past_length:length]
        return self.dropout(self.layer_norm(inputs_embeds + self.position_embeddings(position_ids)))


class TestaTextAttention(nn.Module):
    """BERT's attention with its output layer and post-norm: of a text to itself, or to states of an encoder."""

    def __init__(self, config: TestaTextConfig, layer_idx: int, is_cross_attention: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_cross_attention = is_cross_attention
        self.is_causal = config.is_decoder and not is_cross_attention
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        key_value_size = config.encoder_hidden_size if is_cross_attention else config.hidden_size
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_value_size, config.hidden_size)
        self.value = nn.Linear(key_value_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        attended_states: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from tokens `[N, L, D]` to the texts they are of, or to states of an encoder, `[V, S, D]`.

        Cross-attention reads V encoder sequences, where N is a multiple of V: each serves N / V texts in a row, whose
        tokens are queries of one sequence, so that keys and values are neither computed nor stored more than once.
        """
        if self.is_cross_attention:
            key, value = self.cross_key_value(attended_states, cache)
        else:
            key, value = self.key_value(hidden_states if attended_states is None else attended_states)
            if cache is not None and self.is_causal:
                key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
        num_texts, length = hidden_states.shape[:2]
        num_sequences = key.shape[0]
        if num_texts % num_sequences:
            raise ValueError(
                f"{num_texts} texts can't share {num_sequences} encoder sequences: the first must be a multiple."
            )
        query = self.query(hidden_states).view(num_sequences, -1, self.num_heads, self.head_dim).transpose(1, 2)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, attention_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        context = self.dropout(self.output(context.reshape(hidden_states.shape)))
        if attention_weights is not None and num_sequences < num_texts:
            # [V, heads, N/V * L, S] -> [N, heads, L, S]
            attention_weights = attention_weights.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
        return self.layer_norm(context + hidden_states), attention_weights

    def key_value(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Project states `[V, S, D]` to keys and values `[V, heads, S, D / heads]`."""
        shape = (*states.shape[:2], self.num_heads, self.head_dim)
        return self.key(states).view(shape).transpose(1, 2), self.value(states).view(shape).transpose(1, 2)

    def cross_key_value(self, states: Tensor | None, cache: EncoderDecoderCache | None) -> tuple[Tensor, Tensor]:
        """Take keys and values from the cache, or compute them from `states` and cache them."""
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values  # type: ignore[union-attr, return-value]  # which are there
        assert states is not None
        if cache is None:
            return self.key_value(states)
        cache.is_updated[self.layer_idx] = True
        return cache.cross_attention_cache.update(*self.key_value(states), self.layer_idx)


class TestaTextMLP(nn.Module):
    def __init__(self, config: TestaTextConfig):
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output = self.output(self.activation(self.intermediate(hidden_states)))
        return self.layer_norm(self.dropout(output) + hidden_states)


class TestaTextLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention where there is something to attend to, MLP."""

    def __init__(self, config: TestaTextConfig, layer_idx: int):
        super().__init__()
        self.self_attention = TestaTextAttention(config, layer_idx)
        self.cross_attention = TestaTextAttention(config, layer_idx, is_cross_attention=True)
        self.mlp = TestaTextMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        has_encoder: bool = False,
        has_attended_itself: bool = False,
        num_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Read texts `[N, L, D]`, of which only the first `num_tokens` tokens are wanted."""
        wanted = hidden_states[:, :num_tokens]
        if has_attended_itself:
            hidden_states = wanted
        else:
            hidden_states, _ = self.self_attention(wanted, attention_mask, hidden_states, cache, **kwargs)
        if has_encoder:
            hidden_states, _ = self.cross_attention(
                hidden_states, encoder_attention_mask, encoder_hidden_states, cache, **kwargs
            )
        return self.mlp(hidden_states)


class TestaTextModel(TestaPreTrainedModel):
    """BERT that reads a text alone, together with a video, or (`config.is_decoder`) predicts it token by token.

    The text arrives as the tokenizer gives it; which token comes first ([CLS], [ENC], [DEC]) is the caller's choice.
    """

    config: TestaTextConfig  # type: ignore[assignment]
    main_input_name = "input_ids"
    input_modalities = ["text"]
    _input_embed_layer = "word_embeddings"
    _can_record_outputs = {
        "hidden_states": TestaTextLayer,
        "attentions": OutputRecorder(TestaTextAttention, index=1, layer_name="self_attention"),
        "cross_attentions": OutputRecorder(TestaTextAttention, index=1, layer_name="cross_attention"),
    }

    def __init__(self, config: TestaTextConfig):
        super().__init__(config)
        self.embeddings = TestaTextEmbeddings(config)
        self.layers: Sequence[TestaTextLayer] = nn.ModuleList(  # type: ignore[assignment]
            [TestaTextLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.post_init()

    def read_alone(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read texts `[N, L]` up to where a text encoder first attends to a video, to pass as `text_states [N, L, D]`.

        So far they are the same for every video.
        """
        hidden_states = self.embeddings(input_ids)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        return self.layers[0].self_attention(hidden_states, attention_mask, hidden_states)[0]

    def cache_cross_attention(self, encoder_hidden_states: Tensor) -> EncoderDecoderCache:
        """Compute cross-attention keys and values of encoder states `[V, S, D]` once, to pass as `cache`.

        A text encoder may use the cache for any number of texts; a decoder adds its own tokens to it.
        """
        cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        for layer in self.layers:
            layer.cross_attention.cross_key_value(encoder_hidden_states, cache)
        return cache

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]  # TransformersKwargs has `position_ids` too
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        text_states: Tensor | None = None,
        first_token_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Read texts.

        Args:
            input_ids: `[N, L]`.
            attention_mask: `[N, L]`, 0 at padding (with a cache: `[N, past + L]`).
            encoder_hidden_states: `[V, S, D]`, states to cross-attend to. N is a multiple of V, and each sequence
                serves N / V texts in a row.
            encoder_attention_mask: `[V, S]`, 0 at padding.
            cache: A decoder's cache, or what [`cache_cross_attention`] returned.
            inputs_embeds: `[N, L, D]`, instead of `input_ids`.
            position_ids: `[N, L]`, instead of counting on from the cache.
            use_cache: Whether a decoder returns its cache.
            text_states: `[N, L, D]`, what [`read_alone`] returned, instead of `input_ids`.
            first_token_only: Whether a text encoder computes `last_hidden_state` of the first token only, `[N, 1, D]`.

        Raises:
            ValueError: Where not exactly one of `input_ids`, `inputs_embeds` and `text_states` is given, the text is
                longer than `max_position_embeddings`, N is no multiple of V, or a decoder is to read like an encoder.
        """
        if sum(text is not None for text in (input_ids, inputs_embeds, text_states)) != 1:
            raise ValueError("Exactly one of `input_ids`, `inputs_embeds` and `text_states` is needed.")
        if self.config.is_decoder and (text_states is not None or first_token_only):
            raise ValueError("`text_states` and `first_token_only` are for text encoders; this is a decoder.")
        use_cache = bool(use_cache) and self.config.is_decoder
        if use_cache and not isinstance(cache, EncoderDecoderCache):
            cache = EncoderDecoderCache(cache or DynamicCache(config=self.config), DynamicCache(config=self.config))
        past_length = cache.get_seq_length() if cache is not None else 0
        hidden_states = text_states
        if hidden_states is None:
            hidden_states = self.embeddings(input_ids, inputs_embeds, position_ids, past_length)

        create_mask = create_causal_mask if self.config.is_decoder else create_bidirectional_mask
        text_mask = create_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            cache=cache if self.config.is_decoder else None,
        )
        first_token_mask = None
        if first_token_only:
            first_token_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states[:, :1],
                attention_mask=attention_mask,
                encoder_hidden_states=hidden_states,
            )
        has_encoder = encoder_hidden_states is not None or (
            isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(0, False)
        )
        if has_encoder and encoder_attention_mask is not None:
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                # One row of queries: the mask is the same for all tokens of all texts that share a sequence.
                inputs_embeds=hidden_states[: encoder_attention_mask.shape[0], :1],
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=hidden_states.new_empty(*encoder_attention_mask.shape, 0),
            )
        for number, layer in enumerate(self.layers):
            ends_at_first_token = first_token_only and number == len(self.layers) - 1
            hidden_states = layer(
                hidden_states,
                first_token_mask if ends_at_first_token else text_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                cache=cache,
                has_encoder=has_encoder,
                has_attended_itself=text_states is not None and number == 0,
                num_tokens=1 if ends_at_first_token else None,
                **kwargs,
            )
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            cache=cache if use_cache else None,
        )


class TestaPredictionHead(nn.Module):
    """BERT's head that predicts a token from its state."""

    def __init__(self, config: TestaTextConfig):
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(self.activation(self.transform(hidden_states))))


class TestaTextDecoder(TestaPreTrainedModel, GenerationMixin):
    """Predicts a text token by token while attending to a video, or to a question that was read with a video.

    The text starts with [DEC], which the models that own a decoder put there.
    """

    config: TestaTextConfig  # type: ignore[assignment]
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ["text"]
    _tied_weights_keys = {"prediction_head.decoder.weight": "text_model.embeddings.word_embeddings.weight"}

    def __init__(self, config: TestaTextConfig):
        super().__init__(config)
        if not config.is_decoder:
            raise ValueError("TestaTextConfig.is_decoder is False; a decoder needs True.")
        self.text_model = TestaTextModel(config)
        self.prediction_head = TestaPredictionHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.prediction_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.prediction_head.decoder = new_embeddings

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithCrossAttentions:
        """Predict each next token.

        Args:
            input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, cache, inputs_embeds,
                position_ids, use_cache: As in [`TestaTextModel.forward`].
            labels: `[N, L]`, tokens to predict, in the places of `input_ids` (a token is predicted from those before
                it); -100 where there is nothing to predict. The loss is the mean over them, with label smoothing.
            logits_to_keep: Compute logits of this many last tokens only; 0: of all.

        Returns:
            `loss`, `logits [N, L, vocabulary]` and the cache.
        """
        output = self.text_model(
            input_ids,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            use_cache=use_cache if labels is None else False,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.prediction_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.text_losses(logits, labels).sum() / (labels[:, 1:] != -100).sum().clamp(min=1)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            cache=output.cache,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
        )

    def as_prompt(
        self, num_texts: int, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return what generation starts from: [DEC], then the text `[N, L]` of a prompt without its [SEP].

        Prompts end at the last place, where generation goes on; their padding comes first.
        """
        if input_ids is None:
            input_ids = torch.full((num_texts, 1), self.config.bos_token_id, device=self.device)
            return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        is_text = input_ids != self.config.sep_token_id
        if attention_mask is not None:
            is_text &= attention_mask.bool()
        input_ids = _replace_first_token(input_ids, self.config.bos_token_id)
        padding_first = is_text.long().argsort(dim=1, stable=True)
        return {
            "input_ids": input_ids.gather(1, padding_first),
            "attention_mask": is_text.long().gather(1, padding_first),
        }

    def text_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the losses `[N]` of texts, each summed over its tokens, from logits `[N, L, vocabulary]`."""
        return -text_log_likelihoods(logits, labels, self.config.label_smoothing)


def _decoder_config(config: TestaConfig, encoder_hidden_size: int) -> TestaTextConfig:
    decoder_config = deepcopy(config.text_config)
    decoder_config.is_decoder = True
    decoder_config.encoder_hidden_size = encoder_hidden_size
    return decoder_config


# --- Both encoders ---------------------------------------------------------------------------------------------------


class TestaModel(TestaPreTrainedModel):
    """The video encoder and the text encoder, without heads."""

    def __init__(self, config: TestaConfig, add_text_model: bool = True):
        super().__init__(config)
        self.video_model = TestaVideoModel(config.video_config)
        text_model = TestaTextModel(config.text_config) if add_text_model else None
        self.text_model: TestaTextModel = text_model  # type: ignore[assignment]  # None in TestaForCaptioning alone
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return (self.text_model or self.video_model).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        (self.text_model or self.video_model).set_input_embeddings(value)

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> TestaVideoModelOutput:
        """Encode videos `[B, T, C, H, W]`; `pooler_output [B, D]` is pooled as `config.video_pooling` says."""
        output = self.video_model(pixel_values_videos, return_dict=True, **kwargs)
        if self.config.video_pooling == "cls":
            output.pooler_output = output.last_hidden_state[:, 0]
        return output

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode texts `[B, L]`; `pooler_output [B, D]` is the first token's state."""
        return self.text_model(input_ids, attention_mask, return_dict=True, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TestaModelOutput:
        """Encode videos `[B, T, C, H, W]` and texts `[N, L]`, each by itself."""
        video_output = self.get_video_features(pixel_values_videos, return_dict=True, **kwargs)
        text_output = self.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)
        return TestaModelOutput(
            video_features=video_output.pooler_output,
            text_features=text_output.pooler_output,
            video_model_output=video_output,
            text_model_output=text_output,
        )


# --- Task heads ------------------------------------------------------------------------------------------------------


class TestaForRetrieval(TestaPreTrainedModel):
    """Videos and texts in one embedding space, and a head that tells whether a text read with a video matches it."""

    def __init__(self, config: TestaConfig):
        super().__init__(config)
        self.add_modules(config)
        self.post_init()

    def add_modules(self, config: TestaConfig) -> None:
        self.testa = TestaModel(config)
        self.video_projection = nn.Linear(config.video_config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.temperature = nn.Parameter(torch.tensor([config.temperature_init]))  # a vector, as FSDP shards no scalar
        self.matching_head = nn.Linear(config.text_config.hidden_size, 2)

    @property
    def bounded_temperature(self) -> Tensor:
        """The learned temperature, within the bounds that the released training keeps."""
        return self.temperature.clamp(0.001, 0.5)

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> TestaVideoModelOutput:
        """Encode videos `[B, T, C, H, W]`; `pooler_output [B, projection_dim]` is the embedding, of length 1."""
        output = self.testa.get_video_features(pixel_values_videos, return_dict=True, **kwargs)
        output.pooler_output = F.normalize(apply_head(self.video_projection, output.pooler_output), dim=-1)
        return output

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode texts `[B, L]`; `pooler_output [B, projection_dim]` is the embedding, of length 1."""
        output = self.testa.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)
        output.pooler_output = F.normalize(apply_head(self.text_projection, output.pooler_output), dim=-1)
        return output

    def match(
        self,
        video_hidden_states: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Read texts together with videos.

        Args:
            video_hidden_states: `[V, S, D]`, the `last_hidden_state` of videos; None where `cache` holds their keys and
                values. N is a multiple of V; each video serves N / V texts in a row, and its keys and values are
                computed once.
            input_ids: `[N, L]`, texts as the tokenizer gives them.
            attention_mask: `[N, L]`.
            cache: Of V videos; keys and values that it doesn't hold yet are put into it.

        Returns:
            Logits `[N, 2]`; index 1 means that text and video match.
        """
        output = self.testa.text_model(
            _replace_first_token(input_ids, self.config.text_config.enc_token_id),
            attention_mask,
            encoder_hidden_states=video_hidden_states,
            cache=cache,
            first_token_only=True,
            **kwargs,
        )
        return apply_head(self.matching_head, output.last_hidden_state[:, 0])

    def read_before_matching(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read texts `[N, L]`, as the tokenizer gives them, as far as they don't depend on a video: `[N, L, D]`."""
        input_ids = _replace_first_token(input_ids, self.config.text_config.enc_token_id)
        return self.testa.text_model.read_alone(input_ids, attention_mask)

    def read_videos_before_matching(self, video_hidden_states: Tensor) -> EncoderDecoderCache:
        """Read videos `[V, S, D]` as far as they don't depend on a text: their cross-attention keys and values."""
        return self.testa.text_model.cache_cross_attention(video_hidden_states)

    def match_states(
        self, text_states: Tensor, attention_mask: Tensor | None, video_cache: EncoderDecoderCache
    ) -> Tensor:
        """Match as [`match`] does, with what many pairs share computed once.

        Args:
            text_states: `[N, L, D]`, what [`read_before_matching`] returned.
            attention_mask: `[N, L]`.
            video_cache: Of V videos, what [`read_videos_before_matching`] returned. N is a multiple of V, and each video
                serves N / V texts in a row.

        Returns:
            Logits `[N, 2]`; index 1 means that text and video match.
        """
        output = self.testa.text_model(
            text_states=text_states, attention_mask=attention_mask, cache=video_cache, first_token_only=True
        )
        return apply_head(self.matching_head, output.last_hidden_state[:, 0])

    @torch.no_grad()
    def ground(
        self, pixel_values_videos: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> TestaGroundingOutput:
        """Tell when and where a video shows what a text says (Figure 4 of the paper).

        A token is compared with a text as a whole video is: projected, by cosine. Of what the model offers this finds
        objects best (see `benchmarks/grounding.py`).

        Args:
            pixel_values_videos: `[B, T, C, H, W]`.
            input_ids: `[N, L]`, phrases as the tokenizer gives them. N is a multiple of B, and each video serves N / B
                texts in a row.
            attention_mask: `[N, L]`.

        Raises:
            ValueError: Where N is no multiple of B.
        """
        num_videos, num_texts = len(pixel_values_videos), len(input_ids)
        if num_texts % num_videos:
            raise ValueError(f"{num_texts} texts can't share {num_videos} videos: the first must be a multiple.")
        video_output = self.get_video_features(pixel_values_videos, return_dict=True)
        text_embeds = self.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output
        token_embeds = F.normalize(apply_head(self.video_projection, video_output.last_hidden_state), dim=-1)
        scores = text_embeds.unflatten(0, (num_videos, -1)) @ token_embeds.transpose(1, 2)  # [B, N / B, S]
        token_map = video_output.token_map[:, None].expand(-1, scores.shape[1], -1, -1)  # [B, N / B, T, L]
        patch_scores = scores.gather(2, token_map.clamp(min=0).flatten(2)).view_as(token_map)
        patch_scores = patch_scores.masked_fill(token_map < 0, -1).flatten(0, 1)
        return TestaGroundingOutput(
            scores=patch_scores, frame_scores=patch_scores.amax(dim=-1), video_model_output=video_output
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pair_ids: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TestaRetrievalOutput:
        """Compare videos with texts, and compute the losses of their pairs.

        Args:
            pixel_values_videos: `[B, T, C, H, W]`.
            input_ids: `[N, L]`; with a loss, N = B and text i belongs to video i.
            attention_mask: `[N, L]`.
            pair_ids: `[B]` integers, equal for samples that show the same video: these count as each other's positives
                in the contrastive loss and are never each other's negatives. Without them every sample is a video of
                its own.
            return_loss: Whether to compute the losses; by default in training mode and where `pair_ids` are given.
        """
        video_output = self.get_video_features(pixel_values_videos, return_dict=True, **kwargs)
        text_output = self.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)
        video_embeds, text_embeds = video_output.pooler_output, text_output.pooler_output
        with maybe_autocast(device_type=video_embeds.device.type, enabled=False):
            logits_per_video = video_embeds @ text_embeds.t() / self.bounded_temperature

        loss = loss_vtc = loss_vtm = None
        if return_loss is None:
            return_loss = self.training or pair_ids is not None
        if return_loss:
            if len(video_embeds) != len(text_embeds):
                raise ValueError(f"A loss needs pairs; got {len(video_embeds)} videos and {len(text_embeds)} texts.")
            if pair_ids is None:
                pair_ids = torch.arange(len(video_embeds), device=video_embeds.device)
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            targets = same_pair_targets(pair_ids, pair_ids)
            loss_vtc = contrastive_loss(logits_per_video, logits_per_video.t(), targets, targets)
            pairs = video_output.last_hidden_state, input_ids, attention_mask
            negatives = draw_hard_negatives(logits_per_video, pair_ids)
            loss_vtm = self.matching_loss(*pairs, negatives, candidates=pairs, **kwargs)
            loss = loss_vtc + loss_vtm
        return TestaRetrievalOutput(
            loss=loss,
            loss_vtc=loss_vtc,
            loss_vtm=loss_vtm,
            logits_per_video=logits_per_video,
            logits_per_text=logits_per_video.t(),
            video_embeds=video_embeds,
            text_embeds=text_embeds,
            video_model_output=video_output,
            text_model_output=text_output,
        )

    def matching_loss(
        self,
        video_hidden_states: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        negatives: HardNegatives,
        candidates: tuple[Tensor, Tensor, Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Match texts with their videos and with hard negative videos, and videos with hard negative texts.

        Args:
            video_hidden_states: `[B, S, D]`.
            input_ids: `[B, L]`, the texts of these videos.
            attention_mask: `[B, L]`.
            negatives: Which of the candidates is the negative of each text, and of each video.
            candidates: Video states `[C, S, D]`, texts `[C, L]` and their masks, which negatives are taken from.
        """
        candidate_videos, candidate_ids, candidate_masks = candidates
        # Each video is read with its own text and a negative one: [B, 2, L] -> [2 * B, L]
        both_ids = torch.stack([input_ids, candidate_ids[negatives.text_of_video]], dim=1).flatten(0, 1)
        both_masks = torch.stack([attention_mask, candidate_masks[negatives.text_of_video]], dim=1).flatten(0, 1)
        cache = None
        if candidate_videos is video_hidden_states and not self.is_activation_checkpointing:
            # The negative videos are among these: their keys and values are there already. (Checkpointing would have to
            # keep them for all layers, which is more than it saves.)
            text_config = self.config.text_config
            cache = EncoderDecoderCache(DynamicCache(config=text_config), DynamicCache(config=text_config))
        logits = self.match(video_hidden_states, both_ids, both_masks, cache=cache, **kwargs).unflatten(0, (-1, 2))
        negative_videos = None
        if cache is None:
            negative_videos = candidate_videos[negatives.video_of_text]
        else:
            cache.cross_attention_cache.batch_select_indices(negatives.video_of_text)
        negative_logits = self.match(negative_videos, input_ids, attention_mask, cache=cache, **kwargs)
        return matching_loss(
            logits[:, 0],
            torch.cat([negative_logits, logits[:, 1]]),
            torch.cat([negatives.text_has_negative, negatives.video_has_negative]),
        )


class TestaForPreTraining(TestaForRetrieval):
    """[`TestaForRetrieval`] with a video-grounded decoder, which learns to tell what the videos show.

    The decoder shares all weights but those of self-attention with the text encoder (section 3.3 of the paper).
    """

    _tied_weights_keys = {
        r"text_decoder.text_model.embeddings.\w+\.": r"testa.text_model.embeddings.\w+\.",
        r"text_decoder.text_model.layers.\d+.cross_attention": r"testa.text_model.layers.\d+.cross_attention",
        r"text_decoder.text_model.layers.\d+.mlp": r"testa.text_model.layers.\d+.mlp",
    }

    def add_modules(self, config: TestaConfig) -> None:
        super().add_modules(config)
        self.text_decoder = TestaTextDecoder(_decoder_config(config, config.video_config.hidden_size))

    def get_output_embeddings(self) -> nn.Module:
        return self.text_decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.text_decoder.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pair_ids: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TestaPreTrainingOutput:
        """Compare videos with texts, and compute the losses of their pairs. Arguments are those of [`TestaForRetrieval`]."""
        output = super().forward(
            pixel_values_videos, input_ids, attention_mask, pair_ids, return_loss, return_dict=True, **kwargs
        )
        output = TestaPreTrainingOutput(**output)
        if output.loss is not None:
            videos = output["video_model_output"].last_hidden_state
            output.loss_caption = self.caption_loss(videos, input_ids, attention_mask, **kwargs)
            output.loss = output.loss + output.loss_caption
        return output

    def caption_loss(
        self,
        video_hidden_states: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Return the mean loss of predicting the tokens of texts `[B, L]` from their videos `[B, S, D]`."""
        input_ids = _replace_first_token(input_ids, self.config.text_config.bos_token_id)
        labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
        return self.text_decoder(
            input_ids, attention_mask, video_hidden_states, labels=labels, return_dict=True, **kwargs
        ).loss


class TestaForCaptioning(TestaPreTrainedModel):
    """Tells in words what a video shows. A checkpoint of [`TestaForPreTraining`] can be loaded as well."""

    # Pre-training stores what its decoder shares with the text encoder once, under the encoder's name.
    _pretraining_names = {
        r"^testa\.text_model\.(embeddings|layers\.\d+\.(?:cross_attention|mlp))\.": r"text_decoder.text_model.\1."
    }

    def __init__(self, config: TestaConfig):
        super().__init__(config)
        self.testa = TestaModel(config, add_text_model=False)
        self.text_decoder = TestaTextDecoder(_decoder_config(config, config.video_config.hidden_size))
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any
    ) -> "TestaForCaptioning":
        return super().from_pretrained(*args, key_mapping=key_mapping or cls._pretraining_names, **kwargs)

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)  # type: ignore[misc]

    def get_input_embeddings(self) -> nn.Module:
        return self.text_decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_decoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TestaCaptioningOutput:
        """Predict each next token of captions.

        Args:
            pixel_values_videos: `[B, T, C, H, W]`.
            input_ids: `[B, L]`, captions as the tokenizer gives them.
            attention_mask: `[B, L]`.
            labels: `[B, L]`, as in [`TestaTextDecoder.forward`]; -100 hides a prompt or padding from the loss.
        """
        video_output = self.testa.get_video_features(pixel_values_videos, return_dict=True, **kwargs)
        output = self.text_decoder(
            _replace_first_token(input_ids, self.config.text_config.bos_token_id),
            attention_mask,
            video_output.last_hidden_state,
            labels=labels,
            return_dict=True,
            **kwargs,
        )
        return TestaCaptioningOutput(loss=output.loss, logits=output.logits, video_model_output=video_output)

    @torch.no_grad()
    def generate(
        self,
        pixel_values_videos: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Tensor:
        """Caption videos.

        Args:
            pixel_values_videos: `[B, T, C, H, W]`.
            input_ids: `[B, L]`, how each caption begins, as the tokenizer gives it; without it captions start freely.
            attention_mask: `[B, L]`.
            generate_kwargs: Those of [`~transformers.GenerationMixin.generate`]: `num_beams`, `max_new_tokens`, ...

        Returns:
            Token ids `[B, N]`, padding, [DEC] and the prompt included; what `generate` returns for other options.
        """
        videos = self.testa.get_video_features(pixel_values_videos, return_dict=True).last_hidden_state
        return self.text_decoder.generate(
            **self.text_decoder.as_prompt(len(videos), input_ids, attention_mask),
            encoder_hidden_states=videos,
            **generate_kwargs,
        )


class TestaForVideoQA(TestaPreTrainedModel):
    """Answers questions about videos in free text: the question is read with the video, the answer told from that.

    A checkpoint of [`TestaForPreTraining`] or [`TestaForRetrieval`] can be loaded as well: what the decoder misses then
    is copied from the text encoder, with which pre-training shares it.
    """

    def __init__(self, config: TestaConfig):
        super().__init__(config)
        self.testa = TestaModel(config)
        self.text_decoder = TestaTextDecoder(_decoder_config(config, config.text_config.hidden_size))
        self.post_init()

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        missing = missing_keys or set()
        for name in sorted(missing):
            source = name.replace("text_decoder.", "testa.", 1)
            if name.startswith("text_decoder.text_model.") and source not in missing:
                weight, of_encoder = self.get_parameter(name), self.get_parameter(source)
                if weight.shape == of_encoder.shape:  # the encoder reads videos, which may have another width
                    weight.data.copy_(of_encoder.data)
                    missing.remove(name)
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)

    def read_question(
        self,
        pixel_values_videos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[TestaVideoModelOutput, Tensor]:
        """Return the encoded videos, and the states `[B, N, D]` of questions `[B, N]` read with them."""
        video_output = self.testa.get_video_features(pixel_values_videos, return_dict=True, **kwargs)
        question_output = self.testa.text_model(
            _replace_first_token(input_ids, self.config.text_config.enc_token_id),
            attention_mask,
            video_output.last_hidden_state,
            return_dict=True,
            **kwargs,
        )
        return video_output, question_output.last_hidden_state

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        answer_input_ids: Tensor | None = None,
        answer_attention_mask: Tensor | None = None,
        answer_weights: Tensor | None = None,
        answers_per_question: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TestaVideoQAOutput:
        """Read questions, and learn their answers where these are given.

        Args:
            pixel_values_videos: `[V, T, C, H, W]`; B is a multiple of V, and each video serves B / V questions in a row.
            input_ids: `[B, N]`, questions as the tokenizer gives them.
            attention_mask: `[B, N]`.
            answer_input_ids: `[A, L]`, the answers to the first question, then those to the second, ...
            answer_attention_mask: `[A, L]`.
            answer_weights: `[A]`, what each answer counts; 1 by default.
            answers_per_question: `[B]` integers that sum to A; A / B each by default.

        Returns:
            `loss` is the sum of the answers' weighted losses, each summed over its tokens, over the number of questions.

        Raises:
            ValueError: Where B questions can't have A answers.
        """
        video_output, question_states = self.read_question(pixel_values_videos, input_ids, attention_mask, **kwargs)
        if answer_input_ids is None:
            return TestaVideoQAOutput(video_model_output=video_output, question_hidden_states=question_states)
        num_answers = len(answer_input_ids)
        states, mask = question_states, attention_mask
        if answers_per_question is not None:
            states = states.repeat_interleave(answers_per_question, 0, output_size=num_answers)
            if mask is not None:
                mask = mask.repeat_interleave(answers_per_question, 0, output_size=num_answers)
        if answer_weights is None:
            answer_weights = states.new_ones(num_answers)
        logits, losses = self.answer_losses(states, mask, answer_input_ids, answer_attention_mask, **kwargs)
        return TestaVideoQAOutput(
            loss=(losses * answer_weights).sum() / len(input_ids),
            logits=logits,
            video_model_output=video_output,
            question_hidden_states=question_states,
        )

    def answer_losses(
        self,
        question_states: Tensor,
        question_mask: Tensor | None,
        answer_input_ids: Tensor,
        answer_attention_mask: Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor]:
        """Return logits `[A, L, vocabulary]` and losses `[A]` of answers to Q questions, A / Q in a row to each."""
        answer_input_ids = _replace_first_token(answer_input_ids, self.config.text_config.bos_token_id)
        output = self.text_decoder(
            answer_input_ids,
            answer_attention_mask,
            question_states,
            question_mask,
            use_cache=False,
            return_dict=True,
            **kwargs,
        )
        labels = answer_input_ids
        if answer_attention_mask is not None:
            labels = answer_input_ids.masked_fill(answer_attention_mask == 0, -100)
        return output.logits, self.text_decoder.text_losses(output.logits, labels)

    @torch.no_grad()
    def generate(
        self,
        pixel_values_videos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Tensor:
        """Answer questions `[B, N]` about videos `[V, T, C, H, W]` in free text; each serves B / V questions in a row.

        Args:
            generate_kwargs: Those of [`~transformers.GenerationMixin.generate`]: `num_beams`, `max_new_tokens`, ...

        Returns:
            Token ids `[B, L]`, [DEC] and padding included; what `generate` returns for other options.
        """
        _, question_states = self.read_question(pixel_values_videos, input_ids, attention_mask)
        return self.text_decoder.generate(
            **self.text_decoder.as_prompt(len(question_states)),
            encoder_hidden_states=question_states,
            encoder_attention_mask=attention_mask,
            **generate_kwargs,
        )

    @torch.no_grad()
    def score_answers(
        self,
        pixel_values_videos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        answer_input_ids: Tensor,
        answer_attention_mask: Tensor,
    ) -> Tensor:
        """Return the log-probabilities `[B, answers]` of the same answers `[answers, L]` to every question.

        They are smoothed by `label_smoothing` as in training, which is how the released models rank answers.
        """
        _, question_states = self.read_question(pixel_values_videos, input_ids, attention_mask)
        answers = torch.arange(len(answer_input_ids), device=answer_input_ids.device).expand(len(input_ids), -1)
        return self._score(question_states, attention_mask, answer_input_ids, answer_attention_mask, answers)

    @torch.no_grad()
    def rank_answers(
        self,
        pixel_values_videos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        answer_input_ids: Tensor,
        answer_attention_mask: Tensor,
        top_k: int = 128,
    ) -> Tensor:
        """Choose among the same answers for every question.

        Args:
            pixel_values_videos: `[V, T, C, H, W]`, each of B / V questions in a row.
            input_ids: `[B, N]`, questions.
            attention_mask: `[B, N]`.
            answer_input_ids: `[answers, L]`, as the tokenizer gives them.
            answer_attention_mask: `[answers, L]`.
            top_k: Answers with the likeliest first token, whose full log-probabilities are compared.

        Returns:
            `[B]`, the index of the likeliest answer.
        """
        _, question_states = self.read_question(pixel_values_videos, input_ids, attention_mask)
        first = self.text_decoder(
            **self.text_decoder.as_prompt(len(question_states)),
            encoder_hidden_states=question_states,
            encoder_attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
        ).logits[:, 0]
        likeliest = first[:, answer_input_ids[:, 1]].topk(min(top_k, len(answer_input_ids)), dim=1).indices
        scores = self._score(question_states, attention_mask, answer_input_ids, answer_attention_mask, likeliest)
        return likeliest.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)

    def _score(
        self,
        question_states: Tensor,
        question_mask: Tensor | None,
        answer_input_ids: Tensor,
        answer_attention_mask: Tensor,
        answers: Tensor,
        answers_at_once: int = 32,
    ) -> Tensor:
        """Log-probabilities `[B, K]` of those `answers [B, K]`, an index into `answer_input_ids`, to each question."""
        scores = []
        for some in answers.split(answers_at_once, dim=1):
            ids, mask = answer_input_ids[some].flatten(0, 1), answer_attention_mask[some].flatten(0, 1)
            _, losses = self.answer_losses(question_states, question_mask, ids, mask)
            scores.append(-losses.view_as(some))
        return torch.cat(scores, dim=1)


class TestaForMultipleChoiceVideoQA(TestaPreTrainedModel):
    """Chooses between answers to a question about a video: each is read with the video and judged by a matching head.

    A checkpoint of [`TestaForRetrieval`] or [`TestaForPreTraining`] can be loaded as well, and chooses without training
    the text that matches the video best.
    """

    def __init__(self, config: TestaConfig):
        super().__init__(config)
        self.testa = TestaModel(config)
        self.matching_head = nn.Linear(config.text_config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TestaVideoQAOutput:
        """Judge each choice.

        Args:
            pixel_values_videos: `[V, T, C, H, W]`; B is a multiple of V, and each video serves B / V questions in a row.
            input_ids: `[B, choices, N]`, "question? choice" as the tokenizer gives it.
            attention_mask: `[B, choices, N]`.
            labels: `[B]`, index of the right choice.

        Returns:
            `logits [B, choices]`, the log-odds that text and video match; `loss`, their cross-entropy.
        """
        video_output = self.testa.get_video_features(pixel_values_videos, return_dict=True, **kwargs)
        states = self.testa.text_model(
            _replace_first_token(input_ids.flatten(0, 1), self.config.text_config.enc_token_id),
            None if attention_mask is None else attention_mask.flatten(0, 1),
            video_output.last_hidden_state,
            return_dict=True,
            **kwargs,
        ).last_hidden_state
        unmatched, matched = apply_head(self.matching_head, states[:, 0]).unbind(dim=-1)
        logits = (matched - unmatched).view(input_ids.shape[:2])
        return TestaVideoQAOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            video_model_output=video_output,
            question_hidden_states=states,
        )


def apply_head(head: nn.Linear, features: Tensor) -> Tensor:
    """Apply a head in the precision of its weights: autocast would round away the differences that rank candidates."""
    with maybe_autocast(device_type=features.device.type, enabled=False):
        return head(features.to(head.weight.dtype))


def _replace_first_token(input_ids: Tensor, token_id: int) -> Tensor:
    return torch.cat([torch.full_like(input_ids[:, :1], token_id), input_ids[:, 1:]], dim=1)


__all__ = [
    "TestaForCaptioning",
    "TestaForMultipleChoiceVideoQA",
    "TestaForPreTraining",
    "TestaForRetrieval",
    "TestaForVideoQA",
    "TestaModel",
    "TestaPreTrainedModel",
    "TestaTextDecoder",
    "TestaTextModel",
    "TestaVideoModel",
]
