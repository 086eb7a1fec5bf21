"""What moves between ranks arrives as it was, through shared memory and through gloo."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist

from omni_sp.collectives import Exchange, all_reduce, exchange, gather_ints, shift
from omni_sp.errors import ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.shared_memory import MAX_FEW, Segment, can_read
from omni_sp.testing.ranks import RankError, RankPool

WAYS = pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "gloo"])


def content(number: int, source: int, target: int, size: int) -> torch.Tensor:
    """What one rank sends another in an exchange: it differs from everything else that is sent."""
    return torch.arange(size, dtype=torch.float32) + 1e6 * number + 1e4 * source + 1e3 * target


def sizes_of(number: int, num_ranks: int) -> dict[tuple[int, int], int]:
    """(source, target) -> elements: uneven, often none, growing with the exchanges."""
    draw = random.Random(number)
    pairs = [(source, target) for source in range(num_ranks) for target in range(num_ranks)]
    return {pair: draw.choice([0, 1, 3, draw.randrange(20 + 40 * number)]) for pair in pairs}


def run_exchanges(mesh: ParallelMesh, program: list[int], dtype: torch.dtype) -> list[int]:
    """Start (n >= 0) and wait for (-1 - n) exchanges; returns the numbers of those that delivered anything wrong."""
    axis, num_ranks = mesh.ulysses, mesh.world_size
    pending: dict[int, Exchange] = {}
    wrong = []
    for step in program:
        number = step if step >= 0 else -1 - step
        sizes = sizes_of(number, num_ranks)
        send_sizes = [sizes[axis.rank, target] for target in range(num_ranks)]
        recv_sizes = [sizes[source, axis.rank] for source in range(num_ranks)]
        if step >= 0:
            pending[number] = exchange(send_sizes, recv_sizes, dtype, torch.device("cpu"), axis)
            for target, send_buffer in enumerate(pending[number].send_buffers):
                send_buffer.copy_(content(number, axis.rank, target, send_sizes[target]))
            pending[number].start()
            continue
        wanted = [content(number, source, axis.rank, recv_sizes[source]) for source in range(num_ranks)]
        if not torch.equal(pending.pop(number).wait(), torch.cat(wanted).to(dtype)):
            wrong.append(number)
    return wrong


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_overlapping_exchanges_deliver_everything(
    ranks: RankPool, num_ranks: int, dtype: torch.dtype, shared_memory: bool
) -> None:
    # One after the other; then a pipeline of groups that wait for what returns only at the end; then all at once.
    program = [step for number in range(12) for step in (number, -1 - number)]
    program += [12, -13, 13, 14, -14, 15, 16, -16, 17, -15, -17, -18]
    program += [*range(18, 26), *(-1 - number for number in reversed(range(18, 26)))]
    wrong = ranks.run(run_exchanges, program, dtype, ulysses=num_ranks, shared_memory=shared_memory)
    assert wrong == [[]] * num_ranks


def run_in_and_out_of_inference_mode(mesh: ParallelMesh) -> list[int]:
    """Memory that is made in inference mode is written to outside of it, and the other way round."""
    own = ParallelMesh(mesh.config, ranks=mesh.ranks)
    wrong = []
    for modes in ((True, False), (False, True)):
        for is_inference in modes:
            with torch.inference_mode(is_inference):
                wrong += run_exchanges(own, [1, -2, 5, -6], torch.float32 if modes[0] else torch.float64)
    return wrong


def test_inference_mode_comes_and_goes(ranks: RankPool) -> None:
    assert ranks.run(run_in_and_out_of_inference_mode, ulysses=2) == [[], []]


def run_shifts(mesh: ParallelMesh, lengths: list[int]) -> bool:
    """Pass every rank's block around the whole ring, twice."""
    axis = mesh.ring
    block = torch.full((lengths[axis.rank],), float(axis.rank))
    right = True
    for step in range(2 * axis.size):
        origin = (axis.rank - step - 1) % axis.size
        block = shift(block, lengths[origin], axis).wait()
        right &= torch.equal(block, torch.full((lengths[origin],), float(origin)))
    return right


@WAYS
@pytest.mark.parametrize("lengths", [[5, 7], [0, 3, 0], [4, 0, 9, 1]])
def test_a_ring_passes_every_block_on(ranks: RankPool, lengths: list[int], shared_memory: bool) -> None:
    assert all(ranks.run(run_shifts, lengths, ring=len(lengths), shared_memory=shared_memory))


def run_steadily(mesh: ParallelMesh) -> tuple[int, int, int]:
    """File descriptors before, after many exchanges of a new mesh, and after it has gone."""

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    own = ParallelMesh(mesh.config)
    for number in range(40):
        assert run_exchanges(own, [number % 5, -1 - number % 5], torch.float32) == []
    during = count()
    del own
    return before, during, count()


def test_two_segments_take_turns_and_nothing_is_left(ranks: RankPool) -> None:
    for before, during, after in ranks.run(run_steadily, ulysses=4):
        # Two of this rank's and two of each peer's; each is held by a mapping (which has a descriptor of its own), and
        # this rank's also by the descriptor that the peers open. And a pipe from and to each peer, for all three axes.
        assert during - before == 10 + 2 * 3
        assert after == before


