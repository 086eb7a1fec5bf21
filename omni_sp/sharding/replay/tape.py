"""What one kind of block does to arguments of one kind, as a program without any of the model's Python."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from omni_sp.sharding.replay.compiler import compiled
from omni_sp.sharding.replay.program import as_function
from omni_sp.sharding.replay.recorder import PLAIN_TENSORS, Recorder, is_impure
from omni_sp.sharding.replay.simplify import GraphSimplifier
from omni_sp.sharding.tracked import TokenTensor
from omni_sp.sharding.tracked.tensor import GatheredView

Signature = tuple[Any, ...]
_SIGNATURE = "_omni_sp_signature"


@dataclass
class Guard:
    """The content of an argument that the program decided by.

    Attributes:
        content: a copy of it.
    """

    content: torch.Tensor
    _seen: Callable[[], torch.Tensor | None] = field(default=lambda: None)
    _seen_in: Callable[[], object] = field(default=lambda: None)
    _version: int = -1

    def holds(self, argument: torch.Tensor, forward: object) -> bool:
        """Whether an argument has this content. The same tensor, unchanged, is looked at once a forward.

        Between forwards somebody may write to it in ways that no version counts, as by its ``data`` or by numpy.
        """
        counts = not argument.is_inference()
        if counts and self._seen() is argument and self._seen_in() is forward and self._version == argument._version:
            return True
        if not torch.equal(argument, self.content):
            return False
        if counts:
            self._seen, self._seen_in, self._version = weakref.ref(argument), weakref.ref(forward), argument._version
        return True


class Tape:
    """One recorded block.

    Args:
        recorder: what was taken down.
        arguments: the block's tensor arguments.
        output: what the block returned.

    Attributes:
        graph: the operations, whose inputs are the arguments, the weights and our constants.
        guards: index of an argument -> what it must hold.
        replays: how often it was replayed.
        waits: why the host waits for the device in every replay; empty where it does not.
        is_compiled: whether torch.compile makes a program of it.

    Raises:
        ValueError: it cannot be replayed; the message says why.
    """

    def __init__(self, recorder: Recorder, arguments: Sequence[torch.Tensor], output: Any) -> None:
        flat, self._spec = tree_flatten(output)
        self._makers = [_maker(x, arguments) for x in flat]
        # Results that share memory count their writes together.
        counters = [id(x.writes) if type(x) is TokenTensor else -index - 1 for index, x in enumerate(flat)]
        places = [counters.index(counter) for counter in counters]
        self._sharing = [(first, place) for place, first in enumerate(places) if first != place]
        self._is_single = len(flat) == 1 and flat[0] is output
        self._is_tuple = type(output) is tuple and len(output) == len(flat)
        results = [_local(x) for x in flat]
        nodes = [recorder.node_of(x) if isinstance(x, torch.Tensor) else None for x in results]
        if recorder.refusal is not None:
            raise ValueError(recorder.refusal)
        recorder.graph.output(tuple(nodes))
        apart = recorder.written.union(recorder.memory[node].identity for node in nodes if node in recorder.memory)
        self._constants = GraphSimplifier(recorder.graph, recorder.constants, recorder.memory, apart).run()
        recorder.graph.eliminate_dead_code(is_impure)
        self.graph = recorder.graph
        self.guards = {index: Guard(content) for index, content in recorder.guards.items()}
        self.waits = recorder.waits or ("decides by the numbers of an argument" if self.guards else "")
        self.replays = 0
        self._function = as_function(recorder.graph)
        self.is_compiled = False

    def compile(self, options: Mapping[str, Any]) -> None:
        """Let torch.compile make a program of the graph, at the next replay."""
        self._function, self.is_compiled = compiled(self.graph, options), True

    def accepts(self, arguments: Sequence[torch.Tensor], forward: object) -> bool:
        """Whether the arguments that the program decided by hold what they held, in a forward."""
        return not self.guards or all(guard.holds(arguments[index], forward) for index, guard in self.guards.items())

    def replay(self, arguments: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> Any:
        """What the block returns for these arguments, by the operations that were recorded."""
        self.replays += 1
        results = self._function(*map(_local, arguments), *weights, *self._constants)
        made = [make(result, arguments) for make, result in zip(self._makers, results, strict=True)]
        for first, other in self._sharing:
            made[other].writes = made[first].writes
        if self._is_single:
            return made[0]
        return tuple(made) if self._is_tuple else tree_unflatten(made, self._spec)


def signature_of(value: torch.Tensor) -> Signature:
    """What of a tensor decides which operations are done to it.

    Raises:
        ValueError: it is of a kind that cannot be replayed.
    """
    kind = type(value)
    if kind in PLAIN_TENSORS:
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError("an argument requires gradients")
        return (value.shape, value.stride(), value.dtype, value.device, value.is_conj(), value.is_neg())
    if not isinstance(value, TokenTensor):
        raise ValueError(f"an argument is a {kind.__name__}")
    if value._writes_seen is not None and value._writes_seen != value.writes[0]:
        raise ValueError("an argument is a view of a tensor that was written to")
    known: Signature | None = value.__dict__.get(_SIGNATURE)
    if known is None:
        local = value._local
        # Asked by the rules' way, a wrapper's strides would take longer than all the rest.
        with torch._C.DisableTorchFunctionSubclass():
            known = (
                value.shape,
                value.stride(),
                value.dtype,
                value.device,
                local.shape,
                local.stride(),
                value.shard_dim,
                value.placement,
                value.is_copy,
                local.is_conj(),
                local.is_neg(),
            )
        value.__dict__[_SIGNATURE] = known
    return known


def _local(value: Any) -> Any:
    return value._local if type(value) is TokenTensor else value


def _maker(value: Any, arguments: Sequence[torch.Tensor]) -> Callable[[Any, Sequence[torch.Tensor]], Any]:
    """How a replay makes one of the block's results of what the graph gives."""
    for place, argument in enumerate(arguments):
        if argument is value:
            return lambda _result, arguments: arguments[place]
    if isinstance(value, GatheredView):
        raise ValueError("returns a view of a gathered tensor")
    if not isinstance(value, TokenTensor):
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, (int, float, bool, str, type(None))):
                raise ValueError(f"returns a {type(value).__name__}")
            return lambda _result, _arguments: value
        return lambda result, _arguments: result
    if value.is_copy or any(isinstance(x, TokenTensor) and x.writes is value.writes for x in arguments):
        raise ValueError("returns a view of an argument")
    signature, dim, placement, axis = signature_of(value), value.shard_dim, value.placement, value.axis
    strides = signature[1]

    local_strides = value._local.stride()

    def make(result: torch.Tensor, _arguments: Sequence[torch.Tensor]) -> TokenTensor:
        sharded = TokenTensor(result, dim, placement, axis, strides)
        if result.stride() == local_strides:  # a compiled graph may choose others
            sharded.__dict__[_SIGNATURE] = signature
        return sharded

    return make
