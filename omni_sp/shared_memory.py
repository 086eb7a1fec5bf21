"""Memory that the ranks of one machine can read from each other: a CPU tensor crosses with one copy, not by a socket.

Every rank has a `SharedMemoryChannel`. It writes what it sends into its own memory, a small message over the
process group says where that lies, and the receiver copies it out. The messages are the only synchronisation: they have
the group's timeout and its error when a rank dies, and nobody polls.

The memory is anonymous (``memfd_create``), and other ranks open it under ``/proc/<pid>/fd``: it has no name that a
killed process could leave behind, and does not count against a container's small ``/dev/shm``. Linux only.
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


class Memory:
    """A mapping of shared memory, which its tensors keep alive.

    Attributes:
        bytes: it as a flat uint8 tensor.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        # What is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.bytes = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
        self._views: dict[torch.dtype, torch.Tensor] = {}

    def as_dtype(self, dtype: torch.dtype) -> torch.Tensor:
        """It as a flat tensor of a dtype, made once."""
        if dtype not in self._views:
            with torch.inference_mode(False):
                self._views[dtype] = self.bytes.view(dtype)
        return self._views[dtype]


class Segment(Memory):
    """A range of this rank's memory that other ranks may read. A number distinguishes the segments of a channel."""

    def __init__(self, number: int, num_bytes: int) -> None:
        self.number, self.num_bytes = number, num_bytes
        self.descriptor = os.memfd_create("omni-sp", os.MFD_CLOEXEC)
        # Other ranks open it by this descriptor, so it stays open for as long as the segment may be read.
        weakref.finalize(self, os.close, self.descriptor)
        os.truncate(self.descriptor, num_bytes)
        self.readers: set[int] = set()  # the ranks that have opened it, or do with the next exchange
        super().__init__(self.descriptor, num_bytes)


def _open_segment(pid: int, descriptor: int, num_bytes: int) -> Memory:
    """A segment of another process."""
    own_descriptor = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return Memory(own_descriptor, num_bytes)
    finally:
        os.close(own_descriptor)


class _Slot:
    """Memory for one exchange at a time, and for the messages that say where it lies.

    Attributes:
        segment: its memory.
        free_from: every exchange from this number on is prepared after the exchange in this slot was received; None
            while that was not received.
        sent: this rank's message to each rank.
        received: each rank's message to this one.
    """

    def __init__(self, segment: Segment, num_ranks: int) -> None:
        self.segment = segment
        self.free_from: int | None = None
        self.sent = torch.empty(num_ranks, 7, dtype=torch.int64)
        self.received = torch.empty_like(self.sent)
        self._sent_array = self.sent.numpy()

    def write_messages(self, location: Sequence[int], starts: Sequence[int]) -> None:
        """Write what all ranks are to know, and for each rank where its bytes start."""
        self._sent_array[:, :6] = location
        self._sent_array[:, 6] = starts


