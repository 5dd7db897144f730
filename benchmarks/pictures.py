"""Draw what a retrieval model makes of a video: the paper's Figures 3, 4, 8 and 9.

    python benchmarks/pictures.py --model testa-base-didemo-f96 --video dog.mp4 --phrase "a dog on the beach" --output_dir pictures
    python benchmarks/pictures.py --model runs/testa-demo --data_dir demo_stories

Written are what became one token (merged.png), that block by block (layers.png, layers.gif), how similar merged tokens are
(similarity.png) and where a phrase is (grounding.png). Of a story of the demo, these are the pictures of
docs/aggregation.md; then the results of a search (results.png) follow and, over all test stories, how often patches that
became one token are of one scene, and of one kind (object or background), beside how often any two are.
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

from transformers_testa import TestaForRetrieval, TestaProcessor
from transformers_testa.data.annotations import load_annotations
from transformers_testa.data.demo import plan_demo, read_arguments
from transformers_testa.visualization import (
    PATCH_PIXELS,
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


class Video:
    """A file's frames to draw on, `[T, H, W, 3]`, and as the model takes them, `[1, T, C, H, W]`.

    Args:
        file: The video.
        processor: The model's.
        size: Height and width of the frames to draw on; as they are in the file if not given.
    """

    def __init__(self, file: Path, processor: TestaProcessor, size: int | None = None):
        resizing = {"size": {"height": size, "width": size}} if size else {"do_resize": False}
        self.frames = processor.video_processor.decode(str(file), **resizing).permute(0, 2, 3, 1).numpy()
        inputs = processor.video_processor(str(file), return_metadata=True, return_tensors="pt")
        self.pixel_values = inputs["pixel_values_videos"]
        self.metadata = inputs["video_metadata"][0]


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
    parser.add_argument("--model", required=True, help="A TestaForRetrieval.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--video", type=Path, help="A file.")
    source.add_argument("--data_dir", type=Path, help="What transformers_testa.data.demo made.")
    parser.add_argument("--video_id", default="test-00030", help="With data_dir: the test story to draw.")
    parser.add_argument("--phrase", default="a yellow square.", help="What to look for in it.")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"), help="Folder for the pictures.")
    args = parser.parse_args(arguments)

    model = TestaForRetrieval.from_pretrained(args.model).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.video:
        config = model.config.video_config
        size = max(config.image_size, PATCH_PIXELS * config.image_size // config.patch_size)
        draw_video(model, processor, Video(args.video, processor, size), args.phrase, args.output_dir)
        return
    rows = {row["video_id"]: row for row in load_annotations(args.data_dir / "test.jsonl")}
    stories = {
        video_id: Video(Path(row["video"]), processor)
        for video_id, row in tqdm(rows.items(), desc="Decoding", unit="video")
    }
    draw_video(model, processor, stories[args.video_id], args.phrase, args.output_dir)
    embeddings = compare_merges_with_the_plan(model, stories, args.data_dir)
    draw_results(model, processor, stories, embeddings, args.video_id, rows[args.video_id]["text"], args.output_dir)


def draw_video(model: TestaForRetrieval, processor: TestaProcessor, video: Video, phrase: str, output_dir: Path):
    """Write all pictures of one video."""
    hidden_states, token_maps = trace_layers(model.testa.video_model, video.pixel_values)
    layer_names = ["input", *(f"block {number}" for number in range(1, len(token_maps)))]
    by_layer = [draw_merged_regions(video.frames, token_map[0]) for token_map in token_maps]
    captions = [[f"{name}, frame {number}" for number in range(len(video.frames))] for name in layer_names]
    save(contact_sheet(by_layer[-1], captions[-1], columns=6), output_dir / "merged.png")
    pictures = np.concatenate([layer[:NUM_FRAMES_BY_LAYER] for layer in by_layer])
    names = [name for names in captions for name in names[:NUM_FRAMES_BY_LAYER]]
    save(contact_sheet(pictures, names, columns=NUM_FRAMES_BY_LAYER), output_dir / "layers.png")
    sheets = [
        contact_sheet(layer[:NUM_FRAMES_BY_LAYER], names[:NUM_FRAMES_BY_LAYER], columns=4)
        for layer, names in zip(by_layer, captions, strict=True)
    ]
    save_animation(output_dir / "layers.gif", np.stack([np.asarray(sheet) for sheet in sheets]), fps=0.7)

    scores = model.ground(video.pixel_values, **tokenize(processor, phrase)).scores[0]
    save(
        as_picture(plot_grounding(video.frames, scores, phrase, video.metadata.timestamps)),
        output_dir / "grounding.png",
    )
    save(
        as_picture(plot_merged_similarity(*merged_similarity(hidden_states, token_maps))),
        output_dir / "similarity.png",
    )


def tokenize(processor: TestaProcessor, text: str) -> dict[str, torch.Tensor]:
    tokens = processor.tokenizer([text], return_tensors="pt", truncation=True)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def compare_merges_with_the_plan(model: TestaForRetrieval, stories: dict[str, Video], data_dir: Path) -> torch.Tensor:
    """Print how often patches of one token are of one scene and of one kind; return the videos' embeddings."""
    demo = read_arguments(data_dir)
    plans = plan_demo(demo)["test"]
    counts = np.zeros((2, 2, 2), dtype=np.int64)
    side = model.config.video_config.image_size // model.config.video_config.patch_size
    embeddings = []
    for video_id, story in tqdm(stories.items(), desc="Encoding", unit="video"):
        with torch.no_grad():
            output = model.get_video_features(story.pixel_values)
        embeddings.append(output.pooler_output)
        scene_of_frame, places = places_in_frames(plans[video_id], story.metadata.frames_indices, demo)
        share = F.adaptive_avg_pool2d(torch.from_numpy(places >= 0).float(), side).flatten(1)
        counts += pairs_of_one_kind(output.token_map[0], scene_of_frame, share >= LEAST_SHARE)
    for what, (in_one_token, any_two) in zip(
        ("Frames of one scene", "Patches of a frame, both object or both background"), counts, strict=True
    ):
        print(
            f"{what}: {100 * in_one_token[0] / in_one_token[1]:.1f} % of those in one token, "
            f"{100 * any_two[0] / any_two[1]:.1f} % of any two."
        )
    return torch.cat(embeddings)


def draw_results(
    model: TestaForRetrieval,
    processor: TestaProcessor,
    stories: dict[str, Video],
    embeddings: torch.Tensor,
    told_id: str,
    text: str,
    output_dir: Path,
):
    """Write the best three stories for a text, and say which it tells."""
    query = tokenize(processor, text)
    with torch.no_grad():
        similarity = embeddings @ model.get_text_features(**query).pooler_output[0]
    best = similarity.topk(3).indices.tolist()
    video_ids = list(stories)
    results = [stories[video_ids[number]] for number in best]
    sheet = show_results(
        [result.frames for result in results],
        [model.ground(result.pixel_values, **query).frame_scores[0] for result in results],
        [
            f"{rank}. {video_ids[number]}, {similarity[number]:.2f}"
            + (": the story that is told" if video_ids[number] == told_id else "")
            for rank, number in enumerate(best, start=1)
        ],
        num_frames=6,
    )
    save(sheet, output_dir / "results.png")


if __name__ == "__main__":
    main()
