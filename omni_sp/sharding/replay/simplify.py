"""Leaves out of a recorded graph what a replay need not do again: it gives the same bits by fewer operations.

What a model computes twice from the same tensors is computed once, and what it makes of plain numbers alone is kept. No
operation is replaced by another one, and nothing that is written to, or that the block returns, is shared or kept.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from omni_sp.sharding.replay.operators import traits_of
from omni_sp.sharding.tracked.nesting import map_nested

_MAX_SHARED_BYTES = 2**20
"""A larger result is computed again: kept until its last use, it would add to the memory that a replay needs."""
_MAX_KEPT_BYTES = 2**16
_MAX_COMPARED = 1024
"""Constants of so many elements are compared by their numbers."""


class Memory(NamedTuple):
    """Where the tensor lies that a node gives.

    Attributes:
        identity: the same for tensors that share memory.
        num_bytes: of the tensor.
    """

    identity: int
    num_bytes: int


class GraphSimplifier:
    """Simplifies one graph in place.

    Args:
        graph: its last inputs are the constants.
        constants: their values.
        memory: for each node that gives a tensor where that lies. Of an operator that gives several there are nodes
            that take one out of what it gives.
        apart: the memory that is written to, and that of results.
    """

    def __init__(
        self, graph: fx.Graph, constants: Sequence[torch.Tensor], memory: Mapping[fx.Node, Memory], apart: set[int]
    ) -> None:
        self._graph, self._memory, self._apart = graph, memory, apart
        inputs = graph.find_nodes(op="placeholder")
        self._constants = dict(zip(inputs[len(inputs) - len(constants) :], constants, strict=True))
        self._known: dict[Hashable, fx.Node] = {}

    def run(self) -> list[torch.Tensor]:
        """Simplify. Returns the values of the constants that the graph has afterwards."""
        for node, value in list(self._constants.items()):
            if node in self._memory and self._memory[node].identity not in self._apart:
                self._share(node, _name_of_constant(value))
        for node in [node for node in self._graph.nodes if node.op == "call_function" and _is_pure(node.target)]:
            around = [memory for x in (node, *node.all_input_nodes) for memory in self._memory_of(x)]
            if any(memory.identity in self._apart for memory in around):
                continue
            value = self._value_of(node)
            if value is not None:
                kept = self._add_constant(value)
                self._replace(node, kept)
                self._share(kept, _name_of_constant(value))
            elif self._may_be_shared(node):
                self._share(node, (node.target, _name_of(node.args), _name_of(node.kwargs)))
        for node in [node for node in self._constants if not node.users]:
            self._graph.erase_node(node)
            del self._constants[node]
        return list(self._constants.values())

    def _share(self, node: fx.Node, name: Hashable) -> None:
        """Let the first node of a name take the place of this one."""
        first = self._known.setdefault(name, node)
        if first is not node:
            self._replace(node, first)

    def _replace(self, node: fx.Node, other: fx.Node) -> None:
        node.replace_all_uses_with(other)
        if node.op == "call_function":
            self._graph.erase_node(node)

    def _value_of(self, node: fx.Node) -> torch.Tensor | None:
        """What a node gives, where that is small and the same in every replay."""
        memory = self._memory.get(node)
        if memory is None or memory.num_bytes > _MAX_KEPT_BYTES or node.target is operator.getitem:
            return None
        if not all(x in self._constants for x in node.all_input_nodes):
            return None
        args, kwargs = map_nested(self._constant_of, (node.args, node.kwargs))
        value: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return value

    def _constant_of(self, argument: Any) -> Any:
        return self._constants[argument] if isinstance(argument, fx.Node) else argument

    def _add_constant(self, value: torch.Tensor) -> fx.Node:
        *_, last = self._graph.find_nodes(op="placeholder")
        with self._graph.inserting_after(last):
            node = self._graph.placeholder(f"kept_{len(self._graph.nodes)}")
        self._constants[node] = value
        return node

    def _may_be_shared(self, node: fx.Node) -> bool:
        """Whether it takes no memory of its own, or little."""
        viewed = {memory.identity for x in node.all_input_nodes for memory in self._memory_of(x)}
        own = self._memory_of(node)
        return all(memory.identity in viewed or memory.num_bytes <= _MAX_SHARED_BYTES for memory in own)

    def _memory_of(self, node: fx.Node) -> Iterator[Memory]:
        if node in self._memory:
            yield self._memory[node]
        else:
            for user in node.users:
                if user.target is operator.getitem:
                    yield from self._memory_of(user)


def _is_pure(target: Any) -> bool:
    """Whether a call gives the same whenever it gets the same, and does nothing else."""
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    traits = traits_of(target)
    return not (traits.is_mutable or traits.is_random or "empty" in target.overloadpacket.__name__)


def _name_of(value: Any) -> Hashable:
    """Equal for arguments that are the same in every replay."""
    if isinstance(value, (list, tuple)):
        return (isinstance(value, list), *map(_name_of, value))
    if isinstance(value, dict):
        return tuple((name, _name_of(x)) for name, x in value.items())
    # 0 is equal to 0.0 and -0.0.
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


def _name_of_constant(value: torch.Tensor) -> Hashable:
    """Equal for constants of the same numbers, where these are few."""
    if type(value) is not torch.Tensor or value.numel() > _MAX_COMPARED:
        return id(value)
    return value.shape, value.stride(), value.dtype, value.device, repr(value.tolist())