def drop_mesh_early(job: ParallelMesh) -> list[int]:
    """Rank 0 drops its mesh after the only exchange, which rank 1 waits for later."""
    own = ParallelMesh(job.config, ranks=job.ranks)
    pending = exchange([4, 4], [4, 4], torch.float32, torch.device("cpu"), own.ulysses)
    for target, send_buffer in enumerate(pending.send_buffers):
        send_buffer.copy_(content(0, own.rank, target, 4))
    pending.start()
    time.sleep(0.3 * own.rank)
    return pending.wait().tolist()


def test_a_mesh_may_go_before_others_have_read_from_it(ranks: RankPool) -> None:
    for rank, got in enumerate(ranks.run(drop_mesh_early, ulysses=2)):
        assert got == torch.cat([content(0, source, rank, 4) for source in range(2)]).tolist()


def run_out_of_step(mesh: ParallelMesh) -> str:
    """Rank 1 has started one exchange more."""
    own = ParallelMesh(mesh.config, ranks=mesh.ranks)
    assert own.ulysses.channel is not None
    if own.rank == 1:
        own.ulysses.channel.prepare([0, 0])
    try:
        run_exchanges(own, [0, -1], torch.float32)
    except ShardingError as error:
        return str(error)
    return "nothing was raised"


def test_ranks_out_of_step_are_found_out(ranks: RankPool) -> None:
    for message in ranks.run(run_out_of_step, ulysses=2):
        assert "out of step" in message
        assert "same order" in message


def send_another_size(job: ParallelMesh, size: int) -> str:
    """Rank 1 has one number more than the others, and sends it along another axis of the same ranks."""
    own = ParallelMesh(job.config, ranks=job.ranks)
    try:
        gather_ints([1] * (size + (own.rank == 1)), own.world if own.rank == 1 else own.sequence)
    except ShardingError as error:
        return str(error)
    return "nothing was raised"


def test_messages_of_another_size_are_found_out(ranks: RankPool) -> None:
    for size, (sent, other) in {
        1: ("a message of 1 integers", "a message of 2 integers"),
        MAX_FEW: (f"a message of {MAX_FEW} integers", f"exchange 0 of {8 * MAX_FEW + 8} bytes"),
        MAX_FEW + 1: (f"exchange 0 of {8 * MAX_FEW + 8} bytes", f"exchange 0 of {8 * MAX_FEW + 16} bytes"),
    }.items():
        first, second = ranks.run(send_another_size, size, ulysses=2)
        assert f"waits for {sent}, rank 1 of its row sends {other}" in first
        assert f"waits for {other}, rank 0 of its row sends {sent}" in second


def reduce_and_gather(mesh: ParallelMesh) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, ...]]]:
    x = torch.arange(12.0).view(3, 4).T / (3 + mesh.rank)
    total = all_reduce(x, mesh.sequence)
    return total, all_reduce(x.bfloat16(), mesh.sequence), gather_ints([mesh.rank, -(2**62)], mesh.sequence)


@WAYS
def test_sums_are_the_same_on_all_ranks(ranks: RankPool, shared_memory: bool) -> None:
    parts = [torch.arange(12.0).view(3, 4).T / (3 + rank) for rank in range(4)]
    answers = ranks.run(reduce_and_gather, ulysses=2, ring=2, shared_memory=shared_memory)
    for total, rounded, numbers in answers:
        assert torch.equal(total, answers[0][0])
        torch.testing.assert_close(total, torch.stack(parts).sum(0), rtol=1e-6, atol=1e-6)
        wide = torch.stack([part.bfloat16().float() for part in parts]).sum(0)
        torch.testing.assert_close(rounded, wide.bfloat16(), rtol=1e-2, atol=0)
        assert rounded.dtype == torch.bfloat16
        assert numbers == [(rank, -(2**62)) for rank in range(4)]


def die_in_an_exchange(job: ParallelMesh) -> str:
    """Rank 1 dies, and the others wait for it."""
    own = ParallelMesh(job.config, ranks=job.ranks)
    if own.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(dist.DistNetworkError, match="closed by peer") as error:
        run_exchanges(own, [0, -1], torch.float32)
    raise TimeoutError(f"after {time.monotonic() - began:.1f} s: {error.value}")


def test_a_rank_that_dies_is_noticed_at_once() -> None:
    pool = RankPool(3)
    with pytest.raises(RankError, match=r"TimeoutError: after [01]\.\d s: .* closed by peer"):
        pool.run(die_in_an_exchange, ulysses=3)
    assert not pool.alive


def has_channels(mesh: ParallelMesh, unwilling: int) -> list[bool]:
    """Whether the axes have shared memory where one rank wants none."""
    own = ParallelMesh(mesh.config, shared_memory=mesh.rank != unwilling)
    return [axis.channel is not None for axis in (own.ulysses, own.ring)]


def test_all_ranks_of_a_group_share_memory_or_none_does(ranks: RankPool) -> None:
    assert ranks.run(has_channels, 3, ulysses=2, ring=2) == [[True, True], [True, False], [False, True], [False, False]]


def reads_foreign_memory(mesh: ParallelMesh) -> bool:
    """What another machine's process of the same number would look like: readable, but not the one meant."""
    segment = Segment(0, 8)
    segment.bytes.view(torch.int64)[0] = 7
    assert can_read(os.getpid(), segment.descriptor, 7)
    return can_read(os.getpid(), segment.descriptor, 8) or can_read(2**22 + 1, segment.descriptor, 7)


def test_only_the_memory_meant_is_taken(ranks: RankPool) -> None:
    assert not any(ranks.run(reads_foreign_memory))
