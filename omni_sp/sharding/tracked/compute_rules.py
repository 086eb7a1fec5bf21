"""Rules for operators that compute: on the shards, wherever tokens do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from omni_sp.collectives import all_reduce
from omni_sp.mesh import Axis
from omni_sp.sharding.tracked.recording import as_one_operation
from omni_sp.sharding.tracked.tensor import FUNCTION_RULES, OPERATOR_RULES, Rule, TokenTensor, require_writable
from omni_sp.sharding.tracked.view_rules import positive_dim, rule

aten = torch.ops.aten
F = torch.nn.functional


def _pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Element by element, with broadcasting. Replicated operands are sharded like the sharded ones."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    written = _written_argument(func)
    if written is None:
        # The result is sharded like one operand. Of two that are sharded along different dims (an outer product) it is
        # the one of the outer dim: these are the queries of an attention mask.
        sharded = [x for x in tensors if isinstance(x, TokenTensor)]
        lead = max(sharded, key=lambda x: (x.placement.size, x.ndim - x.shard_dim), default=None)
    else:
        lead = args[written] if isinstance(args[written], TokenTensor) else None
    if lead is None:  # the tensor that is written to is replicated, or the sharded tensors are in a list
        return NotImplemented
    dim_from_end = lead.shard_dim - lead.ndim  # counted from the end, as broadcasting does
    if any(x.ndim >= -dim_from_end and x.shape[dim_from_end] not in (1, lead.placement.size) for x in tensors):
        return NotImplemented
    if written is not None:
        require_writable(func, lead)
    local_args = [_broadcast_local(x, dim_from_end, lead) for x in args]
    result = func(*local_args, **{name: _broadcast_local(x, dim_from_end, lead) for name, x in kwargs.items()})
    if written is not None:
        # This comes after the call, since an operand may be a view of the tensor that is written to.
        lead.writes[0] += 1
        return args[written]
    dim = dim_from_end + max(x.ndim for x in tensors)
    if isinstance(result, torch.Tensor):
        return lead.wrap_pointwise(result, dim, tensors)
    return type(result)(lead.wrap(one, dim) for one in result)


def _broadcast_local(x: Any, dim_from_end: int, lead: TokenTensor) -> Any:
    """An operand as it broadcasts against the shard of ``lead``; what is no tensor stays as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    if isinstance(x, TokenTensor):
        if x.shard_dim - x.ndim == dim_from_end and x.placement.size == lead.placement.size:
            return x.local if x.placement is lead.placement else x.redistribute(lead.placement).local
        x = x.full_tensor("broadcasting")
    if x.ndim < -dim_from_end or x.shape[dim_from_end] == 1:
        return x
    return lead.shard_like(x, x.ndim + dim_from_end)


