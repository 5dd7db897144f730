"""Pictures of what a model does with a video, made from its public outputs.

Functions of arrays and tensors to arrays, pictures and figures. What they show comes from `token_map`, which tells the
output token of every input patch, and from hidden states, so they work on any video and any kind of aggregation. Heat
maps and plots need the `visualization` extra.
"""

from __future__ import annotations

import colorsys
import math
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


# Only heat maps and plots need matplotlib: merged regions and sheets are drawn without it.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .modeling_testa import TestaVideoModel


# Pictures are enlarged to at least this many pixels a patch, so that outlines don't hide what they enclose.
PATCH_PIXELS = 24
TINT = 0.3
HEAT = 0.6
SPAN_LEVEL = 0.75
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
    rows, columns = _find_grid(frames, patches, grid_size, "token_map")
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


def draw_heat_map(
    frames: np.ndarray,
    scores: torch.Tensor,
    grid_size: tuple[int, int] | None = None,
    limits: tuple[float, float] | None = None,
) -> np.ndarray:
    """Lay a heat map of scores over the patches of a video.

    Args:
        frames: uint8 `[T, H, W, 3]`, of any size.
        scores: `[T, L]`: of one text, the `scores` of [`TestaForRetrieval.ground`].
        grid_size: Rows and columns of patches in a frame; by default as many rows as columns.
        limits: Scores shown as coldest and hottest; by default the least and the greatest of this video.

    Returns:
        uint8 `[T, H', W', 3]`, enlarged to at least 24 pixels a patch.

    Raises:
        ValueError: Where the frames, the scores and the grid don't fit together.
    """
    from matplotlib import colormaps

    frames = _check_frames(frames)
    values = torch.as_tensor(scores).detach().float().cpu().numpy()
    if values.ndim != 2:
        raise ValueError(f"scores should be [frames, patches], those of one text; got shape {values.shape}.")
    rows, columns = _find_grid(frames, values, grid_size, "scores")
    least, greatest = limits or (values.min(), values.max())
    heat = ((values - least) / max(greatest - least, 1e-8)).clip(0, 1).reshape(len(frames), rows, columns)
    pictures, heat = _enlarge(frames, heat)
    colors = colormaps["inferno"](heat, bytes=True)[..., :3]
    return ((1 - HEAT) * pictures + HEAT * colors).round().astype(np.uint8)


def best_span(frame_scores: torch.Tensor) -> tuple[int, int]:
    """Return the first and the last frame of when a text is seen.

    It is the run of frames whose scores exceed `SPAN_LEVEL`, as a share of the way from the least score to the
    greatest, by the greatest sum: a short gap may be part of it, a long one is not.

    Args:
        frame_scores: `[T]`: of one text, the `frame_scores` of [`TestaForRetrieval.ground`].

    Raises:
        ValueError: Where there is no frame, or another dimension.
    """
    scores = torch.as_tensor(frame_scores).detach().double().cpu()
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"frame_scores should be [frames], those of one text; got shape {tuple(scores.shape)}.")
    sums = torch.cat([scores.new_zeros(1), (scores - scores.min().lerp(scores.max(), SPAN_LEVEL)).cumsum(0)])
    gains = sums[None] - sums[:, None]  # [first, last + 1]
    spans = torch.ones_like(gains, dtype=torch.bool).triu(1)
    first, end = divmod(int(gains.masked_fill(~spans, -torch.inf).argmax()), len(sums))
    return first, end - 1


