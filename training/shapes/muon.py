"""Muon in float32: momentum whose update is brought to singular values near 1 (https://kellerjordan.github.io/posts/muon).

`torch.optim.Muon` iterates in bfloat16, which most CPUs emulate, and takes one matrix at a time; this one iterates on
all matrices of the same shape together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices.

    The update's root mean square is brought to that of AdamW, about 0.2, so learning rates can be compared.

    Args:
        params: Parameter groups; every parameter has two dims.
        lr: Learning rate.
        momentum: Decay of the averaged gradient; the update looks one step ahead (Nesterov).
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters from their gradients."""
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients first, then call step()")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                directions = [self._direction(p, p.grad, group["momentum"]) for p in parameters if p.grad is not None]
                updates = _orthogonalize(torch.stack(directions))
                scale = 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * scale)

    def _direction(self, parameter: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        """Average the gradient into the momentum and return the direction, one step ahead."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def _orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices, (num_matrices, rows, columns), near 1 by Newton-Schulz iterations."""
    rows, columns = matrices.shape[-2:]
    x: Tensor = matrices.mT if rows > columns else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = x.mT if rows > columns else x
    return orthogonal
