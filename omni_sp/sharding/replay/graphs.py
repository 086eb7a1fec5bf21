"""CUDA graphs of whole forwards: when all blocks are replayed, a forward's kernels are captured, and launched at once.

A graph repeats kernels and exchanges, without the model's Python. So before each use the modules, their attributes,
their weights and where those lie are looked at; a change captures anew. What must wait for the device in the middle,
to decide by numbers, cannot be captured, and runs as it would without graphs. All ranks send the same either way, so
they need not agree on who uses a graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.lazy import full_tensors
from omni_sp.sharding.replay.state import ModuleState, aliases, describe, modes
from omni_sp.sharding.replay.store import TapeStore

_MOVERS = ("nccl", "fake")
"""What moves tensors on the stream that is captured."""
_MAX_GRAPHS = 16
"""Each keeps the memory of a forward; the one that was used longest ago is dropped."""


class ForwardGraphs:
    """Takes the calls of a transformer, in the place that torch has for a compiled call.

    Args:
        model: the transformer.
        mesh: the ranks.
        store: the tapes of its blocks.
        gathers: operation -> how often it needed a full tensor, as the handle counts them.
        before: what comes before every forward and is no part of a graph: a look at the modules, and the comparison of
            the ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mesh: ParallelMesh,
        store: TapeStore,
        gathers: dict[str, int],
        before: Callable[[tuple[Any, ...], dict[str, Any]], Sequence[str]],
    ) -> None:
        self._model, self._mesh, self._store, self._gathers, self._before = model, mesh, store, gathers, before
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._ready: dict[Any, ModuleState] = {}
        self._pool: Any = None
        self.is_capturing = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the transformer."""
        args, kwargs = full_tensors((args, kwargs), "the transformer")
        arguments: list[torch.Tensor] = []
        try:
            key = (modes(), describe(args, arguments), describe(kwargs, arguments), aliases(arguments))
            self._require_able(arguments)
        except ValueError as reason:
            return self._run(str(reason), None, args, kwargs)
        graph, ready = self._graphs.get(key), self._ready.pop(key, None)
        if graph is not None and graph.is_current():
            if foreign := self._before(args, kwargs):
                return self._run(f"there is code of others in {foreign[0]}", None, args, kwargs)
            self._graphs.move_to_end(key)
            self._store.counts.in_graphs += 1
            return graph.replay(arguments)
        self._graphs.pop(key, None)
        if ready is not None and ready.is_current():
            foreign = self._before(args, kwargs)
            if not foreign and ready.is_current():
                return self._capture(key, ready, arguments, args, kwargs)
        return self._run("it is the first of its shape, or the model was changed", key, args, kwargs)

    def _require_able(self, arguments: Sequence[torch.Tensor]) -> None:
        """Raise a ValueError where nothing can be captured."""
        if torch.is_grad_enabled():
            raise ValueError("gradients are enabled")
        for x in arguments:
            if not can_capture(x.device):
                raise ValueError(f"an argument lies on the {x.device.type}")
            for axis in _axes(self._mesh):
                if axis.size > 1 and axis.backends.get(x.device.type) not in _MOVERS:
                    raise ValueError(f"{axis.backends.get(x.device.type)} moves tensors, which cannot be captured")

    def _run(self, reason: str, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run without a graph. Where it came to nothing but replays, the next of this key is captured."""
        counts, self._store.waits = self._store.counts, ""
        before = (counts.recorded, counts.followed.total(), counts.replayed)
        output = self._model._call_impl(*args, **kwargs)
        after = (counts.recorded, counts.followed.total(), counts.replayed)
        if key is not None and after[:2] == before[:2] and after[2] > before[2]:
            if self._store.waits:
                reason = self._store.waits
            else:
                self._ready[key] = ModuleState(self._model)
        counts.not_in_graphs[reason] += 1
        return output

    def _capture(
        self, key: Any, state: ModuleState, arguments: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        static = [x.clone() for x in arguments]
        flat, spec = tree_flatten((args, kwargs))
        copies = iter(static)
        own_args, own_kwargs = tree_unflatten([next(copies) if isinstance(x, torch.Tensor) else x for x in flat], spec)
        counts = [x for axis in _axes(self._mesh) for x in (axis.traffic.calls, axis.traffic.bytes)]
        counted = _Counted([*counts, self._gathers], self._store)
        self.is_capturing = True
        try:
            launch, output, self._pool = capture(lambda: self._model._call_impl(*own_args, **own_kwargs), self._pool)
        except RuntimeError as error:
            reason = f"capturing failed: {str(error).splitlines()[0]}"
            return self._run(reason, None, args, kwargs)
        finally:
            self.is_capturing = False
            counted.take_back()
        while len(self._graphs) >= _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        graph = self._graphs[key] = _Graph(state, launch, static, output, counted)
        self._store.counts.in_graphs += 1
        return graph.replay(arguments)


class _Graph:
    """A captured forward, with the memory of its inputs and outputs."""

    def __init__(
        self,
        state: ModuleState,
        launch: Callable[[], None],
        inputs: list[torch.Tensor],
        output: Any,
        counted: _Counted,
    ) -> None:
        self._state, self._launch, self._inputs, self._output, self._counted = state, launch, inputs, output, counted
        self._places = [x.data_ptr() for x in state.weights]

    def is_current(self) -> bool:
        """True while the model is what was captured, and its weights lie where they lay."""
        return self._state.is_current() and [x.data_ptr() for x in self._state.weights] == self._places

    def replay(self, arguments: Sequence[torch.Tensor]) -> Any:
        """What the forward returns for these arguments."""
        for own, x in zip(self._inputs, arguments, strict=True):
            own.copy_(x)
        self._launch()
        self._counted.add_again()
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, self._output)


class _Counted:
    """What a forward adds to counts of Python, which a graph does not: traffic, gathers and replayed blocks."""

    def __init__(self, counts: Sequence[dict[str, int]], store: TapeStore) -> None:
        self._counts, self._store = counts, store
        self._before = [dict(count) for count in counts]
        self._replayed = store.counts.replayed
        self._added: list[Mapping[str, int]] = []

    def take_back(self) -> None:
        """Note what was added since the construction, and undo it."""
        for count, before in zip(self._counts, self._before, strict=True):
            self._added.append({name: value - before.get(name, 0) for name, value in count.items()})
            count.clear()
            count.update(before)
        self._replayed, self._store.counts.replayed = self._store.counts.replayed - self._replayed, self._replayed

    def add_again(self) -> None:
        """Add as much once more."""
        for count, added in zip(self._counts, self._added, strict=True):
            count.update({name: count.get(name, 0) + value for name, value in added.items() if value})
        self._store.counts.replayed += self._replayed


def _axes(mesh: ParallelMesh) -> list[Any]:
    return list({id(axis.traffic): axis for axis in (mesh.ulysses, mesh.ring, mesh.sequence)}.values())


def can_capture(device: torch.device) -> bool:
    """Whether work on a device can be captured."""
    return device.type == "cuda"


def capture(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any, Any]:
    """Capture what a function launches.

    Args:
        function: what to capture.
        pool: memory that other graphs use, one at a time; None for new memory.

    Returns:
        What launches it again, the function's output, whose memory that fills, and the memory that it uses.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = function()
    return graph.replay, output, graph.pool()
