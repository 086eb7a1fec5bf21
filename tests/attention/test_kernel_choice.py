"""Which kernel "auto" takes by device and shape, and what "tune" measures and decides for all ranks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from omni_sp import DiffusionParallelConfig, ParallelMesh, parallelize
from omni_sp.attention import (
    SequenceLayout,
    WholeKeyMask,
    kernel_names,
    sequence_parallel_attention,
    tuned_kernels,
    tuning,
)
from omni_sp.attention.kernels import KernelCall, exact_kernels, preference, registry, select_kernel
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import attention, randomise, relative_error, split_tokens
from tests.sharding.models import CASES

A100, H100, B200, RTX_5090 = (8, 0), (9, 0), (10, 0), (12, 0)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Gives the choice of "auto" on a GPU where some packages are installed, and cuDNN of a version."""

    def choose(
        capability: tuple[int, int] | None,
        *installed: str,
        tokens: int = 4096,
        head_dim: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        key_mask: bool = False,
        causal: bool = False,
        cudnn: int | None = 91002,
    ) -> str:
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(registry, "is_usable", lambda name: name in installed or not name.startswith("flash_attn"))
        registry._preferred_kernel.cache_clear()
        return select_kernel("auto", KernelCall("cuda", dtype, head_dim, key_mask, causal, tokens, capability)).name

    yield choose
    registry._preferred_kernel.cache_clear()


def test_auto_takes_what_published_figures_say(chosen: Any) -> None:
    packages = ("flash_attn_2", "flash_attn_3", "flash_attn_4")
    assert chosen(H100, *packages) == "flash_attn_3"
    assert chosen(H100, *packages, head_dim=256) == "flash_attn_3"
    assert chosen(H100, *packages, causal=True) == "flash_attn_3"
    assert chosen(H100, *packages, tokens=512) == "cuda_cudnn"
    assert chosen(H100, *packages, tokens=256) == "cuda_flash"
    assert chosen(H100) == "cuda_cudnn"
    assert chosen(H100, head_dim=256) == "cuda_flash", "cuDNN takes no such heads"
    assert chosen(H100, *packages, head_dim=36) == "math"
    assert chosen(B200, *packages) == "flash_attn_4"
    assert chosen(B200, *packages, head_dim=80) == "cuda_cudnn"
    assert chosen(B200, *packages, cudnn=91900) == "cuda_cudnn"
    assert chosen((10, 3)) == "cuda_cudnn"
    for other in (A100, (8, 9), RTX_5090, None):
        assert chosen(other, *packages) == "cuda_flash"
    for device in (H100, B200, A100):
        assert chosen(device, *packages, dtype=torch.float32) == "cuda_efficient"
        assert chosen(device, *packages, key_mask=True) == "cuda_efficient"
    assert chosen((7, 5), *packages) == "cuda_efficient", "torch's flash needs Ampere"


def test_the_capability_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: H100 if asked == device else None)
    capability = preference.compute_capability.__wrapped__
    assert capability(device) == H100
    assert capability(torch.device("cpu")) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert capability(device) is None


def test_a_package_that_cannot_be_imported_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "fa3_fwd_interface.py"
    module.write_text("raise OSError('undefined symbol')")
    usable = registry.is_usable.__wrapped__
    assert not usable("flash_attn_3")
    assert "flash_attn_3 is passed over: fa3_fwd_interface cannot be imported" in caplog.text
    module.write_text("")
    assert usable("flash_attn_3")
    del sys.modules["fa3_fwd_interface"]
    assert not usable("flash_attn_4"), "it is not installed"
    assert usable("cpu_flash")


def test_what_approximates_is_never_timed() -> None:
    assert "sage_lossy" not in exact_kernels()
    assert {"cpu_flash", "math", "flash_attn_4"} <= set(exact_kernels())
    assert kernel_names()[:2] == ("auto", "tune")


HEADS, KV_HEADS, HEAD_DIM = 6, 3, 16


