"""Whether a call's result is made of numbers, and which stage made the first NaN or infinite one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FiniteCheck:
    """Notes the least and the largest number of what stages give: where there is a NaN or an infinite one, they are it.

    A note costs one pass over the tensors, and does not wait for the device. Only first_stage() does.
    """

    def __init__(self) -> None:
        self._notes: list[tuple[str, torch.Tensor]] = []

    def note(self, stage: str, value: Any) -> None:
        """Note the tensors anywhere in what a stage has given. Call it in the order of the stages."""
        self._notes += [(stage, torch.stack(torch.aminmax(tensor.detach()))) for tensor in _tensors(value)]

    def first_stage(self, result: Iterable[Any]) -> str | None:
        """The first stage that gave NaN or infinite numbers; None where its last one and the result are finite.

        Args:
            result: what the pipeline gave. Of pictures, whose levels are always finite, the stage before them says it.
        """
        stages = [stage for stage, limits in self._notes if not bool(limits.isfinite().all())]
        last = self._notes[-1][0] if self._notes else None
        is_finite = all(bool(torch.stack(torch.aminmax(one)).isfinite().all()) for one in _tensors(list(result)))
        if is_finite and last not in stages:
            return None
        return stages[0] if stages else "the result"


def _tensors(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors and arrays anywhere in a value."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value) if value.dtype.kind == "f" else None
    if isinstance(value, torch.Tensor):
        return [value] if value.dtype in _DTYPES and value.numel() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []
