"""Weights of a transformer's blocks over ranks: each rank keeps its part of the bytes of every block.

A block's weights are gathered before it runs, while the block before it runs, and freed after it. Bytes have no dtype,
so quantised weights and LoRA's go the same way. Between forwards a stand-in is in a weight's place, which looks like
the weight; whatever computes with it gets the weight, gathered, until the next forward begins.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import distributed_c10d

from omni_sp.collectives import Exchange, all_gather, require_equal
from omni_sp.errors import ShardingError, UnsupportedModelError
from omni_sp.mesh import Axis
from omni_sp.sharding.diffusers_internals import has_group_offloading
from omni_sp.sharding.forward_context import current_forward
from omni_sp.sharding.replay import block_lists
from omni_sp.sharding.stand_in import Owner, ShardedWeight
from omni_sp.sharding.weight_parts import Leaf, can_be_cut, leaves_of, stored_weight

_ALIGNMENT = 256
"""In bytes, as torch's allocator on CUDA: kernels may ask where a weight begins."""
_PATIENCE_S = 60.0
"""How long a rank that reads a weight between forwards waits for the others to read it too."""


class WeightShards:
    """The weights of a transformer's blocks, over ranks until ``remove()``.

    Args:
        model: the transformer. Its weights are the same on all ranks, and whole; those of blocks may still be in files
            (see `weight_parts.mark_stored`), of which each rank then reads its part alone.
        axis: the ranks, more than one, which make the same forwards. Nothing else is sent along it, so that a gather
            under way never holds up another exchange.
    """

    def __init__(self, model: torch.nn.Module, axis: Axis) -> None:
        self._model, self._axis = model, axis
        self._blocks: dict[torch.nn.Module, BlockWeights] = {}

    def of(self, block: torch.nn.Module) -> BlockWeights:
        """The weights of one block."""
        if block not in self._blocks:
            self._blocks[block] = BlockWeights(
                block, self._axis, f"block {len(self._blocks)} of {type(self._model).__name__}"
            )
        return self._blocks[block]

    def refresh(self) -> None:
        """Shard what is whole: at first everything, then what was read, changed or added since the last forward.

        A collective where anything was changed or added: people do that on all ranks, or the comparison of the ranks
        before it has found that they did not.
        """
        order = self._shard_again()
        if order:
            order[0].start()

    def _shard_again(self) -> list[BlockWeights]:
        """Shard what is whole. Returns the weights of all blocks, in their order."""
        order = [self.of(block) for block in block_lists(self._model)]
        stale = [weights for weights in order if not weights.is_current()]
        if stale:
            require_not_offloaded(self._model)
            shared = _shared(self._model)
            for weights in stale:  # one after the other, so that no rank has all of them whole
                weights.restore()
                weights.cut(shared)
            sizes = [weights.num_bytes for weights in order]
            message = "the ranks hold weights of different sizes, and each keeps its part of all: {values}"
            require_equal(self._axis, message, sizes=sizes)
        for weights, following in zip(order, [*order[1:], None], strict=False):
            weights.following = following
        return order

    def release(self) -> None:
        """Shard again what was read since the last forward, where this rank's group skips the next one.

        A collective where anything was read: the ranks of a group read alike, and skip the same forwards.
        """
        if any(weights.is_read for weights in self._blocks.values()):
            self._shard_again()

    def remove(self) -> None:
        """Restore the very weights. All ranks do it.

        Raises:
            ShardingError: the other ranks do not, and this one has waited long enough.
        """
        if any(not weights.is_loaded for weights in self._blocks.values()):
            _meet(self._axis, type(self._model).__name__, "remove() of the handle")
        for weights in self._blocks.values():
            weights.restore()
        self._blocks.clear()


