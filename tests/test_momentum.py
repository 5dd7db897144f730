import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from original import OriginalCase, case_names
from test_distributed import launch
from test_modeling import TOLERANCE, example_texts, example_videos, trained
from test_modeling_common import tiny_config

from transformers_testa import TestaForRetrieval, conversion
from transformers_testa.momentum import FeatureQueue, MomentumTeacher, MomentumTraining
from transformers_testa.objectives import HardNegatives


def released_training(case: OriginalCase, architecture: str) -> MomentumTraining:
    """The model of a case with the teacher and the queues that its release holds."""
    model = conversion.load_original_checkpoint(case.state_dict, architecture, case.config)
    training = MomentumTraining(
        model,
        queue_size=case.facts["queue_size"],
        momentum=case.facts["momentum"],
        distillation_weight=case.facts["alpha"],
    )
    weights = {
        name.replace("encoder_m.", "encoder.").replace("proj_m.", "proj."): tensor
        for name, tensor in sorted(case.state_dict.items(), key=lambda item: "_m." in item[0])  # the teacher's last
        if not name.startswith("text_decoder.")
    }
    followed = conversion.load_original_checkpoint(weights, "retrieval", case.config)
    training.teacher.load_state_dict(MomentumTeacher(followed).state_dict())
    queue = training.queue
    queue.video_embeds.copy_(case.state_dict["image_queue"].t())
    queue.text_embeds.copy_(case.state_dict["text_queue"].t())
    if "idx_queue" in case.state_dict:
        queue.pair_ids.copy_(case.state_dict["idx_queue"].flatten())
    else:
        queue.pair_ids.fill_(-100)
    return training


@pytest.mark.parametrize("name", case_names("retrieval"))
def test_a_training_step_computes_what_the_released_one_does(name):
    case = OriginalCase(name)
    training = released_training(case, "retrieval").train()
    model = training.model
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    training.teacher.update(model)  # the release follows the model before the step, not after it
    loss_vtc = training(case.videos, ids, mask, case.inputs["pair_ids"]).loss_vtc
    loss_vtm = released_matching_loss(case, model)
    torch.testing.assert_close(loss_vtc, case.outputs["loss_vtc"], **TOLERANCE)
    torch.testing.assert_close(loss_vtm, case.outputs["loss_vtm"], **TOLERANCE)

    (loss_vtc + loss_vtm).backward()
    for gradient, expected in (
        (model.video_projection.weight.grad, "grad_norm_vision_proj"),
        (model.get_input_embeddings().weight.grad, "grad_norm_text_word_embeddings"),
    ):
        torch.testing.assert_close(gradient.norm(), case.outputs[expected], **TOLERANCE)

    queue = training.queue
    torch.testing.assert_close(queue.video_embeds.t(), case.outputs["queue_after_video"], **TOLERANCE)
    torch.testing.assert_close(queue.text_embeds.t(), case.outputs["queue_after_text"], **TOLERANCE)
    assert torch.equal(queue.pair_ids, case.outputs["queue_after_ids"].flatten())
    expected = case.outputs["momentum_after_vision_proj"]
    torch.testing.assert_close(training.teacher.video_projection.weight, expected, **TOLERANCE)


def test_pre_training_computes_the_released_losses():
    (name,) = case_names("pretraining")
    case = OriginalCase(name)
    training = released_training(case, "pretraining")
    training.teacher.update(training.model)
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    with torch.no_grad():
        output = training(case.videos, ids, mask, torch.arange(len(ids)))
        loss_vtm = released_matching_loss(case, training.model)
    torch.testing.assert_close(output.loss_vtc, case.outputs["loss_vtc"], **TOLERANCE)
    torch.testing.assert_close(loss_vtm, case.outputs["loss_vtm"], **TOLERANCE)
    torch.testing.assert_close(output.loss_caption, case.outputs["loss_cap"], **TOLERANCE)
    torch.testing.assert_close(output.loss, output.loss_vtc + output.loss_vtm + output.loss_caption)


