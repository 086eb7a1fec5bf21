"""Memory that the ranks of one machine show each other: a CPU tensor crosses with one copy, not through a socket.

Every rank has an :class:`Outbox`. It writes what leaves it there, a small message over the process group says where it
lies, and the receiver copies it out. The messages are the only synchronisation: they carry the group's timeout and its
error when a rank dies, and nobody polls.

The memory is anonymous (``memfd_create``), found by its peers under ``/proc/<pid>/fd``: it has no name that a killed
process could leave behind, and does not count against a container's small ``/dev/shm``. Linux only.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from omni_sp.errors import ShardingError

_ALIGNMENT = 64


class _Segment:
    """A piece of this rank's memory that its peers may read."""

    def __init__(self, number: int, num_bytes: int) -> None:
        self.number, self.num_bytes = number, num_bytes
        self.descriptor = os.memfd_create("omni-sp", os.MFD_CLOEXEC)
        # Peers open it by this descriptor, so it stays open for as long as the segment may be read.
        weakref.finalize(self, os.close, self.descriptor)
        os.truncate(self.descriptor, num_bytes)
        self.bytes = _mapped(self.descriptor, num_bytes)


def _mapped(descriptor: int, num_bytes: int) -> torch.Tensor:
    """Shared memory as a flat uint8 tensor, which keeps the mapping alive."""
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)


def _open_peer(pid: int, descriptor: int, num_bytes: int) -> torch.Tensor:
    """Another rank's segment."""
    mine = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return _mapped(mine, num_bytes)
    finally:
        os.close(mine)


@dataclass
class _Slot:
    """Room for one exchange under way.

    Attributes:
        segment: its memory.
        free_from: exchanges from this number on were started after the one in this slot was waited for; None while it
            has not been.
    """

    segment: _Segment
    free_from: int | None = None


def _probe() -> _Segment | None:
    """A little memory for others to try, where there can be any."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        return _Segment(0, 8)
    except OSError:  # a sandbox may forbid it
        return None


def _holds(pid: int, descriptor: int, token: int) -> bool:
    """Whether that process's memory can be read, and is the one meant: process numbers repeat on other machines."""
    if descriptor < 0:
        return False
    try:
        return int(_open_peer(pid, descriptor, 8).view(torch.int64)[0]) == token
    except (OSError, ValueError):
        return False


