"""Long-video-and-language models with temporal-spatial token aggregation (TESTA) for Transformers."""

from transformers import AutoConfig, AutoModel

from .configuration_testa import TestaConfig, TestaTextConfig, TestaVideoConfig
from .modeling_testa import TestaForRetrieval, TestaModel, TestaPreTrainedModel, TestaTextModel, TestaVideoModel


for _config, _model in (
    (TestaConfig, TestaModel),
    (TestaVideoConfig, TestaVideoModel),
    (TestaTextConfig, TestaTextModel),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)

__all__ = [
    "TestaConfig",
    "TestaForRetrieval",
    "TestaModel",
    "TestaPreTrainedModel",
    "TestaTextConfig",
    "TestaTextModel",
    "TestaVideoConfig",
    "TestaVideoModel",
]
