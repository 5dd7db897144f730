"""Numbers that don't drift: between runs, batches, precisions, and compiled or not.

The long test measures recall of a trained model on the stories of the demo:

    TESTA_DEMO_MODEL=runs/testa-demo TESTA_DEMO_DATA=demo_stories \\
        python -m pytest -m slow tests/robustness/test_numbers.py -s
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_world import WORDS, tiny_config, tiny_processor

from transformers_testa import TestaForRetrieval, TestaProcessor


NUM_VIDEOS = 8
# Alone or in a batch, float32.
SAME = {"atol": 1e-5, "rtol": 0}
# Cosines of embeddings with those in float32, where the same tokens merge: between tokens that are nearly as alike,
# bfloat16 may choose another.
LEAST_COSINE = {"bf16": 0.9999, "compiled": 0.99999}
LARGEST_CHANGE_OF_RECALL = {"bf16": 2.0, "compiled": 0.5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TestaForRetrieval(tiny_config()).eval()


@pytest.fixture(scope="module")
def inputs():
    generator = np.random.default_rng(0)
    videos = list(generator.integers(0, 256, (NUM_VIDEOS, 6, 32, 32, 3), dtype=np.uint8))
    texts = [" ".join(generator.choice(WORDS[7:], 3 + number)) for number in range(NUM_VIDEOS)]
    return tiny_processor()(videos=videos, text=texts, padding=True, return_tensors="pt")


def embed_videos(model, pixel_values_videos):
    with torch.no_grad():
        return model.get_video_features(pixel_values_videos).pooler_output


def embed_and_map(model, batches, autocast):
    """Return the embeddings of videos, and which token each of their patches is in."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [model.get_video_features(batch) for batch in batches]
    return torch.cat([output.pooler_output.float() for output in outputs]), torch.cat(
        [output.token_map.flatten(1) for output in outputs]
    )


def embed_texts(model, inputs):
    with torch.no_grad():
        return model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output


@settings(max_examples=8, derandomize=True)
@given(rows=st.lists(st.integers(0, NUM_VIDEOS - 1), min_size=1, max_size=NUM_VIDEOS))
def test_a_video_and_a_text_have_one_embedding_in_any_batch_and_order(model, inputs, rows):
    expected = torch.cat([embed_videos(model, video[None]) for video in inputs["pixel_values_videos"]])
    torch.testing.assert_close(embed_videos(model, inputs["pixel_values_videos"][rows]), expected[rows], **SAME)
    batch = {name: inputs[name][rows] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(embed_texts(model, batch), embed_texts(model, inputs)[rows], **SAME)


def test_the_same_inputs_give_the_same_bits(model, inputs):
    first, second = (embed_videos(model, inputs["pixel_values_videos"]) for _ in range(2))
    assert torch.equal(first, second)


def test_bf16_agrees_with_float32(model, inputs):
    expected = embed_videos(model, inputs["pixel_values_videos"])
    with torch.autocast("cpu", torch.bfloat16):
        found = embed_videos(model, inputs["pixel_values_videos"]).float()
    assert F.cosine_similarity(found, expected).min() >= 0.99


@pytest.mark.slow
def test_recall_of_the_demo_agrees_in_float32_bf16_and_compiled():
    model = TestaForRetrieval.from_pretrained(os.environ["TESTA_DEMO_MODEL"]).eval()
    processor = TestaProcessor.from_pretrained(os.environ["TESTA_DEMO_MODEL"])
    folder = Path(os.environ["TESTA_DEMO_DATA"])
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    videos = [processor.video_processor.decode(folder / row["video"]) for row in rows]
    pixel_values_videos = processor.video_processor(
        videos, do_sample_frames=False, do_resize=False, return_tensors="pt"
    )["pixel_values_videos"]
    texts = processor.tokenizer(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    text_embeds = torch.cat(
        [
            embed_texts(model, {name: value[start : start + 32] for name, value in texts.items()})
            for start in range(0, len(rows), 32)
        ]
    )
    compiled = TestaForRetrieval.from_pretrained(os.environ["TESTA_DEMO_MODEL"]).eval()
    compiled.testa.video_model.compile()
    ways = {"float32": (model, False), "bf16": (model, True), "compiled": (compiled, False)}
    embeddings, maps, recalls = {}, {}, {}
    for name, (way, autocast) in ways.items():
        embeddings[name], maps[name] = embed_and_map(way, pixel_values_videos.split(20), autocast)
        ranks = (text_embeds @ embeddings[name].T).argsort(dim=-1, descending=True)
        for k in (1, 5):
            hits = (ranks[:, :k] == torch.arange(len(rows))[:, None]).any(dim=-1)
            recalls[name, k] = 100 * hits.float().mean().item()
    for name in LEAST_COSINE:
        cosines = F.cosine_similarity(embeddings[name], embeddings["float32"])
        merges_alike = (maps[name] == maps["float32"]).all(dim=-1)
        print(
            f"\n{name}: recall@1 {recalls[name, 1]:.1f}, @5 {recalls[name, 5]:.1f}; least cosine "
            f"{cosines.min().item():.6f}, {cosines[merges_alike].min().item():.6f} of {merges_alike.sum()} that merge alike",
            end="",
        )
        assert cosines[merges_alike].min() >= LEAST_COSINE[name]
        for k in (1, 5):
            assert abs(recalls[name, k] - recalls["float32", k]) <= LARGEST_CHANGE_OF_RECALL[name]
    print(f"\nfloat32: recall@1 {recalls['float32', 1]:.1f}, @5 {recalls['float32', 5]:.1f}; {len(rows)} videos")
