"""The ranks as a mesh with the axes cfg, ring and ulysses, and the process groups along these axes."""

from __future__ import annotations

import atexit
import math
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch.distributed as dist
from torch.distributed import distributed_c10d

from omni_sp.config import DiffusionParallelConfig
from omni_sp.errors import ConfigError
from omni_sp.shared_memory import SharedMemoryChannel
from omni_sp.validation import shown

if dist.is_available():
    # Its functions take the group that exists when it is imported as a default argument. Transformers imports it with a
    # model's class; after init_process_group, the group would then outlive destroy_process_group, and a thread of gloo
    # that still runs while the interpreter ends can abort the process.
    import torch.distributed.nn  # noqa: F401

_AXES = ("cfg", "ring", "ulysses")
_axes: WeakValueDictionary[int, Axis] = WeakValueDictionary()
_released = object()
# For each job that this process was part of.
_num_local_groups: WeakKeyDictionary[object, Counter[tuple[int, ...]]] = WeakKeyDictionary()


@dataclass
class Traffic:
    """What one rank has sent along one axis.

    Attributes:
        calls: number of calls of each kind of collective.
        bytes: number of bytes that this rank sent to other ranks, by kind.
    """

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, num_bytes: int) -> None:
        """Count one call of ``kind`` that sends ``num_bytes`` to other ranks."""
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.bytes[kind] = self.bytes.get(kind, 0) + num_bytes

    def reset(self) -> None:
        """Set all counts to zero."""
        self.calls.clear()
        self.bytes.clear()


