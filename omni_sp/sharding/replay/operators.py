"""What a recording asks of the operators that it sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

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
