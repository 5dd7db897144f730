"""GFLOPs of the base encoder with and without aggregation, beside the published ones.

    python benchmarks/gflops.py --output gflops.json

Counted from the configuration, so the figures are the same on every machine.
"""

import argparse
import json
from pathlib import Path

from transformers_testa import TestaVideoConfig
from transformers_testa.flops import count_video_gflops


# Frames, merged frames and patches a block, GFLOPs as the paper or its released code counts them.
SETTINGS = (
    (32, 0, 0, 786.8),
    (32, 1, 12, 419.8),
    (96, 0, 0, 2382.5),
    (96, 4, 8, 1381.4),
    (96, 0, 14, 1364.0),
    (96, 7, 0, 1303.9),
    (16, 0, 0, 392.5),
    (16, 1, 2, 229.0),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file for the figures.")
    output = parser.parse_args().output
    rows = []
    print("| frames | merged frames, patches a block | GFLOPs | published |\n|---|---|---|---|")
    for num_frames, merged_frames, merged_patches, published in SETTINGS:
        config = TestaVideoConfig(
            num_frames=num_frames,
            merged_frames_per_layer=merged_frames,
            merged_patches_per_layer=merged_patches,
        )
        gflops = round(count_video_gflops(config), 1)
        print(f"| {num_frames} | {merged_frames}, {merged_patches} | {gflops} | {published} |")
        rows.append(
            {
                "num_frames": num_frames,
                "merged_frames_per_layer": merged_frames,
                "merged_patches_per_layer": merged_patches,
                "gflops": gflops,
                "published": published,
            }
        )
    if output:
        output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
