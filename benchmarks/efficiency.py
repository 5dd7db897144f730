"""GFLOPs, seconds and memory of the video encoder with and without aggregation, beside three encoders of Transformers.

    python benchmarks/efficiency.py --dtype bfloat16 --output efficiency.json

Rows "32" and "96" are the paper's Table 1 and 5: base size, 224 pixels, one video of so many frames, compared with
`TimesformerModel` of the same size. "others" are VideoMAE and X-CLIP at their published sizes, with the frames that these
have. "linear" is how fast this machine multiplies the matrices of a block, and nothing else: a bound for any encoder.
Inference, random weights. A multiply-add counts once.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measuring import (
    alternate,
    alternate_with_processors,
    benchmark_parser,
    describe_machine,
    peak_memory,
    print_table,
    save_json,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    TimesformerConfig,
    TimesformerModel,
    VideoMAEConfig,
    VideoMAEModel,
    XCLIPConfig,
    XCLIPModel,
    XCLIPVisionConfig,
)

from transformers_testa import TestaVideoConfig, TestaVideoModel
from transformers_testa.flops import count_video_gflops


# Frames and patches that each block merges, by frames of the video.
AGGREGATION = {8: (0, 12), 16: (1, 2), 32: (1, 12), 96: (4, 8)}
TINY = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY_AGGREGATION = dict.fromkeys(AGGREGATION, (1, 1))
LINEAR_SHAPES = ((1, 3), (1, 1), (1, 4), (4, 1))  # input and output, in widths of the encoder


class VideoEncoderOfXCLIP(nn.Module):
    """X-CLIP without its text encoder."""

    def __init__(self, config: XCLIPConfig):
        super().__init__()
        self.model = XCLIPModel(config)
        self.model.text_model = self.model.text_projection = self.model.prompts_generator = None

    def forward(self, pixel_values: Tensor) -> Any:
        return self.model.get_video_features(pixel_values)


def count_peer_gflops(encoder: Callable[[], nn.Module], frames: tuple[int, ...]) -> float:
    """Return the GFLOPs of matrix products and convolutions; without tensors' contents, and before any fused kernel."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        encoder("eager").eval()(torch.empty(frames))
    return counter.get_total_flops() / 2e9


def time_encoders(
    encoders: dict[str, Callable[..., nn.Module]],
    num_frames: dict[str, int],
    compiled: Sequence[str],
    settings: Any,
) -> list[dict[str, Any]]:
    """Return a row for each encoder, and one more for each that is also compiled."""
    device, dtype, size = settings.device, getattr(torch, settings.dtype), settings.image_size
    models, memory, runs = {}, {}, {}
    for name, encoder in encoders.items():
        torch.manual_seed(0)
        model = encoder("sdpa").eval().requires_grad_(False).to(device, dtype)
        video = torch.randn(1, num_frames[name], 3, size, size, device=device, dtype=dtype)
        models[name] = model
        runs[name] = partial(model, video)
        if name in compiled and not settings.eager_only:
            runs[f"{name}, compiled"] = partial(torch.compile(model, fullgraph=True), video)
    rows = []
    with torch.inference_mode():
        seconds, processor_seconds = alternate_with_processors(runs, settings.repeats)
        for name, run in runs.items():
            memory[name] = peak_memory(run, device)
    for name in runs:
        encoder = name.removesuffix(", compiled")
        frames = num_frames[encoder]
        gflops = (
            count_video_gflops(models[encoder].config)
            if isinstance(models[encoder], TestaVideoModel)
            else count_peer_gflops(encoders[encoder], (1, frames, 3, size, size))
        )
        median = statistics.median(seconds[name])
        rows.append(
            {
                "encoder": name,
                "frames": frames,
                "GFLOPs": gflops,
                "seconds": median,
                "processor seconds": statistics.median(processor_seconds[name]),
                "ms per frame": 1000 * median / frames,
                "GFLOPs × 2 / s": 2 * gflops / median,
                "peak MB": memory[name] / 1e6,
            }
        )
    return rows


def testa(num_frames: int, aggregated: bool, tiny: bool) -> Callable[[str], nn.Module]:
    """Return how our encoder is made."""
    merges = (TINY_AGGREGATION if tiny else AGGREGATION)[num_frames] if aggregated else (0, 0)
    config = TestaVideoConfig(
        num_frames=num_frames,
        merged_frames_per_layer=merges[0],
        merged_patches_per_layer=merges[1],
        **(TINY if tiny else {}),
    )
    return lambda attention: TestaVideoModel._from_config(config, attn_implementation=attention)


