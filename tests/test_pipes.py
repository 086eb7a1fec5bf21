"""Short messages through pipes: they come in order, a rank that is gone or late is an error, and nothing stays open."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from omni_sp.pipes import Inbox, Pipes, open_outbox


def connected(num_ranks: int, timeout: float = 30.0, length: int = 2) -> list[Pipes]:
    """The pipes of several ranks, all of which are this process."""
    inboxes = [Inbox(num_ranks, rank) for rank in range(num_ranks)]
    ranks = []
    for rank in range(num_ranks):
        outbox = open_outbox([os.getpid()] * num_ranks, [inbox.writable[rank] for inbox in inboxes], rank)
        assert outbox is not None
        ranks.append(outbox)
    wait = timedelta(seconds=timeout)
    return [
        Pipes(inbox, outbox, rank, length, wait)
        for rank, (inbox, outbox) in enumerate(zip(inboxes, ranks, strict=True))
    ]


def send(ranks: list[Pipes], rank: int, number: int) -> None:
    assert ranks[rank].send([(rank, 10 * number + to) for to in range(len(ranks))]) == number


def test_messages_belong_to_the_send_of_their_number_whoever_is_ahead() -> None:
    ranks = connected(3)
    for number in range(4):
        send(ranks, 0, number)
    for number in range(4):
        send(ranks, 2, number)
        send(ranks, 1, number)
    for rank, pipes in enumerate(ranks):
        for number in (2, 0, 3, 1):
            assert pipes.receive(number) == [(sender, 10 * number + rank) for sender in range(3)]


def test_what_a_rank_sent_before_it_went_is_read_and_what_it_did_not_send_is_an_error() -> None:
    ranks = connected(3)
    for rank in range(3):
        send(ranks, rank, 0)
    ranks.pop()
    assert ranks[0].receive(0) == [(0, 0), (1, 0), (2, 0)]
    with pytest.raises(dist.DistNetworkError, match="closed by peer: rank 2 of 3"):
        ranks[0].send([(0, 0)] * 3)
    with pytest.raises(dist.DistNetworkError, match=r"closed by peer: ranks \[2\] of 3"):
        ranks[0].receive(1)


def test_a_rank_that_is_late_is_waited_for_as_long_as_was_said() -> None:
    ranks = connected(3, timeout=0.2)
    send(ranks, 0, 0)
    send(ranks, 1, 0)
    began = time.monotonic()
    with pytest.raises(dist.DistNetworkError, match=r"timed out: ranks \[2\] of 3 did not come .* within 0.2 s"):
        ranks[0].receive(0)
    assert 0.2 <= time.monotonic() - began < 5
    send(ranks, 2, 0)
    assert ranks[0].receive(0) == [(0, 0), (1, 0), (2, 0)]


def test_a_pipe_that_nobody_reads_is_an_error() -> None:
    ranks = connected(2, timeout=0.1)

    def send_forever() -> None:
        for number in range(2**17):
            send(ranks, 0, number)

    with pytest.raises(dist.DistNetworkError, match=r"timed out: rank 1 has read nothing for 0.1 s"):
        send_forever()


def test_nothing_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    ranks = connected(4)
    assert len(os.listdir("/proc/self/fd")) - before == 4 * 2 * 3
    del ranks
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_is_not_there_has_no_pipes() -> None:
    inbox = Inbox(3, 0)
    before = len(os.listdir("/proc/self/fd"))
    assert open_outbox([os.getpid(), 2**22 + 1, os.getpid()], [inbox.writable[2], 3, -1], 2) is None
    assert len(os.listdir("/proc/self/fd")) == before
