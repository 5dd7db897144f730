"""Other models of the Transformers library, as they are, in the evaluation of this package.

Each has the methods that [`evaluate_retrieval`] asks of a model, so that one evaluation computes the figures of TESTA and of
what it is compared with. Videos are decoded and sampled as for TESTA; their frames are resized, cropped and normalised,
and texts are tokenized, by the baseline's own processor.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoProcessor,
    BatchFeature,
    BlipForImageTextRetrieval,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension
from transformers.modeling_outputs import BaseModelOutputWithPooling

from transformers_testa.hub import load_config
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.video_decoding_testa import FrameSelection, VideoSource
from transformers_testa.video_processing_testa import TestaVideoProcessor


# --- Models ------------------------------------------------------------------------------------------------------------


class Baseline(nn.Module, ABC):
    """A model of the Transformers library with the methods that [`evaluate_retrieval`] asks of a model.

    Args:
        model: What is wrapped, an instance of `model_class`.
        tokenizer: Its tokenizer.

    Attributes:
        model_type: Of the configurations that it takes.
        takes: What a message says about these.
        model_class: What loads them.
        has_matching_head: Whether it re-ranks: then it has `read_before_matching`, `read_videos_before_matching` and
            `match_states`, as `TestaForRetrieval` has.
    """

    model_type: ClassVar[str]
    takes: ClassVar[str] = ""
    model_class: ClassVar[Any] = AutoModel
    has_matching_head: ClassVar[bool] = False

    # Only some have these methods.
    read_before_matching: Callable[[Tensor, Tensor], Tensor]
    read_videos_before_matching: Callable[[Tensor], Any]
    match_states: Callable[[Tensor, Tensor, Any], Tensor]
    compare: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.model: Any = model  # of classes that have no interface in common
        self.tokenizer = tokenizer

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @classmethod
    def frame_transform(cls, processor: ProcessorMixin) -> BaseImageProcessor:
        """The part of the model's processor that makes pixel values of frames."""
        return processor.image_processor

    @abstractmethod
    def get_video_features(self, pixel_values_videos: Tensor) -> BaseModelOutputWithPooling:
        """Encode videos `[B, T, C, H, W]`: `pooler_output [B, E]` is compared with texts, `last_hidden_state [B, S, D]`
        is what else of a video a pair needs; float32 but for the latter."""

    @abstractmethod
    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        """Encode texts `[B, L]`, as the tokenizer gives them; `pooler_output [B, E]`, float32."""

    def forward(self, pixel_values_videos: Tensor) -> BaseModelOutputWithPooling:
        """The same as [`get_video_features`]."""
        return self.get_video_features(pixel_values_videos)

    def count_video_gflops(self, num_frames: int, height: int, width: int) -> float:
        """Return the GFLOPs of encoding one video: convolutions, linear layers and matrix products.

        A multiply-add counts once, as in [`flops.count_video_gflops`], which counts layer norms too. Nothing is computed.
        """
        tensors = chain(self.named_parameters(), self.named_buffers())
        weights = {name: tensor.detach().to("meta") for name, tensor in tensors}
        pixels = torch.empty(1, num_frames, 3, height, width, device="meta")
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            functional_call(self, weights, (pixels,))
        return counter.get_total_flops() / 2e9


class FramePooledClip(Baseline):
    """CLIP, frame by frame: the parameter-free similarity of CLIP4Clip (Luo et al., 2021), with CLIP's own weights.

    A video is the mean of its frames' features, each of length 1.
    """

    model_type = "clip"

    def get_video_features(self, pixel_values_videos: Tensor) -> BaseModelOutputWithPooling:
        frames = self.model.get_image_features(pixel_values_videos.flatten(0, 1)).pooler_output  # [B*T, E]
        frames = F.normalize(frames.float(), dim=-1).unflatten(0, pixel_values_videos.shape[:2])
        return _features(F.normalize(frames.mean(dim=1), dim=-1))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        output = self.model.get_text_features(input_ids, attention_mask)
        return _features(F.normalize(output.pooler_output.float(), dim=-1))


