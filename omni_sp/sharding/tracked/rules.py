"""Rules for operators that compute: on the pieces, wherever tokens do not see each other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from omni_sp.collectives import add_up
from omni_sp.mesh import Axis
from omni_sp.sharding.tracked.shapes import _positive, rule
from omni_sp.sharding.tracked.tensor import FUNCTION_RULES, OPERATOR_RULES, TokenTensor, require_writable

aten = torch.ops.aten
F = torch.nn.functional


def _pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Element by element, with broadcasting. What is whole is cut to fit the pieces."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    written = _written(func)
    if written is None:
        # Of two that are cut along different dims (an outer product) the outer dim: rows, as attention wants them.
        leads = [x for x in tensors if isinstance(x, TokenTensor)]
        lead = max(leads, key=lambda x: (x.spans.size, x.ndim - x.cut_dim), default=None)
    else:
        lead = args[written] if isinstance(args[written], TokenTensor) else None
    if lead is None:  # what is written to is whole, or the pieces hide in a list
        return NotImplemented
    place = lead.cut_dim - lead.ndim  # counted from the end, as broadcasting does
    if any(x.ndim >= -place and x.shape[place] not in (1, lead.spans.size) for x in tensors):
        return NotImplemented
    if written is not None:
        require_writable(func, lead)
    result = func(
        *[_fitted(x, place, lead) if isinstance(x, torch.Tensor) else x for x in args],
        **{name: _fitted(x, place, lead) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()},
    )
    if written is not None:
        # Only now: what is read may be a view of what is written.
        lead.writes[0] += 1
        return args[written]
    dim = place + max(x.ndim for x in tensors)
    if isinstance(result, torch.Tensor):
        return lead.made_of(result, dim, tensors)
    return type(result)(lead.like(part, dim) for part in result)


def _alike(x: TokenTensor, place: int, lead: TokenTensor) -> bool:
    """Whether two tensors are cut alike, dims counted from the end."""
    return x.cut_dim - x.ndim == place and (x.spans is lead.spans or x.spans == lead.spans)


def _fitted(x: torch.Tensor, place: int, lead: TokenTensor) -> torch.Tensor:
    """A tensor as it broadcasts against the pieces."""
    if isinstance(x, TokenTensor):
        if _alike(x, place, lead):
            return x.local
        if x.cut_dim - x.ndim == place and x.spans.size == lead.spans.size:
            return x.moved(lead.spans).local
        x = x.whole("broadcasting")
    if x.ndim < -place or x.shape[place] == 1:
        return x
    return lead.cut_alike(x, x.ndim + place)


@lru_cache(maxsize=1024)
def _written(func: Any) -> int | None:
    """Index of the argument that an operator changes in place."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return index
    return None


OPERATOR_RULES["pointwise"] = _pointwise
for _operator in (aten.copy_, aten.masked_fill, aten.masked_fill_, aten.where.self, aten.fill_, aten.zero_, aten.lerp):
    OPERATOR_RULES[_operator] = _pointwise


@rule(aten._softmax, aten._log_softmax, aten.softmax, aten.cumsum, aten.sort, aten.topk, aten.glu)
def _along_another_dim(func: Any, x: TokenTensor, *args: Any, **kwargs: Any) -> Any:
    """The result has the same dims; the dim in question must not be the cut one."""
    index = 1 if func.overloadpacket is aten.topk else 0
    dim = kwargs.get("dim", args[index] if len(args) > index else -1)
    if not isinstance(x, TokenTensor) or not isinstance(dim, int) or _positive(dim, x.ndim) == x.cut_dim:
        return NotImplemented
    result = func(x.local, *args, **kwargs)
    return x.like(result) if isinstance(result, torch.Tensor) else tuple(x.like(part) for part in result)


@rule(aten.cumsum_)
def _cumsum_in_place(func: Any, x: Any, dim: int, **kwargs: Any) -> Any:
    if not isinstance(x, TokenTensor) or _positive(dim, x.ndim) == x.cut_dim:
        return NotImplemented
    require_writable(func, x)
    func(x.local, dim, **kwargs)
    x.writes[0] += 1
    return x


@rule(aten.gather)
def _gather(func: Any, x: Any, dim: int, index: Any, **kwargs: Any) -> Any:
    """Each index counts within its own token, where both are cut alike."""
    if not (isinstance(x, TokenTensor) and isinstance(index, TokenTensor)):
        return NotImplemented
    if (x.cut_dim, x.spans) != (index.cut_dim, index.spans) or _positive(dim, x.ndim) == x.cut_dim:
        return NotImplemented
    return x.like(func(x.local, dim, index.local, **kwargs))


