"""Other models in this package's evaluation: tiny ones with random weights, saved as the library saves the real ones."""

import json
import os
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from retrieval_world import run_script, write_rows, write_stories
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoProcessor,
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    LlavaOnevisionVideoProcessor,
    Siglip2Config,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    VideoMAEImageProcessor,
    VideoPrismClipModel,
    VideoPrismConfig,
    VideoPrismProcessor,
    VideoPrismTokenizer,
    XCLIPConfig,
    XCLIPModel,
    XCLIPProcessor,
)
from video_files import write_video

from transformers_testa import TestaVideoProcessor
from transformers_testa.baselines import BASELINES, count_long_texts, load_baseline
from transformers_testa.data.datasets import VideoTextDataset, collate_texts, collate_videos
from transformers_testa.retrieval import evaluate_retrieval


SCRIPT = Path(__file__).parents[1] / "run_retrieval.py"
sys.path.insert(0, str(SCRIPT.parent))
from run_retrieval import main  # noqa: E402


TEXTS = ["first red, then green, finally blue", "a white star", "then blue", "finally a red square, and no green one"]
NUM_FRAMES = {"clip": 3, "siglip2": 3, "blip": 3, "xclip": 4, "videoprism": 4}

# --- Tiny models -------------------------------------------------------------------------------------------------------

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
IMAGES = {"image_size": 32, "patch_size": 8}
CLIP_LETTERS = [*string.ascii_lowercase, *string.digits, ",", ".", "!"]
CLIP_TOKENS = [*CLIP_LETTERS, *(f"{letter}</w>" for letter in CLIP_LETTERS), "<|startoftext|>", "<|endoftext|>"]
CLIP_TEXT = {"vocab_size": len(CLIP_TOKENS), "max_position_embeddings": 48, "eos_token_id": len(CLIP_TOKENS) - 1}
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "first", "red", "then", "green", "finally", "blue"]
BERT_WORDS += ["white", "star", "square", ",", "!"]


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer({token: number for number, token in enumerate(CLIP_TOKENS)}, [], model_max_length=48)


def tiny_clip():
    config = CLIPConfig(text_config=LAYERS | CLIP_TEXT, vision_config=LAYERS | IMAGES, projection_dim=16)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPModel(config), CLIPProcessor(images, clip_tokenizer())


def tiny_siglip2(padding_side: str = "right"):
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", ",", *string.ascii_lowercase]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 48, "projection_size": 16}
    config = SiglipConfig(text_config=LAYERS | text, vision_config=LAYERS | IMAGES)
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    return SiglipModel(config), SiglipProcessor(images, Siglip2Tokenizer(vocabulary, padding_side=padding_side))


def tiny_blip():
    text = {"vocab_size": len(BERT_WORDS) + 2, "max_position_embeddings": 24, "encoder_hidden_size": 16}
    text |= {"bos_token_id": len(BERT_WORDS), "pad_token_id": 0, "sep_token_id": 3}
    config = BlipConfig(
        text_config=BlipTextConfig(**LAYERS, **text).to_dict(),
        vision_config=BlipVisionConfig(**LAYERS, **IMAGES).to_dict(),
        image_text_hidden_size=8,
    )
    vocabulary = {word: number for number, word in enumerate(BERT_WORDS)}
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    return BlipForImageTextRetrieval(config), BlipProcessor(images, BertTokenizer(vocabulary))


def tiny_xclip():
    frames = {"num_frames": 4, "mit_hidden_size": 16, "mit_intermediate_size": 32, "mit_num_attention_heads": 2}
    config = XCLIPConfig(
        text_config=LAYERS | CLIP_TEXT,
        vision_config=LAYERS | IMAGES | frames,
        projection_dim=16,
        prompt_num_attention_heads=2,
        prompt_alpha=1.0,
    )
    images = VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return XCLIPModel(config), XCLIPProcessor(images, clip_tokenizer())


