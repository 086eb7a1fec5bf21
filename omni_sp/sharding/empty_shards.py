"""Running a model's own code over shards without any token.

Three text tokens on four ranks leave one rank with none. Most operations take empty tensors as they are; the exception
is ``reshape(…, -1, …)``, where torch calls the -1 ambiguous. It is not: it follows from the other dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_RESHAPES = (torch.Tensor.reshape, torch.Tensor.view, torch.reshape)


class EmptyShardReshape(TorchFunctionMode):
    """While active, -1 in a reshape of a tensor with no elements means what it would mean with one token."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RESHAPES and not kwargs and isinstance(args[0], torch.Tensor) and args[0].numel() == 0:
            shape = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list, torch.Size)) else args[1:]
            if all(isinstance(size, int) for size in shape) and -1 in shape and 0 in shape:
                args = (args[0], _resolved_shape(args[0].shape, shape))
        return func(*args, **kwargs)


def _resolved_shape(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """``after`` with its -1 computed from all dims but the empty ones."""
    known = math.prod(size for size in after if size > 0)
    missing = math.prod(size for size in before if size > 0) // known
    return tuple(missing if size == -1 else size for size in after)
