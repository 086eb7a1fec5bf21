"""The core on 1 to 4 ranks against float64 attention over the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch

from omni_sp.attention import SequenceLayout, WholeKeyMask, entry, sequence_parallel_attention
from omni_sp.mesh import ParallelMesh
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import attention, relative_error, split_tokens

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (4, 1), (1, 4)]


@dataclass(frozen=True)
class Case:
    """One attention: what each of four ranks holds (fewer ranks take the first lengths), and the rest.

    With ``whole_mask`` every rank passes the mask of all ranks' keys, else that of its own.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    batch: int = 1
    masked: bool = False
    whole_mask: bool = False
    causal: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float32


CASES = {
    "even": Case((16, 16, 16, 16), (16, 16, 16, 16)),
    "uneven": Case((17, 16, 16, 15), (17, 16, 16, 15), batch=2),
    "6 heads": Case((9, 8, 8, 7), (9, 8, 8, 7), heads=6, kv_heads=6),
    "5 heads, masked": Case((9, 8, 8, 7), (9, 8, 8, 7), heads=5, kv_heads=5, masked=True, batch=2),
    "fewer heads than ranks": Case((5, 4, 4, 4), (5, 4, 4, 4), heads=1, kv_heads=1, batch=2),
    "ranks without tokens": Case((3, 0, 2, 0), (3, 0, 2, 0), batch=2),
    "ranks without keys": Case((3, 4, 2, 1), (0, 7, 0, 4), batch=2, masked=True),
    "cross": Case((9, 8, 0, 7), (3, 4, 5, 0), heads=3, kv_heads=3, masked=True, batch=3),
    "gqa": Case((9, 8, 8, 7), (9, 8, 8, 7), heads=8, kv_heads=2, masked=True, batch=2),
    "gqa, uneven groups": Case((9, 8, 8, 7), (9, 8, 8, 7), heads=9, kv_heads=3),
    "mqa": Case((9, 8, 8, 7), (5, 6, 0, 2), heads=7, kv_heads=1, batch=2),
    "causal": Case((9, 8, 8, 7), (9, 8, 8, 7), causal=True, batch=2),
    "causal, masked, gqa": Case((9, 0, 8, 7), (9, 0, 8, 7), heads=6, kv_heads=2, causal=True, masked=True, batch=3),
    "scale": Case((9, 8, 8, 7), (9, 8, 8, 7), scale=0.3, head_dim=24),
    "float64": Case((9, 8, 8, 7), (9, 8, 8, 7), dtype=torch.float64, masked=True),
    "head_dim 256": Case((9, 8, 8, 7), (9, 8, 8, 7), head_dim=256),
}

CASES |= {f"{name}, whole mask": replace(case, whole_mask=True) for name, case in CASES.items() if case.masked}


