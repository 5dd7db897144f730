"""Training with a momentum teacher: contrastive targets that are softer, and more to compare with than one batch.

A teacher follows the model slowly. Its features of the last few batches wait in queues, so that every sample is compared
with far more candidates than a batch holds, and what it believes softens the targets (section 3.3 of the paper, after
ALBEF and BLIP). All of this is training state: a checkpoint of a run holds it, a published model doesn't.
"""

from copy import deepcopy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers.utils.generic import maybe_autocast

from .configuration_testa import TestaConfig
from .modeling_testa import TestaForPreTraining, TestaForRetrieval, TestaPreTrainingOutput, apply_head
from .objectives import (
    HardNegatives,
    contrastive_loss,
    distilled_targets,
    draw_hard_negatives,
    same_pair_targets,
)


# Its weight in a softmax is 0, and unlike an infinity it can be multiplied by a target of 0.
NO_CANDIDATE = -1e4


class MomentumTeacher(nn.Module):
    """A slow copy of what makes the embeddings of videos and texts: both encoders and both projections.

    Args:
        model: What is followed.
        momentum: Share of the teacher's weights that an update keeps.
    """

    def __init__(self, model: TestaForRetrieval, momentum: float = 0.995):
        super().__init__()
        self.testa = deepcopy(model.testa)
        for layer in self.testa.text_model.layers:
            del layer.cross_attention  # no text is read with a video here
        self.video_projection = deepcopy(model.video_projection)
        self.text_projection = deepcopy(model.text_projection)
        self.average = get_ema_multi_avg_fn(momentum)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "MomentumTeacher":
        """Stay in evaluation mode: targets without dropout."""
        return super().train(False)

    @torch.no_grad()
    def update(self, model: TestaForRetrieval) -> None:
        """Move the weights a little towards the model's."""
        followed = dict(model.named_parameters())
        own = dict(self.named_parameters())
        self.average(list(own.values()), [followed[name] for name in own], None)

    @torch.no_grad()
    def forward(self, pixel_values_videos: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embed videos `[B, T, C, H, W]` and texts `[B, L]`: both `[B, E]`, of length 1."""
        videos = self.testa.get_video_features(pixel_values_videos, return_dict=True).pooler_output
        texts = self.testa.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output
        videos, texts = apply_head(self.video_projection, videos), apply_head(self.text_projection, texts)
        return F.normalize(videos, dim=-1), F.normalize(texts, dim=-1)


class FeatureQueue(nn.Module):
    """The teacher's embeddings of the last `size` samples, and which video each shows.

    Args:
        size: Samples kept.
        embedding_dim: Width of the embeddings.
    """

    EMPTY = -1

    def __init__(self, size: int, embedding_dim: int):
        super().__init__()
        self.video_embeds = nn.Buffer(torch.zeros(size, embedding_dim))
        self.text_embeds = nn.Buffer(torch.zeros(size, embedding_dim))
        self.pair_ids = nn.Buffer(torch.full((size,), self.EMPTY))
        self.position = nn.Buffer(torch.tensor(0))

    @torch.no_grad()
    def push(self, video_embeds: Tensor, text_embeds: Tensor, pair_ids: Tensor) -> None:
        """Replace the oldest samples by these: embeddings `[B, E]` and ids `[B]`.

        Raises:
            ValueError: These are more than the queue holds.
        """
        size = len(self.pair_ids)
        if len(pair_ids) > size:
            raise ValueError(f"A queue of {size} samples is too short for a batch of {len(pair_ids)}.")
        places = (self.position + torch.arange(len(pair_ids), device=pair_ids.device)) % size
        self.video_embeds[places] = video_embeds.to(self.video_embeds)
        self.text_embeds[places] = text_embeds.to(self.text_embeds)
        self.pair_ids[places] = pair_ids
        self.position.copy_((self.position + len(pair_ids)) % size)


class MomentumTraining(nn.Module):
    """A model with its teacher and queue, trained as the paper trains for retrieval and in pre-training.

    In a run with several processes each sample is compared with those of all processes.

    Args:
        model: A [`TestaForRetrieval`] or a [`TestaForPreTraining`].
        queue_size: Samples whose features are kept; at least a batch over all processes.
        momentum: Share of the teacher's weights that an update keeps.
        distillation_weight: Weight of the teacher's beliefs in the targets (the paper's alpha), from 0 to 1.
        distillation_ramp_steps: Optimizer steps over which that weight rises linearly from 0.
    """

    def __init__(
        self,
        model: TestaForRetrieval,
        queue_size: int,
        momentum: float = 0.995,
        distillation_weight: float = 0.4,
        distillation_ramp_steps: int = 0,
    ):
        super().__init__()
        for name, value in (("momentum", momentum), ("distillation_weight", distillation_weight)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; a share from 0 to 1 is needed.")
        self.model = model
        self.teacher = MomentumTeacher(model, momentum)
        self.queue = FeatureQueue(queue_size, model.config.projection_dim)
        self.distillation_weight = distillation_weight
        self.distillation_ramp_steps = distillation_ramp_steps
        self.step = nn.Buffer(torch.tensor(0))

    @property
    def config(self) -> TestaConfig:
        return self.model.config

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Let the teacher follow the model's new weights, and count the step."""
        self.teacher.update(self.model)
        self.step.add_(1)

    def forward(
        self, pixel_values_videos: Tensor, input_ids: Tensor, attention_mask: Tensor, pair_ids: Tensor
    ) -> TestaPreTrainingOutput:
        """Compute the losses of pairs, and remember the teacher's embeddings of them.

        Args:
            pixel_values_videos: `[B, T, C, H, W]`.
            input_ids: `[B, L]`, text i belongs to video i.
            attention_mask: `[B, L]`.
            pair_ids: `[B]`, integers from 0, equal for samples that show the same video.
        """
        model = self.model
        video_output = model.get_video_features(pixel_values_videos, return_dict=True)
        text_output = model.get_text_features(input_ids, attention_mask, return_dict=True)
        video_embeds, text_embeds = video_output.pooler_output, text_output.pooler_output
        videos = video_output.last_hidden_state
        everywhere = ProcessRows(input_ids)
        all_ids = everywhere.gather(pair_ids)

        teacher_embeds = self.teacher(pixel_values_videos, input_ids, attention_mask)
        teacher_videos, teacher_texts = (everywhere.gather(embeds) for embeds in teacher_embeds)
        loss_vtc = self.contrastive_loss(
            (video_embeds, text_embeds), teacher_embeds, (teacher_videos, teacher_texts), pair_ids, all_ids
        )
        self.queue.push(teacher_videos, teacher_texts, all_ids)

        with torch.no_grad():
            logits_per_video = self.logits(everywhere.gather(video_embeds), everywhere.gather(text_embeds))
            negatives = everywhere.own_share(draw_hard_negatives(logits_per_video, all_ids))
        all_videos, all_texts, all_masks = (everywhere.gather(each) for each in (videos, input_ids, attention_mask))
        own_texts, own_masks = all_texts[everywhere.own], all_masks[everywhere.own]
        loss_vtm = model.matching_loss(videos, own_texts, own_masks, negatives, (all_videos, all_texts, all_masks))

        output = TestaPreTrainingOutput(
            loss=loss_vtc + loss_vtm,
            loss_vtc=loss_vtc,
            loss_vtm=loss_vtm,
            video_embeds=video_embeds,
            text_embeds=text_embeds,
        )
        if isinstance(model, TestaForPreTraining):
            loss_caption = model.caption_loss(videos, input_ids, attention_mask)
            output.loss, output.loss_caption = loss_vtc + loss_vtm + loss_caption, loss_caption
        return output

    def contrastive_loss(
        self,
        embeds: tuple[Tensor, Tensor],
        teacher_embeds: tuple[Tensor, Tensor],
        all_teacher_embeds: tuple[Tensor, Tensor],
        pair_ids: Tensor,
        all_ids: Tensor,
    ) -> Tensor:
        """Compare embeddings of videos and of texts, all `[B, E]`, with the teacher's of the other kind.

        Args:
            embeds: The model's, of this process's videos and texts.
            teacher_embeds: The teacher's, of the same.
            all_teacher_embeds: The teacher's, of the samples of all processes; those in the queue are added to them.
            pair_ids: `[B]`, ids of this process's samples.
            all_ids: Ids of all processes' samples.
        """
        candidate_ids = torch.cat([all_ids, self.queue.pair_ids])
        is_empty = candidate_ids == FeatureQueue.EMPTY
        targets = same_pair_targets(pair_ids, candidate_ids)
        ramp = (self.step / self.distillation_ramp_steps).clamp(max=1) if self.distillation_ramp_steps else 1.0
        weight = self.distillation_weight * ramp

        all_videos, all_texts = all_teacher_embeds
        text_candidates = torch.cat([all_texts, self.queue.text_embeds])
        video_candidates = torch.cat([all_videos, self.queue.video_embeds])
        logits, soft_targets = [], []
        for own, teacher, candidates in zip(embeds, teacher_embeds, (text_candidates, video_candidates), strict=True):
            with torch.no_grad():
                beliefs = self.logits(teacher, candidates).masked_fill(is_empty, NO_CANDIDATE)
                soft_targets.append(distilled_targets(targets, beliefs, weight))
            logits.append(self.logits(own, candidates).masked_fill(is_empty, NO_CANDIDATE))
        return contrastive_loss(*logits, *soft_targets)

    def logits(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """Return cosine similarities over the temperature, in float32 also under autocast."""
        with maybe_autocast(device_type=queries.device.type, enabled=False):
            return queries @ candidates.t() / self.model.bounded_temperature


# --- Several processes -------------------------------------------------------------------------------------------------


class ProcessRows:
    """Joins the samples of all processes, in the order of the processes.

    Processes may have different numbers of samples, and texts of different lengths.

    Args:
        input_ids: `[B, L]`, this process's texts.
    """

    def __init__(self, input_ids: Tensor):
        self.is_alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        shapes = [list(input_ids.shape)]
        if not self.is_alone:
            shape = torch.tensor(input_ids.shape, device=input_ids.device)
            gathered = shape.new_empty(dist.get_world_size(), 2)
            dist.all_gather_into_tensor(gathered.view(-1), shape)
            shapes = gathered.tolist()
        self.counts, lengths = zip(*shapes, strict=True)
        self.text_length = max(lengths)
        first = 0 if self.is_alone else sum(self.counts[: dist.get_rank()])
        self.own = slice(first, first + len(input_ids))

    def gather(self, tensor: Tensor) -> Tensor:
        """Join `[B, ...]` of all processes; gradients flow back to where each row came from.

        Integer `[B, L]` are texts or their masks, which are padded with 0 to the longest text of all processes.
        """
        if self.is_alone:
            return tensor
        padding = [0, 0] * (tensor.ndim - 1) + [0, max(self.counts) - len(tensor)]
        if tensor.ndim == 2 and not tensor.is_floating_point():
            padding[1] = self.text_length - tensor.shape[1]
        parts = _AllGather.apply(F.pad(tensor, padding)).chunk(len(self.counts))
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def own_share(self, negatives: HardNegatives) -> HardNegatives:
        """Return the negatives of this process's samples, out of those that process 0 drew for all."""
        drawn = torch.stack([tensor.long() for tensor in negatives])
        if not self.is_alone:
            dist.broadcast(drawn, src=0)
        video_of_text, text_of_video, *has_negative = drawn[:, self.own]
        return HardNegatives(video_of_text, text_of_video, *(has.bool() for has in has_negative))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