@lru_cache(maxsize=1024)
def _written_argument(func: Any) -> int | None:
    """Index of the argument that an operator changes in place."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return index
    return None


OPERATOR_RULES["pointwise"] = _pointwise
for _operator in (aten.copy_, aten.masked_fill, aten.masked_fill_, aten.where.self, aten.fill_, aten.zero_, aten.lerp):
    OPERATOR_RULES[_operator] = _pointwise


@rule(aten._softmax, aten._log_softmax, aten.cumsum, aten.sort, aten.topk, aten.glu)
def _along_another_dim(func: Any, x: TokenTensor, *args: Any, **kwargs: Any) -> Any:
    """Operators along one dim, which must not be the sharded one; the result has the dims of the operand."""
    index = 1 if func.overloadpacket is aten.topk else 0
    dim = kwargs.get("dim", args[index] if len(args) > index else -1)
    if not isinstance(x, TokenTensor) or not isinstance(dim, int) or positive_dim(dim, x.ndim) == x.shard_dim:
        return NotImplemented
    result = func(x.local, *args, **kwargs)
    return x.wrap(result) if isinstance(result, torch.Tensor) else tuple(x.wrap(one) for one in result)


@rule(aten.cumsum_)
def _cumsum_in_place(func: Any, x: Any, dim: int, **kwargs: Any) -> Any:
    if not isinstance(x, TokenTensor) or positive_dim(dim, x.ndim) == x.shard_dim:
        return NotImplemented
    require_writable(func, x)
    func(x.local, dim, **kwargs)
    x.writes[0] += 1
    return x


@rule(aten.gather)
def _gather_indices(func: Any, x: Any, dim: int, index: Any, **kwargs: Any) -> Any:
    """``torch.gather`` along another dim: each index counts within its own token, where both are sharded alike."""
    if not (isinstance(x, TokenTensor) and isinstance(index, TokenTensor)):
        return NotImplemented
    if (x.shard_dim, x.placement) != (index.shard_dim, index.placement) or positive_dim(dim, x.ndim) == x.shard_dim:
        return NotImplemented
    return x.wrap(func(x.local, dim, index.local, **kwargs))


@rule(aten.embedding)
def _embedding(func: Any, weight: Any, indices: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(weight, TokenTensor):
        return NotImplemented
    return indices.wrap(func(weight, indices.local, *args, **kwargs))


@rule(
    aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin, aten.var, aten.std,
    aten.var_mean, aten.any, aten.all, aten.linalg_vector_norm, aten.norm, aten.prod, aten.logsumexp,
)  # fmt: skip
def _reduce(func: Any, x: TokenTensor, *args: Any, **kwargs: Any) -> Any:
    """Reductions over other dims than the sharded one; sums over that one, too."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names[1:], args, strict=False)), **kwargs}
    dims = given.get("dim")
    if dims is None or not isinstance(x, TokenTensor) or dims == []:
        return NotImplemented
    reduced = {positive_dim(dim, x.ndim) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if x.shard_dim in reduced:
        is_sum = func.overloadpacket is aten.sum
        return _all_reduced_sum(func, x.axis, x.local, *args, **kwargs) if is_sum else NotImplemented
    dim = x.shard_dim if given.get("keepdim", False) else x.shard_dim - sum(d < x.shard_dim for d in reduced)
    result = func(x.local, *args, **kwargs)
    return x.wrap(result, dim) if isinstance(result, torch.Tensor) else tuple(x.wrap(one, dim) for one in result)


@rule(aten.mm, aten.bmm)
def _matmul(func: Any, a: Any, b: Any) -> Any:
    """Shapes (…, n, k) x (…, k, m). Rows of the first, columns of the second and batches are independent."""
    last, batched = a.ndim - 1, a.ndim == 3
    if isinstance(a, TokenTensor) and a.shard_dim != last:
        if batched and a.shard_dim == 0:
            if isinstance(b, TokenTensor) and (b.shard_dim, b.placement) != (0, a.placement):
                return NotImplemented
            return a.wrap(func(a.local, b.local if isinstance(b, TokenTensor) else a.shard_like(b, 0)))
        return a.wrap(func(a.local, b.full_tensor("matmul") if isinstance(b, TokenTensor) else b))
    if isinstance(a, TokenTensor):
        # The sum runs over the sharded dim, as for the state of linear attention.
        if isinstance(b, TokenTensor) and (b.shard_dim, b.placement) != (last - 1, a.placement):
            return NotImplemented
        other = b.local if isinstance(b, TokenTensor) else a.shard_like(b, last - 1)
        return _all_reduced_sum(func, a.axis, a.local, other)
    if b.shard_dim == last:
        return b.wrap(func(a, b.local))
    return NotImplemented


def _all_reduced_sum(func: Any, axis: Axis, *tensors: Any, **kwargs: Any) -> torch.Tensor:
    """The sum over all ranks of what ``func`` gives for the local tensors.

    Sums of 16-bit numbers are made in 32 bit and rounded once, as on one rank.
    """
    dtype = kwargs.get("dtype") or tensors[0].dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return as_one_operation(all_reduce, func(*tensors, **kwargs), axis)
    kwargs.pop("dtype", None)
    wide = [x.float() if isinstance(x, torch.Tensor) else x for x in tensors]
    return as_one_operation(all_reduce, func(*wide, **kwargs), axis).to(dtype)


@rule(aten.addmm)
def _addmm(func: Any, bias: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if kwargs or not isinstance(a, TokenTensor) or a.shard_dim != 0 or isinstance(bias, TokenTensor) or bias.ndim != 1:
        return NotImplemented
    return a.wrap(func(bias, a.local, b.full_tensor("matmul") if isinstance(b, TokenTensor) else b))


@rule(aten.baddbmm)
def _baddbmm(_func: Any, base: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = torch.bmm(a, b) * alpha
    return product if beta == 0 else product + base * beta


def _on_last_dims(function: Any, num_dims: Callable[..., int]) -> Rule:
    """A rule for a function that works on the last dims of ``input``; its other arguments are replicated."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        others, _ = tree_flatten((args[1:], {name: value for name, value in kwargs.items() if name != "input"}))
        if not isinstance(x, TokenTensor) or any(isinstance(other, TokenTensor) for other in others):
            return NotImplemented
        if x.shard_dim >= x.ndim - num_dims(*args[1:2], **kwargs):
            return NotImplemented
        if args:
            return x.wrap(function(x.local, *args[1:], **kwargs))
        return x.wrap(function(**{**kwargs, "input": x.local}))

    return apply


def _num_normalized_dims(shape: Any = None, **kwargs: Any) -> int:
    shape = kwargs.get("normalized_shape", shape)
    return 1 if isinstance(shape, int) else len(shape)


FUNCTION_RULES[F.linear] = _on_last_dims(F.linear, lambda *_args, **_kwargs: 1)
for _norm in (F.layer_norm, F.rms_norm, torch.rms_norm):
    FUNCTION_RULES[_norm] = _on_last_dims(_norm, _num_normalized_dims)


_NUM_BEFORE_MASKS = 11
"""Arguments of torch's function behind query, key and value, and before its masks."""


def _multi_head_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention of torch's own module, which takes (tokens, batch, channels): batches are independent."""
    tensors, (others, _) = (query, key, value), tree_flatten((args, kwargs))
    if not all(isinstance(x, TokenTensor) and x.ndim == 3 and x.shard_dim == 1 for x in tensors):
        return NotImplemented
    if any(x.placement != query.placement for x in tensors) or any(isinstance(x, TokenTensor) for x in others):
        return NotImplemented
    # A mask may be one for each row of the batch.
    if len(args) > _NUM_BEFORE_MASKS or any(kwargs.get(name) is not None for name in ("attn_mask", "key_padding_mask")):
        return NotImplemented
    out, weights = F.multi_head_attention_forward(*(x.local for x in tensors), *args, **kwargs)
    return query.wrap(out), None if weights is None else query.wrap(weights, 0)


FUNCTION_RULES[F.multi_head_attention_forward] = _multi_head_attention
