"""Long-video-and-language models with temporal-spatial token aggregation (TESTA) for Transformers."""

from .configuration_testa import TestaConfig, TestaTextConfig, TestaVideoConfig
from .hub import register_auto_classes
from .modeling_testa import (
    TestaForCaptioning,
    TestaForMultipleChoiceVideoQA,
    TestaForPreTraining,
    TestaForRetrieval,
    TestaForVideoQA,
    TestaModel,
    TestaPreTrainedModel,
    TestaTextDecoder,
    TestaTextModel,
    TestaVideoModel,
)
from .pipelines import VideoQuestionAnsweringPipeline, VideoTextRetrievalPipeline
from .processing_testa import TestaProcessor
from .video_decoding_testa import VideoDecodingError
from .video_processing_testa import TestaVideoProcessor


register_auto_classes()

__all__ = [
    "TestaConfig",
    "TestaForCaptioning",
    "TestaForMultipleChoiceVideoQA",
    "TestaForPreTraining",
    "TestaForRetrieval",
    "TestaForVideoQA",
    "TestaModel",
    "TestaPreTrainedModel",
    "TestaProcessor",
    "TestaTextConfig",
    "TestaTextDecoder",
    "TestaTextModel",
    "TestaVideoConfig",
    "TestaVideoModel",
    "TestaVideoProcessor",
    "VideoDecodingError",
    "VideoQuestionAnsweringPipeline",
    "VideoTextRetrievalPipeline",
]
