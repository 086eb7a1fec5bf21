"""Operations for programs on tensors, as data: each takes two tensors and two numbers to use as it likes.

What is computed inexactly is rounded to small integers, so that results can be compared for equality.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Op = Callable[[Tensor, Tensor, int, int], Any]


def tidy(x: Tensor) -> Tensor:
    """Small integers out of any numbers."""
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
    """Integers for a linear layer, the same everywhere."""
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


def convolved(x: Tensor, p: int, q: int) -> Tensor:
    """Over rows, over a picture with its channels first or last, or with its batch merged; also with strides."""
    if x.ndim == 3:
        x = x.movedim(1, 2) if p % 2 else x
        kernel = torch.arange(6 * x.shape[1], dtype=x.dtype).view(2, x.shape[1], 3)
        return F.conv1d(x, kernel, padding=q % 3, stride=1 + q // 6, dilation=1 + q // 4)
    x = x.movedim(-1, 1) if p % 2 else x
    kernel = torch.arange(9.0 * x.shape[1], dtype=x.dtype).view(x.shape[1], 1, 3, 3)
    return F.conv2d(x, kernel, padding=(q % 3, 1), stride=1 + q // 6, groups=x.shape[1])


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
    "sort": lambda x, y, p, q: x.sort(dim=p % x.ndim, stable=True)[q % 2],
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
    "conv": lambda x, y, p, q: tidy(convolved(x, p, q)),
    "resized": lambda x, y, p, q: tidy(F.interpolate(x, scale_factor=1 + p % 3, mode=["nearest", "linear"][q % 2])),
    "shrunk": lambda x, y, p, q: tidy(F.avg_pool1d(x, 1 + p % 3, 1 + q % 2, (p % 3) // 2)),
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
    "pad with itself": lambda x, y, p, q: F.pad(x, [p % 3, q % 3], mode=["replicate", "reflect"][q % 2]),
    "shuffle": lambda x, y, p, q: F.pixel_shuffle(x, 2) if p % 2 else F.pixel_unshuffle(x, 2),
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
    "view turned sum": lambda x, y, p, q: (x.permute(rotated(x, p)) + y.permute(rotated(y, q))).view(x.shape[0], -1),
    "view expanded": lambda x, y, p, q: x[:, :, None].expand(-1, -1, 2, -1).clone().view(*x.shape[:2], -1),
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
    "part add_ own row": lambda x, y, p, q: x.narrow(p % x.ndim, 1, 2).add_(
        x.select(p % x.ndim, 0).unsqueeze(p % x.ndim)
    ),
    "flat add_": lambda x, y, p, q: x.view(-1).add_(1),
    "reshaped add_": lambda x, y, p, q: x.reshape(-1, x.shape[-1]).add_(1),
    "turned contiguous add_": lambda x, y, p, q: x.permute(rotated(x, p)).contiguous().add_(1),
    "complex mul_": lambda x, y, p, q: as_complex(x).mul_(1 - 1j),
    "bits zero_": lambda x, y, p, q: x.view(torch.int64)[..., p % x.shape[-1]].zero_(),
    "diagonal fill_": lambda x, y, p, q: x.diagonal(0, -2, -1).fill_(p),
    "squeezed zero_": lambda x, y, p, q: x.narrow(p % x.ndim, 0, 1).squeeze().zero_(),
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
    "cumsum out": lambda x, y, p, q: torch.cumsum(x, p % x.ndim, out=y.view(x.shape)),
    "transpose_": lambda x, y, p, q: x.clone().transpose_(p % x.ndim, q % x.ndim).add_(1),
}
OPS = COMPUTE | MOVE | WRITE
