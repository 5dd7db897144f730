"""Muon for processors that have no instructions for products of bfloat16."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class Float32Muon(torch.optim.Muon):
    """PyTorch's Muon with gradients made orthogonal in float32, not bfloat16, and steps as large as AdamW's.

    Where products of bfloat16 are emulated, they take 17 times as long, which is more than all else in a training step
    of a small model. State and arguments are those of `torch.optim.Muon` with `nesterov=True` and
    `adjust_lr_fn="match_rms_adamw"`, the only settings there are here.
    """

    def __init__(self, params: ParamsT, lr: float, weight_decay: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]  # of floats
        """Update the parameters that have gradients; return the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Matrices of one shape together: some of them alone are too small for several threads.
            of_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._with_momentum(parameter, parameter.grad, group["momentum"])
                    of_shape.setdefault(parameter.shape, []).append((parameter, update))
            for shape, updated in of_shape.items():
                parameters, updates = zip(*updated, strict=True)
                orthogonal = orthogonalise(
                    torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                for parameter, update in zip(parameters, orthogonal, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-0.2 * group["lr"] * max(shape) ** 0.5)
        return loss

    def _with_momentum(self, parameter: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return matrices `[B, M, N]` with their singular values brought near 1 by Newton and Schulz's iteration.

    Source: Jordan et al., Muon (https://kellerjordan.github.io/posts/muon/), where the coefficients come from.
    """
    linear, cubic, quintic = coefficients
    is_wide = matrices.shape[1] <= matrices.shape[2]
    wide = matrices if is_wide else matrices.mT
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        factor = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        wide = torch.baddbmm(wide, factor, wide, beta=linear)
    return wide if is_wide else wide.mT
