"""Takes down the local operations of one followed block as a graph.

The recorder is a dispatch mode beneath the followed tensors: the rules run as ever, and what they do to plain tensors
passes through here. An exchange between ranks, and an attention, are one operation each. The pass that is taken down
computes the real result, so recording costs one followed forward.

What must not be frozen into the graph is found while it is made: a number that the program read decides what it does
next, so the argument that the number came from is compared at every replay; a tensor that came from anywhere else than
the arguments, the weights and the recording itself makes the block unfit for a replay.
"""

from __future__ import annotations

import operator
import pickle
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from omni_sp.sharding.replay.operators import Operation, Traits, traits_of
from omni_sp.sharding.replay.simplify import Memory
from omni_sp.sharding.torch_functions import torchs_own
from omni_sp.sharding.tracked import TokenTensor
from omni_sp.sharding.tracked.nesting import map_nested, tensors_in
from omni_sp.sharding.tracked.recording import activate_recording, is_constant
from omni_sp.sharding.tracked.tensor import GatheredView, memory_of

aten = torch.ops.aten
T = TypeVar("T")

PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter, FakeTensor})
"""Of other kinds of tensors an operator may do more than compute. Fake ones have shapes and no numbers."""
# On the CPU these never reach the dispatcher.
_UNSEEN_READS = frozenset({torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__})
_PLAIN = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_WEIGHT, _RANDOM = -1, -2
_NO_SOURCE: frozenset[int] = frozenset()


