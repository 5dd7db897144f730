"""Videos and text in, model inputs out."""

from transformers.processing_utils import ProcessorMixin


class TestaProcessor(ProcessorMixin):
    """A [`TestaVideoProcessor`] and a BERT tokenizer in one call.

    `processor(videos=..., text=..., return_tensors="pt")` gives `pixel_values_videos` float32 `[B, T, C, H, W]`,
    `input_ids` and `attention_mask` int64 `[B, L]`. Text longer than the tokenizer's `model_max_length` is truncated
    unless `truncation=False`. Keyword arguments of both parts are accepted; an unknown one is a ValueError.
    """

    text_kwargs = {"truncation": True}
    unused_input_names = ["token_type_ids"]

    def __init__(self, video_processor=None, tokenizer=None, **kwargs):
        super().__init__(video_processor, tokenizer, **kwargs)

    def __call__(self, videos=None, text=None, **kwargs):
        return super().__call__(videos=videos, text=text, **kwargs)

    def longest_text(self, model) -> int:
        """Return how many tokens of a text, [CLS] and [SEP] included, the tokenizer and a model take."""
        return min(self.tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
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
