"""Whatever a checkpoint to convert holds, it becomes a model, or is refused with a ValueError that names the file.

More examples than usual are tried with

    TESTA_EXAMPLES=500 python -m pytest tests/robustness/test_hostile_checkpoints.py
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from original import OriginalCase

from transformers_testa.conversion import from_blip, load_original_checkpoint


CASES = {
    "video": "encoder_frames_and_patches",
    "retrieval": "retrieval_full",
    "videoqa": "videoqa_full",
    "pretraining": "pretraining",
}
example_settings = settings(
    max_examples=int(os.environ.get("TESTA_EXAMPLES", "8")),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# A few numbers that pretend to be more.
sizes = st.lists(st.sampled_from([0, 1, 2, 3, 17, 64, 10**6]), max_size=3)
replacements = st.one_of(
    sizes.map(lambda shape: torch.zeros(()).expand(shape)),
    st.lists(st.integers(0, 6), max_size=5).map(torch.zeros),
    st.sampled_from([torch.long, torch.bool, torch.complex64, torch.float16]).map(
        lambda kind: torch.ones(3, dtype=kind)
    ),
    st.sampled_from([torch.eye(3).to_sparse(), torch.zeros(2, device="meta"), None, "text", {}, [1], float("nan")]),
)
names = st.sampled_from(
    [5, "", "x", "blocks.99999999999.norm1.weight", f"visual_encoder.blocks.{'9' * 5000}.norm1.weight"]
)


def convert(file, architecture):
    """Convert, and let nothing pass but a ValueError that names the file."""
    try:
        load_original_checkpoint(file, architecture)
    except ValueError as error:
        assert file.name in str(error), repr(error)


@pytest.mark.parametrize("architecture", CASES)
@example_settings
@given(data=st.data())
def test_changed_tensors_become_a_model_or_are_refused_by_name(tmp_path, architecture, data):
    tensors = dict(OriginalCase(CASES[architecture]).state_dict)
    # Those first that sizes are taken from, and the first layer's.
    ordered = sorted(
        tensors, key=lambda name: ("embed" not in name and "proj" not in name and ".0." not in name, name)
    )
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(ordered))
        change = data.draw(st.sampled_from(["leave out", "replace", "add"]))
        if change == "leave out":
            tensors.pop(name, None)
        else:
            tensors[name if change == "replace" else data.draw(names)] = data.draw(replacements)
    torch.save(tensors, tmp_path / "changed.pth")
    convert(tmp_path / "changed.pth", architecture)


@example_settings
@given(data=st.data(), old_format=st.booleans())
def test_changed_bytes_become_a_model_or_are_refused_by_name(tmp_path, data, old_format):
    file = tmp_path / "bytes.pth"
    torch.save(OriginalCase(CASES["video"]).state_dict, file, _use_new_zipfile_serialization=not old_format)
    content = bytearray(file.read_bytes())
    # Names, shapes and offsets are at the start, the directory of the zip file at the end.
    places = (
        st.integers(0, len(content) - 1) | st.integers(0, 3000) | st.integers(len(content) - 3000, len(content) - 1)
    )
    for _ in range(data.draw(st.integers(0, 20))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.just(len(content)) | places)])
    convert(file, "video")


def test_a_small_file_cannot_ask_for_a_model_that_no_memory_holds(tmp_path):
    tensors = OriginalCase(CASES["video"]).state_dict
    # 12 MB, with which each attention layer would take 12 TB.
    tensors["patch_embed.proj.weight"] = torch.zeros(10**6, 3, 1, 1)
    torch.save(tensors, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"wide\.pth doesn't fit .* of another shape"):
        load_original_checkpoint(tmp_path / "wide.pth", "video")


def test_a_blip_checkpoint_cannot_either(tmp_path):
    tensors = OriginalCase(CASES["retrieval"]).state_dict
    tensors["visual_encoder.patch_embed.proj.weight"] = torch.zeros(10**6, 3, 1, 1)
    for name in ("key", "value"):
        tensors[f"text_encoder.encoder.layer.0.crossattention.self.{name}.weight"] = torch.zeros(1, 10**6)
    torch.save(tensors, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"wide\.pth doesn't fit .* of another shape"):
        from_blip(tmp_path / "wide.pth")
