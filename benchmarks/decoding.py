"""Sampled decoding: 96 frames of a 3-minute 1280x720 H.264 file at 224 pixels, ours and three other decoders.

    pip install torchcodec decord2
    python benchmarks/decoding.py --folder decoding_videos --output decoding.json

The videos are made first, which takes some minutes, and kept in the folder. All decoders give the same frames, as uint8
at 224 x 224; the processor time tells what a decoder computes, the seconds also how well it shares that out.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import torch
from measuring import alternate_with_processors, describe_machine, median_ratio, print_table, save_json
from moving_pictures import write_moving_pictures
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers.video_utils import load_video

from transformers_testa.video_decoding_testa import sample_frame_indices
from transformers_testa.video_processing_testa import TestaVideoProcessor


SIZE = 224
NUM_FRAMES = 96
THREADS = 2
# 30 seconds, six times over.
ENCODED_FRAMES, REPEATS_OF_THEM = 900, 6
GROUPS_OF_PICTURES = (30, 250)
# Two decoders may scale with different filters; frames of other moments differ by ten times as much.
LARGEST_MEAN_DIFFERENCE = 4.0

LEAST = {(30, "load_video"): 4, (30, "the faster"): 2, (250, "load_video"): 1.4, (250, "the faster"): 1.0}
AIM = {(30, "load_video"): 8, (30, "the faster"): 4, (250, "load_video"): 2.2, (250, "the faster"): 1.5}


def decode_with_testa(path: str) -> Tensor:
    return TestaVideoProcessor(num_frames=NUM_FRAMES).decode(path, decoding_threads=THREADS)


def decode_with_load_video(path: str) -> Tensor:
    def sample(metadata, **kwargs):
        return sample_frame_indices(metadata.total_num_frames, NUM_FRAMES)

    frames, _ = load_video(path, backend="pyav", sample_indices_fn=sample)
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return resize(pictures, [SIZE, SIZE], interpolation=InterpolationMode.BICUBIC, antialias=True)


def decode_with_torchcodec(path: str) -> Tensor:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    # Its fastest settings: no scan of the file before, and frames that leave the decoder scaled.
    decoder = VideoDecoder(
        path, num_ffmpeg_threads=THREADS, seek_mode="approximate", transforms=[Resize((SIZE, SIZE))]
    )
    return decoder.get_frames_at(sample_frame_indices(len(decoder), NUM_FRAMES).tolist()).data


def decode_with_decord(path: str) -> Tensor:
    import decord

    reader = decord.VideoReader(path, width=SIZE, height=SIZE, num_threads=THREADS)
    frames = reader.get_batch(sample_frame_indices(len(reader), NUM_FRAMES).tolist()).asnumpy()
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


DECODERS = {
    "transformers-testa": decode_with_testa,
    "load_video": decode_with_load_video,
    "torchcodec": decode_with_torchcodec,
    "decord2": decode_with_decord,
}


def usable_decoders(path: str) -> dict[str, Callable[[str], Tensor]]:
    """Return the decoders that are installed and give the frames that ours gives."""
    expected = decode_with_testa(path).float()
    usable = {}
    for name, decode in DECODERS.items():
        try:
            difference = (decode(path).float() - expected).abs().mean().item()
        except (ImportError, RuntimeError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        if difference > LARGEST_MEAN_DIFFERENCE:
            raise RuntimeError(f"{name} gives other frames than ours: they differ by {difference:.1f} of 255 levels.")
        usable[name] = decode
    return usable


def measure(path: str, repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return seconds and seconds of processor time of each decoder."""
    decoders = usable_decoders(path)
    return alternate_with_processors({name: partial(decode, path) for name, decode in decoders.items()}, repeats)


def lend_ffmpeg_to_torchcodec():
    """Start again with PyAV's FFmpeg libraries in reach: torchcodec brings none, and PyAV's have names of their own."""
    libraries = Path(av.__file__).parents[1] / "av.libs"
    if "FFMPEG_OF_PYAV" in os.environ or not libraries.exists():
        return
    folder = Path(tempfile.mkdtemp(prefix="ffmpeg_of_pyav_"))
    for library in libraries.glob("lib*-*.so.*"):
        name, _, version = library.name.partition(".so.")
        link = folder / f"{name.rpartition('-')[0]}.so.{version.partition('.')[0]}"
        link.symlink_to(library)
    search_path = os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = {**os.environ, "LD_LIBRARY_PATH": search_path, "FFMPEG_OF_PYAV": str(folder)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="Where the videos are kept.")
    parser.add_argument(
        "--gop",
        type=int,
        nargs="+",
        choices=GROUPS_OF_PICTURES,
        default=GROUPS_OF_PICTURES,
        help="Which files; else both.",
    )
    parser.add_argument("--repeats", type=int, default=5, help="Runs of each decoder; the median counts.")
    parser.add_argument("--output", type=Path, help="JSON file for the figures.")
    args = parser.parse_args()
    lend_ffmpeg_to_torchcodec()

    torch.set_num_threads(THREADS)
    machine = describe_machine()
    print(machine)
    args.folder.mkdir(parents=True, exist_ok=True)
    rows, ratios = [], []
    for group_of_pictures in args.gop:
        path = args.folder / f"moving_pictures_{ENCODED_FRAMES * REPEATS_OF_THEM}_frames_gop_{group_of_pictures}.mp4"
        if not path.exists():
            write_moving_pictures(path, ENCODED_FRAMES, group_of_pictures, REPEATS_OF_THEM)
        seconds, processor_seconds = measure(str(path), args.repeats)
        for name in seconds:
            rows.append(
                {
                    "GOP": group_of_pictures,
                    "decoder": name,
                    "seconds": statistics.median(seconds[name]),
                    "processor seconds": statistics.median(processor_seconds[name]),
                    "ours is faster by": median_ratio(seconds, name, "transformers-testa"),
                }
            )
        faster = {name: statistics.median(seconds[name]) for name in ("torchcodec", "decord2") if name in seconds}
        peers = {"load_video": "load_video"} | ({"the faster": min(faster, key=faster.get)} if faster else {})
        for role, peer in peers.items():
            ratios.append(
                {
                    "GOP": group_of_pictures,
                    "against": peer,
                    "ours is faster by": median_ratio(seconds, peer, "transformers-testa"),
                    "at least": LEAST[group_of_pictures, role],
                    "aim": AIM[group_of_pictures, role],
                }
            )
    print_table(rows)
    print()
    print_table(ratios)
    save_json(args.output, machine, {"decoders": rows, "targets": ratios})


if __name__ == "__main__":
    main()
