"""Token aggregation: which tokens join, and what becomes of them.

A plan is one integer tensor, `assignment [..., N]`: the output slot of each of N input tokens, or -1 where a token is
dropped. Merging, undoing a merge and tracing tokens through many merges all follow from it. A frame is a token like any
other, along time: its patches move together.

The scheme is that of TESTA (Ren et al., 2023, section 3.2), which builds on the bipartite matching of ToMe (Bolya et
al., 2023). Plans have no gradient and are made in float32 whatever the model's dtype, so that they do not change with
precision. All shapes follow from the arguments, none from values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.generic import maybe_autocast


def limit_merges(num_merged: int, num_tokens: int, class_token_ahead: bool = False) -> int:
    """Return how many of `num_tokens` tokens a step may take away: `num_merged`, but at most half of them.

    Args:
        num_merged: Tokens wished to go.
        num_tokens: Tokens there are, without the class token; at least one.
        class_token_ahead: Whether a class token precedes them.
    """
    return min(num_merged, (num_tokens + class_token_ahead - 1) // 2)


def plan_aggregation(
    metric: Tensor | None,
    num_merged: int,
    strategy: str = "geometry",
    received_attention: Tensor | None = None,
    class_token_ahead: bool = False,
    vote: bool = False,
) -> Tensor:
    """Decide which tokens join.

    Args:
        metric: `[..., N, D]`, what tokens are compared by (cosine). With `vote`, `[..., P, N, D]`: P opinions. Pruning
            doesn't read it.
        num_merged: Tokens that go; at most [`limit_merges`].
        strategy: "geometry" lets every second token (set A) propose its most similar token among the others (set B)
            and accepts the `num_merged` best proposals. "importance" merges the `num_merged` tokens with the least
            `received_attention` into their most similar other token; "prune" drops them.
        received_attention: `[..., N]`, the importance of each token; geometry doesn't read it.
        class_token_ahead: Whether a class token precedes the N tokens; it takes the first place in set A.
        vote: Whether each of P opinions proposes: the most frequent partner wins, and a token's similarity is the
            smallest of its P best ones.

    Returns:
        `assignment [..., N]` (int64), the output slot in `[0, N - num_merged)` of each token, -1 where dropped. Slots
        are ordered: kept tokens of A, then B, each ascending; with "importance" all kept tokens ascending.

    Raises:
        ValueError: Where `metric` or `received_attention` is None and the strategy reads it.
    """
    is_geometry = strategy == "geometry"
    read = _given(metric, "metric") if is_geometry else _given(received_attention, "received_attention")
    with torch.no_grad(), maybe_autocast(device_type=read.device.type, enabled=False):
        if is_geometry:
            return _plan_geometry(F.normalize(read.float(), dim=-1), num_merged, class_token_ahead, vote)
        gone = _is_among_largest(-read.float(), num_merged)
        slot_of_kept = (~gone).cumsum(-1) - 1
        if strategy == "prune":
            return torch.where(gone, -1, slot_of_kept)
        metric = F.normalize(_given(metric, "metric").float(), dim=-1)
        unavailable = gone[..., None, None, :] if vote else gone[..., None, :]
        similarity = (metric @ metric.transpose(-1, -2)).masked_fill(unavailable, -torch.inf)
        _, partner = _best_partner(similarity, vote)
        return torch.where(gone, slot_of_kept.gather(-1, partner), slot_of_kept)


def plan_consecutive(metric: Tensor, num_merged: int) -> Tensor:
    """Let each of the `num_merged` tokens that are most like the one before them join it; a run of such is one slot.

    Not the paper's: frames of one scene follow each other, and their order matters. Geometry lets only every second
    token go, to any other.

    Args:
        metric: `[..., N, D]`, what tokens are compared by (cosine).
        num_merged: Tokens that go; less than N.

    Returns:
        `assignment [..., N]` (int64), the output slot in `[0, N - num_merged)` of each token. Tokens and slots are in
        the same order.
    """
    with torch.no_grad():
        metric = F.normalize(metric.float(), dim=-1)
        similarity = (metric[..., 1:, :] * metric[..., :-1, :]).sum(dim=-1)
        return F.pad((~_is_among_largest(similarity, num_merged)).cumsum(dim=-1), (1, 0))


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{name} is None, and this strategy reads it.")
    return tensor


def _plan_geometry(metric: Tensor, num_merged: int, class_token_ahead: bool, vote: bool) -> Tensor:
    first = int(class_token_ahead)
    set_a, set_b = metric[..., first::2, :], metric[..., 1 - first :: 2, :]
    similarity, partner = _best_partner(set_a @ set_b.transpose(-1, -2), vote)
    merged = _is_among_largest(similarity, num_merged)
    num_kept = set_a.shape[-2] - num_merged

    slot_of_kept = (~merged).cumsum(-1) - 1
    assignment = partner.new_empty(*partner.shape[:-1], metric.shape[-2])
    assignment[..., first::2] = torch.where(merged, num_kept + partner, slot_of_kept)
    assignment[..., 1 - first :: 2] = num_kept + torch.arange(set_b.shape[-2], device=metric.device)
    return assignment


def _best_partner(similarity: Tensor, vote: bool) -> tuple[Tensor, Tensor]:
    best, partner = similarity.max(dim=-1)
    if not vote:
        return best, partner
    votes = F.one_hot(partner, similarity.shape[-1]).sum(dim=-3)  # [..., P, A] -> [..., A, B]
    return best.amin(dim=-2), votes.argmax(dim=-1)


def _is_among_largest(values: Tensor, count: int) -> Tensor:
    """Mark the `count` largest of `[..., N]`, the first of equal ones; NaN is larger than any number."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    values = values.nan_to_num(nan=torch.inf)
    smallest = values.topk(count).values[..., -1:]
    is_larger, is_equal = values > smallest, values == smallest
    num_equal = count - is_larger.sum(dim=-1, keepdim=True)
    return is_larger | (is_equal & (is_equal.cumsum(dim=-1) <= num_equal))


