"""Videos and text in, model inputs out."""

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from .video_processing_testa import TestaVideoProcessor, Video


class TestaProcessor(ProcessorMixin):
    """A [`TestaVideoProcessor`] and a BERT tokenizer in one call.

    `processor(videos=..., text=..., return_tensors="pt")` gives `pixel_values_videos` float32 `[B, T, C, H, W]`,
    `input_ids` and `attention_mask` int64 `[B, L]`. Text longer than the tokenizer's `model_max_length` is truncated
    unless `truncation=False`. Keyword arguments of both parts are accepted; an unknown one is a ValueError.
    """

    text_kwargs = {"truncation": True}
    unused_input_names = ["token_type_ids"]

    video_processor: TestaVideoProcessor
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        video_processor: TestaVideoProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        super().__init__(video_processor, tokenizer, **kwargs)

    def __call__(
        self, videos: Video | Sequence[Video] | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        return super().__call__(videos=videos, text=text, **kwargs)

    def longest_text(self, model: PreTrainedModel) -> int:
        """Return how many tokens of a text, [CLS] and [SEP] included, the tokenizer and a model take."""
        return min(self.tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        schemas = self.valid_processor_kwargs.__annotations__
        known = {
            "common_kwargs",
            *schemas,
            *schemas["text_kwargs"].__annotations__,
            *self.video_processor.valid_kwargs.__annotations__,
        }
        if unknown := sorted(kwargs.keys() - known):
            raise ValueError(f"{', '.join(unknown)}: no such argument of {type(self).__name__}.")
