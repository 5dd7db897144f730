"""Pictures of what a model does with a video, made from its public outputs.

Functions of arrays and tensors to arrays, pictures and figures. What they show comes from `token_map`, which tells the
output token of every input patch, so they work on any video and any kind of aggregation. Needs the `visualization`
extra.
"""

from __future__ import annotations

import colorsys
import math
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


# Pictures are enlarged to at least this many pixels a patch, so that outlines don't hide what they enclose.
PATCH_PIXELS = 24
TINT = 0.4
DROPPED_BRIGHTNESS = 0.2
GOLDEN_RATIO = (5**0.5 - 1) / 2


def draw_merged_regions(
    frames: np.ndarray, token_map: torch.Tensor, grid_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Draw which patches of a video became one token (Figures 3 and 9 of the paper).

    Patches that share a token are tinted and outlined in one colour, wherever and in whichever frame they are. Frames
    that share tokens have a border of one colour. What stayed by itself keeps its looks; what was dropped is dark.

    Args:
        frames: uint8 `[T, H, W, 3]`, of any size.
        token_map: `[T, L]` integers, the token of each patch, -1 where dropped: one video of the model's `token_map`.
        grid_size: Rows and columns of patches in a frame; by default as many rows as columns.

    Returns:
        uint8 `[T, H', W', 3]`, enlarged to at least 24 pixels a patch, with room for the border.

    Raises:
        ValueError: Where the frames, the map and the grid don't fit together.
    """
    frames, patches = _check_frames(frames), _check_map(token_map)
    rows, columns = _find_grid(frames, patches, grid_size)
    pictures, labels = _enlarge(frames, patches.reshape(len(frames), rows, columns))

    region_of_token = _number_shared(patches)
    region = np.where(labels < 0, -1, region_of_token[labels])  # [T, H', W'], -1 where a patch is by itself
    colors = region_colors(region_of_token.max(initial=-1) + 1)
    is_merged = region >= 0
    pictures[is_merged] = (1 - TINT) * pictures[is_merged] + TINT * colors[region[is_merged]]
    pictures[labels < 0] = DROPPED_BRIGHTNESS * pictures[labels < 0]
    thickness = max(2, min(pictures.shape[1:3]) // (16 * max(rows, columns)))
    is_outline = is_merged & _is_near_edge(labels, thickness)
    pictures[is_outline] = colors[region[is_outline]]
    return _frame_borders(pictures.round().astype(np.uint8), _group_frames(patches), 3 * thickness)


def region_colors(number: int) -> np.ndarray:
    """Return colours `[number, 3]` (uint8) of which any that follow each other are far apart."""
    colors = [
        colorsys.hsv_to_rgb(index * GOLDEN_RATIO % 1, (1.0, 0.55, 0.8)[index % 3], (1.0, 1.0, 0.7)[index // 3 % 3])
        for index in range(number)
    ]
    return np.round(255 * np.array(colors).reshape(number, 3)).astype(np.uint8)


def contact_sheet(pictures: np.ndarray, captions: list[str], columns: int) -> Image.Image:
    """Lay pictures out in rows, each above its caption.

    Args:
        pictures: uint8 `[N, H, W, 3]`.
        captions: N texts, broken into lines as wide as a picture.
        columns: Pictures in a row.

    Raises:
        ValueError: Where there are not as many captions as pictures, or no column.
    """
    pictures = _check_frames(pictures, "pictures")
    if len(captions) != len(pictures):
        raise ValueError(f"captions has {len(captions)} texts for {len(pictures)} pictures. Give one each.")
    if columns < 1:
        raise ValueError(f"columns={columns} should be at least 1.")
    height, width = pictures.shape[1:3]
    font = ImageFont.load_default(size=12)
    letters = max(1, int(width / font.getlength("x")))
    texts = ["\n".join(textwrap.wrap(caption, letters)) for caption in captions]
    margin = 6
    text_height = max(_text_height(text, font) for text in texts)
    cell_width, cell_height = width + margin, height + text_height + 2 * margin
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = margin + number % columns * cell_width, margin + number // columns * cell_height
        sheet.paste(Image.fromarray(picture), (x, y))
        draw.multiline_text((x, y + height + margin // 2), text, fill="black", font=font, spacing=2)
    return sheet


def _text_height(text: str, font: ImageFont.FreeTypeFont) -> int:
    if not text:
        return 0
    return math.ceil(ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font, spacing=2)[3])


def _check_frames(frames: np.ndarray, name: str = "frames") -> np.ndarray:
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(
            f"{name} should be uint8 [number, height, width, 3]; got {frames.dtype} of shape {frames.shape}."
        )
    return frames


def _check_map(token_map: torch.Tensor) -> np.ndarray:
    token_map = torch.as_tensor(token_map)
    if token_map.ndim != 2 or token_map.is_floating_point():
        raise ValueError(
            "token_map should be integers [frames, patches], those of one video; got "
            f"{token_map.dtype} of shape {tuple(token_map.shape)}."
        )
    return token_map.cpu().numpy()


def _find_grid(frames: np.ndarray, patches: np.ndarray, grid_size: tuple[int, int] | None) -> tuple[int, int]:
    num_frames, num_patches = patches.shape
    if num_frames != len(frames):
        raise ValueError(f"The map is of {num_frames} frames and there are {len(frames)} frames.")
    side = math.isqrt(num_patches)
    rows, columns = grid_size or (side, side)
    if rows * columns != num_patches:
        raise ValueError(
            f"grid_size={(rows, columns)} doesn't hold {num_patches} patches. Give rows and columns of patches."
        )
    return rows, columns


def _enlarge(frames: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return enlarged frames `[T, H', W', 3]` (float) and the value of `grid [T, rows, columns]` at each pixel."""
    height, width = frames.shape[1:3]
    rows, columns = grid.shape[1:]
    scale = max(1, math.ceil(PATCH_PIXELS * rows / height), math.ceil(PATCH_PIXELS * columns / width))
    pictures = frames.repeat(scale, axis=1).repeat(scale, axis=2).astype(np.float64)
    row_of_pixel = np.arange(scale * height) * rows // (scale * height)
    column_of_pixel = np.arange(scale * width) * columns // (scale * width)
    return pictures, grid[:, row_of_pixel[:, None], column_of_pixel]


def _number_shared(labels: np.ndarray) -> np.ndarray:
    """Number those labels (0, 1, ...) that occur more than once, in order; -1 for the others."""
    is_shared = np.bincount(labels[labels >= 0], minlength=labels.max(initial=0) + 1) > 1
    return np.where(is_shared, is_shared.cumsum() - 1, -1)


def _is_near_edge(labels: np.ndarray, thickness: int) -> np.ndarray:
    """Mark pixels of `[T, H, W]` that are less than `thickness` away from another label or the picture's end."""
    near = np.zeros(labels.shape, dtype=bool)
    padded = np.pad(labels, ((0, 0), (thickness, thickness), (thickness, thickness)), constant_values=-2)
    height, width = labels.shape[1:]
    for distance in (-thickness, thickness):
        near |= padded[:, thickness + distance :][:, :height, thickness : thickness + width] != labels
        near |= padded[:, thickness : thickness + height, thickness + distance :][:, :, :width] != labels
    return near


def _group_frames(patches: np.ndarray) -> np.ndarray:
    """Number groups `[T]` of frames that share tokens, -1 for a frame that shares none."""
    group = np.arange(len(patches))
    for frame in range(len(patches)):
        for other in range(frame):
            if np.isin(patches[frame], patches[other][patches[other] >= 0]).any():
                group[group == group[frame]] = group[other]
    return _number_shared(group)[group]


def _frame_borders(pictures: np.ndarray, group: np.ndarray, thickness: int) -> np.ndarray:
    pad = ((0, 0), (thickness, thickness), (thickness, thickness), (0, 0))
    bordered = np.pad(pictures, pad, constant_values=255)
    colors = region_colors(group.max(initial=-1) + 1)
    for picture, number in zip(bordered, group, strict=True):
        if number >= 0:
            inside = picture[thickness:-thickness, thickness:-thickness].copy()
            picture[:] = colors[number]
            picture[thickness:-thickness, thickness:-thickness] = inside
    return bordered