def _probe_segment() -> Segment | None:
    """A small segment for other ranks to try; None where there can be none."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        return Segment(0, 8)
    except OSError:  # a sandbox may forbid it
        return None


def can_read(pid: int, descriptor: int, token: int) -> bool:
    """Whether this process can read another one's segment, which contains ``token``; ``descriptor`` -1 is none.

    The token is compared because another machine has processes of the same ids.
    """
    if descriptor < 0:
        return False
    try:
        return int(_open_segment(pid, descriptor, 8).as_dtype(torch.int64)[0]) == token
    except (OSError, ValueError):
        return False


class SharedMemoryChannel:
    """What one rank sends to a group of ranks that can all read each other's memory.

    All ranks prepare, send and receive the same exchanges in the same order, and that alone says when memory may be
    written again: a rank that received exchange j knows that all ranks have sent j, and have done all that comes before
    it in the program. In steady state two segments take turns.

    A segment can be opened only while its owner holds it, and be read ever after. So where a rank opens one for the
    first time, all ranks wait until that is done: the owner may drop its mesh, or end, right after its last exchange.

    Attributes:
        num_prepared: exchanges so far.
    """

    def __init__(self, group: dist.ProcessGroup, pids: Sequence[int]) -> None:
        self.group = group
        self._rank = dist.get_rank(group)
        self._pids = tuple(pids)
        self._slots: list[_Slot] = []
        self._num_segments = 0
        self.num_prepared = 0
        self._newest_received = -1
        # By rank and slot there: the number of the segment that is open, and its memory.
        self._opened: dict[tuple[int, int], tuple[int, Memory]] = {}

    @classmethod
    def open(cls, group: dist.ProcessGroup, wanted: bool = True) -> SharedMemoryChannel | None:
        """Open a channel on every rank of a group, or on none. All call it at the same point of the program.

        Whether all can read each other's memory is tried out, not guessed from host names. None is returned where they
        cannot, where the system lacks what it takes, or where a rank does not want a channel.
        """
        size = dist.get_world_size(group)
        probe = _probe_segment() if wanted else None
        token = int.from_bytes(os.urandom(7), "little")
        if probe is not None:
            probe.bytes.view(torch.int64)[0] = token
        own = torch.tensor([os.getpid(), -1 if probe is None else probe.descriptor, token])
        probes = torch.empty(size, 3, dtype=torch.int64)
        dist.all_gather(list(probes), own, group=group)
        able = torch.tensor([probe is not None and all(can_read(*x) for x in probes.tolist())], dtype=torch.uint8)
        answers = torch.empty(size, 1, dtype=torch.uint8)
        # After this gather, too, all ranks have looked at this rank's probe, which may be freed.
        dist.all_gather(list(answers), able, group=group)
        return cls(group, probes[:, 0].tolist()) if answers.all() else None

    def prepare(self, sizes: Sequence[int], *, is_same_for_all: bool = False) -> ChannelExchange:
        """Reserve memory for the next exchange: write its ``memory``, then ``send`` it.

        Args:
            sizes: number of bytes for each rank. They lie one behind the other.
            is_same_for_all: all ranks read the same bytes, which lie in the memory once.
        """
        *starts, num_bytes = [0] * len(sizes) + [max(sizes)] if is_same_for_all else accumulate(sizes, initial=0)
        index = next((i for i, slot in enumerate(self._slots) if self._is_free(slot)), len(self._slots))
        if index == len(self._slots):
            self._slots.append(_Slot(self._new_segment(num_bytes), len(sizes)))
        slot = self._slots[index]
        if slot.segment.num_bytes < num_bytes:
            slot.segment = self._new_segment(num_bytes)
        slot.free_from = None
        number, segment = self.num_prepared, slot.segment
        self.num_prepared += 1
        new_readers = {rank for rank, size in enumerate(sizes) if size} - segment.readers - {self._rank}
        segment.readers |= new_readers
        location = (number, index, segment.number, segment.descriptor, segment.num_bytes, bool(new_readers))
        slot.write_messages(location, starts)
        return ChannelExchange(self, number, slot)

    def _received_views(
        self, number: int, own_slot: _Slot, sizes: Sequence[int], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """What each rank has sent to this one in exchange ``number``, as views of its memory."""
        views, messages = [], own_slot.received.tolist()
        for rank, (message, size) in enumerate(zip(messages, sizes, strict=True)):
            sent_number, slot, segment, descriptor, num_bytes, _, start = message
            if sent_number != number:
                raise ShardingError(
                    f"the ranks fell out of step: this one waits for exchange {number}, rank {rank} of its row "
                    f"sends exchange {sent_number}; every rank must run the same attentions in the same order"
                )
            if not size:
                continue
            memory: Memory = own_slot.segment
            if rank != self._rank:
                if self._opened.get((rank, slot), (-1,))[0] != segment:
                    self._opened[rank, slot] = segment, _open_segment(self._pids[rank], descriptor, num_bytes)
                memory = self._opened[rank, slot][1]
            # Messages of one exchange have one dtype, so each starts at a multiple of its size.
            first = start // dtype.itemsize
            views.append(memory.as_dtype(dtype)[first : first + size])
        if any(is_opened_first for *_, is_opened_first, _ in messages):
            # Every rank got the same answer to this question from every rank, so all take part.
            dist.all_reduce(torch.zeros(1), group=self.group)
        return views

    def _mark_received(self, number: int, slot: _Slot) -> None:
        """This rank has read all of exchange ``number``, which lies in ``slot``."""
        self._newest_received = max(self._newest_received, number)
        slot.free_from = self.num_prepared

    def _is_free(self, slot: _Slot) -> bool:
        return slot.free_from is not None and slot.free_from <= self._newest_received

    def _new_segment(self, num_bytes: int) -> Segment:
        self._num_segments += 1
        # Whole pages, of which every dtype's size is a divisor.
        return Segment(self._num_segments, max(-(-num_bytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE)


@dataclass
class ChannelExchange:
    """One exchange of a channel, which `SharedMemoryChannel.prepare` makes."""

    _channel: SharedMemoryChannel
    _number: int
    _slot: _Slot
    _work: dist.Work | None = None

    def memory(self, dtype: torch.dtype) -> torch.Tensor:
        """Where this rank writes what it sends, flat; there may be more of it than was asked for."""
        return self._slot.segment.as_dtype(dtype)

    def send(self) -> None:
        """Let all ranks know that what is for them can be read."""
        slot = self._slot
        self._work = dist.all_to_all_single(slot.received, slot.sent, group=self._channel.group, async_op=True)

    def receive(self, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Wait for all ranks, and copy what they have sent to this one.

        Args:
            sizes: number of elements that each rank has sent.
            dtype: of all messages.

        Returns:
            The messages, flat, one behind the other.
        """
        assert self._work is not None, "send() comes first"
        self._work.wait()
        views = self._channel._received_views(self._number, self._slot, sizes, dtype)
        received = torch.cat(views) if views else torch.empty(0, dtype=dtype)
        self._channel._mark_received(self._number, self._slot)
        return received
