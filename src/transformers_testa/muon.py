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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(mean, group["momentum"])
                update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * group["lr"] * max(parameter.shape) ** 0.5)
        return loss


def orthogonalise(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return the matrix `[M, N]` with its singular values brought near 1 by steps of Newton and Schulz's iteration.

    Source: Jordan et al., Muon (https://kellerjordan.github.io/posts/muon/), where the coefficients come from.
    """
    linear, cubic, quintic = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), wide, beta=linear)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