class SharedMemoryChannel:
    """What one rank sends along one row of ranks that can all read each other's memory.

    All ranks start and wait for the same exchanges in the same order, and that alone tells when memory may be written
    again: whoever has waited for exchange j knows that everybody has started j, and has done all that comes before it
    in the program. In steady state two segments take turns.

    Args:
        group: the ranks. pids: their process numbers.
    """

    @classmethod
    def open(cls, group: dist.ProcessGroup, wanted: bool = True) -> SharedMemoryChannel | None:
        """An outbox on every rank of ``group``, or on none. All call it at the same point of the program.

        Whether all can read each other's memory is tried out, not guessed from host names. None where they cannot,
        where the system lacks what it takes, or where a rank does not want it.

        Args:
            group: the ranks.
            wanted: whether this rank wants one.
        """
        size = dist.get_world_size(group)
        probe = _probe() if wanted else None
        token = int.from_bytes(os.urandom(7), "little")
        if probe is not None:
            probe.bytes.view(torch.int64)[0] = token
        mine = torch.tensor([os.getpid(), -1 if probe is None else probe.descriptor, token])
        rows = torch.empty(size, 3, dtype=torch.int64)
        dist.all_gather(list(rows), mine, group=group)
        able = torch.tensor([probe is not None and all(_holds(*row) for row in rows.tolist())], dtype=torch.uint8)
        answers = torch.empty(size, 1, dtype=torch.uint8)
        # It also tells everybody that its probe has been looked at and may go.
        dist.all_gather(list(answers), able, group=group)
        return cls(group, rows[:, 0].tolist()) if answers.all() else None

    def __init__(self, group: dist.ProcessGroup, pids: Sequence[int]) -> None:
        self.group = group
        self._pids = tuple(pids)
        self._slots: list[_Slot] = []
        self._segments = 0
        self._started = 0
        self._seen = -1  # the newest exchange that was waited for
        self._theirs: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}

    def start(self, sizes: Sequence[int]) -> ChannelExchange:
        """Make room for ``sizes[rank]`` bytes to each rank: fill the parcel's ``places``, then ``send`` it."""
        ends = list(accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))
        index = next((i for i, slot in enumerate(self._slots) if self._is_free(slot)), len(self._slots))
        if index == len(self._slots):
            self._slots.append(_Slot(self._new_segment(ends[-1])))
        slot = self._slots[index]
        if slot.segment.num_bytes < ends[-1]:
            slot.segment = self._new_segment(ends[-1])
        slot.free_from = None
        number, segment = self._started, slot.segment
        self._started += 1
        offsets = [0, *ends[:-1]]
        send_buffers = [segment.bytes[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
        where = (number, index, segment.number, segment.descriptor, segment.num_bytes)
        return ChannelExchange(self, number, slot, send_buffers, torch.tensor([[*where, offset] for offset in offsets]))

    def arrived(self, pending: ChannelExchange, messages: list[list[int]], sizes: Sequence[int]) -> list[torch.Tensor]:
        """The pieces of an exchange that everybody has sent, ``sizes[rank]`` bytes in each rank's memory."""
        pieces = []
        for rank, (message, size) in enumerate(zip(messages, sizes, strict=True)):
            number, slot, segment, descriptor, num_bytes, offset = message
            if number != pending.number:
                raise ShardingError(
                    f"the ranks fell out of step: this one waits for exchange {pending.number}, rank {rank} of its row "
                    f"sends exchange {number}; every rank must run the same attentions in the same order"
                )
            if not size:
                pieces.append(torch.empty(0, dtype=torch.uint8))
                continue
            if self._theirs.get((rank, slot), (-1,))[0] != segment:
                self._theirs[rank, slot] = segment, _open_peer(self._pids[rank], descriptor, num_bytes)
            pieces.append(self._theirs[rank, slot][1][offset : offset + size])
        return pieces

    def done(self, pending: ChannelExchange) -> None:
        """This rank has read all of an exchange."""
        self._seen = max(self._seen, pending.number)
        pending.slot.free_from = self._started

    def _is_free(self, slot: _Slot) -> bool:
        return slot.free_from is not None and slot.free_from <= self._seen

    def _new_segment(self, num_bytes: int) -> _Segment:
        self._segments += 1
        return _Segment(self._segments, max(num_bytes, mmap.PAGESIZE))


class ChannelExchange:
    """One exchange of an outbox.

    Attributes:
        places: for each rank, the bytes (flat, uint8) that it will read; written before :meth:`send`.
    """

    def __init__(
        self,
        channel: SharedMemoryChannel,
        number: int,
        slot: _Slot,
        send_buffers: list[torch.Tensor],
        messages: torch.Tensor,
    ) -> None:
        self.number, self.slot, self.send_buffers = number, slot, send_buffers
        self._outbox = channel
        self._messages = messages
        self._received = torch.empty_like(messages)
        self._work: dist.Work | None = None

    def send(self) -> None:
        """Tell everybody that it is there."""
        self._work = dist.all_to_all_single(self._received, self._messages, group=self._outbox.group, async_op=True)

    def receive(self, into: Sequence[torch.Tensor]) -> None:
        """Wait for everybody, and copy their pieces out: ``into[rank]`` is flat uint8, empty where nothing comes.

        Raises:
            ShardingError: a rank runs another program.
        """
        assert self._work is not None, "send() comes first"
        self._work.wait()
        pieces = self._outbox.arrived(self, self._received.tolist(), [place.numel() for place in into])
        for place, piece in zip(into, pieces, strict=True):
            place.copy_(piece)
        self._outbox.done(self)
