"""The benchmarks run from end to end, small, and save what they print."""

import importlib
import json
import threading
import time
from contextlib import suppress

import psutil
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoConfig, BertConfig, BertModel

from transformers_testa import TestaForRetrieval
from transformers_testa.data.demo import DemoArguments, make_demo


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
        picture = Image.new("RGBA", (20, 20), (2 * number, 100, 200, 255))
        (tmp_path / "objects").mkdir(exist_ok=True)
        picture.save(tmp_path / f"objects/{number}.png")
        (tmp_path / f"objects/{number}.txt").write_text(f"Sheep {number}.")
    sizes = {"num_train": 16, "num_validation": 2, "num_test": 4, "image_size": 32, "fps": 4}
    scenes = {"min_scenes": 3, "max_scenes": 4, "objects": str(tmp_path / "objects")}
    make_demo(DemoArguments(str(tmp_path / "demo"), **sizes, **scenes))
    ablation, distillation = map(importlib.import_module, ("ablation", "distillation"))
    config_dir = ablation.ROOT / "hub_configs" / "testa-demo-photographs"
    text_config = AutoConfig.from_pretrained(config_dir).text_config
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
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
