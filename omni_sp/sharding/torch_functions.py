"""Torch's own functions, where somebody has put others in their place."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch

from omni_sp.errors import ShardingError

_OF_TORCH = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)


def _is_torchs(function: Any) -> bool:
    """Whether a function is one that is written in C, or in a file of torch's."""
    if isinstance(function, _OF_TORCH):
        return True
    return isinstance(function, FunctionType) and str(function.__globals__.get("__name__")).startswith("torch.")


def _torchs_in(owner: Any) -> dict[str, Any]:
    return {name: x for name in dir(owner) if _is_torchs(x := getattr(owner, name)) and not isinstance(x, type)}


_FUNCTIONS = [
    (name, owner, _torchs_in(owner))
    for name, owner in (
        ("torch.nn.functional", torch.nn.functional),
        ("torch.functional", torch.functional),
        ("torch.Tensor", torch.Tensor),
    )
]
"""Where torch's functions are looked up by their names when they name themselves, and which they were at first."""


def torchs_own(function: Any) -> Any:
    """Return torch's own function for one that ``__torch_function__`` got.

    Torch's functions in Python, and its methods of tensors, name themselves there by what bears their name now. Where
    that is somebody's function around torch's, it has been run already, up to the call of torch's.

    Raises:
        ShardingError: it was there before this package was imported, so that torch's own is not known.
    """
    if _is_torchs(function):
        return function
    for place, owner, functions in _FUNCTIONS:
        name = next((name for name, x in vars(owner).items() if x is function), None)
        if name in functions:
            return functions[name]
        if name is not None:
            raise ShardingError(
                f"{place}.{name} was replaced by {function!r} before omni_sp was imported: import omni_sp first"
            )
    return function