@dataclass(frozen=True)
class Axis:
    """One group of ranks that this rank belongs to.

    Attributes:
        name: "cfg", "ring", "ulysses", "sequence" (ring × ulysses: all that hold tokens of the same sequence), "world"
            (all ranks of the mesh), "weights" (all that hold parts of the same weights), or the name given to
            `of_group`.
        ranks: the global ranks along it, in order.
        rank: this rank's index in ``ranks``.
        group: their process group; None where the axis has size 1 and nothing is ever sent.
        backends: which library moves tensors of which device type, such as ``{"cpu": "gloo", "cuda": "nccl"}``.
        channel: this rank's shared memory where all ranks along the axis can read each other's memory; else None.
        traffic: what this rank has sent along it so far.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None
    backends: dict[str, str]
    channel: SharedMemoryChannel | None = None
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        if not _axes:
            atexit.register(_release_groups)
        _axes[id(self)] = self

    @property
    def size(self) -> int:
        """Number of ranks along this axis."""
        return len(self.ranks)

    @classmethod
    def of_group(
        cls, group: dist.ProcessGroup, name: str = "ulysses", *, shared_memory: bool = True, like: Axis | None = None
    ) -> Axis:
        """The axis along an existing process group. Its ranks call this at the same point of the program.

        Args:
            group: the ranks, of which this process is one.
            name: the name of the axis.
            shared_memory: let CPU tensors cross through shared memory, where the ranks can read each other's memory.
            like: another axis along the same ranks, whose shared memory this one uses too. Then a rank that enters an
                exchange along one of them while the others are in one along the other is found at once.
        """
        backends = _backends_of(group)
        if like is not None:
            channel = like.channel
        else:
            channel = SharedMemoryChannel.open(group, shared_memory) if backends.get("cpu") == "gloo" else None
        return cls(name, tuple(dist.get_process_group_ranks(group)), dist.get_rank(group), group, backends, channel)


class ParallelMesh:
    """The ranks of one picture as cfg × ring × ulysses, ulysses innermost: ranks of a Ulysses group are neighbours.

    Args:
        config: the degrees.
        ranks: the global ranks of this mesh, as many as the product of the degrees, ascending; every one of them
            builds the mesh at the same point of the program, other ranks need not. None for all ranks of the job.
            Meshes of disjoint ranks run side by side.
        check: check on every call that the ranks hold tensors that fit together, not only where lengths are exchanged.
            None reads the environment: True where ``OMNI_SP_CHECK`` is "1".
        shared_memory: let CPU tensors cross between ranks of one machine through shared memory. None reads the
            environment: False where ``OMNI_SP_SHARED_MEMORY`` is "0".

    Attributes:
        config: the degrees.
        ranks: the global ranks of this mesh.
        rank: this rank's index in ``ranks``.
        world_size: number of ranks.
        check: whether every call checks that the ranks hold tensors that fit together.
        cfg: ranks that compute different guidance branches.
        ring: ranks around which keys and values travel.
        ulysses: ranks that trade tokens for heads.
        sequence: ring × ulysses as one axis, ring-major.
        world: all ranks of this mesh.
        weights: the ranks of "sequence" once more, in a process group of its own, where the configuration says
            ``shard_weights``; else this rank alone.

    Raises:
        ConfigError: torch.distributed is not initialised, the number of ranks is not the product of the degrees,
            ``ranks`` are not ascending ranks of the job with this one among them, or these are something else.
    """

    def __init__(
        self,
        config: DiffusionParallelConfig,
        *,
        ranks: Sequence[int] | None = None,
        check: bool | None = None,
        shared_memory: bool | None = None,
    ) -> None:
        if not isinstance(config, DiffusionParallelConfig):
            raise ConfigError(f"config={shown(config)}: give a DiffusionParallelConfig, which holds the degrees")
        config.require_one_replica()
        self.config = config
        sizes = {"cfg": config.cfg_parallel_size, "ring": config.ring_degree, "ulysses": config.ulysses_degree}
        self.world_size = math.prod(sizes.values())
        self.check = os.environ.get("OMNI_SP_CHECK") == "1" if check is None else check
        self._shared_memory = os.environ.get("OMNI_SP_SHARED_MEMORY") != "0" if shared_memory is None else shared_memory
        self._is_whole_job = ranks is None
        self.ranks = _mesh_ranks(config, ranks)
        self.rank = self.ranks.index(dist.get_rank()) if dist.is_available() and dist.is_initialized() else 0
        self._sizes = sizes
        self._made: dict[tuple[int, ...], Axis] = {}
        self.cfg = self._axis("cfg", ("cfg",))
        self.ring = self._axis("ring", ("ring",))
        self.ulysses = self._axis("ulysses", ("ulysses",))
        self.sequence = self._axis("sequence", ("ring", "ulysses"))
        self.world = self._axis("world", _AXES)
        # Ranks of one sequence make the same forwards, which those of the axis cfg need not.
        self.weights = self._axis("weights", ("ring", "ulysses") if config.shard_weights else ())

    @property
    def rings(self) -> tuple[tuple[int, ...], ...]:
        """The global ranks of each Ulysses group. A ring joins ranks of one index in as many groups as its degree."""
        degree = self.ulysses.size
        return tuple(self.ranks[start : start + degree] for start in range(0, self.world_size, degree))

    def exchanges_so_far(self) -> tuple[int, int, int]:
        """What this rank has sent and prepared to send, by axis and kind, as checksums.

        Ranks are in step where no exchange lacks a partner between two calls of a pipeline: then all have the same
        second checksum, and those of one group the same first one. Groups make other calls of a transformer.

        Returns:
            The group, which is the rank's place on the cfg axis; what it sent within the group; what to others.
        """
        in_group = (self.ring, self.ulysses, self.sequence, self.weights)
        return self.cfg.rank, _checksum(in_group), _checksum((self.cfg, self.world))

    def _axis(self, name: str, along: tuple[str, ...]) -> Axis:
        """The axis along some axes. All ranks make the same groups in the same order, as new_group demands."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, index in zip(self.ranks, product(*(range(self._sizes[axis]) for axis in _AXES)), strict=True):
            elsewhere = tuple(0 if axis in along else coordinate for axis, coordinate in zip(_AXES, index, strict=True))
            groups.setdefault(elsewhere, []).append(rank)
        rank, own_group = self.ranks[self.rank], None
        for ranks in groups.values():
            group = self._group(ranks, name == "weights") if len(ranks) > 1 else None
            own_group = group if rank in ranks else own_group
        if own_group is None:
            return Axis(name, (rank,), 0, None, {})
        if name == "weights":  # whole blocks of weights would stay in memory twice
            return Axis.of_group(own_group, name, shared_memory=False)
        members = tuple(dist.get_process_group_ranks(own_group))
        axis = Axis.of_group(own_group, name, shared_memory=self._shared_memory, like=self._made.get(members))
        self._made.setdefault(members, axis)  # the axes of one rank lie along the same ranks on all others too
        return axis

    def _group(self, ranks: list[int], is_own: bool) -> dist.ProcessGroup | None:
        """The process group of some ranks of the mesh, or one of its own; None where this rank takes no part."""
        if self._is_whole_job:
            world: dist.ProcessGroup | None = dist.group.WORLD
            return world if len(ranks) == self.world_size and not is_own else dist.new_group(ranks)
        # Ranks outside a group do not take part: they may belong to another mesh, or to none.
        return _local_group(ranks) if self.ranks[self.rank] in ranks else None

    def describe(self) -> str:
        """One line for people: the degrees, and which ranks are in which Ulysses group."""
        if self.world_size == 1:
            return "1 rank, nothing is split"
        groups = [" ".join(map(str, group)) for group in self.rings]
        size = self.ring.size
        rings = [f"[{' | '.join(groups[start : start + size])}]" for start in range(0, len(groups), size)]
        return f"{self.config.equation}; ring of {', '.join(rings)}"