@rule(
    aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin, aten.var, aten.std,
    aten.var_mean, aten.any, aten.all, aten.linalg_vector_norm, aten.norm, aten.prod, aten.logsumexp,
)  # fmt: skip
def _reduced(func: Any, x: TokenTensor, *args: Any, **kwargs: Any) -> Any:
    """Reductions over other dims than the cut one."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names[1:], args, strict=False)), **kwargs}
    dims = given.get("dim")
    if dims is None or not isinstance(x, TokenTensor) or dims == []:
        return NotImplemented
    gone = {_positive(dim, x.ndim) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if x.cut_dim in gone:
        # Each rank has a part of the sum.
        return _summed(func, x.axis, x.local, *args, **kwargs) if func.overloadpacket is aten.sum else NotImplemented
    dim = x.cut_dim if given.get("keepdim", False) else x.cut_dim - sum(d < x.cut_dim for d in gone)
    result = func(x.local, *args, **kwargs)
    return x.like(result, dim) if isinstance(result, torch.Tensor) else tuple(x.like(part, dim) for part in result)


@rule(aten.mm, aten.bmm)
def _matmul(func: Any, a: Any, b: Any) -> Any:
    """(…, n, k) x (…, k, m). Rows of the first, columns of the second and batches are independent."""
    last, batched = a.ndim - 1, a.ndim == 3
    if isinstance(a, TokenTensor) and a.cut_dim != last:
        if batched and a.cut_dim == 0:
            if isinstance(b, TokenTensor) and (b.cut_dim, b.spans) != (0, a.spans):
                return NotImplemented
            return a.like(func(a.local, b.local if isinstance(b, TokenTensor) else a.cut_alike(b, 0)))
        return a.like(func(a.local, b.whole("matmul") if isinstance(b, TokenTensor) else b))
    if isinstance(a, TokenTensor):
        # The sum runs over the cut dim: linear attention's state. Each rank has a part of it.
        if isinstance(b, TokenTensor) and (b.cut_dim, b.spans) != (last - 1, a.spans):
            return NotImplemented
        other = b.local if isinstance(b, TokenTensor) else a.cut_alike(b, last - 1)
        return _summed(func, a.axis, a.local, other)
    if b.cut_dim == last:
        return b.like(func(a, b.local))
    return NotImplemented


def _summed(func: Any, axis: Axis, *tensors: Any, **kwargs: Any) -> torch.Tensor:
    """A sum of which each rank has a part. Of 16-bit numbers it is made in 32 bit and rounded once, as on one rank."""
    dtype = kwargs.get("dtype") or tensors[0].dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return add_up(func(*tensors, **kwargs), axis)
    kwargs.pop("dtype", None)
    wide = [x.float() if isinstance(x, torch.Tensor) else x for x in tensors]
    return add_up(func(*wide, **kwargs), axis).to(dtype)


@rule(aten.addmm)
def _addmm(func: Any, bias: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if kwargs or not isinstance(a, TokenTensor) or a.cut_dim != 0 or isinstance(bias, TokenTensor) or bias.ndim != 1:
        return NotImplemented
    return a.like(func(bias, a.local, b.whole("matmul") if isinstance(b, TokenTensor) else b))


@rule(aten.baddbmm)
def _baddbmm(_func: Any, base: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = torch.bmm(a, b) * alpha
    return product if beta == 0 else product + base * beta


@rule(aten.convolution)
def _convolution(func: Any, x: Any, weight: Any, bias: Any, *args: Any) -> Any:
    """Over pieces of rows (or frames, or sound), each with the neighbours that its kernel sees."""
    stride, padding, dilation, transposed, output_padding, groups = args
    if not isinstance(x, TokenTensor) or isinstance(weight, TokenTensor) or isinstance(bias, TokenTensor):
        return NotImplemented
    place = x.cut_dim - 2
    if x.cut_dim == 0:
        # Asked of all ranks, not of this one: those that gather would wait for those that do not.
        return x.like(func(x.local, weight, bias, *args)) if min(x.spans.lengths) else NotImplemented
    if place < 0 or transposed or stride[place] != 1 or any(len(spans) > 1 for spans in x.spans.held):
        return NotImplemented
    reach = dilation[place] * (weight.shape[x.cut_dim] - 1)
    before = padding[place]
    if reach != 2 * before or min(x.spans.lengths) == 0:
        return NotImplemented  # as many come out as go in, and everybody has some
    wanted = [[(max(a - before, 0), min(b + before, x.spans.size)) for a, b in spans] for spans in x.spans.held]
    (start, stop), (first, last) = x.spans.held[x.axis.rank][0], wanted[x.axis.rank][0]
    rows = x.local if before == 0 else x.fetched(wanted)
    # Only at the picture's own edges is there padding.
    edges = [0, 0] * (x.ndim - 1 - x.cut_dim) + [first - (start - before), (stop + before) - last]
    inner = [0 if d == place else amount for d, amount in enumerate(padding)]
    rows = F.pad(rows, edges) if before else rows
    return x.like(func(rows, weight, bias, stride, inner, dilation, transposed, output_padding, groups))


def _on_last_dims(first_argument: str, dims_of: Any) -> Any:
    """A function that works on the last dims of its first argument alone; its other arguments are whole."""

    def apply(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs[first_argument]
            others, _ = tree_flatten((args[1:], {k: v for k, v in kwargs.items() if k != first_argument}))
            if not isinstance(x, TokenTensor) or any(isinstance(other, TokenTensor) for other in others):
                return NotImplemented
            if x.cut_dim >= x.ndim - dims_of(*args[1:2], **kwargs):
                return NotImplemented
            if args:
                return x.like(function(x.local, *args[1:], **kwargs))
            return x.like(function(**{**kwargs, first_argument: x.local}))

        return run

    return apply


def _one(*_args: Any, **_kwargs: Any) -> int:
    return 1


def _normalized(shape: Any = None, **kwargs: Any) -> int:
    shape = kwargs.get("normalized_shape", shape)
    return 1 if isinstance(shape, int) else len(shape)


FUNCTION_RULES[F.linear] = _on_last_dims("input", _one)(F.linear)
FUNCTION_RULES[F.layer_norm] = _on_last_dims("input", _normalized)(F.layer_norm)
FUNCTION_RULES[F.rms_norm] = _on_last_dims("input", _normalized)(F.rms_norm)
FUNCTION_RULES[torch.rms_norm] = _on_last_dims("input", _normalized)(torch.rms_norm)
