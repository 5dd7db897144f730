"""The benchmarks run from end to end, small, and save what they print."""

import importlib
import json
import threading
import time
from contextlib import suppress
from pathlib import Path

import datasets
import psutil
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoConfig, BertConfig, BertModel

from transformers_testa import TestaForRetrieval, TestaProcessor
from transformers_testa.data.demo import DemoArguments, make_demo


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("efficiency", "96 frames, ours, aggregated: times faster than TimesformerModel"),
        ("training", "ours: times faster than the peer"),
    ],
)
def test_a_benchmark_prints_and_saves_what_it_measured(name, ratio, tmp_path, capsys):
    benchmark = importlib.import_module(name)
    options = ["--eager_only"] if name == "efficiency" else []
    benchmark.main(["--tiny", "--repeats", "1", "--output", str(tmp_path / "figures.json"), *options])
    saved = json.loads((tmp_path / "figures.json").read_text())
    printed = capsys.readouterr().out
    assert saved["machine"] in printed and f"| {ratio} |" in printed
    assert saved["results"]["ratios"][ratio] > 0


def run_small(name, tmp_path, *options):
    benchmark = importlib.import_module(name)
    benchmark.main([*map(str, options), "--repeats", "2", "--output", str(tmp_path / "figures.json")])
    return json.loads((tmp_path / "figures.json").read_text())["results"]


def test_re_ranking_is_measured_against_one_by_one(tmp_path, capsys):
    sizes = ("--layers", 2, "--video_tokens", 12, 20, "--text_tokens", 6, "--texts_per_video", 3)
    rows = run_small("reranking", tmp_path, *sizes)
    assert [(row["video tokens"], row["texts a video"]) for row in rows] == [(12, 3), (20, 3)]
    for row in rows:
        ratio = row["pairs/s ours"] / row["pairs/s one by one"]
        assert row["ours is faster by"] == pytest.approx(ratio) and row["by processor time"] > 0
        assert row["measured"] == "8/8192 6/8192"
    assert "| 20 | 3 |" in capsys.readouterr().out