def compare_with_timesformer(num_frames: int, settings: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return rows of both encoders, and by how much aggregation and we are faster or smaller."""
    config = TimesformerConfig(num_frames=num_frames, **(TINY if settings.tiny else {}))
    encoders = {
        "TimesformerModel": lambda attention: TimesformerModel(config),  # has one attention only
        "ours": testa(num_frames, False, settings.tiny),
        "ours, aggregated": testa(num_frames, True, settings.tiny),
    }
    rows = time_encoders(encoders, dict.fromkeys(encoders, num_frames), tuple(encoders)[1:], settings)
    by_name = {row["encoder"]: row for row in rows}
    ours, aggregated, peer = (by_name[name] for name in ("ours", "ours, aggregated", "TimesformerModel"))
    ratios = {"GFLOPs gain of aggregation": ours["GFLOPs"] / aggregated["GFLOPs"]}
    for suffix in ("", ", compiled") if "ours, compiled" in by_name else ("",):
        ours, aggregated = by_name[f"ours{suffix}"], by_name[f"ours, aggregated{suffix}"]
        for unit, clock in (("seconds", ""), ("processor seconds", " (processor time)")):
            ratios |= {
                f"ours{suffix}: times faster than TimesformerModel{clock}": peer[unit] / ours[unit],
                f"ours, aggregated{suffix}: times faster than TimesformerModel{clock}": peer[unit] / aggregated[unit],
                f"ours{suffix}: times faster by aggregation{clock}": ours[unit] / aggregated[unit],
            }
        ratios |= {
            f"ours{suffix}: peak memory, share left by aggregation": aggregated["peak MB"] / ours["peak MB"],
            f"ours, aggregated{suffix}: peak memory, share of TimesformerModel's": aggregated["peak MB"]
            / peer["peak MB"],
        }
    return rows, {f"{num_frames} frames, {name}": ratio for name, ratio in ratios.items()}


def compare_with_others(settings: Any) -> list[dict[str, Any]]:
    """Return rows of VideoMAE and X-CLIP, and of our encoder with as many frames."""
    videomae = VideoMAEConfig(**(TINY if settings.tiny else {}))
    vision = {name: value for name, value in TINY.items() if settings.tiny}
    xclip = XCLIPConfig(
        vision_config=XCLIPVisionConfig(
            patch_size=16, num_frames=8, mit_hidden_size=vision.get("hidden_size", 512), **vision
        ),
        projection_dim=vision.get("hidden_size", 512),
    )
    encoders = {
        "VideoMAE": lambda attention: VideoMAEModel._from_config(videomae, attn_implementation=attention),
        "ours, 16 frames": testa(16, False, settings.tiny),
        "ours, 16 frames, aggregated": testa(16, True, settings.tiny),
        "X-CLIP": lambda attention: VideoEncoderOfXCLIP(xclip),
        "ours, 8 frames": testa(8, False, settings.tiny),
        "ours, 8 frames, aggregated": testa(8, True, settings.tiny),
    }
    num_frames = {name: 8 if "8" in name or name == "X-CLIP" else 16 for name in encoders}
    return time_encoders(encoders, num_frames, (), settings)


def measure_linear_layers(settings: Any) -> list[dict[str, Any]]:
    """Return the rate of each linear layer of a block over the tokens of 32 frames, and their mean."""
    width, tokens = (32, 128) if settings.tiny else (768, 32 * 197)
    device, dtype = settings.device, getattr(torch, settings.dtype)
    runs, gflops = {}, {}
    for inputs, outputs in LINEAR_SHAPES:
        states = torch.randn(tokens, inputs * width, device=device, dtype=dtype)
        weight = torch.randn(outputs * width, inputs * width, device=device, dtype=dtype)
        bias = torch.randn(outputs * width, device=device, dtype=dtype)
        name = f"{inputs * width} → {outputs * width}"
        runs[name] = partial(F.linear, states, weight, bias)
        gflops[name] = tokens * inputs * outputs * width**2 / 1e9
    with torch.inference_mode():
        seconds = {name: statistics.median(times) for name, times in alternate(runs, 4 * settings.repeats).items()}
    rates = {name: 2 * gflops[name] / seconds[name] for name in runs}
    rows = [
        {"linear layer": name, "GFLOPs": gflops[name], "seconds": seconds[name], "GFLOPs × 2 / s": rates[name]}
        for name in runs
    ]
    return [
        *rows,
        {"linear layer": "mean", "GFLOPs": None, "seconds": None, "GFLOPs × 2 / s": statistics.mean(rates.values())},
    ]


def main(arguments: Sequence[str] | None = None):
    parser = benchmark_parser(__doc__, rows=("linear", "32", "96", "others"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--eager_only", action="store_true", help="Leave out the compiled encoders.")
    parser.add_argument("--tiny", action="store_true", help="Encoders of two narrow blocks, to see that this runs.")
    settings = parser.parse_args(arguments)
    settings.image_size = TINY["image_size"] if settings.tiny else 224
    machine = f"{describe_machine(settings.device)}, {settings.dtype}"
    print(machine)

    results, rates = {"ratios": {}}, {}
    if "linear" in settings.rows:
        print()
        results["linear"] = measure_linear_layers(settings)
        print_table(results["linear"])
        rates["linear"] = results["linear"][-1]["GFLOPs × 2 / s"]
    for row in ("32", "96"):
        if row in settings.rows:
            print()
            results[row], ratios = compare_with_timesformer(int(row), settings)
            print_table(results[row])
            if rates:
                for figures in results[row][1:]:
                    ratios[f"{row} frames, {figures['encoder']}: rate, share of linear layers'"] = (
                        figures["GFLOPs × 2 / s"] / rates["linear"]
                    )
            results["ratios"] |= ratios
    if "others" in settings.rows:
        print()
        results["others"] = compare_with_others(settings)
        print_table(results["others"])
    if results["ratios"]:
        print()
        print_table([{"figure": name, "ratio": ratio} for name, ratio in results["ratios"].items()])
    save_json(settings.output, machine, results)


if __name__ == "__main__":
    main()
