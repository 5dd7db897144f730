"""The benchmarks that measure encoders and training run from end to end, on models of two narrow blocks."""

import importlib
import json

import pytest


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("efficiency", "96 frames, ours, aggregated: times faster than TimesformerModel"),
        ("training", "times faster than TimesformerModel and two passes of BlipTextModel"),
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
