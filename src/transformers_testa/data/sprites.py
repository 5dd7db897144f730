"""The objects of the demo world: drawn shapes, real handwritten digits, or cut-outs from a folder."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .stories import NUMBERS, ObjectKind, StoryObject


logger = logging.getLogger(__name__)

COLORS = {
    "red": (225, 25, 30),
    "orange": (255, 130, 0),
    "yellow": (255, 230, 0),
    "green": (15, 170, 45),
    "blue": (25, 75, 235),
    "purple": (140, 25, 190),
    "pink": (255, 130, 200),
    "white": (250, 250, 250),
}
OUTLINE_COLOR = (20, 20, 20)
SPLITS = ("train", "validation", "test")

# Masks are drawn on this square and scaled down once, which smooths their edges.
CANVAS = 128
MARGIN = 4


def _polygon(*points: tuple[float, float]) -> Callable[[ImageDraw.ImageDraw], None]:
    return lambda draw: draw.polygon([(x * CANVAS, y * CANVAS) for x, y in points], fill=255)


def _star(draw: ImageDraw.ImageDraw) -> None:
    corners = []
    for corner in range(10):
        radius, angle = (0.5 if corner % 2 == 0 else 0.21), math.pi * corner / 5
        corners.append((0.5 + radius * math.sin(angle), 0.53 - radius * math.cos(angle)))
    _polygon(*corners)(draw)


def _heart(draw: ImageDraw.ImageDraw) -> None:
    angles = np.linspace(0, 2 * np.pi, 100)
    x = 16 * np.sin(angles) ** 3
    y = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
    _polygon(*zip(0.5 + x / 35, 0.47 - y / 35, strict=True))(draw)


def _ellipse(draw: ImageDraw.ImageDraw, left: float, top: float, right: float, bottom: float, fill: int = 255) -> None:
    draw.ellipse([CANVAS * side for side in (left, top, right, bottom)], fill=fill)


def _ring(draw: ImageDraw.ImageDraw) -> None:
    _ellipse(draw, 0.02, 0.02, 0.98, 0.98)
    _ellipse(draw, 0.3, 0.3, 0.7, 0.7, fill=0)


def _moon(draw: ImageDraw.ImageDraw) -> None:
    _ellipse(draw, 0.02, 0.02, 0.98, 0.98)
    _ellipse(draw, 0.36, -0.02, 1.12, 0.74, fill=0)


def _cross(draw: ImageDraw.ImageDraw) -> None:
    _polygon((0.34, 0.02), (0.66, 0.02), (0.66, 0.98), (0.34, 0.98))(draw)
    _polygon((0.02, 0.34), (0.98, 0.34), (0.98, 0.66), (0.02, 0.66))(draw)


SHAPES = {
    "circle": lambda draw: _ellipse(draw, 0.03, 0.03, 0.97, 0.97),
    "square": _polygon((0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)),
    "triangle": _polygon((0.5, 0.02), (0.99, 0.94), (0.01, 0.94)),
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
}


def shape_kinds() -> tuple[ObjectKind, ...]:
    """Drawn shapes in every color and texture."""
    return tuple(
        ObjectKind(
            name=name,
            plural="crosses" if name == "cross" else f"{name}s",
            source="shape",
            pictures=(name,),
            colors=tuple(COLORS),
            textures=("plain", "plain", "striped", "dotted"),
        )
        for name in SHAPES
    )


def digit_kinds(split: str) -> tuple[ObjectKind, ...]:
    """The handwritten digits of scikit-learn in every color; each split has its own samples.

    Raises:
        ValueError: If scikit-learn isn't installed.
    """
    labels, _ = _handwritten_digits()
    samples = [
        [str(sample) for sample in np.flatnonzero(labels == digit) if _split_of(f"digit {sample}") == split]
        for digit in range(10)
    ]
    return tuple(
        ObjectKind(
            name=name,
            plural="sixes" if name == "six" else f"{name}s",
            source="digit",
            pictures=tuple(pictures),
            colors=tuple(COLORS),
            sizes=("large",),
            weight=0.1,
        )
        for name, pictures in zip(NUMBERS, samples, strict=True)
    )


def cutout_kinds(folder: str | Path) -> dict[str, tuple[ObjectKind, ...]]:
    """The captioned cut-outs below a folder, for each split.

    A cut-out is a PNG file with a text file of the same name beside it, whose first line is the caption. Which split
    it belongs to follows from its path below the folder; cut-outs with the same caption are pictures of one kind.

    Raises:
        ValueError: If the folder doesn't exist or holds no captioned PNG file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"objects={str(folder)!r} should be 'shapes' or an existing folder of cut-outs.")
    paths = sorted(folder.rglob("*.png"))
    captions = {path: _read_caption(path.with_suffix(".txt")) for path in paths}
    if uncaptioned := [path for path in paths if not captions[path]]:
        logger.warning(
            f"{len(uncaptioned)} of {len(paths)} PNG files below {folder} have no caption in a .txt file beside them, "
            f"{uncaptioned[0]} for one: left out."
        )
    pictures: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in SPLITS}
    for path in readable_images([path for path in paths if captions[path]]):
        pictures[_split_of(path.relative_to(folder).as_posix())][captions[path]].append(str(path))
    if not any(pictures.values()):
        raise ValueError(f"{folder} holds no PNG file with a caption in a .txt file of the same name beside it.")
    return {
        split: tuple(
            ObjectKind(name=name, plural=f"copies of {name}", source="cutout", pictures=tuple(paths))
            for name, paths in sorted(by_name.items())
        )
        for split, by_name in pictures.items()
    }


