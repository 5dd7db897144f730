"""Recall, size and speed of a retrieval model in fp32, bf16 and int8, on the machine this runs on.

    python benchmarks/quantization.py --model_name_or_path runs/testa-demo --test_file demo_stories/test.jsonl \
        --output quantization.json

int8 is the dynamic quantization of torchao (`pip install torchao`): weights are stored as 8-bit integers and inputs are
rounded to them on the fly, in all linear layers but the heads. Videos are decoded beforehand, so that the time is the
encoder's.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from measuring import describe_machine, print_table, save_json
from torch.utils.data import DataLoader
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from transformers import AutoProcessor, PreTrainedModel, TorchAoConfig

from transformers_testa import TestaForRetrieval
from transformers_testa.data.annotations import load_annotations
from transformers_testa.data.datasets import (
    BrokenVideos,
    VideoTextDataset,
    cache_frames,
    collate_texts,
    collate_videos,
    distinct_videos,
)
from transformers_testa.retrieval import evaluate_retrieval, inference


# The heads are small, and differences as small as a rounding error rank candidates.
HEADS = ["video_projection", "text_projection", "matching_head"]
PRECISIONS = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {
        "dtype": torch.float32,
        "quantization_config": TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=HEADS),
    },
}
RECALLS = {
    f"{shown}R@{k}": f"{ranked}text_to_video_recall@{k}"
    for shown, ranked in (("", ""), ("re-ranked ", "reranked_"))
    for k in (1, 5, 10)
}


def megabytes_of(model: PreTrainedModel) -> float:
    """Return the size of the weights as they are saved."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="A TestaForRetrieval.")
    parser.add_argument("--test_file", required=True, help="Annotations of videos and texts.")
    parser.add_argument("--batch_size", type=int, default=8, help="Videos to encode at a time.")
    parser.add_argument("--output", type=Path, help="JSON file for the figures.")
    args = parser.parse_args(arguments)

    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    table = load_annotations(args.test_file)
    videos = distinct_videos(table)
    frames = cache_frames(videos, processor.video_processor)
    video_loader = DataLoader(
        VideoTextDataset(videos, processor.video_processor, frames),
        args.batch_size,
        collate_fn=partial(collate_videos, processor=processor),
    )
    text_loader = DataLoader(
        [{**row, "index": number} for number, row in enumerate(table)],
        args.batch_size,
        collate_fn=partial(collate_texts, processor=processor, max_words=processor.tokenizer.model_max_length),
    )

    machine = describe_machine()
    print(f"{len(table)} texts, {len(videos)} videos. {machine}\n")
    broken_videos, rows = BrokenVideos(), []
    for precision, settings in PRECISIONS.items():
        model = TestaForRetrieval.from_pretrained(args.model_name_or_path, **settings)
        with inference(model):  # the first time is slower
            model.get_video_features(next(broken_videos.filter(video_loader))["pixel_values_videos"])
        metrics, _ = evaluate_retrieval(model, broken_videos.filter(video_loader), text_loader)
        rows.append(
            {
                "precision": precision,
                "MB": megabytes_of(model),
                "seconds per video": metrics["seconds_per_video"],
                **{shown: metrics[name] for shown, name in RECALLS.items()},
            }
        )
    print_table(rows)
    save_json(args.output, machine, {"texts": len(table), "videos": len(videos), "rows": rows})


if __name__ == "__main__":
    main()
