"""Random programs on tensors in pieces against the same programs on whole tensors, on two and three ranks.

All numbers are small whole ones (what is computed inexactly is rounded), so everything must be equal, not just close.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_sp.errors import ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.tracked import Spans, TokenTensor, cut, dealt_evenly, unwrapped
from omni_sp.sharding.tracked.spans import joined
from tests.ranks import RankPool

Step = tuple[str, int, int, int, int]
"""An operation, the numbers of two tensors, and two numbers for it to use as it likes."""
Op = Callable[[Tensor, Tensor, int, int], Any]
SLOTS = 12


def tidy(x: Tensor) -> Tensor:
    """Small whole numbers out of any."""
    return (x * 7.31913).round().remainder(17)


def at(x: Tensor, dim: int, index: Any) -> tuple[Any, ...]:
    """An index for one dim."""
    return (slice(None),) * (dim % x.ndim) + (index,)


def some(x: Tensor, p: int, q: int) -> tuple[int, int, int]:
    """A dim of a tensor, and a start and a length in it."""
    dim = p % x.ndim
    start = q % x.shape[dim]
    return dim, start, max((x.shape[dim] - start) // 2, 1)


def rotated(x: Tensor, p: int) -> list[int]:
    return [(dim + p) % x.ndim for dim in range(x.ndim)]


def weight(x: Tensor, rows: int) -> Tensor:
    """Whole numbers for a linear layer, the same everywhere."""
    size = x.shape[-1]
    return torch.arange(rows * size, dtype=x.dtype).view(rows, size).remainder(5)


def each(x: Tensor, size: int) -> Tensor:
    """Indices from 0 below ``size``, as many as ``x`` has numbers."""
    return x.long().remainder(size)


def as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def normal(x: Tensor, p: int) -> Tensor:
    groups = F.group_norm(x.flatten(2).movedim(1, -1), x.shape[-1])
    return [groups, F.layer_norm(x, x.shape[-2:]), F.rms_norm(x, x.shape[-1:])][p % 3]


COMPUTE: dict[str, Op] = {
    "add": lambda x, y, p, q: x + y,
    "mul": lambda x, y, p, q: tidy(x * y),
    "rsub": lambda x, y, p, q: p - x,
    "maximum": lambda x, y, p, q: torch.maximum(x, y),
    "ge": lambda x, y, p, q: x >= y,
    "where": lambda x, y, p, q: torch.where(x > y, x, y + 1),
    "where number": lambda x, y, p, q: torch.where(x > p, x, -1.0),
    "masked_fill": lambda x, y, p, q: x.masked_fill(x > p, q),
    "masked_fill other": lambda x, y, p, q: x.masked_fill(y > p, q),
    "addcmul": lambda x, y, p, q: tidy(torch.addcmul(x, y, y, value=2)),
    "lerp": lambda x, y, p, q: tidy(torch.lerp(x, y, 0.3)),
    "sin": lambda x, y, p, q: tidy(x.sin()),
    "clamp": lambda x, y, p, q: x.clamp(-p, q),
    "clamp other": lambda x, y, p, q: x.clamp(min=y),
    "with a row": lambda x, y, p, q: x + torch.arange(x.shape[-1 - p % x.ndim]).view(-1, *[1] * (p % x.ndim)),
    "double": lambda x, y, p, q: x.double(),
    "float": lambda x, y, p, q: x.float(),
    "long": lambda x, y, p, q: x.long(),
    "type_as": lambda x, y, p, q: x.type_as(y),
    "to": lambda x, y, p, q: x.to(y.dtype, copy=bool(p % 2)),
    "softmax": lambda x, y, p, q: tidy(x.softmax(p % x.ndim)),
    "cumsum": lambda x, y, p, q: x.cumsum(p % x.ndim).remainder(17),
    "sort": lambda x, y, p, q: x.sort(p % x.ndim, stable=True),
    "topk": lambda x, y, p, q: x.topk(min(2, x.shape[p % x.ndim]), p % x.ndim)[0],
    "sum": lambda x, y, p, q: x.sum(p % x.ndim, keepdim=bool(q % 2)).remainder(17),
    "sum of two": lambda x, y, p, q: x.sum((p % x.ndim, -1 - (p + 1) % x.ndim), keepdim=bool(q % 2)).remainder(17),
    "sum of all": lambda x, y, p, q: y + x.sum().remainder(17),
    "mean": lambda x, y, p, q: tidy(x.mean(p % x.ndim, keepdim=bool(q % 2))),
    "var": lambda x, y, p, q: tidy(x.var(p % x.ndim, keepdim=bool(q % 2), correction=0)),
    "norm": lambda x, y, p, q: tidy(torch.linalg.vector_norm(x, dim=p % x.ndim)),
    "amax": lambda x, y, p, q: x.amax(p % x.ndim, keepdim=bool(q % 2)),
    "max": lambda x, y, p, q: x.max(p % x.ndim),
    "argmax": lambda x, y, p, q: x.argmax(p % x.ndim, keepdim=bool(q % 2)),
    "any": lambda x, y, p, q: (x > p).any(q % x.ndim),
    "matmul": lambda x, y, p, q: tidy(x @ y),
    "matmul turned": lambda x, y, p, q: tidy(x @ y.mT),
    "state": lambda x, y, p, q: tidy(x.mT @ y),
    "bmm": lambda x, y, p, q: tidy(torch.bmm(x, y.mT)),
    "baddbmm": lambda x, y, p, q: tidy(torch.baddbmm(x @ y.mT, x, y.mT, beta=p % 2, alpha=2)),
    "einsum": lambda x, y, p, q: tidy(torch.einsum(["bic,bjc->bij", "bic,bid->bcd", "bic,bjc->ij"][p % 3], x, y)),
    "linear": lambda x, y, p, q: tidy(F.linear(x, weight(x, 4), torch.arange(4, dtype=x.dtype))),
    "addmm": lambda x, y, p, q: tidy(torch.addmm(torch.ones(4, dtype=x.dtype), x, weight(x, 4).T)),
    "normal": lambda x, y, p, q: tidy(normal(x, p)),
    "conv": lambda x, y, p, q: tidy(
        F.conv1d(x.movedim(1, 2) if p % 2 else x, torch.ones(2, x.shape[2 - p % 2], 3, dtype=x.dtype), padding=1)
    ),
    "item": lambda x, y, p, q: y + x.reshape(-1)[q].item(),
    "rope": lambda x, y, p, q: tidy(torch.view_as_real(as_complex(x) * (1 + 2j)).flatten(-2)),
    "attention": lambda x, y, p, q: tidy(
        (x.unflatten(-1, (2, -1)).transpose(-2, -3) @ y.unflatten(-1, (2, -1)).transpose(-2, -3).mT).softmax(-1)
    ),
    "like": lambda x, y, p, q: [torch.zeros_like, torch.ones_like, torch.empty_like][p % 3](x).fill_(q),
    "new": lambda x, y, p, q: x.new_full((x.shape[-1],), q),
}
MOVE: dict[str, Op] = {
    "chunk": lambda x, y, p, q: x.chunk(1 + q % 4, p % x.ndim),
    "split": lambda x, y, p, q: x.split(1 + q % 4, p % x.ndim),
    "split sizes": lambda x, y, p, q: x.split([q % 3, x.shape[p % x.ndim] - q % 3], p % x.ndim),
    "unbind": lambda x, y, p, q: x.unbind(p % x.ndim),
    "narrow": lambda x, y, p, q: x.narrow(*some(x, p, q)),
    "narrow from behind": lambda x, y, p, q: x.narrow(p % x.ndim, -1 - q % 3, 1),
    "slice": lambda x, y, p, q: x[at(x, p, slice(q % 4, -(q // 2) or None))],
    "steps": lambda x, y, p, q: x[at(x, p, slice(q % 2, None, 2))],
    "select": lambda x, y, p, q: x.select(p % x.ndim, -1 - q % x.shape[p % x.ndim]),
    "none": lambda x, y, p, q: x[:, None, ..., q % x.shape[-1]],
    "flip": lambda x, y, p, q: x.flip(p % x.ndim, q % x.ndim) if p % x.ndim != q % x.ndim else x.flip(p % x.ndim),
    "roll": lambda x, y, p, q: x.roll(1 + q, p % x.ndim),
    "roll all": lambda x, y, p, q: x.roll(1 + q),
    "pad": lambda x, y, p, q: F.pad(x, [q % 2, 1, 0, p % 3][: 2 * x.ndim], value=p),
    "pad tokens": lambda x, y, p, q: F.pad(x, [0, 0, 0, p % 3, 0, q % 2][: 2 * x.ndim]),
    "cat": lambda x, y, p, q: torch.cat([x, y], p % x.ndim),
    "cat three": lambda x, y, p, q: torch.cat([y, x, y], p % x.ndim),
    "stack": lambda x, y, p, q: torch.stack([x, y], p % (x.ndim + 1)),
    "repeat": lambda x, y, p, q: x.repeat(*[1] * (q % 2), *[1 + (p % x.ndim == dim) for dim in range(x.ndim)]),
    "repeat_interleave": lambda x, y, p, q: x.repeat_interleave(2, p % x.ndim),
    "repeat_interleave by": lambda x, y, p, q: x.repeat_interleave(
        torch.arange(x.shape[p % x.ndim]).remainder(3), p % x.ndim
    ),
    "expand": lambda x, y, p, q: x.expand(1 + q % 2, *[-1] * x.ndim),
    "expand_as": lambda x, y, p, q: x.expand_as(y),
    "unsqueeze": lambda x, y, p, q: x.unsqueeze(p % (x.ndim + 1)),
    "squeeze": lambda x, y, p, q: x.squeeze(p % x.ndim) if q % 2 else x.squeeze(),
    "permute": lambda x, y, p, q: x.permute(rotated(x, p)),
    "transpose": lambda x, y, p, q: x.transpose(p % x.ndim, q % x.ndim),
    "movedim": lambda x, y, p, q: x.movedim(p % x.ndim, q % x.ndim),
    "flatten": lambda x, y, p, q: x.flatten(p % x.ndim, max(p % x.ndim, q % x.ndim)),
    "unflatten": lambda x, y, p, q: x.unflatten(p % x.ndim, (-1, 1 + q % 3) if q % 2 else (1 + q % 3, -1)),
    "reshape": lambda x, y, p, q: x.reshape(-1, *x.shape[2:]) if p % 2 else x.reshape(x.shape[0], -1),
    "reshape back": lambda x, y, p, q: x.reshape(2, -1, 4) if p % 2 else x.reshape(-1, 7, 4),
    "reshape as turned": lambda x, y, p, q: x.reshape([x.shape[dim] for dim in rotated(x, p)]),
    "view": lambda x, y, p, q: x.view(-1, x.shape[-1]) if p % 2 else x.view(*x.shape[:-1], -1, 2),
    "complex": lambda x, y, p, q: torch.view_as_real(as_complex(x)),
    "contiguous": lambda x, y, p, q: x.contiguous(),
    "clone": lambda x, y, p, q: x.clone(),
    "detach": lambda x, y, p, q: x.detach(),
    "diagonal": lambda x, y, p, q: x.diagonal(0, p % x.ndim, q % x.ndim),
    "unfold": lambda x, y, p, q: x.unfold(p % x.ndim, 2, 1 + q % 2),
    "mask": lambda x, y, p, q: x[x > p],
    "mask of tokens": lambda x, y, p, q: x[y.reshape(-1)[: x.shape[0]] > p],
    "indices": lambda x, y, p, q: x[at(x, p, torch.tensor([q % 2, 0, 1]))],
    "index_select": lambda x, y, p, q: x.index_select(p % x.ndim, torch.tensor([0, q % x.shape[p % x.ndim], 0])),
    "gather": lambda x, y, p, q: x.gather(p % x.ndim, each(x, x.shape[p % x.ndim])),
    "gather other": lambda x, y, p, q: x.gather(p % x.ndim, each(y, x.shape[p % x.ndim])),
    "scatter": lambda x, y, p, q: torch.zeros_like(x).scatter(p % x.ndim, each(x, x.shape[p % x.ndim]), 1.0 + q),
    "embedding": lambda x, y, p, q: F.embedding(each(x, 5), weight(torch.zeros(3), 5).double()),
    "nonzero": lambda x, y, p, q: torch.where(x > p)[0],
}
WRITE: dict[str, Op] = {
    "add_": lambda x, y, p, q: x.add_(y, alpha=1 + p % 2).remainder_(17),
    "mul_": lambda x, y, p, q: x.mul_(p).remainder_(17),
    "copy_": lambda x, y, p, q: x.copy_(y),
    "copy_ flipped": lambda x, y, p, q: x.copy_(x.flip(p % x.ndim)),
    "clamp_": lambda x, y, p, q: x.clamp_(max=p),
    "masked_fill_": lambda x, y, p, q: x.masked_fill_(y > p, q),
    "cumsum_": lambda x, y, p, q: x.cumsum_(p % x.ndim).remainder_(17),
    "zero_ part": lambda x, y, p, q: x.narrow(*some(x, p, q)).zero_(),
    "slice = number": lambda x, y, p, q: x.__setitem__(at(x, p, slice(q % 3, q % 3 + 2)), p),
    "slice = part": lambda x, y, p, q: x.__setitem__(at(x, p, slice(1, 3)), y.narrow(p % x.ndim, q % 3, 2)),
    "slice += number": lambda x, y, p, q: x.narrow(*some(x, p, q)).add_(1),
    "steps = number": lambda x, y, p, q: x.__setitem__(at(x, p, slice(q % 2, None, 2)), p),
    "index = number": lambda x, y, p, q: x.__setitem__(at(x, p, q % x.shape[p % x.ndim]), p),
    "index = row": lambda x, y, p, q: x.__setitem__(at(x, p, q % x.shape[p % x.ndim]), y.select(p % x.ndim, 0)),
    "select mul_": lambda x, y, p, q: x.select(p % x.ndim, q % x.shape[p % x.ndim]).mul_(2).remainder_(17),
    "unbind add_": lambda x, y, p, q: x.unbind(p % x.ndim)[0].add_(1),
    "flat add_": lambda x, y, p, q: x.view(-1).add_(1),
    "reshaped add_": lambda x, y, p, q: x.reshape(-1, x.shape[-1]).add_(1),
    "turned contiguous add_": lambda x, y, p, q: x.permute(rotated(x, p)).contiguous().add_(1),
    "complex mul_": lambda x, y, p, q: as_complex(x).mul_(1 - 1j),
    "mask = number": lambda x, y, p, q: x.__setitem__(x > p, q),
    "indices = number": lambda x, y, p, q: x.__setitem__(at(x, p, torch.tensor([1, 0])), q),
    "scatter_": lambda x, y, p, q: x.scatter_(p % x.ndim, each(y, x.shape[p % x.ndim]), 1.0 + q),
    "index_add_": lambda x, y, p, q: x.index_add_(p % x.ndim, torch.arange(x.shape[p % x.ndim]).flip(0), x.clone()),
    "index_copy_ of itself": lambda x, y, p, q: x.index_copy_(
        p % x.ndim, torch.arange(2), x.narrow(p % x.ndim, x.shape[p % x.ndim] - 2, 2).clone()
    ),
    "masked_scatter_ of itself": lambda x, y, p, q: x.masked_scatter_(x > p, x),
    "foreach": lambda x, y, p, q: torch._foreach_add_([x], 1),
    "add out": lambda x, y, p, q: torch.add(x, y, out=x),
    "cumsum out": lambda x, y, p, q: torch.cumsum(x, p % x.ndim, out=y),
    "transpose_": lambda x, y, p, q: x.clone().transpose_(p % x.ndim, q % x.ndim).add_(1),
}
OPS = COMPUTE | MOVE | WRITE
EXTRA = 5
"""The last slots take what the operations give."""


def whole_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).double()


def pieces(mesh: ParallelMesh, x: Tensor, dim: int, *lengths: int) -> TokenTensor:
    """A tensor in pieces. Several lengths: one row behind the other, each dealt out evenly."""
    spans = joined(tuple(dealt_evenly(length, mesh.sequence.size) for length in lengths or (x.shape[dim],)))
    return TokenTensor(cut(x, dim, spans, mesh.sequence).clone(), dim, spans, mesh.sequence)


def tensors(mesh: ParallelMesh) -> tuple[list[Tensor], list[Tensor]]:
    """What a program starts with: whole, and with most of it in pieces."""
    shapes = [(2, 7, 4), (2, 7, 4), (2, 7, 4), (7, 4), (2, 7, 1), (4,), (2, 1, 4), (3, 2, 5, 4), (4, 7), (2, 7, 4)]
    plain = [whole_numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    cuts = {0: (1,), 1: (1, 3, 4), 3: (0,), 4: (1,), 6: (1,), 7: (2,), 8: (1,)}
    tracked = [pieces(mesh, x, *cuts[i]) if i in cuts else x.clone() for i, x in enumerate(plain)]
    plain += [plain[3][2:5], plain[7].transpose(1, 2)]
    tracked += [tracked[3][2:5], tracked[7].transpose(1, 2)]
    assert len(plain) == SLOTS
    return plain, tracked


def differ(plain: Tensor, tracked: Tensor) -> str | None:
    """What is not the same about a tensor and its twin. A collective call."""
    if (plain.shape, plain.dtype) != (tracked.shape, tracked.dtype):
        return f"{tracked.dtype} {tuple(tracked.shape)} for {plain.dtype} {tuple(plain.shape)}"
    whole = unwrapped(tracked)
    if whole.shape != plain.shape:
        return f"pieces that make {tuple(whole.shape)} for {tuple(plain.shape)}"
    if torch.equal(whole, plain) or torch.allclose(whole, plain, rtol=0, atol=0, equal_nan=True):
        return None
    return f"wrong numbers: {int((whole != plain).sum())} of {plain.numel()}"


def mode(inference: bool) -> AbstractContextManager[Any]:
    return torch.inference_mode() if inference else torch.no_grad()


def run_program(mesh: ParallelMesh, program: list[Step], inference: bool) -> tuple[list[str], list[str]]:
    """On one rank: what went wrong, and what was refused (and left undone on both sides)."""
    warnings.simplefilter("ignore")
    with mode(inference):
        return _run(program, *tensors(mesh))


def _run(program: list[Step], plain: list[Tensor], tracked: list[Tensor]) -> tuple[list[str], list[str]]:
    refused: list[str] = []
    for number, (name, a, b, p, q) in enumerate(program):
        before = [x.clone() for x in plain]
        shown = [f"{type(x[i]).__name__}{tuple(x[i].shape)}" for x in (tracked,) for i in (a, b)]
        step = f"step {number}: {name}({', '.join(shown)}, {p}, {q})"
        try:
            wanted = OPS[name](plain[a], plain[b], p, q)
        except Exception:
            continue  # torch itself does not do that
        try:
            got = OPS[name](tracked[a], tracked[b], p, q)
        except ShardingError:
            refused.append(name)
            for x, old in zip(plain, before, strict=True):
                if 0 not in x.stride():
                    x.copy_(old)
            wanted = got = None
        except Exception as error:
            return [f"{step} raised {error!r}"], refused
        if isinstance(wanted, (tuple, list)):
            if len(wanted) != len(got):
                return [f"{step} gave {len(got)} for {len(wanted)}"], refused
            wanted, got = (list(result)[q % len(wanted)] if wanted else None for result in (wanted, got))
        pairs = [*zip(plain, tracked, strict=True)] if name in WRITE else []
        if isinstance(wanted, Tensor):
            pairs.append((wanted, got))
        for slot, (x, y) in enumerate(pairs):
            try:
                trouble = differ(x, y)
            except ShardingError:
                # A view of what has been written to since: reading it is refused.
                refused.append("reading")
                if slot < SLOTS:
                    plain[slot], tracked[slot] = plain[5].clone(), tracked[5].clone()
                continue
            if trouble:
                return [f"{step}: {trouble} in {'its result' if slot >= SLOTS or not pairs else f'slot {slot}'}"], refused
        if isinstance(wanted, Tensor) and 0 < wanted.numel() <= 600 and 0 < wanted.ndim < 5 and not wanted.is_complex():
            slot = SLOTS - 1 - (a + b + p + q) % EXTRA
            plain[slot], tracked[slot] = wanted, got
    for x, y in zip(plain, tracked, strict=True):
        try:
            trouble = differ(x, y)
        except ShardingError:
            continue
        if trouble:
            return [f"at the end: {trouble}"], refused
    return [], refused


programs = st.lists(
    st.tuples(
        st.sampled_from(sorted(OPS)), *[st.integers(0, SLOTS - 1)] * 2, st.integers(0, 7), st.integers(0, 7)
    ),
    min_size=40,
    max_size=120,
)


@pytest.mark.parametrize("num_ranks", [2, 3])
@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.large_base_example, HealthCheck.data_too_large, HealthCheck.too_slow],
)
@given(program=programs, inference=st.booleans())
def test_any_program_gives_what_it_gives_on_whole_tensors(
    ranks: RankPool, num_ranks: int, program: list[Step], inference: bool
) -> None:
    told = ranks.run(run_program, program, inference, ulysses=num_ranks)
    assert told == [([], told[0][1])] * num_ranks