def test_searches_of_a_gallery_are_measured_with_what_they_find_and_storage_with_what_it_loses(tmp_path):
    sizes = ("--videos", 20_000, "--dim", 16, "--top_k", 5, "--queries", 1, "--tokens", 20, "--batch_size", 2)
    results = run_small("gallery", tmp_path, *sizes)
    found = {row["search"]: row["found of the best"] for row in results["search"]}
    for name in ("numpy, full argsort", "EmbeddingIndex, float32", "EmbeddingIndex, faiss"):
        assert found[name] == "100.0%"
    sizes = {row["stored in"]: row["MB a video"] for row in results["storage"]}
    assert sizes["float32"] > 1.9 * sizes["bfloat16"] > 3.5 * sizes["int8"]
    assert [row["relative error"] for row in results["storage"]] == ["0", "2^-9.2", "2^-7.0"]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Stories of the demo and, in `model`, its model with new weights."""
    folder = tmp_path_factory.mktemp("stories")
    sizes = {"num_train": 2, "num_validation": 2, "num_test": 8, "image_size": 32, "fps": 4}
    make_demo(DemoArguments(str(folder), **sizes))
    config_dir = ROOT / "hub_configs" / "testa-demo"
    TestaForRetrieval(AutoConfig.from_pretrained(config_dir)).save_pretrained(folder / "model")
    TestaProcessor.from_pretrained(config_dir).save_pretrained(folder / "model")
    return folder


def test_pictures_are_drawn_of_a_story_and_of_any_video(stories, tmp_path, capsys):
    pictures = importlib.import_module("pictures")
    options = ("--model", str(stories / "model"), "--output_dir")
    story = ("--data_dir", str(stories), "--video_id", "test-00003")
    pictures.main([*options, str(tmp_path / "story"), *story])
    assert "of those in one token" in capsys.readouterr().out
    video = ("--video", str(stories / "videos" / "test-00003.mp4"), "--phrase", "a star.")
    pictures.main([*options, str(tmp_path / "video"), *video])
    drawn = {"merged.png", "layers.png", "layers.gif", "grounding.png", "similarity.png"}
    for folder, names in (("story", drawn | {"results.png"}), ("video", drawn)):
        assert {file.name for file in (tmp_path / folder).iterdir()} == names
        with Image.open(tmp_path / folder / "merged.png") as picture:
            assert picture.width > 6 * 4 * 24  # six frames in a row, of four patches
    with pytest.raises(SystemExit):
        pictures.main([*options, str(tmp_path), *story, *video])


def test_pointing_at_objects_is_compared_with_chance(stories, tmp_path, capsys):
    options = ("--model", str(stories / "model"), "--data_dir", str(stories), "--num_videos", "3")
    importlib.import_module("grounding").main([*options, "--output", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert figures["videos"] == 3 and figures["objects"] > 3
    assert {(row["text"], row["by"]) for row in figures["rows"]} == {
        (text, by) for text in ("phrase", "sentence") for by in ("random", "cosine", "matching", "cross-attention")
    }
    assert all(0 <= value <= 100 for row in figures["rows"] for name, value in row.items() if name.endswith("%"))
    assert "3 videos; " in capsys.readouterr().out


def test_precisions_are_compared_in_recall_size_and_speed(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = ("--model_name_or_path", str(stories / "model"), "--test_file", str(stories / "test.jsonl"))
    importlib.import_module("quantization").main([*source, "--output", str(tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())["results"]["rows"]
    megabytes = {row["precision"]: row["MB"] for row in rows}
    assert megabytes["fp32"] > 1.9 * megabytes["bf16"] > megabytes["int8"] > 0
    assert all(0 <= row["re-ranked R@1"] <= 100 for row in rows)


def test_counted_gflops_are_near_the_published_ones(tmp_path):
    importlib.import_module("gflops").main(["--output", str(tmp_path / "figures.json")])
    for row in json.loads((tmp_path / "figures.json").read_text())["results"]:
        assert float(row["GFLOPs"]) == pytest.approx(float(row["published"]), rel=0.005)


def kill_who_writes(log):
    """Kill the process below this one that has a file open, as soon as there is one."""
    while True:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended since
                if str(log) in (file.path for file in process.open_files()):
                    return process.kill()
        time.sleep(0.05)


def test_an_ablation_trains_once_evaluates_every_row_and_goes_on_from_what_there_is(tmp_path):
    looks = [tmp_path / "here", tmp_path / "elsewhere"]
    for seed, look in enumerate(looks):
        sizes = {"num_train": 24, "num_validation": 2, "num_test": 8, "image_size": 32, "fps": 4}
        make_demo(DemoArguments(str(look), seed=seed, **sizes))
    ablation = importlib.import_module("ablation")
    rows = ("joint, none", "off the shelf, geometry")
    steps = ("--clip_steps", "2", "--story_steps", "2", "--row_steps", "2")
    options = (*steps, "--seeds", "0", "--report", str(tmp_path / "results.md"))
    command = ["--output_dir", str(tmp_path / "runs"), *options, "--rows", *rows, "--data_dir"]
    with pytest.raises(RuntimeError, match=r"seed0/clips, .*log.txt there says why"):
        ablation.main([*command, str(tmp_path / "nowhere")])
    command.append(str(looks[0]))
    stories_log = tmp_path / "runs" / "seed0" / "stories, divided_space_time" / "log.txt"
    killer = threading.Thread(target=kill_who_writes, args=[stories_log], daemon=True)
    killer.start()
    with pytest.raises(RuntimeError, match=r"killed from outside, .* The same command goes on"):
        ablation.main(command)
    killer.join()
    ablation.main(command)
    first = json.loads((tmp_path / "runs" / "ablation.json").read_text())["results"]
    assert [entry["row"] for entry in first] == ["off the shelf, geometry", "joint, none"]
    assert first[0]["GFLOPs"] < 0.6 * first[1]["GFLOPs"]
    assert "Recall against GFLOPs" in (tmp_path / "results.md").read_text() and (tmp_path / "results.png").is_file()
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("results.json")}
    ablation.main(command)
    assert {file: file.stat().st_mtime_ns for file in written} == written and len(written) == 7

    ablation.main([*command, "--test_file", str(looks[1] / "test.jsonl")])
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert json.loads((tmp_path / "runs" / "ablation.json").read_text())["results"][0]["R@1"] == first[0]["R@1"]
    evaluated = sorted((tmp_path / "runs" / "elsewhere").rglob("results.json"))
    assert [file.parent.name for file in evaluated] == sorted(["none", *rows])
    for file in evaluated:
        assert json.loads(file.read_text())["definition"]["data"] == looks[1].name


def test_photographs_and_texts_are_distilled_into_a_start_that_lessons_begin_with(tmp_path, monkeypatch, capsys):
    for number in range(120):
        picture = Image.new("RGBA", (20, 20), (2 * number, 37 * number % 256, 101 * number % 256, 255))
        (tmp_path / "objects").mkdir(exist_ok=True)
        picture.save(tmp_path / f"objects/{number}.png")
        (tmp_path / f"objects/{number}.txt").write_text(f"Sheep {number}.")
    sizes = {"num_train": 16, "num_validation": 2, "num_test": 4, "image_size": 32, "fps": 4}
    scenes = {"min_scenes": 3, "max_scenes": 4, "objects": str(tmp_path / "objects")}
    make_demo(DemoArguments(str(tmp_path / "demo"), **sizes, **scenes))
    ablation, distillation = map(importlib.import_module, ("ablation", "distillation"))
    config_dir = ROOT / "hub_configs" / "testa-demo-photographs"
    text_config = AutoConfig.from_pretrained(config_dir).text_config
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**{name: getattr(text_config, name) for name in shared}))
    bert.save_pretrained(tmp_path / "bert")
    teacher = timm.create_model(distillation.TEACHER).state_dict()
    torch.save({f"other.{name}": weight for name, weight in teacher.items()}, tmp_path / "teacher.pth")

    start = tmp_path / "runs" / "testa-demo-photographs-start"  # as the recipe of the first lesson says
    sources = ("--image_weights", tmp_path / "teacher.pth", "--text_model", tmp_path / "bert")
    folders = ("--data_dir", tmp_path / "demo", "--config_dir", config_dir, "--output_dir", start)
    monkeypatch.setattr(distillation, "NUM_PHRASES", 20)
    distillation.main([*map(str, (*folders, *sources, "--video_steps", 2, "--text_steps", 2))])
    rows = json.loads((start / "distillation.json").read_text())["results"]
    assert [row["split"] for row in rows] == ["train", "validation", "test"]
    assert all(0 <= row[f"{who}: R@1"] <= row[f"{who}: R@5"] <= 100 for row in rows for who in ("model", "teachers"))
    assert rows[0]["teachers: R@1"] > 90  # the regression was fitted to these
    assert "| validation |" in capsys.readouterr().out
    started = TestaForRetrieval.from_pretrained(start)
    words = started.testa.text_model.embeddings.word_embeddings.weight
    difference = (words - bert.embeddings.word_embeddings.weight).abs().max()
    assert 0 < difference < 0.01  # it begins as BERT, and learns
    assert not any(
        block.temporal_fc.weight.any()
        for block in started.testa.video_model.modules()
        if hasattr(block, "temporal_fc")
    )

    monkeypatch.chdir(tmp_path)
    steps = ("--clip_steps", "1", "--story_steps", "1", "--row_steps", "1", "--seeds", "0", "--rows", "none")
    folders = ("--data_dir", "demo", "--config_dir", str(config_dir), "--output_dir", "runs")
    ablation.main([*folders, *steps])
    clips = TestaForRetrieval.from_pretrained("runs/seed0/clips, divided_space_time")
    words_then = clips.testa.text_model.embeddings.word_embeddings.weight
    assert 0 < (words_then - words).abs().max() < 0.01