def plot_grounding(
    frames: np.ndarray,
    scores: torch.Tensor,
    text: str,
    seconds: Sequence[float] | None = None,
    grid_size: tuple[int, int] | None = None,
) -> Figure:
    """Plot when and where a video shows what a text says (Figure 4 of the paper).

    Above are the frames, and under each its heat map; below, the score of each frame's best patch, with the best span
    of time shaded.

    Args:
        frames, scores, grid_size: As in [`draw_heat_map`].
        text: The phrase, as a title.
        seconds: `[T]`, when each frame is seen; by default frames are numbered.

    Raises:
        ValueError: Where the arguments don't fit together.
    """
    from matplotlib.figure import Figure

    pictures = draw_heat_map(frames, scores, grid_size)
    frame_scores = torch.as_tensor(scores).detach().float().cpu().amax(dim=1)
    first, last = best_span(frame_scores)
    num_frames = len(frames)
    times = list(range(num_frames)) if seconds is None else list(seconds)
    if len(times) != num_frames:
        raise ValueError(f"seconds has {len(times)} values for {num_frames} frames. Give one each.")
    figure = Figure(figsize=(max(4, 0.9 * num_frames), 3.4), layout="constrained")
    grid = figure.add_gridspec(3, num_frames, height_ratios=[1, 1, 1.3])
    for frame in range(num_frames):
        for row, picture in enumerate((frames[frame], pictures[frame])):
            axes = figure.add_subplot(grid[row, frame])
            axes.imshow(picture)
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set(color="tab:red" if first <= frame <= last else "white", linewidth=2)
    axes = figure.add_subplot(grid[2, :])
    axes.plot(times, frame_scores, "o-", color="black", markersize=3, linewidth=1)
    half_step = (times[-1] - times[0]) / max(num_frames - 1, 1) / 2
    axes.axvspan(times[first] - half_step, times[last] + half_step, color="tab:red", alpha=0.2, linewidth=0)
    axes.set_xlim(times[0] - half_step - 1e-3, times[-1] + half_step + 1e-3)
    axes.set(xlabel="frame" if seconds is None else "seconds", ylabel="similarity")
    figure.suptitle(text)
    return figure


