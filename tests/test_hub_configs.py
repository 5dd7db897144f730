import random
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

from transformers_testa import TestaForRetrieval, TestaModel, TestaProcessor
from transformers_testa.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from transformers_testa.data.sprites import digit_kinds, shape_kinds
from transformers_testa.data.stories import World, plan_story
from transformers_testa.data.storytelling import ask, tell


ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path for path in (ROOT / "hub_configs").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_auto_classes_load_every_repository(folder):
    config = AutoConfig.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is TestaProcessor
    assert processor.video_processor.num_frames == config.video_config.num_frames
    assert dict(processor.video_processor.size)["height"] == config.video_config.image_size
    tokenizer, text_config = processor.tokenizer, config.text_config
    assert len(tokenizer) == text_config.vocab_size
    assert tokenizer.model_max_length <= text_config.max_position_embeddings
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[DEC]", "[ENC]", "[SEP]"]) == [
        text_config.pad_token_id,
        text_config.bos_token_id,
        text_config.enc_token_id,
        text_config.sep_token_id,
    ]
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)) is TestaModel
        assert config.architectures == [TestaForRetrieval.__name__]


@pytest.mark.parametrize("recipe", sorted((ROOT / "hub_configs").rglob("recipe*.yaml")), ids=lambda file: file.stem)
def test_recipes_name_only_arguments_that_exist(recipe, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from run_retrieval import RetrievalArguments

    *_, args = parse_arguments((ModelArguments, DataArguments, RetrievalArguments, TrainingArguments), [str(recipe)])
    assert args.do_train and args.output_dir


def test_the_demo_knows_every_word_of_its_world():
    tokenizer = AutoProcessor.from_pretrained(ROOT / "hub_configs" / "testa-demo").tokenizer
    world = World(kinds=shape_kinds() + digit_kinds("test"))
    for seed in range(200):
        rng = random.Random(seed)
        story = plan_story(world, rng)
        texts = [tell(story, rng), *(question.question for question in ask(story, rng))]
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert len(ids) <= tokenizer.model_max_length
