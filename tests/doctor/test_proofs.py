"""Kernels that are slightly wrong are found each time: alone, on one rank of many, and in what the doctor says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_sp import ParallelMesh
from omni_sp.attention.kernels import Kernel, load_kernel
from omni_sp.doctor import together
from omni_sp.doctor.kernel_proof import KernelError, kernel_errors, provable
from omni_sp.doctor.rank_proof import SequenceError, StepResult, sequence_errors
from omni_sp.testing.ranks import RankPool

CPU = torch.device("cpu")
GOOD = load_kernel("cpu_flash")


def too_large(out: Tensor, lse: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return out * 1.001, lse


def last_query_wrong(out: Tensor, lse: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    out = out.clone()
    out[:, -1] = out[:, 0]
    return out, lse


def one_head_a_little_off(out: Tensor, lse: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    out = out.clone()
    out[:, :, -1] *= 1.01
    return out, lse


def lse_off(out: Tensor, lse: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return out, lse + 0.01


def base_2(out: Tensor, lse: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return out, lse / 0.6931


def nan_in_one_place(out: Tensor, lse: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    out = out.clone()
    out.view(-1)[7] = torch.nan
    return out, lse


def wrong_when_causal(out: Tensor, lse: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    return (out * 1.002 if is_causal else out), lse


def raises(out: Tensor, lse: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel image is available")


def scores_too_large(out: Tensor, lse: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return out, lse  # see sabotaged()


def sabotaged(change: Any) -> Kernel:
    """A kernel whose result is changed before it is rounded."""
    compute = GOOD.run

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Any:
        scale = scale * 1.005 if change is scores_too_large else scale
        out, lse = compute(query.float(), key.float(), value.float(), mask, is_causal, scale)
        out, lse = change(out, lse, is_causal=is_causal)
        return out.to(query.dtype), lse

    return replace(GOOD, run=run)


SABOTAGES = (
    too_large, last_query_wrong, one_head_a_little_off, lse_off, base_2, nan_in_one_place, wrong_when_causal, raises,
    scores_too_large,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", SABOTAGES, ids=lambda change: change.__name__)
def test_a_wrong_kernel_is_found(change: Any, dtype: torch.dtype) -> None:
    found = kernel_errors(sabotaged(change), CPU, dtype)
    assert found
    assert all(one.raises is (change is raises) for one in found)
    if change is wrong_when_causal:
        assert {one.case for one in found} == {"causal"}


def test_the_kernels_of_the_cpu_are_right() -> None:
    tried = provable(["cpu_flash", "math", "cuda_flash"], CPU)
    assert {name for name, _ in tried} == {"cpu_flash", "math"}
    assert [error for name, dtype in tried[::2] for error in kernel_errors(load_kernel(name), CPU, dtype)] == []


@contextmanager
def kernel_replaced(change: Any) -> Iterator[None]:
    """What this process runs as cpu_flash, while it lasts."""
    before = GOOD.run
    object.__setattr__(GOOD, "run", sabotaged(change).run)
    try:
        yield
    finally:
        object.__setattr__(GOOD, "run", before)


def prove(mesh: ParallelMesh, wrong_rank: int | None) -> list[SequenceError]:
    """What one rank says, of which another one's kernel may be wrong."""
    if mesh.rank != wrong_rank:
        return list(sequence_errors(mesh.world_size, CPU))
    with kernel_replaced(too_large):
        return list(sequence_errors(mesh.world_size, CPU))


def test_attention_over_ranks_is_proven_and_one_wrong_rank_found(ranks: RankPool) -> None:
    (finding,) = together.sequence_findings(ranks.run(prove, None, ulysses=4))
    assert finding.level == "ok"
    assert finding.what.startswith("48 results of ulysses 1 x ring 4, ulysses 2 x ring 2, ulysses 4 x ring 1: equal to")
    (finding,) = together.sequence_findings(ranks.run(prove, 2, ulysses=4))
    assert finding.level == "error"
    assert "are wrong)" in finding.what


def error(rank_text: str = "relative error of 1.0e-03, allowed are 2.0e-06") -> KernelError:
    return KernelError("cuda_flash", "float16", "causal", rank_text)


def test_what_wrong_kernels_mean() -> None:
    tried = ["cuda_flash float16", "math float16"]
    bad, good = together.kernel_findings([(tried, [error()]), (tried, [error()])])
    assert bad.level == "error"
    assert bad.what == (
        "the attention kernel cuda_flash is wrong in float16 on all ranks: causal: relative error of 1.0e-03, allowed "
        "are 2.0e-06"
    )
    assert bad.remedy == (
        "draw with --attention-backend and another kernel than cuda_flash, install another build of it, and report it"
    )
    assert (good.level, good.what) == ("ok", "equal to float64: math float16")
    refused = replace(error("it raises RuntimeError: no kernel image is available"), raises=True)
    bad, _ = together.kernel_findings([(tried, [refused])])
    assert bad.level == "warning"
    assert bad.what.startswith("the attention kernel cuda_flash does not run in float16 on rank 0: causal: it raises")
    bad, _ = together.kernel_findings([(tried, []), (tried, [error()])])
    assert "in float16 on rank 1: causal" in bad.what
    assert bad.remedy.startswith("the other ranks compute it right: leave that GPU out")


def test_what_is_not_the_same_twice() -> None:
    steady = SequenceError("ulysses 2 x ring 1", "causal", 1e-7, 2e-6, True)
    (finding,) = together.sequence_findings([[steady], [replace(steady, repeats=False)]])
    assert (finding.level, finding.what) == (
        "error",
        "ulysses 2 x ring 1, causal: rank 1 gets other bits when it is repeated",
    )
    (finding,) = together.sequence_findings([[replace(steady, error=float("nan"))]])
    assert "off by nan" in finding.what
    right = StepResult({"text": 0.0, "transformer, call 1": 1e-6, "result": 1e-4}, True, False)
    (finding,) = together.step_findings([right, right])
    assert finding.level == "ok"
    (finding,) = together.step_findings([right, replace(right, repeats=False)])
    assert finding.what == "rank 1: two steps, repeated with the same seed, give other bits"
    (finding,) = together.step_findings([right, replace(right, errors={"transformer, call 1": 1e-4})])
    assert finding.what == "transformer, call 1: rank 1 differs from one process by 1.0e-04"
    (finding,) = together.step_findings([replace(right, not_finite=True)])
    assert finding.level == "error"
