"""BERT, a model of texts, as the start of the text encoder of a new TESTA model."""

from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertForMaskedLM, BertForPreTraining, BertModel

from .configuration_testa import TestaTextConfig
from .conversion_original import rename_text
from .conversion_weights import load_weights, read_transformers_model
from .modeling_testa import TestaTextModel


_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act", "layer_norm_eps")


def start_text_from_bert(model: PreTrainedModel, path_or_model: str | Path | PreTrainedModel) -> None:
    """Copy BERT's embeddings and its first layers into the text encoder, and into the decoder where there is one.

    The tokenizers must number words alike. Cross-attention, which BERT doesn't have, stays as it is, and so do the
    embeddings of tokens that BERT doesn't know, such as "[DEC]" and "[ENC]". The embedding of BERT's first token type,
    which there are no others of here, becomes part of the positions'.

    Args:
        model: A TESTA model with a text encoder.
        path_or_model: A `BertModel`, `BertForMaskedLM` or `BertForPreTraining` of Transformers, or where one is saved
            (a folder or Hub id).

    Raises:
        ValueError: The source is no BERT model, or its sizes aren't those of the text encoder, or it has fewer layers or
            positions, or more words.
    """
    bert, source = read_transformers_model(path_or_model, BertModel, BertForMaskedLM, BertForPreTraining)
    bert = getattr(bert, "bert", bert)
    for text_model in model.modules():
        if isinstance(text_model, TestaTextModel):
            _check_sizes(text_model.config, bert, source)
            _copy(text_model, bert, source)


def _check_sizes(config: TestaTextConfig, bert: BertModel, source: str) -> None:
    if different := [name for name in _SIZES if getattr(config, name) != getattr(bert.config, name)]:
        sizes = ", ".join(
            f"{name}={getattr(config, name)!r} (BERT: {getattr(bert.config, name)!r})" for name in different
        )
        raise ValueError(f"{source} can't be the start of a text encoder with {sizes}.")
    for name in ("num_hidden_layers", "max_position_embeddings"):
        if getattr(config, name) > getattr(bert.config, name):
            raise ValueError(
                f"{source} has {name}={getattr(bert.config, name)}, and the text encoder {getattr(config, name)}."
            )
    if config.vocab_size < bert.config.vocab_size:
        raise ValueError(
            f"{source} knows {bert.config.vocab_size} words, and the text encoder {config.vocab_size}: with another "
            "tokenizer its embeddings are those of other words."
        )


def _copy(text_model: TestaTextModel, bert: BertModel, source: str) -> None:
    expected = text_model.state_dict()
    found = {rename_text(name): tensor for name, tensor in bert.state_dict().items()}
    weights = {name: tensor for name, tensor in found.items() if name in expected}
    words, positions = (f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position"))
    first_type = found["embeddings.token_type_embeddings.weight"][0]
    weights[words] = torch.cat([found[words], expected[words][len(found[words]) :]])
    weights[positions] = (found[positions] + first_type)[: len(expected[positions])]
    kept = tuple(name for name in expected if ".cross_attention." in name)
    load_weights(text_model, weights, source, may_miss=kept)
