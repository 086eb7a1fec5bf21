"""Who holds which index: the arithmetic of pieces against lists of indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from omni_sp.sharding.tracked.shapes import reshaped
from omni_sp.sharding.tracked.spans import Spans, dealt_evenly, joined, order_of

QUICK = settings(max_examples=150, derandomize=True, deadline=None, database=None)


@st.composite
def any_spans(draw: st.DrawFn, num_ranks: int | None = None, size: int | None = None) -> Spans:
    """A dim dealt out evenly, or cut out of and joined from such dims, as a model's code does it."""
    ranks = num_ranks or draw(st.integers(1, 4))
    if size is not None:
        head = draw(st.integers(0, size))
        return joined((dealt_evenly(head, ranks), dealt_evenly(size - head, ranks)))
    parts = []
    for length in draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)):
        part = dealt_evenly(length, ranks)
        start = draw(st.integers(0, length))
        parts.append(part.narrowed(start, draw(st.integers(start, length))))
    return joined(tuple(parts))


def indices(spans: Spans, rank: int) -> list[int]:
    """All that a rank holds, in the order in which it lies in its memory."""
    return [index for start, stop in spans.held[rank] for index in range(start, stop)]


def check(spans: Spans, owners: Sequence[int]) -> None:
    """That every index belongs to the rank that it should belong to, and is written down in the one way there is."""
    assert spans.size == len(owners)
    for rank, held in enumerate(spans.held):
        mine = indices(spans, rank)
        assert mine == [index for index, owner in enumerate(owners) if owner == rank]
        assert spans.lengths[rank] == len(mine)
        assert all(start < stop for start, stop in held)
        assert all(first[1] < second[0] for first, second in pairwise(held))


def owners_of(spans: Spans) -> list[int]:
    """For each index the rank that holds it."""
    owners = [-1] * spans.size
    for rank in range(len(spans.held)):
        for index in indices(spans, rank):
            assert owners[index] == -1
            owners[index] = rank
    assert -1 not in owners
    return owners


@QUICK
@given(spans=any_spans())
def test_drawn_spans_are_sound(spans: Spans) -> None:
    check(spans, owners_of(spans))


@QUICK
@given(spans=any_spans(), data=st.data())
def test_narrowed(spans: Spans, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, spans.size))
    stop = data.draw(st.integers(start, spans.size))
    check(spans.narrowed(start, stop), owners_of(spans)[start:stop])


@QUICK
@given(spans=any_spans(), data=st.data())
def test_before(spans: Spans, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, spans.size))
    for rank in range(len(spans.held)):
        assert spans.before(rank, index) == sum(own < index for own in indices(spans, rank))


@QUICK
@given(spans=st.integers(1, 3).flatmap(lambda n: st.lists(any_spans(num_ranks=n), min_size=1, max_size=3)))
def test_joined(spans: list[Spans]) -> None:
    check(joined(tuple(spans)), [owner for part in spans for owner in owners_of(part)])


@QUICK
@given(spans=any_spans(), outer=st.integers(1, 3), inner=st.integers(1, 3))
def test_merged_and_back(spans: Spans, outer: int, inner: int) -> None:
    merged = spans.merged(outer, inner)
    owners = torch.tensor(owners_of(spans), dtype=torch.int64)
    check(merged, owners[None, :, None].expand(outer, -1, inner).flatten().tolist())
    assert merged.unmerged(outer, spans.size, inner) == spans


@QUICK
@given(spans=any_spans(), outer=st.integers(1, 4), inner=st.integers(1, 4))
def test_unmerged(spans: Spans, outer: int, inner: int) -> None:
    assume(spans.size % (outer * inner) == 0)
    size = spans.size // outer // inner
    whole = torch.tensor(owners_of(spans), dtype=torch.int64).view(outer, size, inner)
    fits = bool((whole == whole[:1, :, :1]).all())
    found = spans.unmerged(outer, size, inner)
    assert (found is not None) == fits
    if found is not None:
        check(found, whole[0, :, 0].tolist())
    assert spans.unmerged(outer, size + 1, inner) is None


@QUICK
@given(spans=any_spans())
def test_order(spans: Spans) -> None:
    behind_each_other = [index for rank in range(len(spans.held)) for index in indices(spans, rank)]
    assert spans.in_rank_order == (behind_each_other == sorted(behind_each_other))
    if spans.size:
        assert torch.tensor(behind_each_other)[order_of(spans)].tolist() == list(range(spans.size))


@given(size=st.integers(0, 30), num_ranks=st.integers(1, 5))
@QUICK
def test_dealt_evenly(size: int, num_ranks: int) -> None:
    spans = dealt_evenly(size, num_ranks)
    check(spans, sorted(owners_of(spans)))
    assert max(spans.lengths) - min(spans.lengths) <= 1


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], int, Spans, list[int]]:
    """A shape, its cut dim, who holds what, and another shape with as many elements."""
    before = draw(st.lists(st.sampled_from([1, 1, 2, 2, 3, 4, 6]), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(before) - 1))
    spans = draw(any_spans(num_ranks=draw(st.integers(1, 3)), size=before[dim]))
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
    return before, dim, spans, after + [1] * draw(st.integers(0, 1))


@settings(QUICK, max_examples=400)
@given(drawn=reshapes())
def test_reshaped(drawn: tuple[list[int], int, Spans, list[int]]) -> None:
    before, cut_dim, spans, after = drawn
    found = reshaped(tuple(before), cut_dim, spans, tuple(after))
    whole = torch.arange(math.prod(before)).view(before)
    if found is None:
        # Only where no dim of the new shape could be the cut one.
        owners = torch.tensor(owners_of(spans), dtype=torch.int64)
        spread = owners.view([-1 if dim == cut_dim else 1 for dim in range(len(before))]).expand(before).reshape(after)
        fits = [
            bool(
                (
                    spread
                    == spread.movedim(dim, -1)
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
    for rank in range(len(spans.held)):
        own = whole.index_select(cut_dim, torch.tensor(indices(spans, rank), dtype=torch.int64))
        shape = [new.lengths[rank] if d == dim else size for d, size in enumerate(after)]
        wanted = whole.view(after).index_select(dim, torch.tensor(indices(new, rank), dtype=torch.int64))
        assert torch.equal(own.reshape(shape), wanted)
    check(new, owners_of(new))
