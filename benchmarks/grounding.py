"""How often the region that fits a phrase best shows the phrase's object, on the stories of the demo.

    python benchmarks/grounding.py --model runs/testa-demo --data_dir demo_stories

The stories are planned once more from the arguments that the demo keeps, so that it is known where every object is. A
region is all patches that became one token. Compared are the cosine between projected tokens and the text, which is
what `ground` computes; the matching head on a text that is read with one token alone; and the cross-attention of the
text's words to the tokens. "Random" is the mean over all regions, or all frames: what a blind guess would score; its
span is the whole video. Spans overlap by their intersection over their union.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measuring import describe_machine, print_table, save_json
from torch import Tensor
from tqdm import tqdm
from transformers import AutoProcessor

from transformers_testa import TestaForRetrieval
from transformers_testa.data.demo import DemoArguments, plan_demo, read_arguments
from transformers_testa.data.rendering import count_frames, locate_objects
from transformers_testa.data.stories import Story
from transformers_testa.data.storytelling import name_object, tell
from transformers_testa.visualization import best_span


# An object is in a region where it fills at least this share of one of its patches.
LEAST_SHARE = 0.1
FIGURES = (
    "object in the best region, %",
    "share of that region, %",
    "best frame in the scene, %",
    "overlap of the best span, %",
)


def cosine(model: TestaForRetrieval, pixel_values: Tensor, texts: dict[str, Tensor]) -> Tensor:
    """Return the similarity `[N, T, L]` of texts to the patches of one video."""
    return model.ground(pixel_values, **texts).scores


def matching(model: TestaForRetrieval, pixel_values: Tensor, texts: dict[str, Tensor]) -> Tensor:
    """Return `[N, T, L]`, the log-odds that a text matches a video of this patch's token alone."""
    output = model.get_video_features(pixel_values)
    tokens = output.last_hidden_state[0][:, None]  # [S, 1, D]
    texts = {name: value.repeat(len(tokens), 1) for name, value in texts.items()}
    logits = model.match(tokens, **texts)
    log_odds = (logits[:, 1] - logits[:, 0]).unflatten(0, (len(tokens), -1)).t()
    return log_odds[:, output.token_map[0]]


