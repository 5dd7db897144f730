import pytest
import torch
from original import OriginalCase, case_names
from test_modeling import TOLERANCE

from transformers_testa import TestaForRetrieval, conversion
from transformers_testa.momentum import MomentumTeacher, MomentumTraining
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
