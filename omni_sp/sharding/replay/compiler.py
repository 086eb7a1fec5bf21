"""Compiles what was recorded of a block, by torch.compile.

A recording has no Python left, so every class can be compiled over several ranks: one graph, without breaks. In it an
exchange between ranks, or an attention, is one opaque operation. A compiler may move operations that do not depend on
each other, and ranks with other shapes might move them otherwise; so each of ours also takes the result of the one
before it, which keeps them in their order on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx

from omni_sp.sharding.replay.operators import Operation

_OPERATIONS: WeakValueDictionary[int, Operation] = WeakValueDictionary()
_NUMBERS = count()


def compiled(graph: fx.Graph, options: Mapping[str, Any]) -> Callable[..., tuple[Any, ...]]:
    """A function that does what a recorded graph does.

    Args:
        graph: the recording, which the caller keeps. The function takes its inputs, and is compiled when it is first
            called.
        options: of torch.compile.
    """
    copied, values = fx.Graph(), dict[fx.Node, fx.Node]()
    results = copied.graph_copy(graph, values)
    before = None
    for node in list(copied.nodes):
        if isinstance(node.target, Operation):
            operation, number = node.target, next(_NUMBERS)
            _OPERATIONS[number] = operation
            with copied.inserting_before(node):
                opaque = copied.call_function(
                    torch.ops.omni_sp.operation.default,
                    (list(node.args), before, number, list(operation.shape), operation.dtype),
                )
            node.replace_all_uses_with(opaque)
            copied.erase_node(node)
            before = opaque
            results = tuple(opaque if result is node else result for result in results)  # type: ignore[union-attr]
    # The last of them is a result too, so that none is dropped whose own result nobody uses.
    copied.output((results, before))
    function = torch.compile(fx.GraphModule({}, copied), fullgraph=True, dynamic=False, **options)

    def call(*inputs: torch.Tensor) -> tuple[Any, ...]:
        outputs: tuple[Any, ...] = function(*inputs)[0]
        return outputs

    return call


@torch.library.custom_op(
    "omni_sp::operation",
    mutates_args=(),
    schema="(Tensor[] tensors, Tensor? before, int number, int[] shape, ScalarType dtype) -> Tensor",
)
def _operation(tensors: Sequence[torch.Tensor], _before: Any, number: int, *_shape_and_dtype: Any) -> torch.Tensor:
    """One operation of a recording. Its shape and dtype are arguments, so that a graph which torch keeps says all."""
    result: torch.Tensor = _OPERATIONS[number](*tensors).contiguous()
    memory = result.untyped_storage().data_ptr()
    return result.clone() if any(x.untyped_storage().data_ptr() == memory for x in tensors) else result


@_operation.register_fake
def _(
    tensors: Sequence[torch.Tensor], _before: Any, _number: int, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    return tensors[0].new_empty(list(shape), dtype=dtype)
