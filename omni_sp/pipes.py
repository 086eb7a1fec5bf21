"""Short messages between the ranks of one machine: a pipe from each rank to each other.

gloo sends by sockets, and two threads of its own wake up for every message. Where several ranks share a core, the
threads that wake each other are most of what an exchange costs; a message by a pipe wakes the receiver alone.

A pipe has no name that a killed process could leave behind. Its writer is one process, so a rank that dies is noticed
at once, by the end of the file.
"""

from __future__ import annotations

import os
import select
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from struct import Struct
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_timeout

Message = tuple[int, ...]

_READ_MESSAGES = 64


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class Inbox:
    """This rank's ends of the pipes that the other ranks write to.

    Args:
        num_ranks: how many ranks there are.
        rank: this one.

    Attributes:
        writable: for each rank the descriptor that it opens to write to this one; -1 for this rank. They stay open
            until `Pipes` is made of it, or the inbox is dropped.
    """

    def __init__(self, num_ranks: int, rank: int) -> None:
        ends = [(-1, -1) if peer == rank else os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) for peer in range(num_ranks)]
        self.readable, self.writable = ([end[side] for end in ends] for side in (0, 1))
        self.close_writable = weakref.finalize(self, _close, [x for x in self.writable if x >= 0])
        self.close_readable = weakref.finalize(self, _close, [x for x in self.readable if x >= 0])


class Pipes:
    """Pipes from this rank to all others, and from all others to this one.

    All ranks send the same number of times in the same order, so the n-th message of each rank belongs to the n-th
    of every other, whoever is ahead.

    Args:
        inbox: what the others have opened by now.
        outbox: for each rank the descriptor to write to; -1 for this rank. They are closed with this object.
        rank: this rank.
        length: of a message, in integers; short enough to be written at once or not at all.
        timeout: how long to wait for the other ranks.
    """

    def __init__(self, inbox: Inbox, outbox: Sequence[int], rank: int, length: int, timeout: timedelta) -> None:
        inbox.close_writable()  # else a rank that dies would leave a pipe with a writer
        self._inbox, self._outbox, self._rank = inbox, outbox, rank
        self._close = weakref.finalize(self, _close, [x for x in outbox if x >= 0])
        self._format = Struct(f"={length}q")
        assert self._format.size <= select.PIPE_BUF
        self._timeout = timeout.total_seconds()
        self._num_sent = 0
        self._num_arrived = [0] * len(outbox)
        # Of each send that was not received yet: the messages by rank, of those that have come.
        self._arrived: dict[int, dict[int, Message]] = {}
        self._poll = select.poll()
        self._rank_of = {x: peer for peer, x in enumerate(inbox.readable) if x >= 0}
        for descriptor in self._rank_of:
            self._poll.register(descriptor, select.POLLIN)
        self._gone: set[int] = set()

    def send(self, messages: Sequence[Message]) -> int:
        """Send one message to each rank, also to this one.

        Returns:
            The number of this send, for `receive`.
        """
        number = self._num_sent
        self._num_sent += 1
        self._arrived.setdefault(number, {})[self._rank] = messages[self._rank]
        for peer, descriptor in enumerate(self._outbox):
            if peer != self._rank:
                self._write(descriptor, self._format.pack(*messages[peer]), peer)
        return number

    def receive(self, number: int) -> list[Message]:
        """Wait for the messages of all ranks that belong to a send of this one.

        Raises:
            torch.distributed.DistNetworkError: a rank is gone, or does not answer in time.
        """
        arrived, num_ranks = self._arrived[number], len(self._outbox)
        deadline = None
        while len(arrived) < num_ranks:
            if missing := self._gone - arrived.keys():
                raise dist.DistNetworkError(
                    f"connection closed by peer: ranks {sorted(missing)} of {num_ranks} have ended, or let go of their "
                    "mesh, and this one waits for them in an exchange"
                )
            deadline = deadline or time.monotonic() + self._timeout
            ready = self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                late = sorted({*range(num_ranks)} - arrived.keys())
                raise dist.DistNetworkError(
                    f"timed out: ranks {late} of {num_ranks} did not come to an exchange within {self._timeout:g} s"
                )
            for descriptor, _ in ready:
                self._read(descriptor)
        del self._arrived[number]
        return [arrived[peer] for peer in range(num_ranks)]

    def _read(self, descriptor: int) -> None:
        """Take what has come through one pipe."""
        data, peer = os.read(descriptor, self._format.size * _READ_MESSAGES), self._rank_of[descriptor]
        if not data:
            self._poll.unregister(descriptor)
            self._gone.add(peer)
        for message in self._format.iter_unpack(data):
            self._arrived.setdefault(self._num_arrived[peer], {})[peer] = message
            self._num_arrived[peer] += 1

    def _write(self, descriptor: int, data: bytes, peer: int) -> None:
        try:
            while True:
                try:
                    os.write(descriptor, data)
                    return
                except BlockingIOError:  # a thousand messages that nobody has read
                    if not _can_write_within(descriptor, self._timeout):
                        raise dist.DistNetworkError(
                            f"timed out: rank {peer} has read nothing for {self._timeout:g} s"
                        ) from None
        except BrokenPipeError:
            raise dist.DistNetworkError(
                f"connection closed by peer: rank {peer} of {len(self._outbox)} has ended, or let go of its mesh"
            ) from None


def _can_write_within(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


def open_outbox(pids: Sequence[int], descriptors: Sequence[int], rank: int) -> list[int] | None:
    """Open the pipes of the other ranks' inboxes for writing.

    Args:
        pids: of all ranks, on this machine.
        descriptors: for each rank the descriptor there of the pipe that is for this rank.
        rank: this rank.

    Returns:
        For each rank a descriptor here, -1 for this rank; None where the system forbids it.
    """
    opened: list[int] = []
    try:
        for peer, (pid, descriptor) in enumerate(zip(pids, descriptors, strict=True)):
            path = f"/proc/{pid}/fd/{descriptor}"
            opened.append(-1 if peer == rank else os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        _close([x for x in opened if x >= 0])
        return None
    return opened


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long a process group waits for its ranks."""
    backend: Any = group._get_backend(torch.device("cpu"))
    # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it.
    options = getattr(getattr(backend, "wrapped_pg", backend), "options", None)
    timeout: timedelta = default_pg_timeout if options is None else options._timeout
    return timeout