def tiny_videoprism():
    layers = {name: value for name, value in LAYERS.items() if name != "num_hidden_layers"}
    depth = {"num_spatial_layers": 1, "num_temporal_layers": 1, "num_auxiliary_layers": 1}
    vision = layers | depth | {"image_size": 32, "num_frames": 4, "tubelet_size": [1, 8, 8]}
    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokens += [(letter, -2.0) for letter in (*string.ascii_lowercase, ",")]
    text = {"vocab_size": len(tokens) + 100, "max_position_embeddings": 48}
    config = VideoPrismConfig(text_config=LAYERS | text, vision_config=vision)
    videos = LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}, do_normalize=False)
    return VideoPrismClipModel(config), VideoPrismProcessor(videos, VideoPrismTokenizer(tokens))


TINY = {
    "clip": tiny_clip,
    "siglip2": tiny_siglip2,
    "blip": tiny_blip,
    "xclip": tiny_xclip,
    "videoprism": tiny_videoprism,
}


def save(folder: Path, model, processor) -> Path:
    """Save a model, with weights as large as trained ones, and its processor."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder for each baseline."""
    root = tmp_path_factory.mktemp("baselines")
    return {name: save(root / name, *make()) for name, make in TINY.items()}


# --- Similarities ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[Path]:
    """Files of other shapes than a baseline's square."""
    folder = tmp_path_factory.mktemp("videos")
    shapes = ((12, 48, 64), (20, 80, 48), (9, 36, 36), (5, 64, 80))
    return [
        write_video(folder / f"{number}.mp4", frames, height=height, width=width)
        for number, (frames, height, width) in enumerate(shapes)
    ]


def similarities(folder: Path, name: str, videos: list[Path], rerank_k: int = 0):
    """What the evaluation finds, text i being of video i."""
    model, processor = load_baseline(name, folder, num_frames=NUM_FRAMES[name])
    rows = [
        {"video": str(video), "video_id": str(number), "text": text, "index": number}
        for number, (video, text) in enumerate(zip(videos, TEXTS, strict=True))
    ]
    dataset = VideoTextDataset(Dataset.from_list(rows), processor.video_processor)
    batches = [collate_videos([dataset[row] for row in pair], processor) for pair in ((0, 1), (2, 3))]
    texts = [collate_texts(rows[place : place + 3], processor, processor.longest_text(model)) for place in (0, 3)]
    return evaluate_retrieval(model, batches, texts, rerank_k=rerank_k)


def decoded(videos: list[Path], num_frames: int) -> list[np.ndarray]:
    """The sampled frames of each video, uint8 `[T, H, W, C]`, as large as they are in the file."""
    video_processor = TestaVideoProcessor(do_resize=False, num_frames=num_frames)
    return [video_processor.decode(str(video)).permute(0, 2, 3, 1).numpy() for video in videos]


def by_the_library(folder: Path, name: str, videos: list[Path]) -> torch.Tensor:
    """Cosines `[texts, videos]` from what the library itself computes of the same frames."""
    processor, frames = AutoProcessor.from_pretrained(folder), decoded(videos, NUM_FRAMES[name])
    if name == "blip":
        model = BlipForImageTextRetrieval.from_pretrained(folder)
        tokens = processor(text=TEXTS, padding=True, return_tensors="pt")
        texts = F.normalize(model.text_proj(model.text_encoder(**tokens).last_hidden_state[:, 0]), dim=-1)
        means = [model.vision_proj(states[:, 0]).mean(dim=0) for states in blip_states(model, processor, frames)]
        return texts @ F.normalize(torch.stack(means), dim=-1).T
    model = AutoModel.from_pretrained(folder)
    if name == "videoprism":
        tokens = processor.tokenizer(TEXTS, padding="max_length", max_length=48, return_tensors="pt")
        pixels = processor.video_processor([list(video) for video in frames], return_tensors="pt")
        output = model(**tokens, **pixels)
        return output.text_embeds @ output.video_embeds.T
    images = [processor.image_processor(list(video), return_tensors="pt").pixel_values for video in frames]
    if name == "xclip":
        tokens = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
        return model(**tokens, pixel_values=torch.cat(images)).logits_per_text / model.logit_scale.exp()
    tokens = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    if name == "siglip2":
        tokens = {
            "input_ids": processor.tokenizer(TEXTS, padding="max_length", max_length=48, return_tensors="pt").input_ids
        }
    output = model(**tokens, pixel_values=torch.cat(images))
    means = output.image_embeds.unflatten(0, (len(videos), -1)).mean(dim=1)
    return output.text_embeds @ F.normalize(means, dim=-1).T


