"""Tensors among the arguments and the results of operators, which are nested in lists, tuples and dicts alone.

torch's own functions for trees know every registered container, and take a hundred times as long: they would be most of
what it costs to follow an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """All tensors among some values, in their order; one that is there twice comes twice."""
    found: list[torch.Tensor] = []
    _collect(values, found)
    return found


def _collect(values: Iterable[Any], found: list[torch.Tensor]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)


def map_nested(change: Callable[[Any], Any], value: Any) -> Any:
    """A value with ``change(item)`` for each item that is no list, tuple or dict. Named tuples become plain ones."""
    if isinstance(value, (list, tuple)):
        changed = [map_nested(change, item) for item in value]
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, dict):
        return {name: map_nested(change, item) for name, item in value.items()}
    return change(value)
