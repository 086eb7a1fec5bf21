"""Attention over a distributed KV cache, against float64 attention over the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from omni_sp.attention import SequenceLayout
from omni_sp.attention.distributed_kv import ChunkedPrefillAttention, decode_attention
from omni_sp.mesh import ParallelMesh
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import attention, relative_error, split_tokens


@dataclass(frozen=True)
class Case:
    """A cache of ``cached`` tokens on four ranks, and a chunk behind it."""

    cached: tuple[int, ...]
    chunk: int
    heads: int = 6
    kv_heads: int = 2
    batch: int = 2
    masked: bool = False
    dtype: torch.dtype = torch.float32

    def draw(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Query, key, value and mask of the whole sequence."""
        generator = torch.Generator().manual_seed(7)
        tokens = sum(self.cached[:size]) + self.chunk

        def one(heads: int) -> torch.Tensor:
            return torch.randn(self.batch, tokens, heads, 16, generator=generator).to(self.dtype)

        query, key, value = one(self.heads), one(self.kv_heads), one(self.kv_heads)
        if not self.masked:
            return query, key, value, None
        mask = torch.rand(self.batch, tokens, generator=generator) > 0.3
        # The first batch item begins with padding that reaches into the chunk: some queries see nothing at all.
        mask[0, : tokens - self.chunk + 2] = False
        return query, key, value, mask


CASES = {
    "uneven": Case((5, 9, 4, 7), 23),
    "ranks without keys": Case((0, 9, 0, 7), 23),
    "ranks without queries": Case((5, 9, 4, 7), 3),
    "one query": Case((5, 9, 4, 7), 1, batch=1, heads=1, kv_heads=1),
    "nothing cached": Case((0, 0, 0, 0), 23, kv_heads=6),
    "masked": Case((5, 0, 4, 7), 23, masked=True),
    "float64": Case((5, 9, 4, 7), 23, dtype=torch.float64, masked=True),
}


def on_ranks(mesh: ParallelMesh, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's queries of the chunk, causally; and the last query, which every rank has."""
    axis = mesh.sequence
    whole = case.draw(axis.size)
    layout = SequenceLayout.zigzag(case.chunk, ring=axis.size, ulysses=1)
    cached = sum(case.cached[: axis.size])
    mine = torch.tensor(layout.positions(axis.rank), dtype=torch.int64)

    def held(tensor: torch.Tensor) -> torch.Tensor:
        before = split_tokens(tensor[:, :cached], case.cached[: axis.size])[axis.rank]
        return torch.cat([before, tensor[:, cached:].index_select(1, mine)], dim=1)

    query, key, value, mask = whole
    own = query[:, cached:].index_select(1, mine)
    keys, values, kept = held(key), held(value), None if mask is None else held(mask)
    prefill = ChunkedPrefillAttention(layout, axis, query.device)
    chunk = prefill.attend(own, keys, values, key_mask=kept, scale=0.3)
    return chunk, decode_attention(query[:, -1:], keys, values, axis=axis, key_mask=kept, scale=0.3)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_keys_that_stay_are_attended_to_as_exactly_as_on_one_rank(ranks: RankPool, case: Case, size: int) -> None:
    query, key, value, mask = case.draw(size)
    wanted = attention(query, key, value, key_mask=mask, is_causal=True, scale=0.3)
    limit = 1e-12 if case.dtype == torch.float64 else 2e-6
    layout = SequenceLayout.zigzag(case.chunk, ring=size, ulysses=1)
    chunk = torch.empty_like(query[:, : case.chunk])
    for rank, (own, last) in enumerate(ranks.run(on_ranks, case, ring=size)):
        chunk[:, list(layout.positions(rank))] = own
        assert relative_error(last, wanted[:, -1:]) <= limit
    assert relative_error(chunk, wanted[:, -case.chunk :]) <= limit


def test_bfloat16_is_as_exact_as_one_kernel_in_bfloat16(ranks: RankPool) -> None:
    case = Case((50, 90, 40, 70), 230, dtype=torch.bfloat16)
    query, key, value, _ = case.draw(4)
    wanted = attention(query, key, value, is_causal=True, scale=0.3)[:, -case.chunk :]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    alone = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    alone = alone.transpose(1, 2)[:, -case.chunk :]
    layout = SequenceLayout.zigzag(case.chunk, ring=4, ulysses=1)
    chunk = torch.empty_like(alone)
    for rank, (own, _) in enumerate(ranks.run(on_ranks, case, ring=4)):
        chunk[:, list(layout.positions(rank))] = own
    assert relative_error(chunk, wanted) <= 1.5 * relative_error(alone, wanted)
