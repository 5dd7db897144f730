"""GFLOPs of the base encoder with and without aggregation, beside the published ones.

    python benchmarks/gflops.py --output gflops.json

Counted from the configuration, so the figures are the same on every machine.
"""

import argparse
from pathlib import Path

from measuring import print_table, save_json

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


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file for the figures.")
    args = parser.parse_args(arguments)
    rows = []
    for num_frames, merged_frames, merged_patches, published in SETTINGS:
        config = TestaVideoConfig(
            num_frames=num_frames, merged_frames_per_layer=merged_frames, merged_patches_per_layer=merged_patches
        )
        gflops = f"{count_video_gflops(config):.1f}"
        merges = f"{merged_frames}, {merged_patches}"
        rows.append(
            {
                "frames": num_frames,
                "merged frames, patches a block": merges,
                "GFLOPs": gflops,
                "published": str(published),
            }
        )
    print_table(rows)
    save_json(args.output, "every machine", rows)


if __name__ == "__main__":
    main()
