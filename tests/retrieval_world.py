"""A world small enough to train in a test: videos of coloured squares in an order that their text tells."""

import itertools
import json
from pathlib import Path

import av
import numpy as np
from transformers import BertTokenizer

from transformers_testa import TestaConfig
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.video_processing_testa import TestaVideoProcessor


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "first", "then", "finally", *COLOURS]


def write_stories(folder: Path, **num_videos: int) -> Path:
    """Write `num_train=8, ...` videos of three colours in a row, each split with its `.jsonl` file; return the folder.

    Videos come in twins: the same colours in reverse, each the other's distractor.
    """
    (folder / "videos").mkdir(parents=True)
    orders = [order for order in itertools.permutations(COLOURS, 3) if order < order[::-1]]
    for split, number_of_videos in num_videos.items():
        split = split.removeprefix("num_")
        rows = []
        for number in range(number_of_videos):
            order = orders[number // 2][:: -1 if number % 2 else 1]
            video = f"videos/{split}-{number}.mp4"
            _write_video(folder / video, [COLOURS[colour] for colour in order])
            text = "First {}, then {}, finally {}!".format(*order)
            distractor = f"{split}-{number ^ 1}"
            rows.append({"video": video, "video_id": f"{split}-{number}", "text": text, "distractor": distractor})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _write_video(path: Path, colours: list[tuple[int, int, int]], frames_per_colour: int = 4):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for colour in colours:
            picture = np.full((32, 32, 3), colour, dtype=np.uint8)
            for _ in range(frames_per_colour):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def tiny_config(**video_settings) -> TestaConfig:
    """Return the configuration of a model with two small blocks, which merges a frame and a patch in each."""
    video = {"image_size": 32, "patch_size": 16, "num_frames": 6, "hidden_size": 32, "num_hidden_layers": 2}
    video |= {"num_attention_heads": 2, "intermediate_size": 64}
    video |= {"merged_frames_per_layer": 1, "merged_patches_per_layer": 1, **video_settings}
    text = {"vocab_size": len(WORDS), "hidden_size": 32, "encoder_hidden_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32}
    text |= {"pad_token_id": 0, "sep_token_id": 3, "bos_token_id": 5, "enc_token_id": 6}
    return TestaConfig(video_config=video, text_config=text, projection_dim=16)


def tiny_processor() -> TestaProcessor:
    """Return the processor of [`tiny_config`]."""
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=32)
    return TestaProcessor(TestaVideoProcessor(size={"height": 32, "width": 32}, num_frames=6), tokenizer)
