"""Real video files for tests: small clips whose frames carry their number, written with PyAV."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


NUMBER_BITS = 10
TICKS_PER_SECOND = 1000


def numbered_frame(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Return a picture uint8 [H, W, 3] that moves with `number` and spells it as bright and dark bars on top."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack(
        [(rows * 2 + number * 3) % 256, (columns * 2 + number * 5) % 256, np.full_like(rows, 20 + number % 200)], -1
    ).astype(np.uint8)
    for bit in range(NUMBER_BITS):
        bar = slice(bit * width // NUMBER_BITS, (bit + 1) * width // NUMBER_BITS)
        picture[: height // 2, bar] = 235 if number >> bit & 1 else 20
    return picture


def frame_number(picture: np.ndarray) -> int:
    """Read the number that `numbered_frame` put into a picture [H, W, 3], at any size."""
    height, width = picture.shape[:2]
    centres = ((np.arange(NUMBER_BITS) + 0.5) * width / NUMBER_BITS).astype(int)
    bright = picture[height // 4, centres].mean(axis=-1) > 128
    return int((bright << np.arange(NUMBER_BITS)).sum())


def write_video(
    path: str | Path,
    num_frames: int = 60,
    *,
    height: int = 64,
    width: int = 96,
    rate: int = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    frame_times: Sequence[float] | None = None,
    rotation: int = 0,
) -> Path:
    """Write numbered frames to `path` (format by its suffix), at `rate` or at `frame_times` in seconds; return it.

    `rotation` is in degrees counterclockwise, put into the metadata as a phone does.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=codec_options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        if frame_times is not None:
            stream.codec_context.time_base = Fraction(1, TICKS_PER_SECOND)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, height, width), format="rgb24")
            if frame_times is None:
                frame.pts = number
                frame.time_base = Fraction(1, rate)
            else:
                frame.pts = round(frame_times[number] * TICKS_PER_SECOND)
                frame.time_base = Fraction(1, TICKS_PER_SECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def write_audio(path: str | Path, seconds: float = 1.0) -> Path:
    """Write a silent sound file to `path` and return it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, int(16000 * seconds)), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def plain_decode(path: str | Path, height: int | None = None, width: int | None = None) -> list[np.ndarray]:
    """Decode every frame from the start, scaled to `height` × `width`: what frame n of a file is."""
    with av.open(str(path)) as container:
        return [
            frame.reformat(width, height, format="rgb24", interpolation="BICUBIC").to_ndarray()
            for frame in container.decode(video=0)
        ]
