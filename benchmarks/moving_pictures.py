"""A video to measure decoding with: textured pictures that move over another, with the grain of a camera."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


HEIGHT, WIDTH, RATE = 720, 1280, 30
DISC_SIZES = (96, 128, 160, 200, 240, 320)
GRAIN_PICTURES = 8


def write_moving_pictures(path: Path, num_frames: int, group_of_pictures: int, repeats: int = 1) -> None:
    """Write an H.264 file with a key frame every `group_of_pictures` frames and everything else as x264 has it.

    It appears under its name when it is complete. There are no cuts, where x264 would put further key frames. What is
    encoded once can fill the file several times: as much to decode, and sooner made.
    """
    unfinished = path.with_name(f"unfinished_{path.name}")
    with av.open(str(unfinished), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": str(group_of_pictures)})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        packets = []
        for number, picture in enumerate(moving_pictures(num_frames)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            packets += stream.encode(frame)
        packets += stream.encode()
        for first_frame in range(0, repeats * num_frames, num_frames):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
                shift = round(first_frame / RATE / packet.time_base)
                copy.pts, copy.dts, copy.duration = packet.pts + shift, packet.dts + shift, packet.duration
                container.mux(copy)
    unfinished.rename(path)


def moving_pictures(num_frames: int) -> Iterator[np.ndarray]:
    """Yield pictures uint8 `[720, 1280, 3]`: a camera pans over a texture, in front of which six discs wander."""
    random = np.random.default_rng(0)
    background = _texture(random, HEIGHT * 3 // 2, WIDTH * 3 // 2)
    discs = [_texture(random, size, size) for size in DISC_SIZES]
    insides = [np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2)) < size / 2 for size in DISC_SIZES]
    phases = random.uniform(0, 2 * np.pi, (len(discs), 2))
    speeds = random.uniform(0.2, 1.2, (len(discs), 2))
    grain = random.normal(0, 3, (GRAIN_PICTURES, HEIGHT, WIDTH, 1)).astype(np.int16)
    for number in range(num_frames):
        seconds = number / RATE
        top, left = _position(background, HEIGHT, WIDTH, np.array([0.0, 0.0]), np.array([0.23, 0.17]), seconds)
        picture = background[-top : HEIGHT - top, -left : WIDTH - left].copy()
        for disc, inside, phase, speed in zip(discs, insides, phases, speeds, strict=True):
            top, left = _position(disc, HEIGHT, WIDTH, phase, speed, seconds)
            picture[top : top + len(disc), left : left + len(disc)][inside] = disc[inside]
        yield np.clip(picture + grain[number % GRAIN_PICTURES], 0, 255).astype(np.uint8)


def _position(
    thing: np.ndarray, height: int, width: int, phase: np.ndarray, speed: np.ndarray, seconds: float
) -> list[int]:
    room = np.array([height, width]) - thing.shape[:2]
    return (room * (1 + np.sin(phase + speed * seconds)) / 2).astype(int).tolist()


def _texture(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A coloured picture uint8 `[height, width, 3]` whose spectrum falls as that of photographs does."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    spectrum = random.normal(size=(3, *frequency.shape)) + 1j * random.normal(size=(3, *frequency.shape))
    channels = np.fft.irfft2(spectrum / frequency**1.5, (height, width))
    channels /= channels.std(axis=(1, 2), keepdims=True)
    channels[1:] = 0.7 * channels[0] + 0.3 * channels[1:]
    return np.clip(120 + 50 * channels, 0, 255).astype(np.uint8).transpose(1, 2, 0)
