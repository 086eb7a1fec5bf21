"""References that parallel results are compared with, and weights that hide no error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from omni_sp.attention.reference import attention, relative_error

__all__ = ["attention", "randomise", "relative_error", "split_tokens"]


def split_tokens(tensor: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Split dim 1 into the shards of ranks that hold so many tokens each."""
    return list(tensor.split(list(lengths), dim=1))


def randomise(model: Any, seed: int = 0) -> Any:
    """Draw all weights of a module at random, the same in every process.

    Layers that start at zero, as the last ones of many diffusion transformers do, would hide every error behind them.

    Args:
        model: a module, which is changed in place.
        seed: other seeds give other weights.

    Returns:
        The module, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                # Norm weights around 1, biases around 0; nothing of the unseeded initialisation stays.
                parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()