def mean_key(key: Tensor) -> Tensor:
    """What tokens are compared by: the mean `[N, S, D]` (float32) over heads of their keys `[N, H, S, D]`."""
    with torch.no_grad():
        return key.mean(dim=1, dtype=torch.float32)


def received_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Importance of each token: the attention that all other tokens pay to it (Eq. 1 of the paper), mean over heads.

    Args:
        query: `[N, H, S, D]`.
        key: `[N, H, S, D]`.
        scaling: Factor of the attention logits.

    Returns:
        `[N, S]` (float32).
    """
    with torch.no_grad(), maybe_autocast(device_type=query.device.type, enabled=False):
        attention = torch.softmax(query.float() @ key.float().transpose(-1, -2) * scaling, dim=-1).mean(dim=1)
        return attention.sum(dim=-2) - attention.diagonal(dim1=-2, dim2=-1)


def merge(hidden_states: Tensor, token_sizes: Tensor, assignment: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Replace the tokens of each slot by their mean, weighted by size.

    A token that is alone in its slot comes out as it went in, to the bit.

    Args:
        hidden_states: `[..., N, *features]`; for frames `[B, T, L, D]`, merged along T.
        token_sizes: `[..., N, *features without the last]`, the number of input patches that a token stands for.
        assignment: `[..., N]`.
        num_slots: Tokens after the merge.

    Returns:
        Tokens `[..., num_slots, *features]` in the dtype of `hidden_states`, means computed in float32, and their sizes.
    """
    with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
        token_sizes = token_sizes.float()
        first, others = _first_of_each_slot(assignment, num_slots)
        merged, sizes = _take(hidden_states, first), _take(token_sizes, first)
        if others.shape[-1] == 0:
            return merged, sizes
        # Tokens join at most as many slots as there are others. Only the means of so many are computed; should fewer
        # have received something, slots of one token are among them, whose mean is that token.
        joins = (
            assignment.gather(-1, others)[..., None, :] == torch.arange(num_slots, device=assignment.device)[:, None]
        )
        slots = joins.any(dim=-1).int().topk(min(num_slots, others.shape[-1])).indices
        joins = _take(joins, slots).float()  # [..., slots, others]
        other_sizes, slot_sizes = _take(token_sizes, others), _take(sizes, slots)
        new_sizes = slot_sizes + _add_up(joins, other_sizes)
        sums = _add_up(joins, _take(hidden_states, others).float() * other_sizes[..., None])
        means = _take(merged, slots).float() * (slot_sizes / new_sizes)[..., None] + sums / new_sizes[..., None]
        return _put(merged, slots, means.to(merged.dtype)), _put(sizes, slots, new_sizes)


