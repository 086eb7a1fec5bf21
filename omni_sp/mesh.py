"""Which rank is where: the axes cfg, ring and ulysses, and the process groups along them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product

import torch.distributed as dist

from omni_sp.config import DiffusionParallelConfig
from omni_sp.errors import ConfigError
from omni_sp.shared_memory import SharedMemoryChannel

_AXES = ("cfg", "ring", "ulysses")


@dataclass
class Traffic:
    """What one rank has sent along one axis: ``calls`` of each kind, and ``bytes`` that left this rank."""

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, num_bytes: int) -> None:
        """Count one call of ``kind`` that sends ``num_bytes`` to other ranks."""
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.bytes[kind] = self.bytes.get(kind, 0) + num_bytes

    def reset(self) -> None:
        """Start again from nothing."""
        self.calls.clear()
        self.bytes.clear()


@dataclass(frozen=True)
class Axis:
    """One row of ranks that this rank belongs to.

    Attributes:
        name: "cfg", "ring", "ulysses", or "sequence" (ring × ulysses: everyone who holds a piece of the same tokens).
        ranks: the global ranks along it, in order.
        rank: this rank's index in ``ranks``.
        group: their process group; None where the axis has size 1 and nothing is ever sent.
        backends: which library moves tensors of which device type, such as ``{"cpu": "gloo", "cuda": "nccl"}``.
        outbox: this rank's shared memory, where all ranks along the axis sit on one machine; else None.
        traffic: what this rank has sent along it so far.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None
    backends: dict[str, str]
    channel: SharedMemoryChannel | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        """Number of ranks along this axis."""
        return len(self.ranks)


class ParallelMesh:
    """The ranks of a job laid out as cfg × ring × ulysses, ulysses innermost: its ranks are neighbours.

    Args:
        config: the degrees. With more than one rank, ``torch.distributed`` must be initialised with exactly
            ``config.world_size`` ranks; every rank builds its mesh at the same point of the program.

    Attributes:
        config: as given. rank: this rank's number. world_size: number of ranks.
        cfg, ring, ulysses: the three axes. sequence: ring × ulysses as one axis, ring-major.

    Raises:
        ConfigError: torch.distributed is not initialised, or its size is not the product of the degrees.
    """

    def __init__(self, config: DiffusionParallelConfig) -> None:
        self.config = config
        sizes = {"cfg": 1, "ring": config.ring_degree, "ulysses": config.ulysses_degree}
        self.world_size = math.prod(sizes.values())
        initialised = dist.is_available() and dist.is_initialized()
        if self.world_size > 1 and not initialised:
            raise ConfigError(
                f"{config.equation}, but torch.distributed is not initialised: start the program with "
                f"`torchrun --nproc-per-node {self.world_size}` and call torch.distributed.init_process_group(), "
                "or let Omni(...) start the ranks"
            )
        if initialised and dist.get_world_size() != self.world_size:
            raise ConfigError(
                f"{config.equation}, but torch.distributed runs {dist.get_world_size()}: the product of the degrees "
                "must equal the number of ranks"
            )
        self.rank = dist.get_rank() if initialised else 0
        self._sizes = sizes
        self.cfg = self._axis("cfg", ("cfg",))
        self.ring = self._axis("ring", ("ring",))
        self.ulysses = self._axis("ulysses", ("ulysses",))
        self.sequence = self._axis("sequence", ("ring", "ulysses"))

    def _axis(self, name: str, along: tuple[str, ...]) -> Axis:
        """Build the groups along some axes. Every rank makes every group, in the same order: new_group demands it."""
        sizes = [self._sizes[axis] for axis in _AXES]
        rows: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(product(*(range(size) for size in sizes))):
            row = tuple(0 if axis in along else index for axis, index in zip(_AXES, place, strict=True))
            rows.setdefault(row, []).append(rank)
        mine: tuple[int, ...] = ()
        group: dist.ProcessGroup | None = None
        for ranks in rows.values():
            if len(ranks) == 1:
                candidate = None
            elif len(ranks) == self.world_size:
                candidate = dist.group.WORLD
            else:
                candidate = dist.new_group(ranks)
            if self.rank in ranks:
                mine, group = tuple(ranks), candidate
        backends = backends_of(group)
        # What travels along "sequence" is gathered, not exchanged.
        passes = group is not None and name in ("ring", "ulysses") and backends.get("cpu") == "gloo"
        channel = SharedMemoryChannel.open(group) if group is not None and passes else None
        return Axis(name, mine, mine.index(self.rank), group, backends, channel)

    def describe(self) -> str:
        """One line for people: the equation, and who sits where."""
        if self.world_size == 1:
            return "1 rank, nothing is split"
        rows = " | ".join(
            " ".join(str(ring * self.ulysses.size + ulysses) for ulysses in range(self.ulysses.size))
            for ring in range(self.ring.size)
        )
        return f"{self.config.equation}; ring of [{rows}]"


def backends_of(group: dist.ProcessGroup | None) -> dict[str, str]:
    """Device type -> library, from a group's own description (``cpu:gloo,cuda:nccl``)."""
    if group is None:
        return {}
    pairs = (
        (entry.split(":", 1)[0], entry.split(":", 1)[1]) for entry in str(dist.get_backend_config(group)).split(",")
    )
    return dict(pairs)
