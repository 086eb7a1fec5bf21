"""Which rank holds which index: the arithmetic of placements against lists of indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from omni_sp.sharding.tracked.placement import Placement, concatenated, even_placement, gather_order
from omni_sp.sharding.tracked.view_rules import reshape_placement

QUICK = settings(max_examples=150, derandomize=True, deadline=None, database=None)


@st.composite
def placements(draw: st.DrawFn, num_ranks: int | None = None, size: int | None = None) -> Placement:
    """A dim sharded evenly, or sliced out of and concatenated from such dims, as a model's code does it."""
    ranks = num_ranks or draw(st.integers(1, 4))
    if size is not None:
        head = draw(st.integers(0, size))
        return concatenated((even_placement(head, ranks), even_placement(size - head, ranks)))
    drawn = []
    for length in draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)):
        even = even_placement(length, ranks)
        start = draw(st.integers(0, length))
        drawn.append(even.narrow(start, draw(st.integers(start, length))))
    return concatenated(tuple(drawn))


def indices(placement: Placement, rank: int) -> list[int]:
    """The indices that a rank holds, in the order in which they lie in its memory."""
    return [index for start, stop in placement.ranges_per_rank[rank] for index in range(start, stop)]


def check(placement: Placement, owners: Sequence[int]) -> None:
    """That every index belongs to the rank that it should belong to, and is written down in the one way there is."""
    assert placement.size == len(owners)
    for rank, ranges in enumerate(placement.ranges_per_rank):
        mine = indices(placement, rank)
        assert mine == [index for index, owner in enumerate(owners) if owner == rank]
        assert placement.lengths[rank] == len(mine)
        assert all(start < stop for start, stop in ranges)
        assert all(first[1] < second[0] for first, second in pairwise(ranges))


def owners_of(placement: Placement) -> list[int]:
    """For each index the rank that holds it."""
    owners = [-1] * placement.size
    for rank in range(len(placement.ranges_per_rank)):
        for index in indices(placement, rank):
            assert owners[index] == -1
            owners[index] = rank
    assert -1 not in owners
    return owners


@QUICK
@given(placement=placements())
def test_drawn_placements_are_sound(placement: Placement) -> None:
    check(placement, owners_of(placement))


@QUICK
@given(placement=placements(), data=st.data())
def test_narrowed(placement: Placement, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, placement.size))
    stop = data.draw(st.integers(start, placement.size))
    check(placement.narrow(start, stop), owners_of(placement)[start:stop])


@QUICK
@given(placement=placements(), data=st.data())
def test_local_offset(placement: Placement, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, placement.size))
    for rank in range(len(placement.ranges_per_rank)):
        assert placement.local_offset(rank, index) == sum(own < index for own in indices(placement, rank))


@QUICK
@given(several=st.integers(1, 3).flatmap(lambda n: st.lists(placements(num_ranks=n), min_size=1, max_size=3)))
def test_concatenated(several: list[Placement]) -> None:
    check(concatenated(tuple(several)), [owner for placement in several for owner in owners_of(placement)])


@QUICK
@given(placement=placements(), outer=st.integers(1, 3), inner=st.integers(1, 3))
def test_flattened_and_back(placement: Placement, outer: int, inner: int) -> None:
    flattened = placement.flatten_dims(outer, inner)
    owners = torch.tensor(owners_of(placement), dtype=torch.int64)
    check(flattened, owners[None, :, None].expand(outer, -1, inner).flatten().tolist())
    assert flattened.unflatten_dims(outer, placement.size, inner) == placement


@QUICK
@given(placement=placements(), outer=st.integers(1, 4), inner=st.integers(1, 4))
def test_unflattened(placement: Placement, outer: int, inner: int) -> None:
    assume(placement.size % (outer * inner) == 0)
    size = placement.size // outer // inner
    full = torch.tensor(owners_of(placement), dtype=torch.int64).view(outer, size, inner)
    fits = bool((full == full[:1, :, :1]).all())
    found = placement.unflatten_dims(outer, size, inner)
    assert (found is not None) == fits
    if found is not None:
        check(found, full[0, :, 0].tolist())
    assert placement.unflatten_dims(outer, size + 1, inner) is None


@QUICK
@given(placement=placements())
def test_gather_order(placement: Placement) -> None:
    behind_each_other = [index for rank in range(len(placement.ranges_per_rank)) for index in indices(placement, rank)]
    assert placement.in_rank_order == (behind_each_other == sorted(behind_each_other))
    if placement.size:
        assert torch.tensor(behind_each_other)[gather_order(placement)].tolist() == list(range(placement.size))


@given(size=st.integers(0, 30), num_ranks=st.integers(1, 5))
@QUICK
def test_even(size: int, num_ranks: int) -> None:
    placement = even_placement(size, num_ranks)
    check(placement, sorted(owners_of(placement)))
    assert max(placement.lengths) - min(placement.lengths) <= 1


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], int, Placement, list[int]]:
    """A shape, its sharded dim, its placement, and another shape with as many elements."""
    before = draw(st.lists(st.sampled_from([1, 1, 2, 2, 3, 4, 6]), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(before) - 1))
    placement = draw(placements(num_ranks=draw(st.integers(1, 3)), size=before[dim]))
    # Taking dims apart into their factors and joining neighbours again reaches every shape that a model asks for.
    factors: list[int] = [
        factor
        for size in before
        for factor in {4: [2, 2], 6: draw(st.sampled_from([[2, 3], [3, 2]]))}.get(size, [size])
    ]
    if draw(st.booleans()):
        factors = draw(st.permutations(factors))
    after: list[int] = []
    for factor in factors:
        join = draw(st.booleans())
        if after and join:
            after[-1] *= factor
        else:
            after += [1] * draw(st.integers(0, 1)) + [factor]
    return before, dim, placement, after + [1] * draw(st.integers(0, 1))


@settings(QUICK, max_examples=400)
@given(drawn=reshapes())
def test_reshaped(drawn: tuple[list[int], int, Placement, list[int]]) -> None:
    before, shard_dim, placement, after = drawn
    found = reshape_placement(tuple(before), shard_dim, placement, tuple(after))
    full = torch.arange(math.prod(before)).view(before)
    if found is None:
        # Only where no dim of the new shape could be the sharded one.
        owners = torch.tensor(owners_of(placement), dtype=torch.int64)
        owner_of = (
            owners.view([-1 if dim == shard_dim else 1 for dim in range(len(before))]).expand(before).reshape(after)
        )
        fits = [
            bool(
                (
                    owner_of
                    == owner_of.movedim(dim, -1)
                    .reshape(-1, after[dim])[0]
                    .view([-1 if d == dim else 1 for d in range(len(after))])
                ).all()
            )
            for dim in range(len(after))
            if after[dim] > 1
        ]
        assert not any(fits) or len(set(owners.tolist())) == 1 or before == after
        assert before != after
        return
    dim, new = found
    for rank in range(len(placement.ranges_per_rank)):
        own = full.index_select(shard_dim, torch.tensor(indices(placement, rank), dtype=torch.int64))
        shape = [new.lengths[rank] if d == dim else size for d, size in enumerate(after)]
        wanted = full.view(after).index_select(dim, torch.tensor(indices(new, rank), dtype=torch.int64))
        assert torch.equal(own.reshape(shape), wanted)
    check(new, owners_of(new))
