from pathlib import Path

import onnxruntime
import pytest
import torch
from torch.export import Dim

from transformers_testa import TestaVideoConfig, TestaVideoModel
from transformers_testa.aggregation_testa import plan_aggregation


CASES = {
    "no aggregation": {},
    "frames and patches": {"merged_frames_per_layer": 1, "merged_patches_per_layer": 2, "frame_matching": "vote"},
    "consecutive frames": {"merged_frames_per_layer": 1, "frame_matching": "consecutive"},
    "importance": {
        "attention_type": "joint_space_time",
        "merged_patches_per_layer": 9,
        "aggregation_strategy": "importance",
        "proportional_attention": True,
    },
    "pruning": {"attention_type": "space_only", "merged_patches_per_layer": 2, "aggregation_strategy": "prune"},
}
OUTPUTS = ["last_hidden_state", "pooler_output", "token_map", "token_sizes"]


def encoder(**aggregation) -> TestaVideoModel:
    torch.manual_seed(0)
    sizes = {"image_size": 12, "patch_size": 4, "num_frames": 4, "hidden_size": 32, "intermediate_size": 64}
    model = TestaVideoModel(TestaVideoConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, **aggregation))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # new models have zeros, which would hide mistakes
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def videos(batch_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, 4, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=CASES)
def exported(request) -> tuple[TestaVideoModel, torch.export.ExportedProgram]:
    """An encoder, and what `torch.export` makes of it for batches of any size."""
    model = encoder(**CASES[request.param])
    dynamic_shapes = {"pixel_values_videos": {0: Dim("batch")}}
    return model, torch.export.export(model, (videos(2),), dynamic_shapes=dynamic_shapes)


def test_an_exported_encoder_that_is_loaded_again_computes_the_same(exported, tmp_path):
    model, program = exported
    torch.export.save(program, tmp_path / "encoder.pt2")
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    for batch_size in (2, 5):
        actual, expected = loaded(videos(batch_size)), model(videos(batch_size))
        for name in OUTPUTS:
            torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=0)


def test_onnx_runtime_computes_the_same(exported, tmp_path):
    model, program = exported
    torch.onnx.export(program, f=tmp_path / "encoder.onnx", dynamo=True, output_names=OUTPUTS, verbose=False)
    for batch_size in (2, 5):
        actual, expected = run_onnx(tmp_path / "encoder.onnx", videos(batch_size)), model(videos(batch_size))
        for name in OUTPUTS:
            torch.testing.assert_close(actual[name], expected[name], atol=1e-4, rtol=0)


def run_onnx(file: Path, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs = {node.name: values.numpy() for node, values in zip(session.get_inputs(), inputs, strict=True)}
    outputs = session.run(None, inputs)
    return {node.name: torch.from_numpy(values) for node, values in zip(session.get_outputs(), outputs, strict=True)}


def test_onnx_runtime_merges_the_same_of_equally_similar_tokens(tmp_path):
    class Plan(torch.nn.Module):
        def forward(self, metric):
            return plan_aggregation(metric, num_merged=3)

    directions = torch.eye(3)[torch.randint(3, (50, 12), generator=torch.Generator().manual_seed(0))]
    torch.onnx.export(
        Plan().eval(), (directions,), tmp_path / "plan.onnx", dynamo=True, output_names=["plan"], verbose=False
    )
    actual = run_onnx(tmp_path / "plan.onnx", directions)["plan"]
    assert torch.equal(actual, plan_aggregation(directions, num_merged=3))


@pytest.mark.parametrize("aggregation", CASES.values(), ids=CASES)
def test_one_graph_without_breaks_serves_all_videos_of_a_shape(aggregation):
    model = encoder(**aggregation)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(videos(2))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (1, 2):
            actual, expected = compiled(videos(2, seed)), model(videos(2, seed))
            torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)