@torch.no_grad()
def trace_layers(
    video_model: TestaVideoModel, pixel_values_videos: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Encode videos and keep what every block does.

    Args:
        video_model: A video encoder, such as `model.testa.video_model`.
        pixel_values_videos: `[B, T, C, H, W]`.

    Returns:
        Tokens before the first and after every block, and for each of these the map `[B, T, L]` that tells the token
        of every input patch, an index into them, -1 where dropped.
    """
    token_maps = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, outputs: token_maps.append(outputs[2]))
        for layer in video_model.layers
    ]
    try:
        output = video_model(pixel_values_videos, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    B, T, L = output.token_map.shape
    # Joint attention is given its patches patch-major.
    patches = torch.arange(T * L, device=output.token_map.device)
    if video_model.config.attention_type == "joint_space_time":
        patches = patches.view(L, T).t()
    patches = patches.reshape(1, T, L).expand(B, -1, -1)
    num_class_tokens = T if video_model.config.attention_type == "space_only" else 1
    maps = []
    for states, token_map in zip(output.hidden_states, [patches, *token_maps], strict=True):
        tokens_per_class = states.shape[1] // num_class_tokens - 1
        index = token_map + token_map.div(tokens_per_class, rounding_mode="floor") + 1
        maps.append(torch.where(token_map < 0, -1, index))
    return list(output.hidden_states), maps


def merged_similarity(
    hidden_states: Sequence[torch.Tensor], token_maps: Sequence[torch.Tensor]
) -> tuple[list[float], list[float]]:
    """Compare the tokens that a block merges with those that it keeps apart.

    Args:
        hidden_states, token_maps: What [`trace_layers`] returns.

    Returns:
        For each block, the mean cosine similarity of the pairs of its input tokens that it merges, and that of all
        other pairs; NaN where there are none. Tokens are compared as they enter the block; class tokens are left out.
    """
    merged: list[float] = []
    apart: list[float] = []
    for states, before, after in zip(hidden_states, token_maps, token_maps[1:], strict=False):
        sums = torch.zeros(4, dtype=torch.float64)  # similarity and number of merged pairs, and of the others
        for tokens, slots, next_slots in zip(states, before.flatten(1), after.flatten(1), strict=True):
            sums += _pair_similarity(tokens, slots, next_slots)
        for means, (similarity, number) in zip((merged, apart), sums.view(2, 2).tolist(), strict=True):
            means.append(similarity / number if number else math.nan)
    return merged, apart


def _pair_similarity(tokens: torch.Tensor, slots: torch.Tensor, next_slots: torch.Tensor) -> torch.Tensor:
    """Sum over pairs of tokens `[S, D]` without comparing each: the square of a sum holds all its products."""
    is_kept = next_slots >= 0
    slots, next_slots = slots[is_kept], next_slots[is_kept]
    next_slot = slots.new_full((len(tokens),), -1).scatter(
        0, slots, next_slots
    )  # of each token, by any of its patches
    is_token = next_slot >= 0
    units = torch.nn.functional.normalize(tokens[is_token].double(), dim=-1)
    next_slot = next_slot[is_token]
    slot_sums = units.new_zeros(int(next_slot.max()) + 1, units.shape[1]).index_add(0, next_slot, units)
    squares, pairs = slot_sums.square().sum(), next_slot.bincount().square().sum()
    number = len(units)
    all_squares = units.sum(dim=0).square().sum()
    return torch.stack([squares - number, pairs - number, all_squares - squares, number**2 - pairs]).cpu()


def plot_merged_similarity(merged: Sequence[float], apart: Sequence[float]) -> Figure:
    """Plot what [`merged_similarity`] returns, block by block (Figure 8 of the paper)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    blocks = range(1, len(merged) + 1)
    axes.plot(blocks, merged, "o-", label="merged")
    axes.plot(blocks, apart, "s--", label="kept apart")
    axes.set(xlabel="block", ylabel="mean cosine similarity", xticks=list(blocks))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def show_results(
    videos: Sequence[np.ndarray], frame_scores: Sequence[torch.Tensor], captions: list[str], num_frames: int = 4
) -> Image.Image:
    """Show the results of a search, one in a row: its best frames in their order, over its caption.

    Args:
        videos: Frames of each result, uint8 `[T, H, W, 3]`, all of one height and width.
        frame_scores: `[T]` each: `frame_scores` of [`TestaForRetrieval.ground`] for the query.
        captions: What to write under each result: rank, file, score.
        num_frames: Frames to show of each.

    Raises:
        ValueError: Where there aren't as many scores or captions as videos, or of scores as frames.
    """
    if not len(videos) == len(frame_scores) == len(captions):
        raise ValueError(
            f"There are {len(videos)} videos, {len(frame_scores)} frame_scores and {len(captions)} captions. "
            "Give one of each for every result."
        )
    strips = []
    for number, (frames, scores) in enumerate(zip(videos, frame_scores, strict=True)):
        frames = _check_frames(frames, f"videos[{number}]")
        if tuple(scores.shape) != (len(frames),):
            raise ValueError(
                f"frame_scores[{number}] has shape {tuple(scores.shape)} for a video of {len(frames)} frames."
            )
        best = torch.as_tensor(scores).topk(min(num_frames, len(frames))).indices.sort().values.cpu().numpy()
        strip = np.full((frames.shape[1], num_frames * frames.shape[2], 3), 255, dtype=np.uint8)
        strip[:, : len(best) * frames.shape[2]] = np.concatenate(frames[best], axis=1)
        strips.append(strip)
    return contact_sheet(np.stack(strips), captions, columns=1)


def save_animation(file: str | Path, pictures: np.ndarray, fps: float = 1.0) -> None:
    """Write pictures as a GIF that repeats or an H.264 video, as the name ends in .gif or .mp4.

    Args:
        file: Where to write.
        pictures: uint8 `[N, H, W, 3]`.
        fps: Pictures per second.

    Raises:
        ValueError: Where the name has another ending.
    """
    pictures, file = _check_frames(pictures, "pictures"), Path(file)
    if file.suffix.lower() == ".gif":
        first, *others = (Image.fromarray(picture).quantize(dither=Image.Dither.NONE) for picture in pictures)
        first.save(file, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    elif file.suffix.lower() == ".mp4":
        height, width = pictures.shape[1:3]
        pictures = np.pad(
            pictures, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge"
        )  # as H.264 needs it
        with av.open(str(file), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width = pictures.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    else:
        raise ValueError(f"{file} should end in .gif or .mp4.")


def _text_height(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """The height of so many lines, whatever their letters: sheets of the same pictures have the same size."""
    tallest = "\n".join("Ág" for _ in text.splitlines())
    return math.ceil(ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), tallest, font, spacing=2)[3])


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


def _find_grid(
    frames: np.ndarray, patches: np.ndarray, grid_size: tuple[int, int] | None, name: str
) -> tuple[int, int]:
    num_frames, num_patches = patches.shape
    if num_frames != len(frames):
        raise ValueError(f"frames has {len(frames)} frames; {name} tells of {num_frames}.")
    side = math.isqrt(num_patches)
    rows, columns = grid_size or (side, side)
    if rows * columns != num_patches:
        raise ValueError(
            f"grid_size={(rows, columns)} doesn't hold {num_patches} patches. Give rows and columns of patches."
        )
    return rows, columns


def _enlarge(frames: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return enlarged frames `[T, H', W', 3]` (float32) and the value of `grid [T, rows, columns]` at each pixel."""
    height, width = frames.shape[1:3]
    rows, columns = grid.shape[1:]
    scale = max(1, math.ceil(PATCH_PIXELS * rows / height), math.ceil(PATCH_PIXELS * columns / width))
    pictures = frames.repeat(scale, axis=1).repeat(scale, axis=2).astype(np.float32)
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
