"""New weights for a video encoder that has to learn from little data."""

import torch
from torch import Tensor, nn

from transformers_testa.modeling_testa import TestaVideoAttention, TestaVideoModel, sinusoids


# Strength of what is random and of the identity, as Trockman and Kolter found them in trained models.
SIMILARITY = 0.7
RESIDUAL = 0.4


@torch.no_grad()
def imitate_trained_attention(model: TestaVideoModel) -> None:
    """Begin where training would lead first: tokens attend to those like them and near them, and value what differs.

    The product of each head's query and key weights becomes 0.7 times the identity plus noise as large, that of value
    and output weights -0.4 times the identity plus noise; positions of patches become waves over the grid. A small model
    then learns the shapes of objects in about half of the steps. Biases and all other weights stay as they are.

    Source: Trockman & Kolter, Mimetic Initialization of Self-Attention Layers (ICML 2023), equations 6 and 7.
    """
    for module in model.modules():
        if isinstance(module, TestaVideoAttention):
            _imitate(module.qkv, module.proj, module.num_heads)
    positions = model.embeddings.position_embeddings
    side, width = int((positions.shape[1] - 1) ** 0.5), positions.shape[2]
    row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    waves = [sinusoids(side, width // 2)[row], sinusoids(side, width - width // 2)[column]]
    positions[0, 1:] = 0.5 * torch.cat(waves, dim=1)


def _imitate(qkv: nn.Linear, output: nn.Linear, num_heads: int) -> None:
    query, key, value = qkv.weight.view(3, num_heads, -1, qkv.in_features).unbind()
    for head in range(num_heads):
        similarity = _noise(qkv) + torch.eye(qkv.in_features, device=qkv.weight.device)
        left, sizes, right = torch.linalg.svd(SIMILARITY * similarity)
        rank = query.shape[1]
        query[head] = (left[:, :rank] * sizes[:rank].sqrt()).T
        key[head] = right[:rank] * sizes[:rank, None].sqrt()
    residual = _noise(qkv) - torch.eye(qkv.in_features, device=qkv.weight.device)
    left, sizes, right = torch.linalg.svd(RESIDUAL * residual)
    output.weight.copy_(left * sizes.sqrt())
    value.copy_((right * sizes[:, None].sqrt()).view_as(value))


def _noise(qkv: nn.Linear) -> Tensor:
    width = qkv.in_features
    return torch.randn(width, width, device=qkv.weight.device) / width**0.5
