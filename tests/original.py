"""What the released code computed (tests/fixtures/original_outputs), as inputs and expectations in this package's terms."""

import itertools
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from transformers_testa import TestaConfig, TestaTextConfig, TestaVideoConfig
from transformers_testa.conversion_original import rename_all


FOLDER = Path(__file__).parent / "fixtures" / "original_outputs"


class OriginalCase:
    """One case: its configuration, the released state dict, inputs and outputs."""

    def __init__(self, name: str):
        self.facts = json.loads((FOLDER / f"{name}.json").read_text())
        self.state_dict = load_file(FOLDER / self.facts["state_dict"])
        self.videos = load_file(FOLDER / self.facts["video"])["video_bcthw"].transpose(1, 2)
        self.outputs = load_file(FOLDER / f"{name}.outputs.safetensors")
        inputs = FOLDER / f"{name}.inputs.safetensors"
        self.inputs = load_file(inputs) if inputs.exists() else {}

    @property
    def video_config(self) -> TestaVideoConfig:
        facts, merged = self.facts, self.facts.get("r") or []
        both = facts.get("merging_type") == "frame&patch"
        num_layers = facts["num_hidden_layers"]
        return TestaVideoConfig(
            image_size=facts["image_size"],
            patch_size=facts["patch_size"],
            num_frames=facts["num_frames"],
            hidden_size=facts["hidden_size"],
            num_hidden_layers=num_layers,
            num_attention_heads=facts["num_attention_heads"],
            intermediate_size=4 * facts["hidden_size"],
            attention_type=facts.get("attention_type", "divided_space_time"),
            merged_frames_per_layer=merged[0::2] if both else 0,
            merged_patches_per_layer=merged[1::2] if both else merged or [0] * num_layers,
            aggregation_strategy="prune" if "prune" in facts["case"] else "geometry",
            frame_matching="vote",
            use_temporal_scaling=facts.get("learnable_temporal_scaling", False),
        )

    @property
    def config(self) -> TestaConfig:
        facts, text = self.facts, self.facts["text_config"]
        return TestaConfig(
            video_config=self.video_config,
            text_config=TestaTextConfig(
                vocab_size=text["vocab_size"],
                hidden_size=text["hidden_size"],
                encoder_hidden_size=text["encoder_width"],
                num_hidden_layers=text["num_hidden_layers"],
                num_attention_heads=text["num_attention_heads"],
                intermediate_size=text["intermediate_size"],
                max_position_embeddings=text["max_position_embeddings"],
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                bos_token_id=facts["bos_token_id"],
                enc_token_id=facts["enc_token_id"],
                sep_token_id=facts["sep_token_id"],
            ),
            projection_dim=facts.get("projection_size", 16),
        )

    def last_hidden_state(self, num_frames_left: int) -> Tensor:
        """The expected video tokens in this package's order: the original is patch-major after the class token."""
        expected = self.outputs["last_hidden_state"]
        if self.facts["attention_type"] != "divided_space_time":
            return expected
        patches = expected[:, 1:].unflatten(1, (-1, num_frames_left)).transpose(1, 2).flatten(1, 2)
        return torch.cat([expected[:, :1], patches], dim=1)


def case_names(prefix: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.json"))


def in_released_layout(model: PreTrainedModel, case_name: str) -> dict[str, Tensor]:
    """Weights of a model of any size under the names that a case has for its own, as a released file holds them.

    The state of training that a file holds beside them is there, too: the teacher is the model itself, queues are the
    case's.
    """
    weights, released = model.state_dict(), {}
    names = OriginalCase(case_name).state_dict
    if getattr(model.config, "video_config", model.config).use_temporal_scaling:
        names["visual_encoder.blocks.0.temporal_scaling"] = torch.empty(0)
    for name, tensor in names.items():
        for number in itertools.count():  # the names of the first layer stand for those of all layers
            layer_name = name.replace(".0.", f".{number}.")
            own_name = rename_all(re.sub(r"^(\w+)_m\.", r"\1.", layer_name))
            if number > 0 and (layer_name == name or own_name not in weights):
                break
            released[layer_name] = weights.get(own_name, tensor)
    return released
