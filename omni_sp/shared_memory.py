"""Memory that the ranks of one machine can read from each other: a CPU tensor crosses with one copy, not by a socket.

Every rank has a `SharedMemoryChannel`. It writes what it sends into its own memory, a small message through a pipe
says where that lies, and the receiver copies it out. The messages are the only synchronisation: they have the process
group's timeout, a rank that dies is an error on the others, and nobody polls.

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
from omni_sp.pipes import Inbox, Message, Pipes, open_outbox, timeout_of

_MESSAGE_LENGTH = 8
_NO_EXCHANGE = -1  # in the place of an exchange's number: the message itself is what is sent
MAX_FEW = _MESSAGE_LENGTH - 2
"""How many integers `SharedMemoryChannel.gather_few` takes."""


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
    """Memory for one exchange at a time.

    Attributes:
        segment: its memory.
        free_from: every exchange from this number on is prepared after the exchange in this slot was received; None
            while that was not received.
        messages: for each rank, what tells it where its bytes lie.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.free_from: int | None = None
        self.messages: list[Message] = []


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

    def __init__(self, rank: int, pids: Sequence[int], pipes: Pipes) -> None:
        self._rank, self._pids, self._pipes = rank, tuple(pids), pipes
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
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        probe = _probe_segment() if wanted else None
        inbox = Inbox(size, rank) if probe is not None else None
        token = int.from_bytes(os.urandom(7), "little")
        if probe is not None:
            probe.bytes.view(torch.int64)[0] = token
        descriptors = [-1] * (size + 1) if inbox is None or probe is None else [probe.descriptor, *inbox.writable]
        own = torch.tensor([os.getpid(), token, *descriptors])
        probes = torch.empty(size, len(own), dtype=torch.int64)
        dist.all_gather(list(probes), own, group=group)
        pids, tokens, segments, *writable = probes.T.tolist()
        outbox = None
        if probe is not None and all(map(can_read, pids, segments, tokens)):
            outbox = open_outbox(pids, writable[rank], rank)
        able = torch.tensor([outbox is not None], dtype=torch.uint8)
        answers = torch.empty(size, 1, dtype=torch.uint8)
        # After this gather, too, all ranks have looked at this rank's probe, which may be freed.
        dist.all_gather(list(answers), able, group=group)
        if outbox is None or inbox is None:
            return None
        pipes = Pipes(inbox, outbox, rank, _MESSAGE_LENGTH, timeout_of(group))
        return cls(rank, pids, pipes) if answers.all() else None

    def prepare(self, sizes: Sequence[int], *, is_same_for_all: bool = False) -> ChannelExchange:
        """Reserve memory for the next exchange: write its ``memory``, then ``send`` it.

        Args:
            sizes: number of bytes for each rank. They lie one behind the other.
            is_same_for_all: all ranks read the same bytes, which lie in the memory once.
        """
        *starts, num_bytes = [0] * len(sizes) + [max(sizes)] if is_same_for_all else accumulate(sizes, initial=0)
        index = next((i for i, slot in enumerate(self._slots) if self._is_free(slot)), len(self._slots))
        if index == len(self._slots):
            self._slots.append(_Slot(self._new_segment(num_bytes)))
        slot = self._slots[index]
        if slot.segment.num_bytes < num_bytes:
            slot.segment = self._new_segment(num_bytes)
        slot.free_from = None
        number, segment = self.num_prepared, slot.segment
        self.num_prepared += 1
        new_readers = {rank for rank, size in enumerate(sizes) if size} - segment.readers - {self._rank}
        segment.readers |= new_readers
        location = (number, index, segment.number, segment.descriptor, segment.num_bytes, int(bool(new_readers)))
        slot.messages = [(*location, start, size) for start, size in zip(starts, sizes, strict=True)]
        return ChannelExchange(self, number, slot)

    def gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, which have one shape and dtype and are contiguous."""
        num_ranks = len(self._pids)
        exchange = self.prepare([own.nbytes] * num_ranks, is_same_for_all=True)
        exchange.memory(own.dtype)[: own.numel()].copy_(own.view(-1))
        exchange.send()
        return list(exchange.receive([own.numel()] * num_ranks, own.dtype).view(num_ranks, *own.shape))

    def gather_few(self, values: Sequence[int]) -> list[Message]:
        """As many integers from each rank, at most MAX_FEW, which cross in the messages themselves."""
        head, rest = (_NO_EXCHANGE, len(values)), (0,) * (MAX_FEW - len(values))
        messages = self._pipes.receive(self._pipes.send([(*head, *values, *rest)] * len(self._pids)))
        for rank, message in enumerate(messages):
            if message[:2] != head:
                raise self._out_of_step(f"a message of {len(values)} integers", rank, message)
        return [message[2 : 2 + len(values)] for message in messages]

    def _out_of_step(self, awaited: str, rank: int, message: Message) -> ShardingError:
        """The error where another rank is at another point of the program."""
        number, *_, size = message
        sent = f"a message of {message[1]} integers" if number == _NO_EXCHANGE else f"exchange {number} of {size} bytes"
        return ShardingError(
            f"the ranks fell out of step: this one waits for {awaited}, rank {rank} of its row sends {sent}; every "
            "rank must make the same calls in the same order"
        )

    def _received_views(
        self, number: int, own_slot: _Slot, messages: Sequence[Message], sizes: Sequence[int], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """What each rank has sent to this one in exchange ``number``, as views of its memory."""
        views = []
        for rank, (message, size) in enumerate(zip(messages, sizes, strict=True)):
            sent_number, slot, segment, descriptor, num_bytes, _, start, sent_size = message
            if (sent_number, sent_size) != (number, size * dtype.itemsize):
                raise self._out_of_step(f"exchange {number} of {size * dtype.itemsize} bytes", rank, message)
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
        if any(message[5] for message in messages):
            # Every rank got the same answer to this question from every rank, so all take part.
            self._pipes.receive(self._pipes.send([(0,) * _MESSAGE_LENGTH] * len(messages)))
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
    _sent: int | None = None

    def memory(self, dtype: torch.dtype) -> torch.Tensor:
        """Where this rank writes what it sends, flat; there may be more of it than was asked for."""
        return self._slot.segment.as_dtype(dtype)

    def send(self) -> None:
        """Let all ranks know that what is for them can be read."""
        self._sent = self._channel._pipes.send(self._slot.messages)

    def receive(self, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Wait for all ranks, and copy what they have sent to this one.

        Args:
            sizes: number of elements that each rank has sent.
            dtype: of all messages.

        Returns:
            The messages, flat, one behind the other.
        """
        assert self._sent is not None, "send() comes first"
        messages = self._channel._pipes.receive(self._sent)
        views = self._channel._received_views(self._number, self._slot, messages, sizes, dtype)
        received = torch.cat(views) if views else torch.empty(0, dtype=dtype)
        self._channel._mark_received(self._number, self._slot)
        return received
