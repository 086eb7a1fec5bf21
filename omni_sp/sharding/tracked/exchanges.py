"""What sharded tensors exchange: all shards gathered, or ranges of indices that other ranks hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import torch

from omni_sp.collectives import exchange, gather
from omni_sp.mesh import Axis
from omni_sp.sharding.forward_context import current_forward
from omni_sp.sharding.tracked.placement import Placement, Range, gather_order, intersect


def gather_shards(
    shard: torch.Tensor, dim: int, placement: Placement, axis: Axis, operation: str | None
) -> torch.Tensor:
    """All shards gathered; ``operation`` is counted in the running forward's ``gathers``."""
    forward = current_forward()
    if forward is not None and operation is not None:
        forward.count_gather(operation)
    gathered = gather(shard, placement.lengths, dim, axis)
    if placement.in_rank_order:
        return gathered
    return gathered.index_select(dim, gather_order(placement).to(gathered.device))


class FetchPlan(NamedTuple):
    """What follows from the placement for one rank's `TokenTensor.fetch_ranges`; it is worked out once.

    Attributes:
        own: (start, length) in this rank's shard of each range that it wants and holds.
        to_send: for each rank (start, length) in this rank's shard of each range that is sent there.
        to_receive: for each rank the length of each range that comes from there.
        order: the place of each wanted range, ascending, among the own ones and the received ones in rank order.
    """

    own: tuple[Range, ...]
    to_send: tuple[tuple[Range, ...], ...]
    to_receive: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]


@lru_cache(maxsize=1024)
def fetch_plan(placement: Placement, wanted: tuple[tuple[Range, ...], ...], me: int) -> FetchPlan:
    """Plan `fetch_ranges`: each rank's ranges are wanted, ascending, and rank ``me`` is this one."""

    def in_shard(ranges: Sequence[Range]) -> tuple[Range, ...]:
        return tuple((placement.local_offset(me, start), stop - start) for start, stop in ranges)

    held = placement.ranges_per_rank
    own = intersect(held[me], wanted[me])
    to_send = [[] if rank == me else intersect(held[me], of_rank) for rank, of_rank in enumerate(wanted)]
    to_receive = [[] if rank == me else intersect(of_rank, wanted[me]) for rank, of_rank in enumerate(held)]
    ranges = [*own, *chain.from_iterable(to_receive)]
    return FetchPlan(
        in_shard(own),
        tuple(map(in_shard, to_send)),
        tuple(tuple(stop - start for start, stop in of_rank) for of_rank in to_receive),
        tuple(sorted(range(len(ranges)), key=ranges.__getitem__)),
    )


def fetch_ranges(shard: torch.Tensor, dim: int, plan: FetchPlan, axis: Axis) -> torch.Tensor:
    """The ranges that this rank wants, from those who hold them."""
    pieces = [shard.narrow(dim, start, length) for start, length in plan.own]
    if axis.size > 1:
        shape = list(shard.shape)
        shape[dim] = 1
        width = math.prod(shape)
        send_sizes = [width * sum(length for _, length in ranges) for ranges in plan.to_send]
        recv_sizes = [width * sum(lengths) for lengths in plan.to_receive]
        pending, sent = exchange(send_sizes, recv_sizes, shard.dtype, shard.device, axis), 0
        for ranges, size in zip(plan.to_send, send_sizes, strict=True):
            if size:
                pending.fill([shard.narrow(dim, start, length) for start, length in ranges], dim, sent)
            sent += size
        pending.start()
        received = pending.wait().view(-1)
        for lengths, part in zip(plan.to_receive, received.split(recv_sizes), strict=True):
            if lengths:
                shape[dim] = sum(lengths)
                block = part.view(shape)
                pieces += [block] if len(lengths) == 1 else block.split(lengths, dim)
    if not pieces:
        return shard.narrow(dim, 0, 0)
    if len(pieces) == 1 and not plan.own:  # memory that only the result uses
        return pieces[0]
    return torch.cat([pieces[place] for place in plan.order], dim)