def drawn(lengths: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(2, sum(lengths), heads, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def tuned(mesh: ParallelMesh, lengths: tuple[int, ...], causal: bool = False, masked: bool = False) -> Tensor:
    own = (split_tokens(x, lengths)[mesh.sequence.rank] for x in drawn(lengths))
    mask = WholeKeyMask(torch.arange(sum(lengths))[None] > 0, lengths) if masked else None
    layout = SequenceLayout(lengths, lengths)
    return sequence_parallel_attention(*own, mesh=mesh, kernel="tune", layout=layout, is_causal=causal, key_mask=mask)


def tune_as(
    mesh: ParallelMesh, lengths: tuple[int, ...], times: list[dict[str, int]], able: list[set[str]]
) -> tuple[Tensor, list[str], list[int]]:
    """The output, the choice, and after each of three calls how often lengths were exchanged.

    Each rank has times and able kernels of its own.
    """
    tuning._choices.pop(mesh, None)
    mine, exchanges = times[mesh.rank], []

    def time(name: str, *_others: Any) -> int:
        if mine[name] < 0:
            raise RuntimeError("no kernel image is available")
        return mine[name]

    before = mesh.sequence.traffic.calls.get("gather_ints", 0)
    with (
        patch("omni_sp.attention.tuning._time", time),
        patch("omni_sp.attention.tuning.can_serve", lambda name, call: name in able[mesh.rank]),
    ):
        for more in (0, 0, 600):
            out = tuned(mesh, (lengths[0], *lengths[1:-1], lengths[-1] + more))
            exchanges.append(mesh.sequence.traffic.calls.get("gather_ints", 0) - before)
    return out, list(tuned_kernels(mesh).values()), exchanges


BOTH = {"cpu_flash", "math"}
FLASH, MATH = {"cpu_flash": 10, "math": 20}, {"cpu_flash": 20, "math": 10}
DECIDED: dict[str, tuple[list[dict[str, int]], list[set[str]], str]] = {
    "rank 0 finds flash faster": ([FLASH, FLASH], [BOTH, BOTH], "cpu_flash"),
    "rank 0 finds math faster": ([MATH, MATH], [BOTH, BOTH], "math"),
    "rank 1 would find otherwise": ([MATH, FLASH], [BOTH, BOTH], "math"),
    "rank 1 lacks the fastest": ([FLASH, FLASH], [BOTH, {"math"}], "math"),
    "rank 0 lacks the fastest": ([FLASH, FLASH], [{"math"}, BOTH], "math"),
    "one fails": ([{"cpu_flash": -1, "math": 10}, FLASH], [BOTH, BOTH], "math"),
}


@pytest.mark.parametrize("lengths", [(9, 8), (0, 9), (9, 0)], ids=str)
@pytest.mark.parametrize("name", DECIDED)
def test_rank_0_decides_for_all(ranks: RankPool, name: str, lengths: tuple[int, ...]) -> None:
    times, able, wanted = DECIDED[name]
    for ulysses, ring in ((2, 1), (1, 2)):
        answers = ranks.run(tune_as, lengths, times, able, ulysses=ulysses, ring=ring)
        for _, chosen, exchanges in answers:
            assert chosen == [wanted, wanted]
            # One for each shape, and none for a shape that is known.
            assert exchanges == [1, 1, 2]


def really_tuned(mesh: ParallelMesh, lengths: tuple[int, ...]) -> tuple[list[Tensor], list[Any]]:
    tuning._choices.pop(mesh, None)
    outs = [tuned(mesh, lengths), tuned(mesh, lengths, causal=True), tuned(mesh, lengths, masked=True)]
    return outs, list(tuned_kernels(mesh).items())


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("lengths", [(9, 8, 7, 6), (0, 5, 0, 4), (0, 0, 0, 0)], ids=str)
def test_what_is_tuned_is_exact(ranks: RankPool, lengths: tuple[int, ...], ulysses: int, ring: int) -> None:
    lengths = lengths[: ulysses * ring]
    answers = ranks.run(really_tuned, lengths, ulysses=ulysses, ring=ring)
    query, key, value = drawn(lengths)
    mask = (torch.arange(sum(lengths)) > 0).expand(2, -1)
    calls: list[dict[str, Any]] = [{}, {"is_causal": True}, {"key_mask": mask}]
    for number, options in enumerate(calls):
        got = torch.cat([outs[number] for outs, _ in answers], dim=1)
        assert got.shape == query.shape
        if got.numel():
            assert relative_error(got, attention(query, key, value, **options)) <= 2e-6
    choices = answers[0][1]
    assert all(kernel in BOTH for _, kernel in choices)
    assert bool(choices) == bool(sum(lengths))
    assert all(other == choices for _, other in answers)


def test_the_choice_is_said(caplog: pytest.LogCaptureFixture) -> None:
    mesh = ParallelMesh(DiffusionParallelConfig())
    with caplog.at_level(logging.INFO, logger="omni_sp"):
        tuned(mesh, (9,))
    [(shape, kernel)] = tuned_kernels(mesh).items()
    assert (shape.queries, shape.keys, shape.heads, shape.kv_heads) == (16, 16, HEADS, KV_HEADS)
    assert (
        f"attention kernel {kernel} for batch 2, 16 queries x 6 heads, 16 keys x 3 heads, head_dim 16, float32 ("
        in caplog.text
    )


def tuned_model(mesh: ParallelMesh) -> tuple[list[float], set[str]]:
    build, make_inputs = CASES["qwen, two prompts"]
    model, inputs = randomise(build()), make_inputs()
    with torch.no_grad():
        wanted = model(**inputs)[0]
        handle = parallelize(model, mesh, attention_backend="tune")
        errors = [relative_error(model(**inputs)[0], wanted) for _ in range(2)]
        chosen = set(handle.tuned_kernels.values())
        handle.remove()
    return errors, chosen


def test_a_model_takes_the_tuned_kernel(ranks: RankPool) -> None:
    for errors, chosen in ranks.run(tuned_model, ulysses=2):
        assert max(errors) <= 1e-5
        assert chosen
        assert chosen <= BOTH