def blip_states(model, processor, frames: list[np.ndarray]) -> list[torch.Tensor]:
    """States of each video's frames, `[T, 1+L, D]`."""
    images = [processor.image_processor(list(video), return_tensors="pt").pixel_values for video in frames]
    return [model.vision_model(pixel_values).last_hidden_state for pixel_values in images]


@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_similarities_are_those_of_the_library_on_the_same_frames(folders, videos, name):
    _, details = similarities(folders[name], name, videos)
    expected = by_the_library(folders[name], name, videos)
    assert expected.std() > 0.01
    torch.testing.assert_close(details.similarities, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_siglip_reads_padding_on_the_side_of_its_tokenizer(folders, videos, tmp_path):
    left = save(tmp_path, *tiny_siglip2(padding_side="left"))
    _, details = similarities(left, "siglip2", videos)
    torch.testing.assert_close(details.similarities, by_the_library(left, "siglip2", videos), atol=2e-5, rtol=0)
    assert not torch.allclose(details.similarities, by_the_library(folders["siglip2"], "siglip2", videos), atol=0.01)


@pytest.mark.parametrize("tokens_at_once", [1, 120, 10_000])
@torch.no_grad()
def test_blip_matches_texts_with_the_tokens_of_all_frames(folders, videos, monkeypatch, tokens_at_once):
    monkeypatch.setattr(BASELINES["blip"], "tokens_at_once", tokens_at_once)
    model = BlipForImageTextRetrieval.from_pretrained(folders["blip"])
    processor = AutoProcessor.from_pretrained(folders["blip"])
    tokens = processor(text=TEXTS, padding=True, return_tensors="pt")
    tokens["input_ids"][:, 0] = len(BERT_WORDS) + 1  # [ENC]
    columns = []
    for states in blip_states(model, processor, decoded(videos, 3)):
        sequence = states.flatten(0, 1).expand(len(TEXTS), -1, -1)
        output = model.text_encoder(**tokens, encoder_hidden_states=sequence)
        columns.append(model.itm_head(output.last_hidden_state[:, 0])[:, 1])
    logits = torch.stack(columns, dim=1)
    assert logits.std(dim=0).min() > 1e-3 and logits.std(dim=1).min() > 1e-3

    metrics, details = similarities(folders["blip"], "blip", videos, rerank_k=4)
    expected = details.similarities.double() + logits
    torch.testing.assert_close(details.text_to_video_scores, expected, atol=2e-5, rtol=0)
    assert "reranked_text_to_video_recall@1" in metrics


@torch.no_grad()
def test_one_frame_of_blip_is_an_image_to_the_library(folders, videos):
    """The library's own matching, [ENC] aside."""
    model, processor = load_baseline("blip", folders["blip"], num_frames=1)
    pixels = processor.video_processor([str(video) for video in videos], return_tensors="pt")["pixel_values_videos"]
    tokens = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    tokens["input_ids"][:, 0] = len(BERT_WORDS) + 1
    tokens.pop("token_type_ids", None)
    states = model.get_video_features(pixels).last_hidden_state
    cache = model.read_videos_before_matching(states)
    texts = model.read_before_matching(tokens["input_ids"], tokens["attention_mask"])
    logits = model.match_states(texts, tokens["attention_mask"], cache)
    expected = model.model(**tokens, pixel_values=pixels[:, 0]).itm_score
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", BASELINES)
def test_bfloat16_changes_similarities_by_its_rounding_alone(folders, videos, name):
    rerank_k = 4 if BASELINES[name].has_matching_head else 0
    _, exact = similarities(folders[name], name, videos, rerank_k)
    with torch.autocast("cpu", torch.bfloat16):
        _, rounded = similarities(folders[name], name, videos, rerank_k)
    assert rounded.similarities.dtype == torch.float32
    difference = (rounded.similarities - exact.similarities).abs()
    assert 0 < difference.max() < exact.similarities.std()
    if rerank_k:
        difference = (rounded.text_to_video_scores - exact.text_to_video_scores).abs()
        assert 0 < difference.max() < exact.text_to_video_scores.std()


@pytest.mark.parametrize("name", BASELINES)
def test_gflops_are_counted_without_computing_as_with_it(folders, name):
    model, _ = load_baseline(name, folders[name], num_frames=NUM_FRAMES[name])
    counted = model.count_video_gflops(NUM_FRAMES[name], 32, 32)
    linear = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda layer, _, output: linear.append(output.numel() * layer.in_features))
    # The counter doesn't know the fused attention of CPUs, and tracks no parameter that a module gets as its input.
    model.requires_grad_(False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, NUM_FRAMES[name], 3, 32, 32))
    assert counted == counter.get_total_flops() / 2e9 > sum(linear) / 1e9 > 0