def cross_attention(model: TestaForRetrieval, pixel_values: Tensor, texts: dict[str, Tensor]) -> Tensor:
    """Return `[N, T, L]`, the attention of a text's words to each patch's token, mean over words, heads and layers."""
    output = model.get_video_features(pixel_values)
    input_ids, mask = texts["input_ids"].clone(), texts["attention_mask"]
    input_ids[:, 0] = model.config.text_config.enc_token_id
    attentions = model.testa.text_model(
        input_ids, mask, encoder_hidden_states=output.last_hidden_state, output_attentions=True
    ).cross_attentions
    attention = torch.stack(attentions).mean(dim=(0, 2))  # [N, words, S]
    attention = (attention * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return attention[:, output.token_map[0]]


SIMILARITIES = {"cosine": cosine, "matching": matching, "cross-attention": cross_attention}


def places_in_frames(
    story: Story, frame_indices: list[int], arguments: DemoArguments
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scene `[T]` of each frame, and what [`locate_objects`] tells of it `[T, H, W]`."""
    places = [locate_objects(scene, arguments.image_size, arguments.fps) for scene in story.scenes]
    scene_of_frame = np.repeat(
        np.arange(len(story.scenes)), [count_frames(scene, arguments.fps) for scene in story.scenes]
    )
    return scene_of_frame[frame_indices], np.concatenate(places)[frame_indices]


def point(scores: Tensor, token_map: Tensor, share: Tensor, frame_shows: Tensor) -> tuple[list[float], list[float]]:
    """Return the figures of the best region and frame, and those of a random one.

    Args:
        scores, token_map: `[T, L]`.
        share: `[T, L]`, the share of each patch that the object fills.
        frame_shows: bool `[T]`, whether a frame is of the object's scene.
    """
    is_hit = (share >= LEAST_SHARE).float()
    tokens, token_of_patch = token_map.unique(return_inverse=True)
    members = F.one_hot(token_of_patch.flatten(), len(tokens)).float()  # [T*L, S]
    hit_of_token = (members * is_hit.flatten()[:, None]).amax(dim=0)
    share_of_token = share.flatten() @ members / members.sum(dim=0)
    best = token_of_patch.flatten()[scores.argmax()]
    frame_scores = scores.amax(dim=1)
    first, last = best_span(frame_scores)
    is_in_span = torch.zeros_like(frame_shows)
    is_in_span[first : last + 1] = True
    overlap = (is_in_span & frame_shows).sum() / (is_in_span | frame_shows).sum()
    frames_in_scene = frame_shows.float().mean().item()
    return (
        [
            hit_of_token[best].item(),
            share_of_token[best].item(),
            frame_shows[frame_scores.argmax()].item(),
            overlap.item(),
        ],
        [hit_of_token.mean().item(), share_of_token.mean().item(), frames_in_scene, frames_in_scene],
    )


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="A TestaForRetrieval.")
    parser.add_argument("--data_dir", type=Path, required=True, help="What transformers_testa.data.demo made.")
    parser.add_argument("--split", default="test", help="Stories to look at.")
    parser.add_argument("--num_videos", type=int, help="How many of them; all by default.")
    parser.add_argument("--output", type=Path, help="JSON file for the figures.")
    args = parser.parse_args(arguments)

    model = TestaForRetrieval.from_pretrained(args.model, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(args.model)
    config = model.config.video_config
    grid = config.image_size // config.patch_size
    demo = read_arguments(args.data_dir)
    stories = list(plan_demo(demo)[args.split].items())[: args.num_videos]

    found: dict[tuple[str, str], list[list[float]]] = {}
    num_objects = num_seen = 0
    for video_id, story in tqdm(stories, desc="Grounding", unit="video"):
        inputs = processor.video_processor(
            str(args.data_dir / "videos" / f"{video_id}.mp4"), return_metadata=True, return_tensors="pt"
        )
        pixel_values = inputs["pixel_values_videos"]
        scene_of_frame, places = places_in_frames(story, inputs["video_metadata"][0].frames_indices, demo)
        objects = [(number, index) for number, scene in enumerate(story.scenes) for index in range(len(scene.objects))]
        texts = {
            "phrase": [name_object(story.scenes[n].objects[i], story.scenes[n].count) + "." for n, i in objects],
            "sentence": [tell(Story((story.scenes[n],)), random.Random(f"{video_id} {n}")) for n, _ in objects],
        }
        is_object = [(places == index) & (scene_of_frame == number)[:, None, None] for number, index in objects]
        share = F.adaptive_avg_pool2d(torch.from_numpy(np.stack(is_object)).float(), grid).flatten(2)  # [N, T, L]
        is_seen = (share >= LEAST_SHARE).flatten(1).any(dim=1)
        num_objects, num_seen = num_objects + len(objects), num_seen + int(is_seen.sum())
        with torch.no_grad():
            token_map = model.get_video_features(pixel_values).token_map[0]
            for form, form_texts in texts.items():
                tokens = processor.tokenizer(form_texts, padding=True, return_tensors="pt")
                tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
                for similarity, compute in SIMILARITIES.items():
                    scores = compute(model, pixel_values, tokens)
                    for n in is_seen.nonzero().flatten().tolist():
                        frame_shows = torch.from_numpy(scene_of_frame == objects[n][0])
                        best, chance = point(scores[n], token_map, share[n], frame_shows)
                        found.setdefault((form, similarity), []).append(best)
                        found.setdefault((form, "random"), []).append(chance)

    rows = []
    for (form, similarity), values in found.items():
        figures = (100 * np.mean(values, axis=0)).tolist()
        rows.append({"text": form, "by": similarity, **dict(zip(FIGURES, figures, strict=True))})
    print(f"{len(stories)} videos; {num_seen} of their {num_objects} objects are in the frames that the model sees.\n")
    print_table(rows)
    save_json(args.output, describe_machine(), {"videos": len(stories), "objects": num_seen, "rows": rows})


if __name__ == "__main__":
    main()
