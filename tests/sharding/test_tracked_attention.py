"""Attention with tracked operands against torch's own on the full tensors."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni_sp.attention import select_strategy
from omni_sp.errors import UnsupportedAttentionError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.forward_context import ShardedForward, activate
from omni_sp.sharding.tracked import TokenTensor, even_placement, local_shard, to_full_tensors, tracked_attention
from omni_sp.sharding.tracked.attention import as_autocast_does
from omni_sp.sharding.tracked.placement import concatenated
from omni_sp.testing.ranks import RankPool

DEGREES = [(2, 1), (1, 2), (2, 2), (3, 1)]


@dataclass(frozen=True)
class Case:
    """An attention.

    Attributes:
        query: its shape (…, heads, tokens, head_dim).
        key: the shape of keys and values; None for that of the query.
        cuts: the dims along which query, key and value are sharded, from the end; None leaves one replicated.
        lengths: of the sequences that query, key and value are concatenated from.
        mask: kind of the mask, see ``mask_of``.
        mask_cut: the dim along which the mask itself is sharded.
        causal: as in torch's attention.
        scale: as in torch's attention.
        gqa: as in torch's attention.
        dtype: of query, key and value.
    """

    query: tuple[int, ...] = (2, 6, 11, 8)
    key: tuple[int, ...] | None = None
    cuts: tuple[int | None, int | None, int | None] = (-2, -2, -2)
    lengths: tuple[tuple[int, ...] | None, ...] = (None, None, None)
    mask: str = "none"
    mask_cut: int | None = None
    causal: bool = False
    scale: float | None = None
    gqa: bool = False
    dtype: torch.dtype = torch.float32


PLAIN = Case()
TEXT = replace(PLAIN, key=(2, 6, 5, 8))
MASKS = [
    "bool keys", "-5 keys", "-10000 keys", "-inf keys", "bool keys, a sample without any",
    "-10000 keys, a sample without any", "-inf keys, a sample without any",
    "bool rows and keys", "bool", "bias", "bias per head", "bias of keys",
]  # fmt: skip
CASES: dict[str, Case] = {
    "no mask": PLAIN,
    "scale": replace(PLAIN, scale=0.7),
    "float64": replace(PLAIN, dtype=torch.float64, mask="bool keys"),
    "causal": replace(PLAIN, causal=True),
    "cross, causal": replace(TEXT, causal=True),
    "gqa": replace(PLAIN, key=(2, 2, 11, 8), gqa=True),
    "gqa, masked": replace(PLAIN, key=(2, 3, 11, 8), gqa=True, mask="bool keys"),
    "gqa, bias": replace(PLAIN, key=(2, 3, 11, 8), gqa=True, mask="bias"),
    "gqa, causal": replace(PLAIN, key=(2, 3, 11, 8), gqa=True, causal=True),
    "gqa, heads cut": replace(PLAIN, key=(2, 3, 11, 8), gqa=True, cuts=(-3, -3, -3)),
    "gqa, heads cut, full keys": replace(PLAIN, key=(2, 2, 11, 8), gqa=True, cuts=(-3, None, None)),
    "mqa, heads cut, full keys": replace(PLAIN, key=(2, 1, 11, 8), gqa=True, cuts=(-3, None, None)),
    "heads cut": replace(PLAIN, cuts=(-3, -3, -3), mask="bias per head"),
    "cross": TEXT,
    "cross to full keys": replace(TEXT, cuts=(-2, None, None)),
    "cross to full keys, causal": replace(TEXT, cuts=(-2, None, None), causal=True),
    "fewer tokens than ranks": replace(PLAIN, query=(2, 6, 2, 8), key=(2, 6, 9, 8)),
    "one query": replace(PLAIN, query=(2, 6, 1, 8), key=(2, 6, 9, 8), mask="bias"),
    "one key": replace(PLAIN, key=(2, 6, 1, 8), mask="bool"),
    "full queries, keys cut": replace(TEXT, cuts=(None, -2, -2)),
    "full queries, keys cut, bias": replace(TEXT, cuts=(None, -2, -2), mask="bias"),
    "only values cut": replace(TEXT, cuts=(None, None, -2)),
    "full values": replace(TEXT, cuts=(-2, -2, None)),
    "full keys, values cut": replace(TEXT, cuts=(-2, None, -2), mask="bool keys"),
    "text and picture": replace(PLAIN, lengths=((4, 7),) * 3, mask="bool keys"),
    "text and picture, bias": replace(PLAIN, lengths=((4, 7),) * 3, mask="bias"),
    "text and picture, causal": replace(PLAIN, lengths=((4, 7),) * 3, causal=True),
    "differing placements": replace(PLAIN, lengths=((4, 7), None, None), mask="bool keys"),
    "keys differ from values": replace(PLAIN, lengths=(None, (4, 7), (7, 4)), mask="bool keys"),
    "keys differ from values, bias": replace(PLAIN, lengths=(None, (4, 7), (7, 4)), mask="bias"),
    "3 dims": replace(PLAIN, query=(6, 11, 8), mask="bias of keys"),
    "3 dims, text": replace(PLAIN, query=(6, 11, 8), key=(6, 5, 8)),
    "3 dims, batch cut": replace(PLAIN, query=(7, 11, 8), cuts=(-3, -3, -3)),
    "5 dims": replace(PLAIN, query=(2, 3, 2, 11, 8), mask="bias of keys"),
    "5 dims, frames cut": replace(PLAIN, query=(2, 5, 3, 4, 8), cuts=(-4, -4, -4), mask="bool"),
    "batch cut": replace(PLAIN, query=(7, 6, 4, 8), cuts=(-4, -4, -4), mask="bool keys"),
    "batch cut, causal": replace(PLAIN, query=(7, 6, 4, 8), cuts=(-4, -4, -4), causal=True),
    "batch cut, fewer than ranks": replace(PLAIN, query=(2, 6, 4, 8), cuts=(-4, -4, -4), mask="bias"),
    "batch cut, full keys": replace(PLAIN, query=(7, 6, 4, 8), cuts=(-4, None, None), mask="bias"),
    "batch cut, keys cut otherwise": replace(PLAIN, query=(7, 6, 4, 8), cuts=(-4, -2, -2), mask="bool keys"),
    "batch cut, mask cut": replace(PLAIN, query=(7, 6, 4, 8), cuts=(-4, -4, -4), mask="bool keys", mask_cut=-4),
    "rows cut, keys' batch cut": replace(PLAIN, cuts=(-2, -4, -4), mask="bool keys"),
    "head_dim cut": replace(PLAIN, cuts=(-1, -1, -1), mask="bool keys"),
    "mask's rows cut": replace(PLAIN, mask="bias", mask_cut=-2),
    "mask's rows cut otherwise": replace(PLAIN, lengths=((4, 7), None, None), mask="bool", mask_cut=-2),
    "mask's keys cut": replace(PLAIN, mask="bias", mask_cut=-1),
    "key mask cut": replace(PLAIN, mask="bool keys", mask_cut=-1),
    "mask's rows cut, queries full": replace(TEXT, cuts=(None, -2, -2), mask="bias", mask_cut=-2),
}
CASES |= {mask: replace(PLAIN, mask=mask) for mask in MASKS}
CASES |= {f"{mask}, expanded": replace(PLAIN, mask=f"{mask}, expanded") for mask in MASKS}
CASES |= {f"cross to full keys, {mask}": replace(TEXT, cuts=(-2, None, None), mask=mask) for mask in MASKS}


def mask_of(case: Case) -> Tensor | None:
    """A mask, the same in every process."""
    kind, _, expanded = case.mask.partition(", expanded")
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(9)
    key = case.key or case.query
    batch, heads, rows, keys = case.query[:-3], case.query[-3], case.query[-2], key[-2]
    small = (*batch, 1, 1, keys)
    full = (*batch, 1, rows, keys)
    if kind.startswith("bias"):
        shape = {"bias": full, "bias per head": (*batch, heads, rows, keys), "bias of keys": small}[kind]
        mask = torch.randn(shape, generator=generator, dtype=case.dtype)
    elif kind == "bool":
        mask = torch.rand(full, generator=generator) < 0.7
        mask[..., 0] = True
    else:
        open_keys = torch.rand(small, generator=generator) < 0.6
        open_keys[..., 1 % keys] = True
        if "without any" in kind:
            open_keys[0] = False
        if kind == "bool rows and keys":
            mask = open_keys & (torch.rand((*batch, 1, rows, 1), generator=generator) < 0.7)
        elif kind.startswith("bool"):
            mask = open_keys
        else:
            shut = float(kind.partition(" ")[0])
            mask = torch.zeros(small, dtype=case.dtype).masked_fill(~open_keys, shut)
    return mask.expand(*batch, heads, rows, keys) if expanded else mask


def sharded(mesh: ParallelMesh, x: Tensor, dim: int | None, lengths: tuple[int, ...] | None = None) -> Tensor:
    """A tensor sharded along a dim (from the end), or tensors that are concatenated, each sharded evenly."""
    if dim is None:
        return x
    dim = x.ndim + dim
    placement = concatenated(tuple(even_placement(length, mesh.sequence.size) for length in lengths or (x.shape[dim],)))
    return TokenTensor(local_shard(x, dim, placement, mesh.sequence).clone(), dim, placement, mesh.sequence)


def opened(mesh: ParallelMesh, stack: ExitStack) -> ShardedForward:
    """A forward such as one that a sharded model runs in, until ``stack`` is closed."""
    forward = ShardedForward(mesh=mesh, strategy=select_strategy("omni_sp", mesh, "auto"), tokens={}, gathers={})
    stack.enter_context(activate(forward))
    return forward


def run_cases(mesh: ParallelMesh, names: list[str], inference: bool) -> dict[str, str]:
    """On one rank: for each case what is wrong with it. The masks of one forward are kept, as in a model."""
    warnings.simplefilter("ignore")
    troubles = {}
    with torch.inference_mode() if inference else torch.no_grad(), ExitStack() as stack:
        opened(mesh, stack)
        for name in names:
            try:
                trouble = run_case(mesh, CASES[name])
            except Exception as error:
                trouble = repr(error)
            if trouble:
                troubles[name] = trouble
    return troubles


def run_case(mesh: ParallelMesh, case: Case) -> str | None:
    generator = torch.Generator().manual_seed(3)
    shapes = case.query, case.key or case.query, case.key or case.query
    tensors = [torch.randn(shape, generator=generator, dtype=case.dtype) for shape in shapes]
    query, key, value = tensors
    mask = mask_of(case)
    attention = partial(F.scaled_dot_product_attention, is_causal=case.causal, scale=case.scale, enable_gqa=case.gqa)
    wanted = attention(query, key, value, attn_mask=mask)
    q, k, v = (sharded(mesh, *given) for given in zip(tensors, case.cuts, case.lengths, strict=True))
    given_mask = mask if mask is None else sharded(mesh, mask, case.mask_cut)
    got = attention(q, k, v, attn_mask=given_mask)
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{got.dtype} {tuple(got.shape)} for {wanted.dtype} {tuple(wanted.shape)}"
    full = to_full_tensors(got)
    if full.shape != wanted.shape:
        return f"shards that make {tuple(full.shape)} for {tuple(wanted.shape)}"
    error = float((full - wanted).abs().max())
    return None if error <= 1e-5 else f"off by {error:.1e}"


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize(("ulysses", "ring"), DEGREES)
def test_equals_attention_over_full_tensors(ranks: RankPool, ulysses: int, ring: int, inference: bool) -> None:
    answers = ranks.run(run_cases, list(CASES), inference, ulysses=ulysses, ring=ring)
    assert answers == [{}] * (ulysses * ring)


def run_others(mesh: ParallelMesh) -> tuple[float, float, list[str]]:
    """As diffusers calls it, a mask that is changed in place between two attentions, and what is refused."""
    case = replace(PLAIN, mask="bool keys")
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(case.query, generator=generator)
    tracked = sharded(mesh, x, -2)
    mask = mask_of(case)
    assert mask is not None
    refused = []
    with torch.no_grad():
        try:
            F.scaled_dot_product_attention(tracked, tracked, tracked)
        except UnsupportedAttentionError as error:
            refused.append(str(error))
        with ExitStack() as stack:
            opened(mesh, stack)
            wanted = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            turned = tracked.transpose(1, 2)
            got = tracked_attention(
                turned, turned, turned, attn_mask=mask[:, 0, 0], is_causal=False, scale=None, enable_gqa=False
            )
            error_of_turned = (to_full_tensors(got).transpose(1, 2) - wanted).abs().max()
            F.scaled_dot_product_attention(tracked, tracked, tracked, attn_mask=mask)
            mask.logical_not_()
            wanted = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            got = F.scaled_dot_product_attention(tracked, tracked, tracked, attn_mask=mask)
            error_of_changed = (to_full_tensors(got) - wanted).abs().max()
            try:
                F.scaled_dot_product_attention(tracked, tracked, tracked, dropout_p=0.1)
            except UnsupportedAttentionError as error:
                refused.append(str(error))
    return float(error_of_turned), float(error_of_changed), refused


def test_mask_changed_in_place_and_what_is_refused(ranks: RankPool) -> None:
    for turned, changed, refused in ranks.run(run_others, ulysses=2):
        assert max(turned, changed) <= 1e-5
        assert "outside of a sharded forward" in refused[0]
        assert "dropout 0.1" in refused[1]


def test_what_autocast_casts() -> None:
    """As torch's attention does; a device without autocast, such as that of tensors without numbers, has none on."""
    assert as_autocast_does(torch.ones(1, device="meta")).dtype == torch.float32
    assert as_autocast_does(torch.ones(1)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        kept = (torch.float64, torch.int64, torch.bfloat16)
        assert as_autocast_does(torch.ones(1)).dtype == torch.bfloat16
        assert [as_autocast_does(torch.ones(1, dtype=dtype)).dtype for dtype in kept] == list(kept)