# --- The script --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Six stories, one of them with a text of 24 tokens and more."""
    folder = write_stories(tmp_path_factory.mktemp("world"), num_test=6)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    rows[2]["text"] += " then green, then red, then white, then blue, then green, then red, then white"
    write_rows(folder / "long.jsonl", rows)
    return folder


def arguments(world: Path, folders: dict[str, Path], name: str, output_dir: Path) -> list[str]:
    given = ("--baseline", name, "--model_name_or_path", folders[name], "--do_predict", "--output_dir", output_dir)
    given += ("--test_file", world / "test.jsonl", "--per_device_eval_batch_size", 2)
    return [str(argument) for argument in given]


def results(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics but for the time, and what they depend on."""
    found = json.loads((folder / "results.json").read_text())
    metrics = found["results"]["test"]["as loaded"]
    assert metrics.pop("seconds_per_video") > 0
    return metrics, found["definition"]


@pytest.mark.parametrize("name", BASELINES)
def test_the_script_evaluates_a_baseline_as_it_evaluates_testa(world, folders, tmp_path, name):
    printed = run_script(main, *arguments(world, folders, name, tmp_path))
    metrics, definition = results(tmp_path)
    assert {"text_to_video_recall@1", "video_to_text_mean_rank", "distractor_accuracy"} <= metrics.keys()
    assert "| test, as loaded | similarity | " in printed
    assert ("| test, as loaded | re-ranked | " in printed) == (name == "blip")
    assert definition["baseline"] == f"{name}, {folders[name]}"
    frames = {"xclip": 4, "videoprism": 4}.get(name, 32)
    assert definition["frames"] == f"{frames} a video, uniform sampling"
    assert definition["resolution"] == "height 32, width 32 pixels"
    assert definition["GFLOPs per video"] >= 0 and "merged in each block" not in definition


def test_the_script_tells_how_many_texts_are_cut(world, folders, tmp_path):
    given = arguments(world, folders, "blip", tmp_path)
    given[given.index(str(world / "test.jsonl"))] = str(world / "long.jsonl")
    printed = run_script(main, *given, "--rerank_k", 2, "--num_frames", 2)
    _, definition = results(tmp_path)
    assert definition["texts cut, test split"] == "1 of 6, after 24 tokens"
    assert "texts cut, test split: 1 of 6, after 24 tokens" in printed


def test_frames_can_be_cached(world, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    given = ("--num_frames", 3)
    run_script(main, *arguments(world, folders, "clip", tmp_path / "decoded"), *given)
    run_script(main, *arguments(world, folders, "clip", tmp_path / "cached"), *given, "--cache_frames")
    assert results(tmp_path / "cached")[0] == results(tmp_path / "decoded")[0]
    run_script(main, *arguments(world, folders, "siglip2", tmp_path / "other"), *given, "--cache_frames")
    # Each baseline resizes in its own way.
    assert len(list((tmp_path / "cache").rglob("frames-*.arrow"))) == 2


def test_two_processes_find_what_one_finds(world, folders, tmp_path):
    run_script(main, *arguments(world, folders, "xclip", tmp_path / "1"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    finished = subprocess.run(
        [*command, *arguments(world, folders, "xclip", tmp_path / "2")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert results(tmp_path / "2")[0] == pytest.approx(results(tmp_path / "1")[0], rel=1e-6)


# --- What can go wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--do_train"], "do_train is True, which is for TESTA; leave it out with baseline clip"),
        (["--gallery_dir", "gallery", "--query", "red"], "gallery_dir is 'gallery', which is for TESTA"),
        (["--keep_ratio", "0.5"], "keep_ratio is 0.5, which is for TESTA"),
        (["--merged_patches_per_layer", "4"], "merged_patches_per_layer is 4, which is for TESTA"),
        (["--top_k", "3"], "top_k is 3, which is for TESTA"),
        (["--rerank_k", "8"], "rerank_k is 8, but clip has no matching head; only 0 is possible"),
    ],
)
def test_what_is_for_testa_alone_is_refused(world, folders, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        run_script(main, *arguments(world, folders, "clip", tmp_path), *given)


def test_a_configuration_without_weights_is_refused(world, folders, tmp_path):
    given = arguments(world, folders, "clip", tmp_path)
    given[given.index("--model_name_or_path")] = "--config_name"
    with pytest.raises(ValueError, match=r"config_name is '.*', which is for TESTA"):
        run_script(main, *given)


@pytest.mark.parametrize("name", BASELINES)
def test_a_model_of_another_type_is_named(folders, name):
    other = "clip" if name == "blip" else "blip"
    with pytest.raises(ValueError, match=f"holds a `{other}` model; the baseline `{name}` needs a `"):
        load_baseline(name, folders[other])


def test_siglip_of_any_resolution_is_told_from_that_of_one(tmp_path):
    Siglip2Config().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds a `siglip2` model; .* needs a `siglip` model, .*\(NaFlex, `siglip2`\)"
    ):
        load_baseline("siglip2", tmp_path)


@pytest.mark.parametrize("name", ["xclip", "videoprism"])
def test_a_number_of_frames_that_is_a_part_of_the_weights_stays(folders, name):
    with pytest.raises(ValueError, match=r"num_frames is 8; .* was trained for 4 frames and reads no other number"):
        load_baseline(name, folders[name], num_frames=8)


def test_weights_of_another_task_are_refused(folders, tmp_path):
    model, processor = tiny_blip()
    del model.itm_head
    save(tmp_path, model, processor)
    with pytest.raises(ValueError, match=r"lacks 2 weights of BlipForImageTextRetrieval, itm_head\.bias for one"):
        load_baseline("blip", tmp_path)


@pytest.mark.parametrize("name", ["clip", "xclip"])
def test_a_folder_without_a_whole_processor_is_refused(tmp_path, name):
    model, processor = TINY[name]()
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks files of its processor, which are a tokenizer's and an image"):
        load_baseline(name, tmp_path)


def test_a_name_or_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(
        ValueError, match="There is no baseline `clip4clip`; there are clip, siglip2, blip, xclip, videoprism"
    ):
        load_baseline("clip4clip", tmp_path)
    with pytest.raises(ValueError, match=f"model_name_or_path is '{tmp_path}/no', which is no folder"):
        load_baseline("clip", tmp_path / "no")


def test_texts_count_as_long_with_the_tokens_that_the_tokenizer_adds():
    texts = ["ab", "abc", "abcd"]  # a token a letter, and two around them
    assert [count_long_texts(texts, clip_tokenizer(), limit) for limit in (3, 4, 5, 6)] == [3, 2, 1, 0]
