"""Rules for what networks of pictures do beside convolutions: group norm, resizing, pixel shuffles, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from omni_sp.collectives import gather
from omni_sp.sharding.tracked.placement import Placement, contiguous_placement, even_placement
from omni_sp.sharding.tracked.recording import as_constant, as_one_operation
from omni_sp.sharding.tracked.tensor import FUNCTION_RULES, TokenTensor
from omni_sp.sharding.tracked.view_rules import concatenate, rule
from omni_sp.sharding.tracked.window_rules import Rows, Window, in_order, on_any_rows, over_windows

aten = torch.ops.aten
F = torch.nn.functional
_HALF = (torch.bfloat16, torch.float16)


@rule(aten.native_group_norm)
def _group_norm(
    func: Any, x: Any, weight: Any, bias: Any, batch: int, channels: int, size: int, groups: int, eps: float
) -> Any:
    """Every rank's mean and variance of each group, exchanged and merged (Chan et al. 1983), then applied."""
    if not isinstance(x, TokenTensor) or x.shard_dim == 1:
        return NotImplemented
    if x.shard_dim == 0:
        return tuple(
            x.wrap(one, 0) for one in func(x.local, weight, bias, x.local.shape[0], channels, size, groups, eps)
        )
    moments = _moments(x.local, batch * groups, eps)
    moments = as_one_operation(gather, moments[None], [1] * x.axis.size, 0, x.axis).double()
    shares = _shares(x.placement, x.device)
    mean = (shares * moments[:, 0]).sum(0)
    variance = (shares * (moments[:, 1] + (moments[:, 0] - mean) ** 2)).sum(0)
    dtype = _wide(x.dtype)
    means, variances = (one.to(dtype).repeat_interleave(channels // groups) for one in (mean, variance))
    weight, bias = (None if one is None else one.to(dtype).repeat(batch) for one in (weight, bias))
    # In inference batch norm is the affine map that is left, in one pass, rounded once.
    local = x.local.reshape(1, batch * channels, -1)
    out = F.batch_norm(local, means, variances, weight, bias, eps=eps) if local.numel() else local.clone()
    rstd = (variance + eps).rsqrt()
    return x.wrap(out.view(x.local.shape)), *(one.to(dtype).view(batch, groups) for one in (mean, rstd))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _moments(local: torch.Tensor, num_groups: int, eps: float) -> torch.Tensor:
    """Mean and variance of each group of a shard, shape (2, groups); zeros of an empty one."""
    if not local.numel():
        return local.new_zeros(2, num_groups, dtype=_wide(local.dtype))
    rows = local.reshape(1, num_groups, -1)
    if local.dtype not in _HALF:
        # The quickest way to them (torch.var_mean takes ten times as long on a CPU); what it normalises is not used.
        _, mean, rstd = torch.native_group_norm(rows, None, None, 1, num_groups, rows.shape[2], num_groups, eps)
        return torch.cat([mean, rstd**-2 - eps])
    mean = rows.mean(2, dtype=torch.float32)
    centre = mean.to(local.dtype)  # so that deviations take no more memory than the shard
    deviation = torch.linalg.vector_norm(rows - centre[..., None], dim=2, dtype=torch.float32)
    return torch.cat([mean, deviation**2 / rows.shape[2] - (mean - centre) ** 2])


@lru_cache(maxsize=256)
def _shares(placement: Placement, device: torch.device) -> torch.Tensor:
    """The part of all indices that each rank holds, shape (ranks, 1)."""
    shares = [[length / placement.size] for length in placement.lengths]
    return as_constant(torch.tensor(shares, dtype=torch.float64, device=device))


_NEIGHBOURS = {"nearest": 0, "nearest-exact": 0, "linear": 1, "bilinear": 1, "trilinear": 1, "bicubic": 2}
"""How many rows on each side a resized row is made of, by mode."""


def _interpolate(
    input: Any,  # noqa: A002  (torch's name of it)
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    """Larger or smaller by a whole factor along the sharded dim; along the others as you like."""
    x = input
    if not isinstance(x, TokenTensor):
        return NotImplemented
    d, num_dims = x.shard_dim - 2, x.ndim - 2
    sizes, factors = (list(one) if isinstance(one, (list, tuple)) else [one] * num_dims for one in (size, scale_factor))

    def run(rows: torch.Tensor, stop: int | None = None) -> torch.Tensor:
        wanted: Any = size if size is None or d < 0 else [stop if i == d else one for i, one in enumerate(sizes)]
        return F.interpolate(rows, wanted, scale_factor, mode, align_corners, recompute_scale_factor, antialias)

    if d < 0:
        return x.wrap(on_any_rows(run, x.local, x.shard_dim, 1))
    rows, results = x.placement.size, sizes[d] if size is not None else math.floor(x.placement.size * factors[d])
    fits = size is not None or results == rows * factors[d]
    if not fits or not rows or not results or align_corners or antialias or mode not in _NEIGHBOURS:
        return NotImplemented
    if results % rows == 0:
        return _enlarged(x, results // rows, _NEIGHBOURS[mode], run)
    if rows % results == 0 and _NEIGHBOURS[mode] < 2:
        shrink = rows // results
        return over_windows(x, Window(shrink - 1, shrink), lambda part, _: run(part, part.shape[x.shard_dim] // shrink))
    return NotImplemented


def _enlarged(x: TokenTensor, factor: int, neighbours: int, run: Any) -> TokenTensor:
    dim = x.shard_dim
    if not neighbours or factor == 1:
        local = on_any_rows(lambda rows: run(rows, rows.shape[dim] * factor), x.local, dim, 1)
        return x.wrap(local, placement=x.placement.scale(factor))
    x = in_order(x)
    ranges = [held[0] if held else (0, 0) for held in x.placement.ranges_per_rank]
    needed = [
        (max(start - neighbours, 0), min(stop + neighbours, x.placement.size)) if start < stop else (0, 0)
        for start, stop in ranges
    ]
    rows = Rows(x, needed)
    (start, stop), (first, last) = ranges[x.axis.rank], needed[x.axis.rank]
    large = on_any_rows(lambda part: run(part, part.shape[dim] * factor), rows.between(first, last), dim, 1)
    local = large.narrow(dim, (start - first) * factor, (stop - start) * factor)
    return x.wrap(local, placement=x.placement.scale(factor))


FUNCTION_RULES[F.interpolate] = _interpolate


@rule(aten.pixel_shuffle)
def _pixel_shuffle(func: Any, x: TokenTensor, factor: int) -> Any:
    from_end = x.ndim - x.shard_dim
    if from_end == 3:
        return NotImplemented
    local = on_any_rows(lambda rows: func(rows, factor), x.local, x.shard_dim, 1)
    return x.wrap(local, placement=x.placement.scale(factor) if from_end < 3 else None)


@rule(aten.pixel_unshuffle)
def _pixel_unshuffle(func: Any, x: TokenTensor, factor: int) -> Any:
    from_end = x.ndim - x.shard_dim
    if from_end == 3 or (from_end < 3 and x.placement.size % factor):
        return NotImplemented
    if from_end > 3:
        return x.wrap(on_any_rows(lambda rows: func(rows, factor), x.local, x.shard_dim, 1))
    return over_windows(x, Window(factor - 1, factor), lambda rows, _: func(rows, factor))


@rule(
    aten.constant_pad_nd, aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d,
    aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d,
)  # fmt: skip
def _pad(func: Any, x: TokenTensor, pad: Sequence[int], *value: Any) -> Any:
    """Padding along the sharded dim comes to the first and the last rank that have rows."""
    place = 2 * (x.ndim - 1 - x.shard_dim)
    before, behind = [*pad[place : place + 2], 0, 0][:2]
    if before < 0 or behind < 0 or not x.placement.size:
        return NotImplemented
    if func.overloadpacket is aten.constant_pad_nd and before + behind > x.placement.size // x.axis.size:
        return _pad_evenly(func, x, pad, value, (before, behind))
    if not before and not behind:
        return x.wrap(on_any_rows(lambda rows: func(rows, pad, *value), x.local, x.shard_dim, 1))
    is_reflected = "reflection" in func.overloadpacket.__name__
    if is_reflected and max(before, behind) >= x.placement.size:
        return NotImplemented  # torch refuses it, on all ranks alike
    x = in_order(x)
    lengths, size, me, dim = list(x.placement.lengths), x.placement.size, x.axis.rank, x.shard_dim
    first, *_, last = [rank for rank, length in enumerate(lengths) if length] * 2
    ranges = [held[0] if held else (0, 0) for held in x.placement.ranges_per_rank]
    needed = list(ranges)
    if is_reflected:
        needed[first] = (0, max(needed[first][1], before + 1))
        needed[last] = (min(needed[last][0], size - 1 - behind), size)
    amounts = list(pad)
    amounts[place : place + 2] = before * (me == first), behind * (me == last)
    rows = Rows(x, needed).between(*needed[me])
    padded = on_any_rows(lambda rows: func(rows, amounts, *value), rows, dim, 1)
    lengths[first] += before
    lengths[last] += behind
    local = padded.narrow(dim, ranges[me][0] - needed[me][0], lengths[me])
    return x.wrap(local, placement=contiguous_placement(lengths))


def _pad_evenly(
    func: Any, x: TokenTensor, pad: Sequence[int], value: Sequence[Any], amounts: tuple[int, int]
) -> TokenTensor:
    """Constant padding that is long beside the tensor: it is sharded too."""
    place = 2 * (x.ndim - 1 - x.shard_dim)
    tensors = [x.wrap(func(x.local, [0 if i in (place, place + 1) else one for i, one in enumerate(pad)], *value))]
    shape = list(tensors[0].local.shape)
    for amount, index in zip(amounts, (0, 2), strict=True):
        placement = even_placement(amount, x.axis.size)
        shape[x.shard_dim] = placement.lengths[x.axis.rank]
        tensors.insert(index, x.wrap(x.local.new_full(shape, *value or (0,)), placement=placement))
    return concatenate(tensors, x.shard_dim)