class Recorder(TorchDispatchMode):
    """Records while the block ``run`` lasts.

    Args:
        arguments: the tensors among the block's arguments; of a sharded one its shard.
        is_sharded: for each of them, whether it is a shard.
        weights: parameters and buffers of the block.

    Attributes:
        graph: inputs are the arguments, then the weights, then ``constants``.
        constants: tensors of ours, and those made of plain numbers.
        guards: index of an argument -> the content that the program read numbers of.
        refusal: why there can be no replay; None while there can.
        waits: why the host waits for the device in every replay; empty where it does not.
        memory: for each node that gives a tensor where that lies.
        written: the memory that is written to.
    """

    def __init__(
        self, arguments: Sequence[torch.Tensor], is_sharded: Sequence[bool], weights: Sequence[torch.Tensor]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants: list[torch.Tensor] = []
        self.guards: dict[int, torch.Tensor] = {}
        self.refusal: str | None = None
        self.waits = ""
        self.memory: dict[fx.Node, Memory] = {}
        self.written: set[int] = set()
        self._storages: list[StorageWeakRef] = []
        self._views: dict[Hashable, fx.Node] = {}
        self._arguments, self._is_sharded, self._weights = arguments, is_sharded, weights
        self._versions = [_version(x) for x in (*arguments, *weights)]
        # Nothing is kept alive that following would have freed.
        self._nodes = WeakTensorKeyDictionary()
        self._last_input: fx.Node = self.graph._root
        self._sources: dict[fx.Node, frozenset[int]] = {}
        self._reads_unseen = _UnseenReads(self)
        self._inside = False
        for index, x in enumerate(arguments):
            self._add_input(f"argument_{index}", x, frozenset({index}))
        for index, x in enumerate(weights):
            self._add_input(f"weight_{index}", x, frozenset({_WEIGHT}))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Dynamo is off already where blocks are recorded: torch need not switch it off again at every operator.
        return False

    def record(self, function: Callable[[], T]) -> T:
        """Call a function, and take down what it does."""
        with ExitStack() as stack:
            stack.enter_context(activate_recording(self))
            # So that composite operators arrive whole, as they are called.
            stack.enter_context(torch._C._AutoDispatchBelowAutograd())
            stack.enter_context(self._reads_unseen)
            stack.enter_context(self)
            drawn = _drawn()
            result = function()
        # To fake tensors there are no numbers, and torch draws some of Python's when it makes them.
        if _drawn() != drawn and not any(isinstance(x, FakeTensor) for x in self._arguments):
            self.refuse("draws random numbers that are not torch's")
        if [_version(x) for x in (*self._arguments, *self._weights)] != self._versions:
            self.refuse("writes to an argument or a weight")
        return result

    def refuse(self, reason: str) -> None:
        """Note why there can be no replay; the first reason stays."""
        self.refusal = self.refusal or reason

    def node_of(self, tensor: torch.Tensor) -> fx.Node | None:
        """The node that gives a tensor; None, and a refusal, where nothing in the recording does."""
        node: fx.Node | None = self._nodes.get(tensor)
        if node is None and is_constant(tensor):
            node = self._add_constant(tensor)
        if node is None:
            self.refuse(f"uses a tensor {tuple(tensor.shape)} that is neither an argument nor a weight")
        return node

    def call(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        """Call a function, and take it down as one operation."""
        was_inside, self._inside = self._inside, True
        try:
            with _plain_computation():
                result = function(*args, **kwargs)
        finally:
            self._inside = was_inside
        if not was_inside:
            self._add_call(Operation(function, args, kwargs, result), tensors_in((args, kwargs)), {}, result)
        return result

    def will_read(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Note that every replay looks at a tensor's numbers, and give the replicated arguments they come from."""
        self.waits = self.waits or "looks at the numbers of a mask"
        node = self._nodes.get(tensor)
        sources = None if node is None else self._sources.get(node)
        if sources is None or any(source < 0 or self._is_sharded[source] for source in sources):
            return None
        return [self._arguments[source] for source in sorted(sources)]

    def read(self, tensor: torch.Tensor) -> None:
        """Note that the program looked at a tensor's numbers."""
        if self._inside or self.refusal is not None or tensor.is_meta:
            return
        node = self.node_of(tensor)
        for source in self._sources.get(node, _NO_SOURCE) if node is not None else _NO_SOURCE:
            if source < 0:
                self.refuse("decides by the numbers of a weight" if source == _WEIGHT else "decides by random numbers")
            elif self._is_sharded[source]:
                self.refuse("decides by the numbers of a sharded tensor")
            elif _version(self._arguments[source]) != self._versions[source]:
                self.refuse("writes to an argument or a weight")
            elif source not in self.guards:
                with _plain_computation():
                    self.guards[source] = self._arguments[source].detach().clone()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if TokenTensor in types or GatheredView in types:
            return NotImplemented  # to the rules, which call plain operations
        tensors = tensors_in((args, kwargs))
        if any(isinstance(x, (TokenTensor, GatheredView)) for x in tensors):
            return NotImplemented
        traits = _traits_of(func)
        if traits.is_composite:
            with _views_of_weights():
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return result  # fake tensors are asked by an operator
        made = tensors_in((result,))
        # What gives a number instead of a tensor, such as item() or a comparison of tensors, was read.
        reads = not made and traits.returns
        is_shaped = traits.is_shaped_by_numbers or (traits.is_index and _has_mask(args[1]))
        if not reads and is_shaped:
            self.waits = f"calls {func}, whose result's shape depends on numbers"
        elif _crosses(traits, tensors, made):
            self.waits = f"calls {func}, which moves numbers between host and device"
        if reads or is_shaped:
            for x in tensors:
                self.read(x)
        if self.refusal is None and not reads and not self._inside:
            self._take_down(func, traits, args, kwargs, tensors, made, result)
        return result

    def _take_down(
        self,
        func: Any,
        traits: Traits,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        made: list[torch.Tensor],
        result: Any,
    ) -> None:
        if any(x.is_meta for x in (*tensors, *made)):
            return  # arithmetic with shapes
        if func is aten.detach_.default:
            return  # without gradients there is nothing to detach from
        if func is aten.as_strided.default and (len(args) > 3 or kwargs) and self._is_of_input(args[0]):
            self.refuse("takes a fixed place in the memory of an argument or a weight")
        if any(type(x) not in PLAIN_TENSORS for x in tensors):
            self.refuse(f"uses a {next(type(x).__name__ for x in tensors if type(x) not in PLAIN_TENSORS)}")
        elif traits.is_lift and args[0] not in self._nodes:
            # Made of plain numbers. A replay works on a copy, since the program may write to it.
            constant = self._add_constant(args[0].detach().clone())
            copied = self.graph.call_function(aten.clone.default, (constant,))
            self._nodes[args[0]] = self._nodes[result] = copied
            self._note_memory(copied, result)
        elif any(result is x for x in tensors) and not traits.is_mutable:
            return  # it did nothing, as dropout here
        elif not traits.is_mutable and isinstance(result, torch.Tensor) and self._same_view(result) is not None:
            self._nodes[result] = self._same_view(result)
        else:
            self._add_call(func, args, kwargs, result)

    def _is_of_input(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor shares memory with an argument or a weight."""
        return memory_of(tensor) in map(memory_of, (*self._arguments, *self._weights))

    def _add_input(self, name: str, tensor: torch.Tensor, sources: frozenset[int]) -> fx.Node:
        with self.graph.inserting_after(self._last_input):
            self._last_input = self.graph.placeholder(name)
        self._sources[self._last_input] = sources
        self._note_memory(self._last_input, tensor)
        if tensor not in self._nodes:
            self._nodes[tensor] = self._last_input
        return self._last_input

    def _add_constant(self, tensor: torch.Tensor) -> fx.Node:
        self.constants.append(tensor)
        return self._add_input(f"constant_{len(self.constants)}", tensor, _NO_SOURCE)

    def _add_call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        nodes: list[fx.Node] = []

        def as_node(x: Any) -> Any:
            if isinstance(x, torch.Tensor):
                node = self.node_of(x)
                if node is not None:
                    nodes.append(node)
                return node
            if not isinstance(x, _PLAIN):
                self.refuse(f"passes a {type(x).__name__}")
            return x

        mapped, options = map_nested(as_node, tuple(args)), map_nested(as_node, kwargs)
        if self.refusal is not None:
            return
        traits = _traits_of(function)
        sources = _NO_SOURCE.union(*(self._sources.get(node, _NO_SOURCE) for node in nodes))
        if traits.is_random:
            sources |= {_RANDOM}
        self._bind(self.graph.call_function(function, mapped, options), result, sources)
        for index, name in traits.written:
            for x in tensors_in((args[index] if index < len(args) else kwargs.get(name),)):
                self.written.add(memory_of(x))
                self._spread(x, sources)

    def _bind(self, node: fx.Node, result: Any, sources: frozenset[int]) -> None:
        self._sources[node] = sources
        if isinstance(result, torch.Tensor):
            self._note_memory(node, result)
            if result not in self._nodes:  # else an operator gave back one of its arguments
                self._nodes[result] = node
        elif isinstance(result, (list, tuple)):
            for index, part in enumerate(result):
                if isinstance(part, (torch.Tensor, list, tuple)):
                    self._bind(self.graph.call_function(operator.getitem, (node, index)), part, sources)

    def _same_view(self, tensor: torch.Tensor) -> fx.Node | None:
        """A node that gives the same view of the same memory, such as that of a tensor which was transposed twice."""
        return self._views.get(_view_of(tensor)) if tensor.layout is torch.strided else None

    def _note_memory(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """Note where a node's tensor lies. While this recorder is there, no other memory gets that identity."""
        if tensor.layout is torch.strided:
            self._storages.append(StorageWeakRef(tensor.untyped_storage()))
            self.memory[node] = Memory(memory_of(tensor), tensor.nbytes)
            self._views.setdefault(_view_of(tensor), node)

    def _spread(self, written: torch.Tensor, sources: frozenset[int]) -> None:
        """What was written to, and all that shares its memory, depends on what was written."""
        memory = memory_of(written)
        for tensor, node in list(self._nodes.items()):
            if tensor is written or memory_of(tensor) == memory:
                self._sources[node] = self._sources.get(node, _NO_SOURCE) | sources


def _views_of_weights() -> AbstractContextManager[Any]:
    """Let views that a composite operator makes of weights require gradients, as they do in a replay.

    Below autograd they would not, and ``linear`` of a batch whose memory is not contiguous would choose another kernel.
    """
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)


_OF_OURS = Traits()


def _traits_of(function: Any) -> Traits:
    """What there is to know of an operator, or of one operation of ours."""
    return _OF_OURS if isinstance(function, Operation) else traits_of(function)


@contextmanager
def _plain_computation() -> Iterator[None]:
    """Without the modes that watch operators; that of fake tensors stays, since it makes them."""
    with _disable_current_modes() as modes, ExitStack() as stack:
        for mode in modes:
            if isinstance(mode, FakeTensorMode):
                stack.enter_context(mode)
        yield


class _UnseenReads(TorchFunctionMode):
    """Watches for functions that read numbers without an operator."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = torchs_own(func)
        if func in _UNSEEN_READS and not isinstance(args[0], (TokenTensor, GatheredView)):
            self._recorder.read(args[0])
        return func(*args, **(kwargs or {}))


def is_impure(node: fx.Node) -> bool:
    """Whether a node has to stay although nobody uses its result."""
    if node.op != "call_function":
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.target is not operator.getitem


def _view_of(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are the same view of the same memory, whatever is written there."""
    flags = type(tensor), tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return memory_of(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), flags


def _has_mask(indices: Sequence[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _crosses(traits: Traits, tensors: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> bool:
    """Whether an operator moves numbers between host and device. One number of the host is an argument of a kernel."""
    involved = (*tensors, *made)
    if all(x.is_cpu for x in involved):
        return False
    moved = [x for x in involved if traits.is_copy or x.ndim or x.device.type != "cpu"]
    return len({x.device.type for x in moved} - {"meta"}) > 1


def _drawn() -> tuple[Any, bytes]:
    """The state of Python's and numpy's random numbers, which a replay would not draw."""
    return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
