"""What the core refuses, and how it counts what it sends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from omni_sp import ConfigError, DiffusionParallelConfig, OmniSPError, ParallelMesh, UnsupportedAttentionError
from omni_sp.attention import (
    SequenceLayout,
    kernel_names,
    local_attention,
    sequence_parallel_attention,
    split_evenly,
)
from omni_sp.attention.kernels import KernelCall, select_kernel
from omni_sp.attention.layout import head_shares
from omni_sp.testing.ranks import RankPool


def error_of(call: Callable[[], Any]) -> str:
    """Class and message of the error of ours that a call raises."""
    try:
        call()
    except OmniSPError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def disagreeing(mesh: ParallelMesh) -> list[str]:
    rank = mesh.rank
    fits = torch.zeros(2, 3, 4, 8)
    mask = torch.ones(2, 3, dtype=torch.bool)
    odd: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (torch.zeros(2 + rank, 3, 4, 8), {}),
        (torch.zeros(2, 3, 4 + 4 * rank, 8), {}),
        (fits.bfloat16() if rank else fits, {}),
        (fits, {"key_mask": mask if rank else None}),
        (fits, {"is_causal": rank == 1}),
        (fits, {"scale": 0.25 if rank else None}),
        (fits, {"head_groups": 2 if rank else None}),
        (fits, {"gather_keys": rank == 1}),
    ]
    return [error_of(partial(sequence_parallel_attention, x, x, x, mesh=mesh, **options)) for x, options in odd]


def test_ranks_that_disagree_raise_alike(ranks: RankPool) -> None:
    differences = {
        "batch": "rank 0: 2, rank 1: 3",
        "heads": "rank 0: 4, rank 1: 8",
        "dtype": "rank 0: torch.float32, rank 1: torch.bfloat16",
        "key_mask": "rank 0: 0, rank 1: 1",
        "is_causal": "rank 0: 0, rank 1: 1",
        "scale": f"rank 0: {8**-0.5}, rank 1: 0.25",
        "head_groups": "rank 0: -1, rank 1: 2",
        "gather_keys": "rank 0: 0, rank 1: 1",
    }
    wanted = [f"ShardingError: the ranks disagree about {x} of one attention: {y}" for x, y in differences.items()]
    assert ranks.run(disagreeing, ulysses=2) == [wanted] * 2


@pytest.fixture
def mesh() -> ParallelMesh:
    """One rank: this process."""
    return ParallelMesh(DiffusionParallelConfig())


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 3, 4), (1, 3, 4), (1, 3, 4)), {}, "all three are"),
        (((1, 3, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8)), {}, "batch and head_dim"),
        (((1, 3, 4, 8), (1, 3, 3, 8), (1, 3, 3, 8)), {}, "4 query heads over 3 key/value heads"),
        (((1, 3, 4, 8), (1, 5, 4, 8), (1, 5, 4, 8)), {"is_causal": True}, "queries and keys of the same tokens"),
        (((1, 3, 4, 8),) * 3, {"key_mask": torch.ones(1, 4, dtype=torch.bool)}, "give bool of shape (1, 3)"),
        (((1, 3, 4, 8),) * 3, {"key_mask": torch.ones(1, 3)}, "give bool"),
        (((1, 3, 4, 8),) * 3, {"kernel": "cuda_flash"}, "runs on cuda, not on cpu; able here: cpu_flash, math"),
        (((1, 3, 4, 8),) * 3, {"key_mask": [[True] * 3]}, "give a tensor, a WholeKeyMask or None"),
        (((1, 3, 4, 8),) * 3, {"scale": "0.5"}, "scale='0.5': give a finite number"),
        (((1, 3, 4, 8),) * 3, {"scale": float("nan")}, "scale=nan: give a finite number"),
        (((1, 3, 4, 8),) * 3, {"is_causal": None}, "is_causal=None: give True or False"),
        (((1, 3, 4, 8),) * 3, {"layout": (3,)}, "give a SequenceLayout"),
        (((1, 3, 4, 8),) * 3, {"head_groups": 0}, "head_groups=0: give a number of groups from 1 on"),
        (((1, 3, 4, 8),) * 3, {"gather_keys": "yes"}, "gather_keys='yes': give True or False"),
        (((1, 3, 4, 8),) * 3, {"kernel": None}, "kernel=None"),
        (((1, 3, 4, 8),) * 3, {"mesh": None}, "mesh=None: give a ParallelMesh"),
        (((1, 3, 4, 8),) * 3, {"kernel": "nonsense"}, "choose from auto, tune, cpu_flash"),
    ],
)
def test_bad_input(
    mesh: ParallelMesh, shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], message: str
) -> None:
    query, key, value = (torch.zeros(shape) for shape in shapes)
    error = error_of(lambda: sequence_parallel_attention(query, key, value, **{"mesh": mesh, **options}))
    assert error.startswith("UnsupportedAttentionError")
    assert message in error


@pytest.mark.parametrize("value", [None, [[[[0.0]]]]])
def test_what_is_no_tensor_is_named(mesh: ParallelMesh, value: Any) -> None:
    x = torch.zeros(1, 3, 4, 8)
    for given, name in (((value, x, x), "query"), ((x, value, x), "key"), ((x, x, value), "value")):
        for call in (partial(sequence_parallel_attention, mesh=mesh), local_attention):
            assert error_of(partial(call, *given)) == f"UnsupportedAttentionError: {name}={value}: give a tensor"


def test_dtypes_must_be_alike(mesh: ParallelMesh) -> None:
    x = torch.zeros(1, 3, 4, 8)
    assert "float16 for all three" in error_of(lambda: sequence_parallel_attention(x, x.half(), x, mesh=mesh))
    assert "float16 for all three" in error_of(lambda: sequence_parallel_attention(*[x.int()] * 3, mesh=mesh))


def test_gradients_are_refused(mesh: ParallelMesh) -> None:
    x = torch.zeros(1, 3, 4, 8, requires_grad=True)
    with pytest.raises(UnsupportedAttentionError, match="no_grad"):
        sequence_parallel_attention(x, x, x, mesh=mesh)


def test_a_wrong_layout_is_refused(mesh: ParallelMesh) -> None:
    x = torch.zeros(1, 3, 4, 8)
    error = error_of(lambda: sequence_parallel_attention(x, x, x, mesh=mesh, layout=SequenceLayout((4,), (3,))))
    assert "holds (3, 3) query and key tokens, its layout says (4, 3)" in error
    error = error_of(lambda: sequence_parallel_attention(x, x, x, mesh=mesh, layout=SequenceLayout((3, 3), (3, 3))))
    assert "speaks of 2 ranks, the mesh has 1" in error


def test_a_mesh_needs_its_ranks() -> None:
    with pytest.raises(ConfigError, match=r"2 × ring_degree 2 = 4 ranks, but torch.distributed is not initialised"):
        ParallelMesh(DiffusionParallelConfig(ulysses_degree=2, ring_degree=2))


def axes(mesh: ParallelMesh) -> tuple[tuple[int, ...], tuple[int, ...], int, int, str]:
    error = error_of(lambda: ParallelMesh(DiffusionParallelConfig(ulysses_degree=3)))
    return mesh.ulysses.ranks, mesh.ring.ranks, mesh.ulysses.rank, mesh.ring.rank, error


def test_ulysses_ranks_are_neighbours(ranks: RankPool) -> None:
    got = ranks.run(axes, ulysses=2, ring=2)
    assert [entry[:4] for entry in got] == [
        ((0, 1), (0, 2), 0, 0),
        ((0, 1), (1, 3), 1, 0),
        ((2, 3), (0, 2), 0, 1),
        ((2, 3), (1, 3), 1, 1),
    ]
    assert all("= 3 ranks, but torch.distributed runs 4" in entry[4] for entry in got)


def sent(mesh: ParallelMesh, lengths: tuple[int, ...], heads: int, gather_keys: bool) -> tuple[dict[str, int], ...]:
    x = torch.zeros(1, lengths[mesh.rank], heads, 8)
    for axis in (mesh.ulysses, mesh.ring, mesh.sequence):
        axis.traffic.reset()
    sequence_parallel_attention(x, x, x, mesh=mesh, layout=SequenceLayout(lengths, lengths), gather_keys=gather_keys)
    assert not mesh.sequence.traffic.calls, "a known layout needs no exchange"
    return mesh.ulysses.traffic.calls, mesh.ulysses.traffic.bytes, mesh.ring.traffic.bytes


@pytest.mark.parametrize(("gather_keys", "kind"), [(True, "gather"), (False, "shift")])
def test_bytes_are_what_the_layout_says(ranks: RankPool, gather_keys: bool, kind: str) -> None:
    lengths, heads, width = (5, 4, 4, 3), 3, 8 * 4
    for rank, (calls, ulysses, ring) in enumerate(ranks.run(sent, lengths, heads, gather_keys, ulysses=2, ring=2)):
        mine, other = (2, 1) if rank % 2 == 0 else (1, 2)
        neighbour = rank ^ 1
        assert calls == {"exchange": 2}
        assert ulysses == {"exchange": (lengths[rank] * 3 * other + lengths[neighbour] * mine) * width}
        assert ring == {kind: (lengths[rank] + lengths[neighbour]) * 2 * mine * width}


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_split_evenly_is_tensor_split(parts: int) -> None:
    for total in (0, 1, 3, 12, 13):
        assert split_evenly(total, parts) == tuple(map(len, torch.arange(total).tensor_split(parts)))


def test_head_shares_cover_every_head_once() -> None:
    for heads, kv_heads, degree in [(6, 6, 4), (8, 2, 3), (9, 3, 2), (1, 1, 4), (32, 1, 5), (12, 4, 7)]:
        got = head_shares(heads, kv_heads, degree)[0]
        owned = []
        for share in got:
            repeats = share.num_query // share.num_key if share.num_key else 0
            index = share.key_of_query or tuple(n // repeats for n in range(share.num_query))
            owned += [(share.query[0] + n, share.key[0] + kv) for n, kv in enumerate(index)]
        assert owned == [(head, head // (heads // kv_heads)) for head in range(heads)]


def test_auto_finds_a_kernel_for_every_device() -> None:
    def chosen(device: str, dtype: torch.dtype, head_dim: int = 64, *, mask: bool = False) -> str:
        return select_kernel("auto", KernelCall(device, dtype, head_dim, mask, False)).name

    assert chosen("cpu", torch.float32, mask=True) == "cpu_flash"
    assert chosen("cuda", torch.bfloat16) == "cuda_flash"
    assert chosen("cuda", torch.bfloat16, mask=True) == "cuda_efficient"
    assert chosen("cuda", torch.float32, 36) == "math"
    assert kernel_names()[:2] == ("auto", "tune")
    with pytest.raises(UnsupportedAttentionError, match="no kernel can serve"):
        select_kernel("auto", KernelCall("meta", torch.float32, 64, False, False))


@pytest.mark.parametrize("kernel", ["cpu_flash", "math"])
def test_kernels_agree_on_queries_without_a_key(mesh: ParallelMesh, kernel: str) -> None:
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 2:] = True
    out = sequence_parallel_attention(x, x, x, mesh=mesh, key_mask=mask, is_causal=True, kernel=kernel)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(out[1, :2], torch.zeros_like(out[1, :2]))
    assert torch.allclose(out[1, 2], x[1, 2])
