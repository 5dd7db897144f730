import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from transformers_testa import TestaConfig, TestaForRetrieval, TestaForVideoQA, TestaTextConfig, TestaVideoConfig
from transformers_testa.conversion_bert import start_text_from_bert


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def make_bert(model_class=BertModel, **changes):
    torch.manual_seed(0)
    fields = {"vocab_size": 50, "num_hidden_layers": 3, "max_position_embeddings": 24, **SIZES, **changes}
    return model_class(BertConfig(**fields)).eval()


def make_model(model_class=TestaForRetrieval, **changes):
    torch.manual_seed(1)
    text_config = {"vocab_size": 52, "num_hidden_layers": 2, "max_position_embeddings": 20, **SIZES, **changes}
    fields = {"bos_token_id": 50, "enc_token_id": 51, "encoder_hidden_size": 32}
    video_config = TestaVideoConfig(**SIZES, num_hidden_layers=1, num_frames=2, image_size=16, patch_size=8)
    return model_class(
        TestaConfig(video_config=video_config, text_config=TestaTextConfig(**text_config | fields))
    ).eval()


def read(text_model, **kwargs):
    ids = torch.tensor([[2, 7, 30, 9, 3], [2, 49, 3, 0, 0]])
    with torch.no_grad():
        return text_model(ids, attention_mask=(ids != 0).long(), **kwargs)


@pytest.mark.parametrize("model_class", [BertModel, BertForMaskedLM])
def test_a_text_is_read_as_the_first_layers_of_bert_read_it(model_class, tmp_path):
    bert = make_bert(model_class)
    bert.save_pretrained(tmp_path)
    model = make_model()
    before = {name: weight.clone() for name, weight in model.testa.text_model.state_dict().items()}
    start_text_from_bert(model, tmp_path)
    expected = read(getattr(bert, "bert", bert), output_hidden_states=True).hidden_states[2]
    found = read(model.testa.text_model).last_hidden_state
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)
    after = model.testa.text_model.state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "cross_attention" in name} <= kept
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(after[words][50:], before[words][50:]) and not torch.equal(
        after[words][:50], before[words][:50]
    )


def test_the_decoder_of_answers_starts_from_bert_too():
    model = make_model(TestaForVideoQA)
    start_text_from_bert(model, make_bert())
    decoder, encoder = (part.state_dict() for part in (model.text_decoder.text_model, model.testa.text_model))
    same = [name for name in encoder if "self_attention" in name or "mlp" in name]
    assert same and all(torch.equal(decoder[name], encoder[name]) for name in same)


@pytest.mark.parametrize(
    ("of_bert", "message"),
    [
        ({"hidden_size": 48}, r"can't be the start of a text encoder with hidden_size=32 \(BERT: 48\)"),
        ({"hidden_act": "relu"}, "hidden_act='gelu'"),
        ({"num_hidden_layers": 1}, "has num_hidden_layers=1, and the text encoder 2"),
        ({"max_position_embeddings": 10}, "has max_position_embeddings=10, and the text encoder 20"),
        ({"vocab_size": 60}, "knows 60 words, and the text encoder 52"),
    ],
)
def test_a_bert_of_other_sizes_is_refused(of_bert, message):
    with pytest.raises(ValueError, match=message):
        start_text_from_bert(make_model(), make_bert(**of_bert))


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="the model is a TestaForRetrieval; needed is one of BertModel"):
        start_text_from_bert(make_model(), make_model())
