"""Mistakes that sequence-parallel attention is known for elsewhere, one test each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omni_sp import ParallelMesh
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import attention, relative_error
from tests.attention.test_core import Case, make, run_case


def error(ranks: RankPool, lengths: tuple[int, ...], ulysses: int, ring: int, **options: Any) -> float:
    """Relative error of the ranks' attention; they ask each other for their lengths."""
    case = Case(lengths, lengths, **{"batch": 2, **options})
    got = torch.cat(ranks.run(run_case, case, False, ulysses=ulysses, ring=ring), dim=1)
    query, key, value, mask = make(case, ulysses * ring)
    return relative_error(got, attention(query, key, value, key_mask=mask, is_causal=case.causal))


def test_every_block_of_a_ring_brings_its_own_mask(ranks: RankPool) -> None:
    assert error(ranks, (8, 8, 8, 8), 1, 4, masked=True) <= 2e-6


def test_masks_of_uneven_ranks_stay_with_their_keys(ranks: RankPool) -> None:
    assert error(ranks, (9, 5, 8, 3), 4, 1, masked=True) <= 2e-6


def test_partial_results_are_weighed_by_their_true_log_sum_exp(ranks: RankPool) -> None:
    """With a log-sum-exp of zeros this error is 9e-2."""
    assert error(ranks, (20, 1), 1, 2) <= 2e-6


def test_no_padding_takes_softmax_weight(ranks: RankPool) -> None:
    """Uneven lengths tempt to pad with zero keys, each of which takes weight exp(0)."""
    assert error(ranks, (3, 2, 2, 2), 2, 2) <= 2e-6


def test_attention_is_not_local(ranks: RankPool) -> None:
    query, key, value, _ = make(Case((6, 6), (6, 6), batch=2), 2)
    halves = [attention(q, k, v) for q, k, v in zip(*(x.split(6, dim=1) for x in (query, key, value)), strict=True)]
    assert relative_error(torch.cat(halves, dim=1), attention(query, key, value)) > 0.1, "this test could tell"
    assert error(ranks, (6, 6), 2, 1) <= 2e-6


def test_masked_keys_may_lie_anywhere(ranks: RankPool) -> None:
    """A length taken from a mask's sum would keep the first keys instead of the unmasked ones."""
    assert error(ranks, (7, 6, 6, 5), 2, 2, masked=True) <= 2e-6


def test_ring_ranks_are_not_neighbours(ranks: RankPool) -> None:
    """Under 2 x 2 the ring groups are (0, 2) and (1, 3)."""
    assert error(ranks, (5, 7, 4, 6), 2, 2) <= 2e-6


@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("lengths", [(4, 3, 3, 3), (1, 1, 1, 0)])
def test_lengths_that_nothing_divides(ranks: RankPool, lengths: tuple[int, ...], ulysses: int, ring: int) -> None:
    assert error(ranks, lengths, ulysses, ring) <= 2e-6


def test_six_heads_on_four_ranks(ranks: RankPool) -> None:
    assert error(ranks, (5, 5, 5, 5), 4, 1, heads=6, kv_heads=6) <= 2e-6


def test_thirty_two_query_heads_share_one_key_head(ranks: RankPool) -> None:
    assert error(ranks, (5, 4, 4, 4), 4, 1, heads=32, kv_heads=1) <= 2e-6


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 3), (2, 2)])
def test_causal_ring(ranks: RankPool, ulysses: int, ring: int) -> None:
    assert error(ranks, (5, 4, 4, 4)[: ulysses * ring], ulysses, ring, causal=True, masked=True) <= 2e-6


def changing(mesh: ParallelMesh) -> list[float]:
    """Lengths that stay the same on some ranks and change on others, which ask for them each time."""
    errors = []
    for lengths in ((3, 3, 3, 3), (3, 3, 3, 2), (3, 3, 3, 3), (3, 2, 3, 2)):
        case = Case(lengths, lengths, batch=2)
        query, key, value, _ = make(case, 4)
        wanted = attention(query, key, value).split(list(lengths), dim=1)[mesh.rank]
        errors.append(relative_error(run_case(mesh, case, False), wanted))
    return errors


@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (2, 2)])
def test_lengths_that_change_on_other_ranks_only(ranks: RankPool, ulysses: int, ring: int) -> None:
    """What is kept under a rank's own lengths would be stale on one rank and fresh on another: a hang."""
    for errors in ranks.run(changing, ulysses=ulysses, ring=ring):
        assert max(errors) <= 2e-6
