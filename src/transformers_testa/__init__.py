"""Long-video-and-language models with temporal-spatial token aggregation (TESTA) for Transformers."""

from transformers import AutoConfig, AutoModel, AutoProcessor, AutoVideoProcessor

from .configuration_testa import TestaConfig, TestaTextConfig, TestaVideoConfig
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
from .processing_testa import TestaProcessor
from .video_decoding_testa import VideoDecodingError
from .video_processing_testa import TestaVideoProcessor


for _config, _model in (
    (TestaConfig, TestaModel),
    (TestaVideoConfig, TestaVideoModel),
    (TestaTextConfig, TestaTextModel),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
AutoVideoProcessor.register(TestaConfig, TestaVideoProcessor, exist_ok=True)
AutoProcessor.register(TestaConfig, TestaProcessor, exist_ok=True)

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
]