def released_matching_loss(case: OriginalCase, model: TestaForRetrieval) -> torch.Tensor:
    """The matching loss for the negatives that the release drew."""
    video_of_text, text_of_video = case.outputs["negative_draws"].long().chunk(2)
    has_negative = torch.ones(len(video_of_text), dtype=torch.bool)
    negatives = HardNegatives(video_of_text, text_of_video, has_negative, has_negative)
    videos = model.get_video_features(case.videos).last_hidden_state
    pairs = videos, case.inputs["input_ids"], case.inputs["attention_mask"]
    return model.matching_loss(*pairs, negatives, candidates=pairs)


# --- Teacher ---------------------------------------------------------------------------------------------------------


def tiny_training(**settings) -> MomentumTraining:
    torch.manual_seed(0)
    return MomentumTraining(trained(TestaForRetrieval(tiny_config())), **{"queue_size": 4, **settings})


def example_pairs(batch_size: int = 3):
    return (example_videos(batch_size), *example_texts(batch_size), torch.arange(batch_size))


def test_the_teacher_has_what_makes_embeddings_and_nothing_else():
    teacher = tiny_training().teacher
    names = {name.partition(".")[0] for name in teacher.state_dict()}
    assert names == {"testa", "video_projection", "text_projection"}
    assert not any("cross_attention" in name for name in teacher.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_teacher_moves_by_its_momentum_after_each_step():
    training = tiny_training(momentum=0.75)
    before = training.teacher.video_projection.weight.clone()
    with torch.no_grad():
        training.model.video_projection.weight.add_(1)
    training.after_optimizer_step()
    torch.testing.assert_close(training.teacher.video_projection.weight, before + 0.25)
    assert training.step == 1


def test_the_teacher_has_no_dropout():
    training = tiny_training().train()
    assert training.model.training and not any(module.training for module in training.teacher.modules())


def test_what_the_teacher_believes_gains_weight_linearly():
    training = tiny_training(distillation_weight=0.5, distillation_ramp_steps=4).eval()
    pairs, losses = example_pairs(), []
    for step in (0, 2, 4, 9):
        training.step.fill_(step)
        training.queue.pair_ids.fill_(FeatureQueue.EMPTY)
        losses.append(training(*pairs).loss_vtc)
    torch.testing.assert_close(losses[1] - losses[0], (losses[2] - losses[0]) / 2)
    torch.testing.assert_close(losses[2], losses[3])
    assert not torch.isclose(losses[0], losses[2])


# --- Queues ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.lists(st.integers(1, 7), max_size=6))
def test_a_queue_holds_the_last_samples_whatever_its_length(size, batches):
    queue, pushed = FeatureQueue(size, 2), []
    for batch_size in (min(batch_size, size) for batch_size in batches):
        ids = torch.arange(len(pushed), len(pushed) + batch_size)
        queue.push(ids[:, None].expand(-1, 2).float(), -ids[:, None].expand(-1, 2).float(), ids)
        pushed += ids.tolist()
    held = {number for number in queue.pair_ids.tolist() if number != FeatureQueue.EMPTY}
    assert held == set(pushed[-size:])
    for number, video, text in zip(queue.pair_ids, queue.video_embeds, queue.text_embeds, strict=True):
        assert number == FeatureQueue.EMPTY or (video[0] == number and text[0] == -number)


def test_a_batch_longer_than_the_queue_is_refused():
    with pytest.raises(ValueError, match="A queue of 2 samples is too short for a batch of 3"):
        tiny_training(queue_size=2)(*example_pairs(3))


def test_empty_places_of_the_queue_are_no_candidates():
    pairs = example_pairs()
    losses = [tiny_training(queue_size=size).eval()(*pairs).loss_vtc for size in (3, 50)]
    torch.testing.assert_close(*losses)


def test_settings_out_of_range_are_named():
    for name in ("momentum", "distillation_weight"):
        with pytest.raises(ValueError, match=f"{name} is 1.5; a share from 0 to 1"):
            tiny_training(**{name: 1.5})


# --- Several processes -----------------------------------------------------------------------------------------------


def test_rows_of_unequal_processes_are_joined_and_their_gradients_come_back():
    launch(2, "tests/gather_worker.py")
