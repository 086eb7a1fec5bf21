"""Mistakes that sequence-parallel attention is known for elsewhere, one test each."""

from __future__ import annotations

import pytest
import torch

from omni_sp import ParallelMesh
from omni_sp.attention import sequence_parallel_attention
from testing.ranks import RankPool
from testing.reference import attention, relative_error

Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def row(lengths: tuple[int, ...], heads: int = 4, kv_heads: int = 4, batch: int = 2, holes: bool = False) -> Row:
    """The whole row, the same in every process; ``holes``: a mask whose masked keys lie anywhere."""
    generator = torch.Generator().manual_seed(9)
    total = sum(lengths)
    query = torch.randn(batch, total, heads, 32, generator=generator)
    key, value = (torch.randn(batch, total, kv_heads, 32, generator=generator) for _ in range(2))
    mask = torch.rand(batch, total, generator=generator) < 0.5 if holes else None
    return query, key, value, mask


def own(mesh: ParallelMesh, lengths: tuple[int, ...], whole: Row, *, is_causal: bool = False) -> torch.Tensor:
    query, key, value, mask = (None if x is None else x.split(list(lengths), dim=1)[mesh.rank] for x in whole)
    assert query is not None
    assert key is not None
    assert value is not None
    return sequence_parallel_attention(query, key, value, mesh=mesh, key_mask=mask, is_causal=is_causal)


def run(mesh: ParallelMesh, lengths: tuple[int, ...], options: dict[str, int | bool], is_causal: bool) -> torch.Tensor:
    return own(mesh, lengths, row(lengths, **options), is_causal=is_causal)  # type: ignore[arg-type]


def error(
    ranks: RankPool,
    lengths: tuple[int, ...],
    ulysses: int,
    ring: int,
    is_causal: bool = False,
    **options: int | bool,
) -> float:
    got = torch.cat(ranks.run(run, lengths, options, is_causal, ulysses=ulysses, ring=ring), dim=1)
    query, key, value, mask = row(lengths, **options)  # type: ignore[arg-type]
    return relative_error(got, attention(query, key, value, key_mask=mask, is_causal=is_causal))


def test_every_block_of_a_ring_brings_its_own_mask(ranks: RankPool) -> None:
    assert error(ranks, (8, 8, 8, 8), 1, 4, holes=True) <= 2e-6


def test_masks_of_uneven_ranks_stay_with_their_keys(ranks: RankPool) -> None:
    assert error(ranks, (9, 5, 8, 3), 4, 1, holes=True) <= 2e-6


def test_partial_results_are_weighed_by_their_true_log_sum_exp(ranks: RankPool) -> None:
    """With a log-sum-exp of zeros this error is 9e-2."""
    assert error(ranks, (20, 1), 1, 2) <= 2e-6


def test_no_padding_takes_softmax_weight(ranks: RankPool) -> None:
    """Uneven shares tempt to pad with zero keys, each of which takes weight exp(0)."""
    assert error(ranks, (3, 2, 2, 2), 2, 2) <= 2e-6


def test_attention_is_not_local(ranks: RankPool) -> None:
    lengths = (6, 6)
    query, key, value, _ = row(lengths)
    halves = [attention(q, k, v) for q, k, v in zip(*(x.split(6, dim=1) for x in (query, key, value)), strict=True)]
    assert relative_error(torch.cat(halves, dim=1), attention(query, key, value)) > 0.1, "this test could tell"
    assert error(ranks, lengths, 2, 1) <= 2e-6


def test_masked_keys_may_lie_anywhere(ranks: RankPool) -> None:
    """A length taken from a mask's sum would keep the first keys instead of the unmasked ones."""
    assert error(ranks, (7, 6, 6, 5), 2, 2, holes=True) <= 2e-6


def test_ring_ranks_are_not_neighbours(ranks: RankPool) -> None:
    """Under 2 x 2 the ring groups are (0, 2) and (1, 3)."""
    assert error(ranks, (5, 7, 4, 6), 2, 2) <= 2e-6


@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (1, 4), (2, 2)])
def test_lengths_that_nothing_divides(ranks: RankPool, ulysses: int, ring: int) -> None:
    assert error(ranks, (4, 3, 3, 3), ulysses, ring) <= 2e-6


@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (1, 4), (2, 2)])
def test_three_tokens_on_four_ranks(ranks: RankPool, ulysses: int, ring: int) -> None:
    assert error(ranks, (1, 1, 1, 0), ulysses, ring) <= 2e-6


def test_six_heads_on_four_ranks(ranks: RankPool) -> None:
    assert error(ranks, (5, 5, 5, 5), 4, 1, heads=6, kv_heads=6) <= 2e-6


def test_thirty_two_query_heads_share_one_key_head(ranks: RankPool) -> None:
    assert error(ranks, (5, 4, 4, 4), 4, 1, heads=32, kv_heads=1) <= 2e-6


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 3), (2, 2)])
def test_causal_ring(ranks: RankPool, ulysses: int, ring: int) -> None:
    assert error(ranks, (5, 4, 4, 4)[: ulysses * ring], ulysses, ring, is_causal=True, holes=True) <= 2e-6


def changing(mesh: ParallelMesh) -> list[float]:
    """Lengths that stay the same on some ranks and change on others, with the layout asked for each time."""
    errors = []
    for lengths in ((3, 3, 3, 3), (3, 3, 3, 2), (3, 3, 3, 3), (3, 2, 3, 2)):
        whole = row(lengths)
        wanted = attention(*whole[:3]).split(list(lengths), dim=1)[mesh.rank]
        errors.append(relative_error(own(mesh, lengths, whole), wanted))
    return errors


@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (2, 2)])
def test_lengths_that_change_on_other_ranks_only(ranks: RankPool, ulysses: int, ring: int) -> None:
    """What is kept under a rank's own lengths would be stale on one rank and fresh on another: a hang."""
    for errors in ranks.run(changing, ulysses=ulysses, ring=ring):
        assert max(errors) <= 2e-6
