"""A world small enough to train in a test: videos of coloured squares in an order that their text tells.

And how a test runs a script in this world: in its own process, or in one that it kills.
"""

import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from transformers import BertTokenizer

from transformers_testa import TestaConfig
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.video_processing_testa import TestaVideoProcessor


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "first", "then", "finally", *COLOURS]
WORDS += ["what", "comes", "?"]


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
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def write_rows(file: Path, rows: list[dict]):
    """Write a JSONL file of these rows."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(file: Path) -> list[dict]:
    """Read the rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_questions(folder: Path, *splits: str):
    """Write what can be asked about the stories of some splits, `<split>_questions.jsonl` and `<split>_choices.jsonl`.

    Open-ended questions ask for the first colour, the last one, and any of the three; choices for the first two.
    """
    for split in splits:
        questions, choices = [], []
        for story in read_rows(folder / f"{split}.jsonl"):
            colours = [word for word in re.findall("[a-z]+", story["text"]) if word in COLOURS]
            video = {"video": story["video"], "video_id": story["video_id"]}
            for place, colour in (("first", colours[0]), ("finally", colours[-1])):
                question = {**video, "question": f"What comes {place}?", "question_type": place}
                questions.append({**question, "answers": colour})
                choices.append({**question, "choices": list(COLOURS), "label": list(COLOURS).index(colour)})
            anything = {"question": "What comes?", "answers": colours, "answer_weights": [0.5, 0.25, 0.25]}
            questions.append({**video, **anything, "question_type": "any"})
        write_rows(folder / f"{split}_questions.jsonl", questions)
        write_rows(folder / f"{split}_choices.jsonl", choices)


def write_pictures(folder: Path, number_of_pictures: int) -> Path:
    """Write pictures of one colour each, and return the `.jsonl` file that names it."""
    (folder / "pictures").mkdir()
    rows = []
    for number, colour in zip(range(number_of_pictures), itertools.cycle(COLOURS)):
        picture = f"pictures/{number}.png"
        Image.new("RGB", (32, 32), COLOURS[colour]).save(folder / picture)
        rows.append({"video": picture, "video_id": f"picture-{number}", "text": f"{colour.title()}."})
    write_rows(folder / "pictures.jsonl", rows)
    return folder / "pictures.jsonl"


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
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=32, extra_special_tokens=["[DEC]", "[ENC]"])
    return TestaProcessor(TestaVideoProcessor(size={"height": 32, "width": 32}, num_frames=6), tokenizer)


# --- Scripts -----------------------------------------------------------------------------------------------------------


def run_script(main: Callable[[list[str]], None], *arguments) -> str:
    """Run a script in this process, with one thread as its subprocesses have, and return what it prints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return printed.getvalue()


def kill_script(script: Path, recipe: Path, output_dir: Path, step: int):
    """Run a script in a process of its own and kill it as soon as it has a checkpoint of a step."""
    process = subprocess.Popen(
        [sys.executable, str(script), str(recipe), "--output_dir", str(output_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (output_dir / f"checkpoint-{step}").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
