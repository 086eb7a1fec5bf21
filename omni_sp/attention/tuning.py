"""kernel="tune": the kernels that can serve an attention are timed, once for each shape, and the fastest one runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from omni_sp.attention.kernels import (
    AttentionArgs,
    KeyBlock,
    attend,
    can_serve,
    exact_kernels,
    kernel_call,
    load_kernel,
)
from omni_sp.attention.layout import SequenceLayout, head_shares
from omni_sp.collectives import gather_ints
from omni_sp.mesh import ParallelMesh

_log = logging.getLogger(__name__)
_STEP = 512
"""Numbers of tokens are rounded up to multiples of it, so that a prompt of another length is not another shape."""
_ROUNDS = 5
_MAX_SCORES_OF_MATH = 1 << 26
"""Where there are more, plain torch is far slower than all others, and is not waited for."""


@dataclass(frozen=True)
class TunedShape:
    """The largest attention that one rank computes, the same for all ranks.

    Attributes:
        batch: number of rows.
        queries: number of query tokens, rounded up.
        keys: number of key tokens, rounded up.
        heads: number of query heads.
        kv_heads: number of key/value heads.
        head_dim: channels of a head.
        dtype: of query, key and value.
        key_mask: whether there is a mask.
        causal: whether each token attends to itself and to earlier tokens only.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    key_mask: bool
    causal: bool

    def __str__(self) -> str:
        kind = f"{', masked' if self.key_mask else ''}{', causal' if self.causal else ''}"
        return (
            f"batch {self.batch}, {self.queries} queries x {self.heads} heads, {self.keys} keys x {self.kv_heads} "
            f"heads, head_dim {self.head_dim}, {str(self.dtype).removeprefix('torch.')}{kind}"
        )


_choices: WeakKeyDictionary[ParallelMesh, dict[TunedShape, str]] = WeakKeyDictionary()


def tuned_kernels(mesh: ParallelMesh) -> dict[TunedShape, str]:
    """What ``kernel="tune"`` chose so far, by shape.

    Args:
        mesh: the ranks.
    """
    return dict(_choices.get(mesh, {}))


def tuned_kernel(
    query: torch.Tensor, block: KeyBlock, layout: SequenceLayout, mesh: ParallelMesh, *, is_causal: bool
) -> str:
    """The fastest kernel for an attention over all ranks. All ranks call it, and all get the same name.

    The shape follows from the layout, which all ranks know, so that all have timed it or none has. Rank 0 times, one
    exchange brings its times to all, and what some rank lacks is not taken.

    Args:
        query: (batch, q_tokens, heads, head_dim), this rank's.
        block: this rank's keys.
        layout: the tokens of all ranks.
    """
    degree, ranks = mesh.ulysses.size, range(0, mesh.sequence.size, mesh.ulysses.size)
    queries, keys = (max(sum(x[start : start + degree]) for start in ranks) for x in (layout.query, layout.key))
    if queries == 0 or keys == 0:
        return "auto"  # nothing is computed
    share = head_shares(query.shape[2], block.key.shape[2], degree)[0][0]
    shape = TunedShape(
        query.shape[0],
        _rounded(queries),
        _rounded(keys),
        share.num_query,
        share.num_query if share.key_of_query is not None else share.num_key,
        query.shape[3],
        query.dtype,
        block.mask is not None,
        is_causal,
    )
    chosen = _choices.setdefault(mesh, {})
    if shape not in chosen:
        chosen[shape] = _choose(shape, query, block, mesh)
    return chosen[shape]


def _choose(shape: TunedShape, query: torch.Tensor, block: KeyBlock, mesh: ParallelMesh) -> str:
    call = kernel_call(query, block.mask, is_causal=shape.causal, num_tokens=min(shape.queries, shape.keys))
    names = exact_kernels()
    own = {name: 0 for name in names if can_serve(name, call)}
    if mesh.sequence.rank == 0:
        own = kernel_times(shape, list(own), query.device)
    per_rank = gather_ints([own.get(name, -1) for name in names], mesh.sequence)
    times = dict(zip(names, per_rank[0], strict=True))
    able = [name for name, own_times in zip(names, zip(*per_rank, strict=True), strict=True) if min(own_times) >= 0]
    if not able:
        return "auto"
    fastest = min(able, key=lambda name: times[name])
    if mesh.sequence.rank == 0:
        timed = ", ".join(f"{name} {times[name] / 1e6:.3g} ms" for name in sorted(able, key=lambda name: times[name]))
        _log.info("attention kernel %s for %s (%s)", fastest, shape, timed)
    return fastest


def _rounded(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length() if tokens < _STEP else -(-tokens // _STEP) * _STEP


def kernel_times(shape: TunedShape, names: list[str], device: torch.device) -> dict[str, int]:
    """Nanoseconds of each kernel, by name; one that fails is left out.

    Args:
        shape: the attention.
        names: kernels that can serve it.
        device: where they run.
    """
    times: dict[str, int] = {}
    for name in names:
        scores = shape.batch * shape.heads * shape.queries * shape.keys
        if name == "math" and times and scores > _MAX_SCORES_OF_MATH:
            continue
        try:
            times[name] = _time(name, shape, device)
        except Exception as error:  # a package may raise anything
            _log.warning("the attention kernel %s is passed over: %r", name, error)
    return times


def _time(name: str, shape: TunedShape, device: torch.device) -> int:
    """Nanoseconds of a kernel, the least of some runs."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(shape.batch, tokens, heads, shape.head_dim, dtype=shape.dtype, device=device, generator=generator)
        for tokens, heads in ((shape.queries, shape.heads), *((shape.keys, shape.kv_heads),) * 2)
    )
    mask = torch.ones(shape.batch, shape.keys, dtype=torch.bool, device=device) if shape.key_mask else None
    args = AttentionArgs(load_kernel(name), shape.head_dim**-0.5, shape.causal)

    def run() -> None:
        attend(query, KeyBlock(key, value, mask), args)

    run()  # it may compile or plan
    return min(run_time(run, device) for _ in range(_ROUNDS))


def run_time(run: Callable[[], object], device: torch.device) -> int:
    """Nanoseconds that something takes, on a GPU by the GPU's own clock.

    Args:
        run: what it is.
        device: where it runs.
    """
    if device.type != "cuda":
        began = time.perf_counter_ns()
        run()
        return time.perf_counter_ns() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return int(start.elapsed_time(end) * 1e6)