def readable_images(paths: list[Path]) -> list[Path]:
    """The files that Pillow can open; the others are counted in a warning."""
    unreadable = [path for path in paths if not _is_image(path)]
    if unreadable:
        logger.warning(f"{len(unreadable)} images can't be read, {unreadable[0]} for one: left out.")
    return [path for path in paths if path not in unreadable]


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, SyntaxError):  # what Pillow raises for broken files
        return False
    return True


def _read_caption(path: Path) -> str:
    """The noun of a caption: "A grey wolf." becomes "grey wolf"; nothing where there is no caption."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    words = lines[0].split(".")[0].split() if lines else []
    if words and words[0].lower() in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)


def _split_of(key: str) -> str:
    """70 % of all keys belong to train, 15 % each to validation and test, whatever other keys there are."""
    share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8
    return SPLITS[0] if share < 0.7 else SPLITS[1] if share < 0.85 else SPLITS[2]


@lru_cache(maxsize=1)
def _handwritten_digits() -> tuple[np.ndarray, np.ndarray]:
    """Labels [1797] and images [1797, 8, 8] with values between 0 and 16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "Handwritten digits come with scikit-learn: pip install scikit-learn, or leave digits out with --digits False."
        ) from error
    digits = load_digits()
    return digits.target, digits.images


def draw_sprite(item: StoryObject, size: int, color: str | None = None) -> Image.Image:
    """Draw an object, RGBA, at most `size` pixels wide and high, in its own or in another color."""
    if item.source == "cutout":
        return _fit(_read_cutout(item.picture), size)
    mask, outline = _mask_and_outline(item.source, item.picture)
    sprite = Image.new("RGB", mask.size, OUTLINE_COLOR)
    sprite.paste(_filling(color or item.color, item.texture).crop((0, 0, *mask.size)), mask=mask)
    sprite.putalpha(outline)
    return _fit(sprite, size)


def _fit(sprite: Image.Image, size: int) -> Image.Image:
    scale = size / max(sprite.size)
    width, height = (max(1, round(side * scale)) for side in sprite.size)
    return sprite.resize((width, height), Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)


@lru_cache(maxsize=1024)
def _read_cutout(path: str) -> Image.Image:
    with Image.open(path) as picture:
        sprite = picture.convert("RGBA")
    return _fit(sprite.crop(sprite.getchannel("A").getbbox()), CANVAS)


@lru_cache(maxsize=1024)
def _mask_and_outline(source: str, picture: str) -> tuple[Image.Image, Image.Image]:
    inner = _draw_shape(picture) if source == "shape" else _draw_digit(int(picture))
    mask = Image.new("L", (inner.width + 2 * MARGIN, inner.height + 2 * MARGIN))
    mask.paste(inner, (MARGIN, MARGIN))
    # The outline keeps an object apart from a background of a similar color.
    return mask, mask.filter(ImageFilter.MaxFilter(2 * MARGIN - 1))


def _draw_shape(shape: str) -> Image.Image:
    mask = Image.new("L", (CANVAS, CANVAS))
    SHAPES[shape](ImageDraw.Draw(mask))
    return mask


def _draw_digit(sample: int) -> Image.Image:
    _, images = _handwritten_digits()
    strokes = Image.fromarray((images[sample] * 255 / 16).astype(np.uint8))
    strokes = strokes.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC).point(lambda value: 255 * (value > 110))
    return strokes.crop(strokes.getbbox())


@lru_cache(maxsize=64)
def _filling(color: str, texture: str) -> Image.Image:
    """A sheet of the color with its texture in a darker shade, large enough for every mask."""
    side = CANVAS + 2 * MARGIN
    y, x = np.mgrid[:side, :side]
    if texture == "striped":
        dark = (x + y) // 17 % 2 == 0
    elif texture == "dotted":
        dark = np.hypot(x % 32 - 16, y % 32 - 16) < 8
    else:
        dark = np.zeros((side, side), dtype=bool)
    rgb = np.array(COLORS[color], dtype=np.float32)
    return Image.fromarray(np.where(dark[..., None], rgb * 0.4, rgb).astype(np.uint8))
