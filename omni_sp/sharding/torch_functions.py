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


_FUNCTIONS = {name: x for name, x in vars(torch.nn.functional).items() if isinstance(x, FunctionType) and _is_torchs(x)}


def torchs_own(function: Any) -> Any:
    """Return torch's own function for one that ``__torch_function__`` got.

    Torch's functions in Python name themselves there by what bears their name now. Where that is somebody's function
    around torch's, it has been run already, up to the call of torch's.

    Raises:
        ShardingError: it was there before this package was imported, so that torch's own is not known.
    """
    if _is_torchs(function):
        return function
    name = next((name for name, x in vars(torch.nn.functional).items() if x is function), None)
    if name is None:
        return function
    if name not in _FUNCTIONS:
        raise ShardingError(
            f"torch.nn.functional.{name} was replaced by {function!r} before omni_sp was imported: import omni_sp first"
        )
    return _FUNCTIONS[name]