def _checksum(axes: Sequence[Axis]) -> int:
    counts = [(sorted(axis.traffic.calls.items()), axis.channel and axis.channel.num_prepared) for axis in axes]
    return zlib.crc32(repr(counts).encode())


def _release_groups() -> None:
    """Let go of all process groups at exit: one whose threads still run while the interpreter ends can abort it."""
    for axis in list(_axes.values()):
        # Not None, which torch takes for the group of all ranks: an exchange after this must fail.
        object.__setattr__(axis, "group", _released)
        object.__setattr__(axis, "channel", None)


def _local_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Build a process group that only its own ranks take part in.

    torch names such a group after the number of groups that this rank is in. Ranks that are in unequal numbers of
    groups would look for each other under different names, forever. The number of groups that were built here for
    exactly these ranks is the same on all of them.
    """
    counts = _num_local_groups.setdefault(dist.group.WORLD, Counter())
    counts[tuple(ranks)] += 1
    name = f"omni_sp/{'-'.join(map(str, ranks))}/{counts[tuple(ranks)]}"
    hash_of_ranks = distributed_c10d._hash_ranks_to_str
    distributed_c10d._hash_ranks_to_str = lambda ranks: name
    try:
        group: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    finally:
        distributed_c10d._hash_ranks_to_str = hash_of_ranks
    return group


def _mesh_ranks(config: DiffusionParallelConfig, ranks: Sequence[int] | None) -> tuple[int, ...]:
    """The global ranks of a mesh, in order; raises ConfigError as `ParallelMesh` documents."""
    initialised = dist.is_available() and dist.is_initialized()
    if config.world_size > 1 and not initialised:
        raise ConfigError(
            f"{config.equation}, but torch.distributed is not initialised: start the program with "
            f"`torchrun --nproc-per-node {config.world_size}` and call torch.distributed.init_process_group(), "
            "or let Omni(...) start the ranks"
        )
    size = dist.get_world_size() if initialised else 1
    if ranks is None:
        if size != config.world_size:
            raise ConfigError(
                f"{config.equation}, but torch.distributed runs {size}: the product of the degrees must equal the "
                "number of ranks, or give ParallelMesh(..., ranks=...) those of this mesh"
            )
        return tuple(range(size))
    if not isinstance(ranks, Sequence):
        raise ConfigError(f"ranks={shown(ranks)}: give a list of ranks, such as [0, 1]")
    chosen = tuple(ranks)
    own = dist.get_rank() if initialised else 0
    if len(chosen) != config.world_size or list(chosen) != sorted({*chosen} & {*range(size)}):
        raise ConfigError(
            f"{config.equation}, but ranks={list(chosen)} of a job of {size}: give as many ranks as the product of the "
            "degrees, in ascending order"
        )
    if own not in chosen:
        raise ConfigError(f"rank {own} builds a mesh of ranks {list(chosen)}: each rank builds the mesh that it is in")
    return chosen


def _backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """Device type -> library, from a group's description (``cpu:gloo,cuda:nccl``)."""
    entries = str(dist.get_backend_config(group)).split(",")
    return {device: library for device, _, library in (entry.partition(":") for entry in entries)}