class FramePooledSiglip2(FramePooledClip):
    """SigLIP 2 (or SigLIP), frame by frame, pooled as [`FramePooledClip`] pools CLIP.

    It was trained on texts padded to its full length, and reads their padding: each is padded so here.
    """

    model_type = "siglip"
    takes = ", as SigLIP 2 at a fixed resolution is; at any (NaFlex, `siglip2`) it is not supported"

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        missing = self.config.text_config.max_position_embeddings - input_ids.shape[1]
        sides = (missing, 0) if self.tokenizer.padding_side == "left" else (0, missing)
        input_ids = F.pad(input_ids, sides, value=self.tokenizer.pad_token_id)
        return _features(F.normalize(self.model.get_text_features(input_ids).pooler_output.float(), dim=-1))


class FrameConcatenatedBlip(Baseline):
    """BLIP on the tokens of all frames in one sequence, as its authors evaluate it on videos (Li et al., 2022, section 5.6).

    They sample frames uniformly (8 for retrieval) and concatenate their features: the image-grounded text encoder, which
    re-ranks, attends to T * (1 + patches) tokens of a video. For the candidates a video is the mean of its frames'
    projected class tokens. As in their evaluation, and unlike in the `forward` of [`BlipForImageTextRetrieval`], [ENC]
    takes the place of [CLS] in a text that is matched.

    Until it is re-ranked a video takes 14 MB on disk, with 8 frames of 384 pixels in float32.
    """

    model_type = "blip"
    model_class = BlipForImageTextRetrieval
    has_matching_head = True

    # Pairs read at a time have no more tokens of videos than these in all, or are alone: with texts of 72 tokens they took
    # 1.05 GB in the base model, in float32.
    tokens_at_once = 2**17

    def get_video_features(self, pixel_values_videos: Tensor) -> BaseModelOutputWithPooling:
        states = self.model.vision_model(pixel_values_videos.flatten(0, 1)).last_hidden_state
        states = states.unflatten(0, pixel_values_videos.shape[:2])  # [B, T, 1+L, D]
        embeddings = self.model.vision_proj(states[:, :, 0]).float().mean(dim=1)
        return _features(F.normalize(embeddings, dim=-1), states.flatten(1, 2))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        states = self.model.text_encoder(input_ids, attention_mask).last_hidden_state
        return _features(F.normalize(self.model.text_proj(states[:, 0]).float(), dim=-1))

    def read_before_matching(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed the tokens of texts `[N, L]`: `[N, L, D]`, with [ENC], which follows [DEC], in the first place."""
        input_ids = input_ids.clone()
        input_ids[:, 0] = self.config.text_config.bos_token_id + 1
        return self.model.text_encoder.embeddings(input_ids)

    def read_videos_before_matching(self, video_hidden_states: Tensor) -> list[DynamicCache]:
        """Compute the cross-attention keys and values of videos `[V, S, D]`, those of one video a cache."""
        caches = [DynamicCache() for _ in video_hidden_states]
        for cache, states in zip(caches, video_hidden_states.split(1), strict=True):
            for number, layer in enumerate(self.model.text_encoder.encoder.layer):
                attention = layer.crossattention.self
                # [1, S, D] -> [1, H, S, D/H]
                heads = (attention.num_attention_heads, attention.attention_head_size)
                keys, values = (
                    projection(states).unflatten(-1, heads).transpose(1, 2)
                    for projection in (attention.key, attention.value)
                )
                cache.update(keys, values, number)
        return caches

    def match_states(self, text_states: Tensor, attention_mask: Tensor, video_cache: list[DynamicCache]) -> Tensor:
        """Match texts `[N, L, D]` with V videos, of which each serves N / V texts in a row: logits `[N, 2]`."""
        num_tokens = video_cache[0].get_seq_length()
        texts_at_once = max(self.tokens_at_once // num_tokens, 1)
        logits = []
        for cache, states, mask in zip(
            video_cache, text_states.chunk(len(video_cache)), attention_mask.chunk(len(video_cache)), strict=True
        ):
            for rows in torch.arange(len(states)).split(texts_at_once):
                output = self.model.text_encoder(
                    encoder_embeds=states[rows],
                    attention_mask=mask[rows],
                    # What the layers take their keys and values from is in the cache; that there is something tells
                    # them to attend to it.
                    encoder_hidden_states=cache.layers[0].keys,  # type: ignore[union-attr]
                    cache=EncoderDecoderCache(DynamicCache(), cache),
                )
                logits.append(self.model.itm_head(output.last_hidden_state[:, 0]))
        return torch.cat(logits)


class XClip(Baseline):
    """X-CLIP (Ni et al., 2022), which prompts each text with the video that it is compared with.

    A video has its own features, of all frames, but none of a text is the same for two videos: [`compare`] runs the
    prompt generator for every pair of a text and a video, 5 million multiply-adds with the base model. The number of
    frames is a part of the weights.
    """

    model_type = "xclip"

    def get_video_features(self, pixel_values_videos: Tensor) -> BaseModelOutputWithPooling:
        output = self.model.get_video_features(pixel_values_videos)
        patches = self.model.prompts_visual_layernorm(output.last_hidden_state[:, 1:])
        patches = patches @ self.model.prompts_visual_projection
        patches = patches.unflatten(0, pixel_values_videos.shape[:2]).mean(dim=1)  # [B, T, L, E] -> [B, L, E]
        return _features(output.pooler_output.float(), patches)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        return _features(self.model.get_text_features(input_ids, attention_mask).pooler_output.float())

    def compare(self, text_embeddings: Tensor, video_embeddings: Tensor, video_hidden_states: Tensor) -> Tensor:
        """Compare all texts with all videos.

        Args:
            text_embeddings: `[N, E]`, from [`get_text_features`].
            video_embeddings: `[V, E]`, from [`get_video_features`].
            video_hidden_states: `[V, L, E]`, likewise.

        Returns:
            Cosines `[N, V]`, float32.
        """
        texts = text_embeddings.expand(len(video_embeddings), -1, -1)  # [V, N, E]
        texts = texts + self.model.prompts_generator(texts, video_hidden_states)
        return F.cosine_similarity(texts.float(), video_embeddings.float()[:, None], dim=-1).T


class VideoPrism(Baseline):
    """VideoPrism (Zhao et al., 2024), a video encoder and a text encoder; the number of frames is a part of the weights."""

    model_type = "videoprism"

    @classmethod
    def frame_transform(cls, processor: ProcessorMixin) -> BaseImageProcessor:
        transform = processor.video_processor
        transform.do_sample_frames = False
        # Pixels stay between 0 and 1. The library's processor says so in an attribute that is never read.
        transform.do_normalize = False
        return transform

    def get_video_features(self, pixel_values_videos: Tensor) -> BaseModelOutputWithPooling:
        embeddings = self.model.get_video_features(pixel_values_videos).pooler_output[:, 0]  # [B, 1, E] -> [B, E]
        return _features(F.normalize(embeddings.float(), dim=-1))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        output = self.model.get_text_features(input_ids, attention_mask.long())
        return _features(F.normalize(output.pooler_output.float(), dim=-1))


BASELINES: dict[str, type[Baseline]] = {
    "clip": FramePooledClip,
    "siglip2": FramePooledSiglip2,
    "blip": FrameConcatenatedBlip,
    "xclip": XClip,
    "videoprism": VideoPrism,
}


def _features(embeddings: Tensor, hidden_states: Tensor | None = None) -> BaseModelOutputWithPooling:
    # A gallery stores token features: here the embedding, where nothing else is needed.
    states = embeddings[:, None] if hidden_states is None else hidden_states
    return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=embeddings)


# --- Videos and texts --------------------------------------------------------------------------------------------------


class BaselineVideoProcessor(TestaVideoProcessor):
    """Decodes and samples videos as [`TestaVideoProcessor`] does; resizes, crops and normalises them as a baseline does.

    Args:
        transform: The baseline's image or video processor.
        kwargs: Of [`TestaVideoProcessor`]: `num_frames`, `frame_sampling`, ...
    """

    def __init__(self, transform: BaseImageProcessor, **kwargs: Any):
        self.transform = transform
        height, width = self._transform(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), True, False, False).shape[-2:]
        super().__init__(size={"height": height, "width": width}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "transform": self.transform.to_dict()}

    def _read(self, source: VideoSource, selection: FrameSelection, threads: int, kwargs: Mapping[str, Any]) -> tuple:
        # Frames leave the decoder as large as they are: the baseline's processor resizes them.
        return super()._read(source, selection, threads, {**kwargs, "do_resize": False})

    def _preprocess(  # type: ignore[override]  # it reads fewer arguments
        self,
        videos: list[Tensor],
        do_resize: bool,
        do_rescale: bool,
        do_normalize: bool,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        pixel_values = [self._transform(frames, do_resize, do_rescale, do_normalize) for frames in videos]
        return BatchFeature({"pixel_values_videos": pixel_values}, tensor_type=return_tensors)

    def _transform(self, frames: Tensor, do_resize: bool, do_rescale: bool, do_normalize: bool) -> Tensor:
        """Pixels `[T, C, H, W]` of frames, after those steps of the transform that are asked for."""
        asked = {"do_resize": do_resize, "do_center_crop": do_resize}
        asked |= {"do_rescale": do_rescale, "do_normalize": do_normalize}
        steps: dict[str, Any] = {
            name: step and bool(getattr(self.transform, name, False)) for name, step in asked.items()
        }
        (pixel_values,) = self.transform(
            list(frames.numpy()), input_data_format=ChannelDimension.FIRST, return_tensors="pt", **steps
        ).values()
        return pixel_values.reshape(len(frames), *pixel_values.shape[-3:])  # some add a dimension for the video


def count_long_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> int:
    """Return how many texts have more than `max_tokens` tokens, what the tokenizer adds included."""
    return sum(len(ids) > max_tokens for ids in tokenizer(list(texts), truncation=False, verbose=False).input_ids)


# --- Loading -----------------------------------------------------------------------------------------------------------


def load_baseline(
    name: str, model_name_or_path: str, attn_implementation: str | None = None, **video_settings: Any
) -> tuple[Baseline, TestaProcessor]:
    """Load a model to compare with, in float32, and a processor for its evaluation.

    Args:
        name: One of `BASELINES`.
        model_name_or_path: A folder or an id of the Hub, with weights and processor.
        attn_implementation: eager, sdpa, ...; the library's choice if None.
        video_settings: Of [`TestaVideoProcessor`]: `num_frames`, `frame_sampling`, ...; None leaves one as it is. Where
            the number of frames isn't a part of the weights, it is that of [`TestaVideoProcessor`] if not given.

    Raises:
        ValueError: There is no such baseline, the model can't be found, is of another type, lacks weights or a
            processor, or reads another number of frames.
    """
    if name not in BASELINES:
        raise ValueError(f"There is no baseline `{name}`; there are {', '.join(BASELINES)}.")
    baseline, source = BASELINES[name], str(model_name_or_path)
    config = load_config("model_name_or_path", source)
    if config.model_type != baseline.model_type:
        raise ValueError(
            f"{source} holds a `{config.model_type}` model; the baseline `{name}` needs a `{baseline.model_type}` "
            f"model{baseline.takes}."
        )
    video_settings = {setting: value for setting, value in video_settings.items() if value is not None}
    num_frames = getattr(config.vision_config, "num_frames", None)
    if num_frames is not None and video_settings.setdefault("num_frames", num_frames) != num_frames:
        raise ValueError(
            f"num_frames is {video_settings['num_frames']}; {source} was trained for {num_frames} frames and reads no "
            "other number."
        )
    model, loading = baseline.model_class.from_pretrained(
        source, config=config, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}, {missing[0]} for one: it was made for "
            "another task."
        )
    if attn_implementation:
        model.set_attn_implementation(attn_implementation)
    processor = _load_processor(source)
    video_processor = BaselineVideoProcessor(baseline.frame_transform(processor), **video_settings)
    return baseline(model, processor.tokenizer).eval(), TestaProcessor(video_processor, processor.tokenizer)


def _load_processor(source: str) -> ProcessorMixin:
    reason = "it has a tokenizer alone"
    try:
        processor = AutoProcessor.from_pretrained(source)
        if isinstance(processor, ProcessorMixin):
            return processor
    except OSError as error:
        reason = str(error)
    raise ValueError(
        f"{source} lacks files of its processor, which are a tokenizer's and an image processor's: {reason}"
    )
