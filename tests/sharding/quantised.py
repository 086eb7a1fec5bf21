"""A weight that is made of several tensors, as quantised ones of torchao are; torchao itself need not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

aten = torch.ops.aten
_KEPT = (aten.detach.default, aten.clone.default, aten.alias.default, aten._to_copy.default)


class ScaledWeight(torch.Tensor):
    """Whole numbers and a scale for each row."""

    numbers: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> ScaledWeight:
        made: ScaledWeight = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, dtype=scale.dtype, device=numbers.device
        )
        made.numbers, made.scale = numbers, scale
        return made

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor) -> None:
        pass

    @classmethod
    def of(cls, weight: torch.Tensor) -> torch.nn.Parameter:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return torch.nn.Parameter(cls((weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False)

    def whole(self) -> torch.Tensor:
        return self.numbers.to(self.scale.dtype) * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return func(args[0], args[1].whole(), *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _KEPT:
            parts = (args[0].numbers, args[0].scale)
            return cls(
                *(func(x, *args[1:], **{**kwargs, "dtype": x.dtype} if "dtype" in kwargs else kwargs) for x in parts)
            )
        args, kwargs = tree_map(lambda x: x.whole() if isinstance(x, ScaledWeight) else x, (args, kwargs))
        return func(*args, **kwargs)
