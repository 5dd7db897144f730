"""What the benchmarks share: the machine in words, fair timing, peak memory, tables and JSON."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def describe_machine(device: str = "cpu") -> str:
    """Return the processor and what PyTorch makes of it; for "cuda" the GPU as well."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), processor)
        flags = next((line.partition(": ")[2].split() for line in lines if line.startswith("flags")), [])
        processor += ", AMX" if "amx_bf16" in flags else ", no AMX"
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"{processor} ({capability}), {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    return f"{torch.cuda.get_device_name()}; {machine}" if device == "cuda" else machine


def alternate(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return how many seconds each function takes, `repeats` times, after one run that isn't counted.

    They take turns, so that whatever else the machine does meets all of them alike, and every other round goes
    backwards, so that none always follows the same one.
    """
    seconds = {name: [] for name in functions}
    for function in functions.values():
        function()
    for turn in range(repeats):
        for name in list(functions)[:: 1 if turn % 2 == 0 else -1]:
            _wait_for_device()
            start = time.perf_counter()
            functions[name]()
            _wait_for_device()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def alternate_with_processors(
    functions: dict[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return what [`alternate`] does, and the seconds of all processors: they depend less on what else is running."""
    processor_seconds = {name: [] for name in functions}

    def timed(name: str, function: Callable[[], Any]) -> Callable[[], None]:
        def run():
            start = time.process_time()
            function()
            processor_seconds[name].append(time.process_time() - start)

        return run

    seconds = alternate({name: timed(name, function) for name, function in functions.items()}, repeats)
    return seconds, {name: runs[1:] for name, runs in processor_seconds.items()}


def _wait_for_device():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def median_ratio(seconds: dict[str, list[float]], peer: str, ours: str) -> float:
    """Return how many times faster `ours` is than `peer`: the ratio of their medians."""
    return statistics.median(seconds[peer]) / statistics.median(seconds[ours])


def peak_memory(function: Callable[[], Any], device: str = "cpu") -> int:
    """Return the most bytes that tensors made by `function` take at one time, beside those there were before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    taken = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    return peak


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows that have the same keys as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row.values())) + " |" for row in rows)])


def print_table(rows: Sequence[dict[str, Any]]):
    """Print rows that have the same keys as a Markdown table."""
    print(markdown_table(rows), flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save_json(path: Path | None, machine: str, results: Any):
    """Write the figures and the machine they come from, if there is a path to write to."""
    if path:
        path.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n", encoding="utf-8")


def benchmark_parser(description: str, rows: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark can be told; `rows` names the parts it can be limited to."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="Runs of each thing that is timed; the median counts.")
    if rows:
        parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), help="Which parts; else all.")
    parser.add_argument("--output", type=Path, help="JSON file for the figures.")
    return parser
