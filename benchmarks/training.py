"""One training step for retrieval, beside the encoders of Transformers that it would otherwise be built from.

    python benchmarks/training.py --dtype bfloat16 --output training.json

Base size, 224 pixels, 8 frames, a batch of 4 videos with a text of 64 tokens each. Our step encodes videos and texts,
compares them, reads each text with its video, each text with a hard negative video and each video with a hard negative
text, and goes back through all of it. The peer does as much of this as its models can, forward and backward:
`TimesformerModel`, `BlipTextModel` over the 4 texts, and once more over the 12 pairs. All of them have the dropout of
their default configurations, and random weights.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
from measuring import (
    alternate_with_processors,
    benchmark_parser,
    describe_machine,
    peak_memory,
    print_table,
    save_json,
)
from torch import Tensor, nn
from transformers import BlipTextConfig, TimesformerConfig, TimesformerModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from transformers_testa import TestaConfig, TestaForRetrieval


NUM_FRAMES, TEXT_LENGTH, VOCABULARY = 8, 64, 30524
PAIRS_OF_A_SAMPLE = 3
AGGREGATION = {"merged_patches_per_layer": 12}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY_AGGREGATION = {"merged_patches_per_layer": 1}
PEER = "TimesformerModel and two passes of BlipTextModel"


class PeerModel(nn.Module):
    """Encodes videos and texts, and reads pairs of them."""

    def __init__(self, video_config: TimesformerConfig, text_config: BlipTextConfig):
        super().__init__()
        self.video_model = TimesformerModel(video_config)
        self.text_model = BlipTextModel(text_config, add_pooling_layer=False)

    def forward(self, pixel_values_videos: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return a number that depends on all outputs."""
        videos = self.video_model(pixel_values_videos).last_hidden_state
        texts = self.text_model(input_ids, attention_mask).last_hidden_state
        pairs = self.text_model(
            input_ids.repeat(PAIRS_OF_A_SAMPLE, 1),
            attention_mask.repeat(PAIRS_OF_A_SAMPLE, 1),
            encoder_hidden_states=videos.repeat(PAIRS_OF_A_SAMPLE, 1, 1),
            is_decoder=True,
        ).last_hidden_state
        return videos.mean() + texts[:, 0].mean() + pairs[:, 0].mean()


def build_peer(tiny: bool, layers: int) -> nn.Module:
    sizes = TINY if tiny else {"num_attention_heads": 12, "num_hidden_layers": layers}
    text_config = BlipTextConfig(
        vocab_size=VOCABULARY, encoder_hidden_size=sizes.get("hidden_size", 768), use_cache=False, **sizes
    )
    video_sizes = {**sizes, "image_size": 32} if tiny else sizes
    return PeerModel(TimesformerConfig(num_frames=NUM_FRAMES, **video_sizes), text_config)


def build_ours(tiny: bool, layers: int, aggregation: dict[str, int]) -> TestaForRetrieval:
    sizes = TINY if tiny else {"num_hidden_layers": layers}
    video_config = {**sizes, "image_size": 32} if tiny else sizes
    return TestaForRetrieval(
        TestaConfig(
            video_config={"num_frames": NUM_FRAMES, **video_config, **aggregation},
            text_config={"encoder_hidden_size": sizes.get("hidden_size", 768), **sizes},
        )
    )


def training_step(
    model: nn.Module, loss_of: Callable[[nn.Module], Tensor], device: str, dtype: torch.dtype
) -> Callable[[], None]:
    """Return a step: forward, under autocast unless in float32, and backward."""

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(model)
        loss.backward()

    return step


def main(arguments: Sequence[str] | None = None):
    parser = benchmark_parser(__doc__, rows=("ours", "aggregated", "checkpointed"))
    parser.add_argument(
        "--layers", type=int, default=12, help="Blocks of every encoder; fewer take less time to measure."
    )
    parser.add_argument("--batch_size", type=int, default=4, help="Videos, and texts; 2 or more.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="Of matrix products.")
    parser.add_argument("--tiny", action="store_true", help="Models of two narrow blocks, to see that this runs.")
    settings = parser.parse_args(arguments)
    device, dtype, tiny = settings.device, getattr(torch, settings.dtype), settings.tiny
    machine = (
        f"{describe_machine(device)}, {settings.dtype}, batches of {settings.batch_size}, {settings.layers} layers"
    )
    print(f"{machine}\n")

    torch.manual_seed(0)
    size = 32 if tiny else 224
    input_ids = torch.randint(1000, VOCABULARY - 2, (settings.batch_size, TEXT_LENGTH), device=device)
    batch = {
        "pixel_values_videos": torch.randn(settings.batch_size, NUM_FRAMES, 3, size, size, device=device),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
    }
    aggregation = TINY_AGGREGATION if tiny else AGGREGATION
    models = {PEER: build_peer(tiny, settings.layers)}
    if "ours" in settings.rows:
        models["ours"] = build_ours(tiny, settings.layers, {})
    if "aggregated" in settings.rows:
        models["ours, aggregated"] = build_ours(tiny, settings.layers, aggregation)
    if "checkpointed" in settings.rows:
        models["ours, aggregated, checkpointed"] = build_ours(tiny, settings.layers, aggregation)
        models["ours, aggregated, checkpointed"].activation_checkpointing_enable()
    steps = {}
    for name, model in models.items():
        model.train().to(device)
        of_output = (lambda model: model(**batch)) if name == PEER else (lambda model: model(**batch).loss)
        steps[name] = training_step(model, of_output, device, dtype)
    seconds, processor_seconds = alternate_with_processors(steps, settings.repeats)
    rows = [
        {
            "step": name,
            "seconds": statistics.median(seconds[name]),
            "processor seconds": statistics.median(processor_seconds[name]),
            "peak MB": peak_memory(step, device) / 1e6,
        }
        for name, step in steps.items()
    ]
    print_table(rows)
    by_name = {row["step"]: row for row in rows}
    ratios = {}
    for name, ours in list(by_name.items())[1:]:
        for unit, clock in (("seconds", ""), ("processor seconds", " (processor time)")):
            ratios[f"{name}: times faster than the peer{clock}"] = by_name[PEER][unit] / ours[unit]
        ratios[f"{name}: peak memory, share of the peer's"] = ours["peak MB"] / by_name[PEER]["peak MB"]
    print()
    print_table([{"figure": name, "ratio": ratio} for name, ratio in ratios.items()])
    save_json(settings.output, machine, {"steps": rows, "ratios": ratios})


if __name__ == "__main__":
    main()
