"""A recorded graph as a Python function: it gives what the graph gives, and lets go of what it no longer needs."""

from __future__ import annotations

import operator
import weakref
from typing import NamedTuple

import torch
from torch import fx

from omni_sp.sharding.replay.program import as_function
from omni_sp.sharding.tracked.nesting import map_nested, tensors_in

aten = torch.ops.aten


def test_arguments_of_every_kind_arrive() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    both = graph.call_function(aten.cat.default, ([x, y], 1))
    first, second = (graph.call_function(aten.split.Tensor, (both, 3, 1)) for _ in range(2))
    part = graph.call_function(operator.getitem, (first, 1))
    wide = graph.call_function(aten._to_copy.default, (part,), {"dtype": torch.float64})
    scaled = graph.call_function(aten.mul.Tensor, (wide, float("inf")))
    graph.call_function(aten.relu_.default, (second.args[0],))  # nobody uses its result
    seen: list[object] = []

    def note(*args: object, **kwargs: object) -> torch.Tensor:
        seen.append((args, kwargs))
        return torch.ones(())

    noted = graph.call_function(note, (None, "a'b", (1,), [], {"of": (y, 2.5)}), {"also": torch.bfloat16})
    graph.output((scaled, both, None, noted))
    a, b = torch.randn(2, 4), torch.randn(2, 2)
    scaled_is, both_is, nothing, noted_is = as_function(graph)(a, b)
    assert torch.equal(both_is, torch.cat([a, b], 1).relu())
    assert torch.equal(scaled_is.isinf(), torch.cat([a, b], 1)[:, 3:] != 0)
    assert scaled_is.dtype == torch.float64
    assert nothing is None
    assert torch.equal(noted_is, torch.ones(()))
    assert seen == [((None, "a'b", (1,), [], {"of": (b, 2.5)}), {"also": torch.bfloat16})]


def test_a_tensor_is_let_go_after_its_last_use() -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[list[bool]] = []

    def make(x: torch.Tensor) -> torch.Tensor:
        alive.append([reference() is not None for reference in made])
        result = x + 1
        made.append(weakref.ref(result))
        return result

    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(4):
        node = graph.call_function(make, (node,))
        graph.call_function(make, (node,))  # nobody uses this one
    graph.output((node,))
    as_function(graph)(torch.zeros(2))
    # While one is made, there is the one that it is made of.
    assert [sum(one) for one in alive] == [0, 1, 1, 1, 1, 1, 1, 1]


class _Named(NamedTuple):
    one: torch.Tensor
    other: int


def test_tensors_are_found_in_order_wherever_they_are() -> None:
    a, b, c, d = (torch.tensor(float(number)) for number in range(4))
    value = (a, [b, None, {"x": (c,), "y": _Named(d, 3)}], "text", {"again": a})
    assert [int(x) for x in tensors_in(value)] == [0, 1, 2, 3, 0]
    changed = map_nested(lambda x: float(x) if isinstance(x, torch.Tensor) else x, value)
    assert changed == (0.0, [1.0, None, {"x": (2.0,), "y": (3.0, 3)}], "text", {"again": 0.0})
