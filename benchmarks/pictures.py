"""Make the pictures of docs/aggregation.md from a model of the demo, and measure what they should show.

    python benchmarks/pictures.py --model runs/testa-demo --data_dir demo_stories

The measurement is over all test stories: how often patches that became one token are of one scene, and of one kind
(object or background), beside how often any two are.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from grounding import LEAST_SHARE, places_in_frames
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor

from transformers_testa import TestaForRetrieval
from transformers_testa.data.annotations import load_annotations
from transformers_testa.data.demo import plan_demo, read_arguments
from transformers_testa.visualization import (
    contact_sheet,
    draw_merged_regions,
    merged_similarity,
    plot_grounding,
    plot_merged_similarity,
    save_animation,
    show_results,
    trace_layers,
)


NUM_FRAMES_BY_LAYER = 7  # all would make a large picture


class Story:
    """A video of the demo: its frames as they are, `[T, H, W, 3]`, and as the model takes them, `[1, T, C, H, W]`."""

    def __init__(self, file: Path, processor):
        self.frames = processor.video_processor.decode(str(file), do_resize=False).permute(0, 2, 3, 1).numpy()
        inputs = processor.video_processor(str(file), return_metadata=True, return_tensors="pt")
        self.pixel_values = inputs["pixel_values_videos"]
        self.frame_indices = inputs["video_metadata"][0].frames_indices


def save(picture: Image.Image, file: Path):
    """Write a PNG file with a palette, which keeps it small."""
    picture.convert("RGB").quantize(dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size // 1000} kB, {picture.width} × {picture.height}")


def as_picture(figure) -> Image.Image:
    """Draw a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba()))


def pairs_of_one_kind(token_map: torch.Tensor, scene_of_frame: np.ndarray, is_object: torch.Tensor) -> np.ndarray:
    """Count pairs of patches of one video.

    Args:
        token_map: `[T, L]`.
        scene_of_frame: `[T]`.
        is_object: bool `[T, L]`.

    Returns:
        `[2, 2, 2]`: of pairs in different frames at one position, and of pairs in one frame; those in one token, and
        all; those of one scene (of one kind: object or background), and their number.
    """
    T, L = token_map.shape
    token, kind = token_map.flatten(), is_object.flatten()
    frame = torch.arange(T).repeat_interleave(L)
    position = torch.arange(L).repeat(T)
    scene = torch.from_numpy(scene_of_frame)[frame]

    def same(values: torch.Tensor) -> torch.Tensor:
        return values[:, None] == values

    is_merged = same(token)
    counts = []
    for is_pair, fits in (
        (same(position) & ~same(frame), same(scene)),
        (same(frame) & ~same(position), same(kind)),
    ):
        counts.append([[(pairs & fits).sum(), pairs.sum()] for pairs in (is_pair & is_merged, is_pair)])
    return np.array(counts, dtype=np.int64)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="A TestaForRetrieval trained on the demo.")
    parser.add_argument("--data_dir", type=Path, required=True, help="What transformers_testa.data.demo made.")
    parser.add_argument("--video_id", default="test-00030", help="The test story to draw.")
    parser.add_argument("--phrase", default="a yellow square.", help="What to look for in it.")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"), help="Folder for the pictures.")
    args = parser.parse_args(arguments)

    model = TestaForRetrieval.from_pretrained(args.model).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    demo = read_arguments(args.data_dir)
    plans = plan_demo(demo)["test"]
    rows = {row["video_id"]: row for row in load_annotations(args.data_dir / "test.jsonl")}
    stories = {
        video_id: Story(Path(row["video"]), processor)
        for video_id, row in tqdm(rows.items(), desc="Decoding", unit="video")
    }
    story = stories[args.video_id]

    hidden_states, token_maps = trace_layers(model.testa.video_model, story.pixel_values)
    layer_names = ["input", *(f"block {number}" for number in range(1, len(token_maps)))]
    by_layer = [draw_merged_regions(story.frames, token_map[0]) for token_map in token_maps]
    captions = [[f"{name}, frame {number}" for number in range(len(story.frames))] for name in layer_names]
    save(contact_sheet(by_layer[-1], captions[-1], columns=6), args.output_dir / "merged.png")
    pictures = np.concatenate([layer[:NUM_FRAMES_BY_LAYER] for layer in by_layer])
    save(
        contact_sheet(
            pictures, [name for names in captions for name in names[:NUM_FRAMES_BY_LAYER]], columns=NUM_FRAMES_BY_LAYER
        ),
        args.output_dir / "layers.png",
    )
    sheets = [
        contact_sheet(layer[:NUM_FRAMES_BY_LAYER], names[:NUM_FRAMES_BY_LAYER], columns=4)
        for layer, names in zip(by_layer, captions, strict=True)
    ]
    save_animation(args.output_dir / "layers.gif", np.stack([np.asarray(sheet) for sheet in sheets]), fps=0.7)

    text = processor.tokenizer([args.phrase], return_tensors="pt")
    text = {name: text[name] for name in ("input_ids", "attention_mask")}
    seconds = [index / demo.fps for index in story.frame_indices]
    scores = model.ground(story.pixel_values, **text).scores[0]
    save(as_picture(plot_grounding(story.frames, scores, args.phrase, seconds)), args.output_dir / "grounding.png")

    merged, apart = merged_similarity(hidden_states, token_maps)
    save(as_picture(plot_merged_similarity(merged, apart)), args.output_dir / "similarity.png")

    counts = np.zeros((2, 2, 2), dtype=np.int64)
    side = model.config.video_config.image_size // model.config.video_config.patch_size
    embeds = []
    for video_id, each in tqdm(stories.items(), desc="Encoding", unit="video"):
        with torch.no_grad():
            output = model.get_video_features(each.pixel_values)
        embeds.append(output.pooler_output)
        scene_of_frame, places = places_in_frames(plans[video_id], each.frame_indices, demo)
        share = F.adaptive_avg_pool2d(torch.from_numpy(places >= 0).float(), side).flatten(1)
        counts += pairs_of_one_kind(output.token_map[0], scene_of_frame, share >= LEAST_SHARE)
    for what, (in_one_token, any_two) in zip(
        ("Frames of one scene", "Patches of a frame, both object or both background"), counts, strict=True
    ):
        print(
            f"{what}: {100 * in_one_token[0] / in_one_token[1]:.1f} % of those in one token, "
            f"{100 * any_two[0] / any_two[1]:.1f} % of any two."
        )

    query = processor.tokenizer([rows[args.video_id]["text"]], return_tensors="pt", truncation=True)
    query = {name: query[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        similarity = torch.cat(embeds) @ model.get_text_features(**query).pooler_output[0]
    best = similarity.topk(3).indices.tolist()
    video_ids = list(stories)
    results = [stories[video_ids[number]] for number in best]
    sheet = show_results(
        [result.frames for result in results],
        [model.ground(result.pixel_values, **query).frame_scores[0] for result in results],
        [
            f"{rank}. {video_ids[number]}, {similarity[number]:.2f}"
            + (": the story that is told" if video_ids[number] == args.video_id else "")
            for rank, number in enumerate(best, start=1)
        ],
        num_frames=6,
    )
    save(sheet, args.output_dir / "results.png")


if __name__ == "__main__":
    main()
