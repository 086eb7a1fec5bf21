"""What a recording asks of the operators that it sees, and the operations of ours that it takes down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from omni_sp.sharding.tracked.nesting import tensors_in

aten = torch.ops.aten

_SHAPED_BY_NUMBERS = frozenset({aten.nonzero_numpy, aten.argwhere, aten.tensor_split, aten.bincount})
"""Composite operators, which have no tag that says so."""


@dataclass(frozen=True)
class Traits:
    """What there is to know of one operator.

    Attributes:
        is_composite: it runs others, and gives no view itself.
        returns: it gives something.
        is_shaped_by_numbers: the shape of its result depends on the numbers of its arguments.
        is_index: it indexes, and is shaped by numbers where an index is a mask.
        is_lift: it gives a tensor that was made of plain numbers.
        is_copy: it moves numbers to another device.
        is_mutable: it writes to an argument.
        is_random: it draws random numbers.
        written: place and name of each argument that it writes to.
    """

    is_composite: bool = False
    returns: bool = True
    is_shaped_by_numbers: bool = False
    is_index: bool = False
    is_lift: bool = False
    is_copy: bool = False
    is_mutable: bool = False
    is_random: bool = False
    written: tuple[tuple[int, str], ...] = ()


@cache
def traits_of(func: Any) -> Traits:
    """What there is to know of an overload of an operator; looked up once."""
    schema, packet, tags = func._schema, func.overloadpacket, func.tags
    # What fake tensors call in prim, the dispatcher knows nothing of.
    is_composite = func.namespace != "prim" and bool(func._can_decompose())
    return Traits(
        is_composite=is_composite and all(x.alias_info is None for x in schema.returns),
        returns=bool(schema.returns),
        is_shaped_by_numbers=packet in _SHAPED_BY_NUMBERS or torch.Tag.dynamic_output_shape in tags,
        is_index=packet is aten.index,
        is_lift=packet in (aten.lift_fresh, aten.lift_fresh_copy),
        is_copy=packet in (aten.to, aten._to_copy, aten.copy_),
        is_mutable=bool(schema.is_mutable),
        is_random=torch.Tag.nondeterministic_seeded in tags,
        written=tuple((index, x.name) for index, x in enumerate(schema.arguments) if x.is_write),
    )


class Operation:
    """A function with its plain arguments, to be called with its tensors alone.

    Attributes:
        shape: of the tensor that it gives.
        dtype: of the tensor that it gives.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        self.shape, self.dtype = tuple(result.shape), result.dtype
        flat, spec = tree_flatten((args, kwargs))
        # Where all its tensors are arguments by themselves, a call need not put them among nested ones.
        are_arguments = len(tensors_in(flat)) == sum(isinstance(x, torch.Tensor) for x in args)
        self._kwargs = kwargs if are_arguments else None
        flat = list(args) if are_arguments else flat
        self._places = [place for place, x in enumerate(flat) if isinstance(x, torch.Tensor)]
        self._rest = [None if isinstance(x, torch.Tensor) else x for x in flat]
        self._function, self._spec = function, spec
        name = getattr(getattr(function, "func", function), "__name__", "operation").strip("_")
        # torch names a graph's nodes by these.
        self.__name__ = self.__qualname__ = f"{name}_{id(self)}"
        self.__module__ = __name__

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Call the function with these tensors in its tensors' places."""
        flat = list(self._rest)
        for place, x in zip(self._places, tensors, strict=True):
            flat[place] = x
        if self._kwargs is not None:
            return self._function(*flat, **self._kwargs)
        args, kwargs = tree_unflatten(flat, self._spec)
        return self._function(*args, **kwargs)