class BlockWeights:
    """The weights of one block.

    Args:
        block: the module.
        axis: the ranks.
        name: of the block, for the ranks to know that they read the same one.

    Attributes:
        following: the block that comes next, whose weights are gathered while this one runs.
        is_loaded: whether they are whole now.
        is_read: whether somebody has read them since the last forward, so that they stay whole until the next one.
        part: this rank's part of their bytes.
        num_bytes: of all ranks' parts together.
    """

    def __init__(self, block: torch.nn.Module, axis: Axis, name: str) -> None:
        self._block, self._axis, self._name = block, axis, name
        self._places: list[_Place] = []
        self._leaves: list[Leaf] = []
        self._held: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        self._stand_ins: dict[int, ShardedWeight] = {}
        self.part = torch.empty(0, dtype=torch.uint8)
        self._pending: Exchange | None = None
        self.is_read = False
        self.following: BlockWeights | None = None
        self.is_loaded, self.num_bytes = True, 0

    def is_current(self) -> bool:
        """Whether the block's weights are the stand-ins of all that it has."""
        held = [x for module in self._block.modules() for x in (module._parameters, module._buffers)]
        return (
            not self.is_loaded
            and len(held) == len(self._held)
            and all(
                now is before and len(now) == len(values) and all(map(operator.is_, now.values(), values))
                for now, (before, values) in zip(held, self._held, strict=True)
            )
        )

    def cut(self, shared: set[int]) -> None:
        """Keep this rank's part of the bytes of what the block has now.

        Args:
            shared: ids of tensors, and of their memory, that others use too, which stay whole.
        """
        held = [x for module in self._block.modules() for x in (module._parameters, module._buffers)]
        leaves: dict[int, Leaf] = {}
        end = 0
        for weights in held:
            for name, real in list(weights.items()):
                if real is None or type(real) is ShardedWeight:
                    continue
                stored = stored_weight(real)
                if stored is not None and stored.quantise is not None:  # its bytes are not those of the file
                    with _plain_tensors():
                        real = weights[name] = stored.whole(real)
                    stored = None
                elif stored is not None:
                    with _plain_tensors():
                        real = weights[name] = stored.without_numbers(real)
                parts = list(leaves_of(real))
                if not all(can_be_cut(x, shared, parts[0].device) for x in parts):
                    continue
                if leaves and parts[0].device != next(iter(leaves.values())).tensor.device:
                    continue
                for x in parts:
                    if id(x) not in leaves:
                        leaves[id(x)] = Leaf(x, end, x.shape, x.stride(), x.dtype, stored)
                        end += -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
                self._places.append(_Place(weights, name, real, self._stand_in(real)))
                if stored is not None:
                    with _plain_tensors():
                        leaves[id(real)].free()
        self._leaves = list(leaves.values())
        size = -(-end // (self._axis.size * _ALIGNMENT)) * _ALIGNMENT
        self.num_bytes = size * self._axis.size
        start = size * self._axis.rank
        device = self._leaves[0].tensor.device if self._leaves else None
        with _plain_tensors():
            self.part = torch.zeros(size, dtype=torch.uint8, device=device)
            for leaf in self._leaves:
                leaf.write(self.part, start)
        self._release()
        self._held = [(weights, tuple(weights.values())) for weights in held]

    def restore(self) -> None:
        """Put the weights themselves back. A collective where they are not loaded."""
        self.load(apart=True)
        self._places, self._leaves, self._held = [], [], []
        self.part = self.part.new_empty(0)
        self.is_read = False

    def start(self) -> None:
        """Start to gather. Ranks decide alike: what is loaded or under way follows from the program they all run."""
        if self.is_loaded or self._pending is not None or not self.num_bytes:
            return
        with _plain_tensors():
            sizes = [self.part.numel()] * self._axis.size
            self._pending = all_gather(sizes, torch.uint8, self.part.device, self._axis)
            self._pending.fill([self.part])
            self._pending.start()

    def load(self, *, apart: bool = False) -> None:
        """Have the weights whole, in their places. All ranks do it.

        Args:
            apart: each in memory of its own, as whoever keeps them expects.
        """
        if self.is_loaded:
            return
        self.start()
        with _plain_tensors():
            if self._pending is not None:
                whole = self._pending.wait()
                self._pending = None
                for leaf in self._leaves:
                    leaf.read(whole, apart)
        for place in self._places:
            place.swap(place.stand_in, place.real)
        self.is_loaded = True

    def read(self) -> None:
        """Have the weights whole until the next forward begins, for somebody who may read and write them."""
        if not self.is_loaded and current_forward() is None:
            _meet(self._axis, self._name, "reading the weights")
        self.load(apart=True)
        self.is_read = True

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The weights are whole while this lasts; the next block's are on their way."""
        self.load()
        if self.following is not None:
            self.following.start()
        try:
            yield
        finally:
            if not self.is_read:
                self._release()

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call of the block with its weights whole."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def with_weights(*args: Any, **kwargs: Any) -> Any:
            with self.loaded():
                return call(*args, **kwargs)

        return with_weights  # type: ignore[no-any-return]

    def _release(self) -> None:
        for place in self._places:
            place.swap(place.real, place.stand_in)
        with _plain_tensors():
            for leaf in self._leaves:
                leaf.free()
        self.is_loaded = False

    def _stand_in(self, real: torch.Tensor) -> ShardedWeight:
        """One for each weight for good, since somebody may keep it, unless the weight is another one now."""
        known = self._stand_ins.get(id(real))
        if known is None or known.weight is not real or _described(known) != _described(real):
            known = self._stand_ins[id(real)] = ShardedWeight(real, self)
        return known


@dataclass
class _Place:
    """Where a weight is in a module."""

    held: dict[str, Any]
    name: str
    real: torch.Tensor
    stand_in: ShardedWeight

    def swap(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Put one in the other's place, unless somebody has put another there."""
        if self.held.get(self.name) is before:
            self.held[self.name] = after


def require_not_offloaded(model: torch.nn.Module) -> None:
    """Refuse a transformer whose weights somebody else moves.

    Raises:
        UnsupportedModelError: hooks of accelerate or diffusers offload it, or a part of it.
    """
    for path, module in model.named_modules():
        hook = vars(module).get("_hf_hook")
        which = "" if hook is None else f"{type(hook).__name__} of accelerate (enable_model_cpu_offload and others)"
        if has_group_offloading(module):
            which = "group offloading of diffusers (enable_group_offload)"
        if which:
            raise UnsupportedModelError(
                f"shard_weights=True, and {which} moves the weights of {path or type(model).__name__}: leave out one "
                "of them; sharded, each device holds 1/ranks of the blocks' weights"
            )


def held_bytes(model: torch.nn.Module) -> int:
    """The bytes of a model's weights that this rank holds now, its parts of sharded ones among them."""
    storages: dict[int, int] = {}
    for x in (x for module in model.modules() for x in (*module._parameters.values(), *module._buffers.values())):
        for part in [] if x is None else _held(x):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values())


def _meet(axis: Axis, name: str, what: str) -> None:
    """Wait until all ranks are here, so that no rank is alone in a collective.

    Between forwards nothing makes sure that ranks do the same, and a collective would wait for the one that does not.
    """
    store = distributed_c10d._get_default_store()
    number = axis.traffic.calls.get("meet", 0)
    assert axis.group is not None
    keys = [f"omni_sp/{axis.group.group_name}/{number}/{what} of {name}/{rank}" for rank in axis.ranks]
    store.set(keys[axis.rank], "")
    end = time.monotonic() + _PATIENCE_S
    while not store.check(keys):
        if time.monotonic() > end:
            missing = [rank for rank, key in zip(axis.ranks, keys, strict=True) if not store.check([key])]
            store.delete_key(keys[axis.rank])
            raise ShardingError(
                f"{what} of {name} needs all ranks, since each keeps a part of its weights (shard_weights), and ranks "
                f"{missing} did not come to it within {_PATIENCE_S:g} s: let every rank do it, at the same point of "
                "the program, or parallelize without shard_weights"
            )
        time.sleep(0.002)
    axis.traffic.add("meet", 0)


def _shared(model: torch.nn.Module) -> set[int]:
    """Ids of the tensors that are in several blocks, or in one and outside, and the memory that several tensors use."""
    blocks = {id(part): number for number, block in enumerate(block_lists(model)) for part in block.modules()}
    owners: dict[int, set[int]] = {}
    tensors: dict[int, set[int]] = {}
    for module in model.modules():
        for x in (*module._parameters.values(), *module._buffers.values()):
            for leaf in [] if x is None else leaves_of(_real(x)):
                owners.setdefault(id(leaf), set()).add(blocks.get(id(module), -1))
                if not leaf.is_meta and leaf.numel():
                    tensors.setdefault(leaf.untyped_storage().data_ptr(), set()).add(id(leaf))
    return {key for found in (owners, tensors) for key, users in found.items() if len(users) > 1}


def _held(x: torch.Tensor) -> Iterable[torch.Tensor]:
    """What this rank has of a weight."""
    owner: Owner | None = vars(x)["owner"] if type(x) is ShardedWeight else None
    return leaves_of(_real(x)) if owner is None or owner.is_loaded else [owner.part]


def _described(x: torch.Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, x.requires_grad


def _real(x: torch.Tensor) -> torch.Tensor:
    return x.weight if type(x) is ShardedWeight else x


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Weights are no tensors of inference mode, whatever mode the forward runs in."""
    with torch.inference_mode(False), torch.no_grad():
        yield