def _first_of_each_slot(assignment: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Return the index `[..., num_slots]` of the first token in each slot, and `[..., N - num_slots]` of the others."""
    # Numbers that differ are sorted: ONNX has no stable sort.
    num_tokens = assignment.shape[-1]
    place = torch.arange(num_tokens, device=assignment.device)
    order = (assignment * num_tokens + place).argsort()
    slots = assignment.gather(-1, order)
    is_first = slots != F.pad(slots[..., :-1], (1, 0), value=-1)
    order = order.gather(-1, torch.where(is_first, place, num_tokens + place).argsort())
    return order[..., :num_slots], order[..., num_slots:]


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Return the tokens `[..., M, *features]` of `values [..., N, *features]` at `index [..., M]`."""
    # Whole rows are copied, which a gather of single numbers takes several times as long for.
    rows = values.flatten(0, index.ndim - 1).index_select(0, _row_numbers(index, values.shape[index.ndim - 1]))
    return rows.view(*index.shape, *values.shape[index.ndim :])


def _put(values: Tensor, index: Tensor, new_values: Tensor) -> Tensor:
    """Replace in place the tokens of `values [..., N, *features]` at `index [..., M]`, all different."""
    rows = values.flatten(0, index.ndim - 1)
    rows.index_copy_(0, _row_numbers(index, values.shape[index.ndim - 1]), new_values.flatten(0, index.ndim - 1))
    return rows.view_as(values)


def _row_numbers(index: Tensor, num_tokens: int) -> Tensor:
    """Number tokens `[..., M]` through all leading dimensions."""
    rows = index.flatten(0, -2) if index.ndim > 1 else index[None]
    return (rows + num_tokens * torch.arange(rows.shape[0], device=index.device)[:, None]).flatten()


def _add_up(joins: Tensor, values: Tensor) -> Tensor:
    """Sum `values [..., M, *features]` into slots by `joins [..., slots, M]`, in a fixed order on every device."""
    return (joins @ values.reshape(*values.shape[: joins.ndim - 1], -1)).view(
        *joins.shape[:-1], *values.shape[joins.ndim - 1 :]
    )


def unmerge(hidden_states: Tensor, assignment: Tensor) -> Tensor:
    """Give every input token the value of the output token it is in, zeros where it was dropped.

    Args:
        hidden_states: `[..., M, D]`.
        assignment: `[..., N]`, values in `[-1, M)`.

    Returns:
        `[..., N, D]`.
    """
    return _take(hidden_states, assignment.clamp(min=0)) * (assignment >= 0)[..., None]


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Assignment of doing `first [..., N]` and then `second [..., M]`, where the values of `first` are below M."""
    return torch.where(first < 0, -1, second.gather(-1, first.clamp(min=0)))


def flatten_frames(assignment: Tensor, num_patches: int) -> Tensor:
    """Turn an assignment of frames `[B, T]` into one of all patch tokens, frame-major `[B, T * L]`."""
    patches = torch.arange(num_patches, device=assignment.device)
    tokens = torch.where(assignment[..., None] < 0, -1, assignment[..., None] * num_patches + patches)
    return tokens.flatten(1)


def flatten_patches(assignment: Tensor, num_slots: int) -> Tensor:
    """Turn assignments of each frame's patches `[B, T, L]` into one of all patch tokens, frame-major `[B, T * L]`."""
    frames = torch.arange(assignment.shape[1], device=assignment.device)[:, None]
    return torch.where(assignment < 0, -1, assignment + frames * num_slots).flatten(1)
