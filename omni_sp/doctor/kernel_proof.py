"""Attention kernels on one device against float64: a subset of the conformance suite, and small errors too.

The rounding of bfloat16 hides an error of a thousandth in a norm, but not in the average: rounding has no direction.
So four numbers are looked at: the relative error of all, that of the worst query, how much the result is too large or
too small along the reference, and the error of the log-sum-exp, by which the results of ranks are merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from omni_sp.attention.kernels import AttentionArgs, Kernel, KernelCall, KeyBlock, attend, load_kernel
from omni_sp.attention.kernels.base import unsupported_reason
from omni_sp.attention.kernels.preference import compute_capability
from omni_sp.attention.reference import attention, log_sum_exp, relative_error


@dataclass(frozen=True)
class Case:
    """One attention. Lengths are such that no kernel's tiles divide them.

    Attributes:
        name: for people.
        queries: tokens.
        keys: tokens.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: channels of a head.
        masked: some keys may not be attended.
        causal: each token attends to itself and to earlier ones.
    """

    name: str
    queries: int = 199
    keys: int = 199
    heads: int = 3
    kv_heads: int = 3
    head_dim: int = 128
    masked: bool = False
    causal: bool = False


_RAISES = "it raises"
CASES = (
    Case("uneven", 201, 317),
    Case("one key", 65, 1),
    Case("head_dim 64", 257, 257, head_dim=64),
    Case("grouped heads", 130, 259, heads=4, kv_heads=2),
    Case("causal", causal=True),
    Case("masked", masked=True),
)


@dataclass(frozen=True)
class Limits:
    """The largest errors that a dtype is allowed."""

    relative: float
    worst_query: float
    bias: float
    lse: float


LIMITS = {
    torch.float32: Limits(5e-6, 3e-5, 2e-6, 1e-4),
    torch.bfloat16: Limits(2.0**-7, 2.0**-5, 5e-4, 1e-3),
    torch.float16: Limits(2.0**-10, 2.0**-8, 2e-4, 1e-3),
}
"""Half precision: a unit in the last place for the whole, and four for a query, whose numbers are few."""


@dataclass(frozen=True)
class KernelError:
    """An error that is larger than it may be, or a kernel that failed.

    Attributes:
        kernel: its name.
        dtype: of query, key and value.
        case: which attention.
        text: what is wrong, with its values.
        raises: it gave no numbers, but an error.
    """

    kernel: str
    dtype: str
    case: str
    text: str
    raises: bool = False


def kernel_errors(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> list[KernelError]:
    """What is wrong with a kernel, of the cases that it can serve.

    Args:
        kernel: the kernel.
        device: where it runs.
        dtype: one of `LIMITS`.
    """
    name = str(dtype).removeprefix("torch.")
    return [
        KernelError(kernel.name, name, case.name, text, text.startswith(_RAISES))
        for case in CASES
        if _reason(kernel, case, device, dtype) is None
        for text in _wrong(kernel, case, device, dtype)
    ]


def provable(kernels: Sequence[str], device: torch.device) -> list[tuple[str, torch.dtype]]:
    """The kernels that can run on a device, with each dtype that they take."""
    return [
        (name, dtype)
        for name in kernels
        for dtype in LIMITS
        if _reason(load_kernel(name), CASES[0], device, dtype) is None
    ]


def _reason(kernel: Kernel, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    capability = compute_capability(device)
    tokens = min(case.queries, case.keys)
    call = KernelCall(device.type, dtype, case.head_dim, case.masked, case.causal, tokens, capability)
    return unsupported_reason(kernel, call)


@lru_cache(maxsize=32)
def _problem(
    case: Case, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Query, key and value, mask, and in float64 the output and the log-sum-exp, on the CPU."""
    generator = torch.Generator().manual_seed(7)
    shapes = (case.queries, case.heads), (case.keys, case.kv_heads), (case.keys, case.kv_heads)
    query, key, value = (torch.randn(1, *shape, case.head_dim, generator=generator).to(dtype) for shape in shapes)
    mask = torch.rand(1, case.keys, generator=generator) < 0.7 if case.masked else None
    wanted = attention(query, key, value, key_mask=mask, is_causal=case.causal)
    return (query, key, value), mask, wanted, log_sum_exp(query, key, key_mask=mask, is_causal=case.causal)


def _wrong(kernel: Kernel, case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    (query, key, value), mask, wanted, wanted_lse = _problem(case, dtype)
    args = AttentionArgs(kernel, case.head_dim**-0.5, case.causal)
    block = KeyBlock(key.to(device), value.to(device), None if mask is None else mask.to(device))
    try:
        out, lse = (x.double().cpu() for x in attend(query.to(device), block, args))
    except Exception as error:  # a package may raise anything
        yield f"{_RAISES} {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return
    limits = LIMITS[dtype]
    per_query = (out - wanted).norm(dim=(2, 3)) / wanted.norm(dim=(2, 3))
    for what, found, allowed in (
        ("relative error", relative_error(out, wanted), limits.relative),
        ("relative error of one query", float(per_query.max()), limits.worst_query),
        ("a bias", abs(float((out * wanted).sum() / (wanted * wanted).sum()) - 1), limits.bias),
        ("error of the log-sum-exp", float((lse - wanted_lse).abs().max()), limits.lse),
    ):
        if not found <= allowed:  # also nan
            yield f"{what} of {found:.1e}, allowed are {allowed:.1e}"
            return