def make(case: Case, num_ranks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Query, key, value and mask of the whole sequence, the same in every process."""
    generator = torch.Generator().manual_seed(5)
    num_queries, num_keys = sum(case.query[:num_ranks]), sum(case.key[:num_ranks])

    def draw(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(case.batch, tokens, heads, case.head_dim, generator=generator, dtype=torch.float64)

    query, key, value = draw(num_queries, case.heads), draw(num_keys, case.kv_heads), draw(num_keys, case.kv_heads)
    mask = None
    if case.masked:
        mask = torch.rand(case.batch, num_keys, generator=generator) < 0.6
        if case.batch > 1:
            mask[0, : case.key[0]] = False  # one rank's keys, all masked for one batch item
        if case.batch > 2:
            mask[2] = False  # a batch item without any key
    return query.to(case.dtype), key.to(case.dtype), value.to(case.dtype), mask


def run_case(
    mesh: ParallelMesh, case: Case, known: bool, head_groups: int | None = None, gather_keys: bool | None = None
) -> torch.Tensor:
    """What one rank does."""
    query, key, value, mask = make(case, mesh.world_size)
    layout = SequenceLayout(case.query[: mesh.world_size], case.key[: mesh.world_size])
    rank = mesh.sequence.rank
    key_mask: torch.Tensor | WholeKeyMask | None = mask
    if mask is not None:
        key_mask = WholeKeyMask(mask, layout.key) if case.whole_mask else mask.split(list(layout.key), dim=1)[rank]
    return sequence_parallel_attention(
        split_tokens(query, layout.query)[rank],
        split_tokens(key, layout.key)[rank],
        split_tokens(value, layout.key)[rank],
        mesh=mesh,
        key_mask=key_mask,
        is_causal=case.causal,
        scale=case.scale,
        layout=layout if known else None,
        head_groups=head_groups,
        gather_keys=gather_keys,
    )


@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS, ids=lambda degree: str(degree))
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks: RankPool, name: str, ulysses: int, ring: int) -> None:
    case = CASES[name]
    query, key, value, mask = make(case, ulysses * ring)
    wanted = attention(query, key, value, key_mask=mask, is_causal=case.causal, scale=case.scale)
    for known in (True, False):
        answers = ranks.run(run_case, case, known, None, not known, ulysses=ulysses, ring=ring)
        got = torch.cat(answers, dim=1)
        assert got.shape == query.shape
        assert got.dtype == case.dtype
        assert not got.isnan().any()
        assert relative_error(got, wanted) <= (1e-13 if case.dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS[1:], ids=lambda degree: str(degree))
@pytest.mark.parametrize(
    ("dtype", "whole_mask"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)]
)
def test_half_precision_is_as_good_as_one_process(
    ranks: RankPool, dtype: torch.dtype, whole_mask: bool, ulysses: int, ring: int
) -> None:
    case = Case((90, 80, 80, 70), (90, 80, 80, 70), heads=6, kv_heads=6, batch=2, masked=True, dtype=dtype)
    case = replace(case, whole_mask=whole_mask)
    query, key, value, mask = make(case, ulysses * ring)
    wanted = attention(query, key, value, key_mask=mask)
    assert mask is not None
    alone = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask[:, None, None]
    ).transpose(1, 2)
    got = torch.cat(ranks.run(run_case, case, True, ulysses=ulysses, ring=ring), dim=1)
    assert got.dtype == dtype
    assert relative_error(got, wanted) <= 1.5 * relative_error(alone, wanted)


def run_zigzag(mesh: ParallelMesh, case: Case, total: int, gather_keys: bool) -> tuple[tuple[int, ...], torch.Tensor]:
    """Causal attention in the zigzag layout; returns the rank's positions and its output."""
    query, key, value, mask = make(case, 1)
    layout = SequenceLayout.zigzag(total, ring=mesh.ring.size, ulysses=mesh.ulysses.size)
    held = list(layout.positions(mesh.sequence.rank))
    out = sequence_parallel_attention(
        query[:, held],
        key[:, held],
        value[:, held],
        mesh=mesh,
        key_mask=None if mask is None else mask[:, held],
        is_causal=True,
        layout=layout,
        gather_keys=gather_keys,
    )
    return tuple(held), out


@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS, ids=lambda degree: str(degree))
@pytest.mark.parametrize(("total", "masked"), [(37, False), (37, True), (5, True), (2, False)])
def test_zigzag_equals_one_process(ranks: RankPool, total: int, masked: bool, ulysses: int, ring: int) -> None:
    case = Case((total,), (total,), heads=6, kv_heads=3, batch=2, masked=masked, causal=True)
    query, key, value, mask = make(case, 1)
    if mask is not None:
        assert not mask[0].any()
    wanted = attention(query, key, value, key_mask=mask, is_causal=True)
    for gather_keys in (True, False):
        got = torch.full_like(query, torch.nan)
        for held, out in ranks.run(run_zigzag, case, total, gather_keys, ulysses=ulysses, ring=ring):
            got[:, list(held)] = out
        assert not got.isnan().any(), "every position is held by one rank"
        assert relative_error(got, wanted) <= 2e-6


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 1), (3, 2), (2, 3), (4, 4)])
@pytest.mark.parametrize("total", [0, 1, 7, 64, 101])
def test_in_zigzag_one_rank_holds_each_token(total: int, ring: int, ulysses: int) -> None:
    layout = SequenceLayout.zigzag(total, ring=ring, ulysses=ulysses)
    held = [layout.positions(rank) for rank in range(ring * ulysses)]
    assert [len(positions) for positions in held] == list(layout.query)
    assert sorted(position for positions in held for position in positions) == list(range(total))
    groups = [[p for u in range(ulysses) for p in held[r * ulysses + u]] for r in range(ring)]
    assert all(group == sorted(group) for group in groups)
    if total >= 64:
        work = [sum(position + 1 for position in group) for group in groups]
        assert max(work) <= 1.2 * min(work)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (2, 2), (3, 1)], ids=lambda degree: str(degree))
@pytest.mark.parametrize("name", ["6 heads", "5 heads, masked", "gqa", "gqa, uneven groups", "mqa", "cross"])
def test_head_groups_change_no_bit(ranks: RankPool, name: str, ulysses: int, ring: int) -> None:
    """Overlapped or not, each head is the same computation."""
    plain = ranks.run(run_case, CASES[name], True, 1, ulysses=ulysses, ring=ring)
    for head_groups in (2, 3):
        grouped = ranks.run(run_case, CASES[name], True, head_groups, ulysses=ulysses, ring=ring)
        assert all(torch.equal(one, other) for one, other in zip(plain, grouped, strict=True))


def plan_of(mesh: ParallelMesh) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """From what a rank decides how an attention is exchanged, but for its own position, and what it decides."""
    with patch("omni_sp.attention.entry._plan", wraps=entry._plan) as plan:
        run_case(mesh, CASES["uneven"], known=True)
    (call,) = plan.call_args_list
    layout, heads, token_bytes, device, degree, _, *options = call.args
    decided = entry._plan(*call.args)
    return (layout, heads, token_bytes, device, degree, *options), (
        decided.groups,
        decided.key_lengths,
        decided.gathers_keys,
    )


def test_ulysses_groups_of_different_length_decide_alike(ranks: RankPool) -> None:
    """Else ring ranks would pass each other blocks of different groups of heads, or wait in different exchanges."""
    assert sum(CASES["uneven"].query[:2]) != sum(CASES["uneven"].query[2:])
    got = ranks.run(plan_of, ulysses=2, ring=2)
    assert all(of_rank == got[0] for of_rank in got)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("device", "most"), [("cpu", 16), ("cuda", 64)])
def test_few_keys_are_gathered_and_many_pass(device: str, most: int, rank: int) -> None:
    """Bytes count, of all ranks along the ring together; those that this rank holds do not."""
    heads, token_bytes = 4, 128
    tokens = (most << 20) // (2 * heads * token_bytes)
    for lengths in ((tokens, 0), (0, tokens), (tokens // 2, tokens - tokens // 2)):
        longer = (lengths[0] + 1, lengths[1])
        for keys, gathers in ((lengths, True), (longer, False)):
            layout = SequenceLayout(lengths, keys)
            plan = entry._plan(layout, (heads, heads), token_bytes, device, 1, rank, None, None)
            assert plan.gathers_keys is gathers
