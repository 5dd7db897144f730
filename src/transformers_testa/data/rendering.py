"""Draw the scenes of the demo world as frames and write them as H.264 video files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from .sprites import draw_sprite
from .stories import Background, Scene


BACKGROUND_RGB = {
    "gray": (125, 125, 125),
    "brown": (115, 85, 65),
    "beige": (200, 185, 160),
    "olive": (105, 110, 70),
    "navy": (50, 60, 95),
}

# Height of an object as a share of the frame's. Some actions need a certain one; stories then tell no size.
SIZES = {"small": 0.4, "large": 0.66}
ACTION_SIZES = {"meet": 0.44, "grow": 0.8, "shrink": 0.8, "turn": 0.66, "gather": 0.38}

# Where the members of a group stand, as on the faces of a die.
GROUP_PLACES = {
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.5, 0.27), (0.25, 0.72), (0.75, 0.72)),
    4: ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
    5: ((0.2, 0.2), (0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.8)),
}
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def render_scene(scene: Scene, image_size: int, fps: int) -> np.ndarray:
    """Draw a scene.

    Returns:
        uint8 [T, image_size, image_size, 3], where T is [`count_frames`].
    """
    background = _draw_background(scene.background, image_size)
    frames = []
    for placed in _placed_sprites(scene, image_size, fps):
        frame = background.copy()
        for _, sprite, corner in placed:
            frame.paste(sprite, corner, sprite)
        frames.append(np.asarray(frame))
    return np.stack(frames)


def locate_objects(scene: Scene, image_size: int, fps: int) -> np.ndarray:
    """Tell where the objects of a scene are in the frames that [`render_scene`] draws.

    Returns:
        int8 [T, image_size, image_size], the index in `scene.objects` of what is seen at each pixel, -1 for none.
    """
    places = np.full((count_frames(scene, fps), image_size, image_size), -1, dtype=np.int8)
    for place, placed in zip(places, _placed_sprites(scene, image_size, fps), strict=True):
        for sprite_index, sprite, corner in placed:
            opacity = Image.new("L", (image_size, image_size))
            opacity.paste(sprite.getchannel("A"), corner)
            place[np.asarray(opacity) >= 128] = sprite_index % len(scene.objects)
    return places


def _placed_sprites(
    scene: Scene, image_size: int, fps: int
) -> Iterator[list[tuple[int, Image.Image, tuple[int, int]]]]:
    """What is drawn in each frame: numbers of sprites, sprites, and the corners they are pasted at.

    A sprite has the number of its object; one more is the only object after its turn to a new color.
    """
    sprites = [_sprite(scene, index, image_size) for index in range(len(scene.objects))]
    if scene.action == "turn":
        sprites.append(_sprite(scene, 0, image_size, scene.new_color))
    num_frames = count_frames(scene, fps)
    for frame_index in range(num_frames):
        placed = []
        for sprite_index, x, y, scale in _places(scene, frame_index / (num_frames - 1)):
            sprite = sprites[sprite_index]
            if scale != 1:
                size = [max(1, round(side * scale)) for side in sprite.size]
                sprite = sprite.resize(size, Image.Resampling.BILINEAR)
            corner = round(x * image_size - sprite.width / 2), round(y * image_size - sprite.height / 2)
            placed.append((sprite_index, sprite, corner))
        yield placed


def count_frames(scene: Scene, fps: int) -> int:
    """The length of a scene in frames, at least 2."""
    return max(2, round(scene.seconds * fps))


def _sprite(scene: Scene, index: int, image_size: int, color: str | None = None) -> Image.Image:
    item = scene.objects[index]
    height = ACTION_SIZES.get(scene.action, SIZES[item.size])
    return draw_sprite(item, max(2, round(height * image_size)), color)


def _places(scene: Scene, progress: float) -> list[tuple[int, float, float, float]]:
    """Sprite, centre (x, y) in shares of the frame, and scale of all that is seen at a time from 0 to 1."""
    # An action takes the middle four fifths of its scene; before and after, its start and its end are seen.
    done = min(1.0, max(0.0, (progress - 0.1) / 0.8))
    if scene.action in ("enter", "leave", "move"):
        # Fast outside of the picture and slow in its middle, so that few of the frames show nothing.
        along = {"enter": -0.85 * (1 - done) ** 2, "leave": 0.85 * done**2, "move": 0.7 * done - 0.35}[scene.action]
        step_x, step_y = STEPS[scene.direction]
        x, y = (0.5 + step_x * along, scene.lane) if step_x else (scene.lane, 0.5 + step_y * along)
        return [(0, x, y, 1.0)]
    if scene.action == "meet":
        apart = 0.36 - 0.17 * done
        return [(0, 0.5 - apart, scene.lane, 1.0), (1, 0.5 + apart, scene.lane, 1.0)]
    if scene.action in ("grow", "shrink"):
        return [(0, 0.5, 0.5, 0.35 + 0.65 * (done if scene.action == "grow" else 1 - done))]
    if scene.action == "turn":
        return [(0 if progress < 0.5 else 1, 0.5, 0.5, 1.0)]
    hop = 0.03 * math.sin(2 * math.pi * 2 * progress)
    return [(0, x, y + hop, 1.0) for x, y in GROUP_PLACES[scene.count]]


def _draw_background(background: Background, size: int) -> Image.Image:
    rng = np.random.default_rng(background.seed)
    if background.photograph:
        return _crop_photograph(background.photograph, size, rng)
    y, x = np.mgrid[:size, :size] / size
    offset, cell = rng.uniform(), rng.uniform(0.1, 0.2)
    # Light and shade between -1 and 1.
    if background.pattern == "gradient":
        angle = 2 * np.pi * offset
        shade = 1.4 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
    elif background.pattern == "stripes":
        along = (x, y, x + y, x - y)[rng.integers(4)]
        shade = np.where(np.floor(along / cell + offset) % 2 == 0, -0.6, 0.6)
    elif background.pattern == "checks":
        shade = np.where((np.floor(x / cell + offset) + np.floor(y / cell + offset)) % 2 == 0, -0.6, 0.6)
    elif background.pattern == "noise":
        coarse = Image.fromarray(rng.uniform(-1, 1, (24, 24)).astype(np.float32))
        shade = np.asarray(coarse.resize((size, size), Image.Resampling.BILINEAR))
    else:
        shade = np.zeros((size, size))
    rgb = np.array(BACKGROUND_RGB[background.color]) + 16 * shade[..., None]
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def _crop_photograph(path: str, size: int, rng: np.random.Generator) -> Image.Image:
    return ImageOps.fit(_read_photograph(path, 4 * size), (size, size), centering=tuple(rng.uniform(size=2)))


@lru_cache(maxsize=128)
def _read_photograph(path: str, size: int) -> Image.Image:
    with Image.open(path) as photograph:
        photograph.thumbnail((size, size))
        return photograph.convert("RGB")


def write_video(path: Path, frames: Iterable[np.ndarray], image_size: int, fps: int) -> None:
    """Write frames (uint8 [H, W, 3]) as an H.264 mp4 file, aside first, so that a file that exists is complete."""
    path = Path(path)
    unfinished = path.with_suffix(".unfinished")
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "20"})
        stream.width = stream.height = image_size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 4 * fps
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.replace(unfinished, path)
