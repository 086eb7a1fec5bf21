"""What a kernel is, and the one way to call it: ``attend`` handles every degenerate case before a kernel sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Capabilities:
    """What a kernel can serve.

    Attributes:
        devices: device types that it runs on.
        dtypes: dtypes of query, key and value, which are alike.
        key_mask: it takes a mask over keys.
        causal: it takes causal attention.
        causal_with_mask: it takes causal attention and a mask at once.
        gqa: it takes fewer key/value heads than query heads, in equal runs.
        max_head_dim: the largest head_dim that it takes.
        head_dim_multiple: head_dim must be a multiple of this.
    """

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    key_mask: bool = False
    causal: bool = False
    causal_with_mask: bool = False
    gqa: bool = False
    max_head_dim: int = 256
    head_dim_multiple: int = 1


@dataclass(frozen=True)
class KernelCall:
    """What a call asks of a kernel, for choosing one.

    Attributes:
        num_tokens: about how many queries and keys there are, the lesser of both.
        compute_capability: of an NVIDIA GPU; None for others, and where it is not known.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    key_mask: bool
    causal: bool
    num_tokens: int = 0
    compute_capability: tuple[int, int] | None = None


Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    """One attention kernel.

    Attributes:
        name: the name that users choose it by.
        capabilities: what it can serve; it is never asked for more.
        run: ``run(query, key, value, key_mask, is_causal, scale) -> (out, lse)``, computing
            softmax(query · keyᵀ · scale) · value. query is (batch, q_tokens, heads, head_dim), key and value
            (batch, kv_tokens, kv_heads, head_dim), none of them empty, last dim contiguous; key_mask (batch, kv_tokens)
            bool, True = attend, or None. ``out`` is shaped like query; ``lse`` is the natural log-sum-exp
            (batch, heads, q_tokens) in fp32 (fp64 for fp64). What they hold for queries that no key may attend does
            not matter: ``attend`` overrides it.
        lossy: it approximates. Such a kernel runs where it is named, never by "auto".
        modules: it needs one of these modules, which an installation may lack.
        install: the command that installs one of them.
    """

    name: str
    capabilities: Capabilities
    run: Run
    lossy: bool = False
    modules: tuple[str, ...] = ()
    install: str = ""


@dataclass(frozen=True)
class AttentionArgs:
    """How one attention is computed, whatever tensors it gets; ``attention_args`` makes it once a call."""

    kernel: Kernel
    scale: float
    is_causal: bool


class KeyBlock(NamedTuple):
    """The keys of some tokens with all that belongs to them, wherever they are sent.

    Attributes:
        key: (batch, kv_tokens, kv_heads, head_dim).
        value: (batch, kv_tokens, kv_heads, head_dim).
        mask: (batch, kv_tokens) bool, True = attend; None where all may be attended.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None

    def tokens(self, start: int, stop: int | None) -> KeyBlock:
        """The block of the tokens from ``start`` to ``stop``, as views."""
        mask = None if self.mask is None else self.mask[:, start:stop]
        return KeyBlock(self.key[:, start:stop], self.value[:, start:stop], mask)


class Rows(NamedTuple):
    """Rows of a batch, one after the other, that attend to the same keys of a block.

    Attributes:
        start: the first of them.
        stop: the one behind the last.
        keys: which keys these are: a slice, or an int64 tensor of their indices.
    """

    start: int
    stop: int
    keys: slice | Tensor


def select_keys(tensor: Tensor, keys: slice | Tensor) -> Tensor:
    """Some of the tokens of a tensor (batch, tokens, …); of a slice a view."""
    return tensor[:, keys] if isinstance(keys, slice) else tensor.index_select(1, keys)


def unsupported_reason(kernel: Kernel, call: KernelCall) -> str | None:
    """Why ``kernel`` cannot serve ``call``; None where it can."""
    can = kernel.capabilities
    if call.device not in can.devices:
        return f"runs on {_names(can.devices)}, not on {call.device}"
    if call.dtype not in can.dtypes:
        return f"takes {_names(can.dtypes)}, not {call.dtype}"
    if call.head_dim > can.max_head_dim or call.head_dim % can.head_dim_multiple:
        return f"takes head_dim up to {can.max_head_dim} in multiples of {can.head_dim_multiple}, not {call.head_dim}"
    if call.key_mask and not can.key_mask:
        return "takes no key mask"
    if call.causal and not can.causal:
        return "is not causal"
    if call.causal and call.key_mask and not can.causal_with_mask:
        return "takes no key mask together with causal"
    return None


def _names(values: frozenset[str] | frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(map(str, values)))


def attend(
    query: Tensor,
    block: KeyBlock,
    args: AttentionArgs,
    key_of_query: tuple[int, ...] | None = None,
    rows: Sequence[Rows] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one kernel on one device's tensors, any of which may be empty.

    Args:
        query: (batch, q_tokens, heads, head_dim).
        block: the keys; without a mask where there are ``rows``.
        key_of_query: for each query head the index of its key/value head; None where they form equal runs.
        rows: which keys each row of the batch attends to; None where all rows attend to all keys.

    Returns:
        Output (batch, q_tokens, heads, head_dim) and LSE (batch, heads, q_tokens). A query that no key may attend has
        output 0 and LSE -inf.
    """
    key, value, key_mask = block
    batch, num_queries, heads, head_dim = query.shape
    if query.numel() == 0 or key.shape[1] == 0:
        # Kernels are not asked: torch's CPU kernel kills the process on empty keys or queries.
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = torch.full((batch, heads, num_queries), -torch.inf, dtype=lse_dtype, device=query.device)
        return query.new_zeros(batch, num_queries, heads, head_dim), lse
    if rows is not None:
        parts = [_attend_rows(query, block, args, key_of_query, one) for one in rows]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    if key_of_query is not None:
        key, value = _repeat_heads(key, key_of_query), _repeat_heads(value, key_of_query)
    elif key.shape[2] != heads and not args.kernel.capabilities.gqa:
        repeats = heads // key.shape[2]
        key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out, lse = args.kernel.run(query, key, value, key_mask, args.is_causal, args.scale)
    if key_mask is not None:
        # Kernels disagree about queries without a key (0, nan, an average of everything): here it is 0 for all kernels.
        if args.is_causal:
            without_keys = key_mask.cumsum(dim=1)[:, :num_queries] == 0
        else:
            without_keys = ~key_mask.any(dim=1, keepdim=True)
        out = out.masked_fill(without_keys[:, :, None, None], 0)
        lse = lse.masked_fill(without_keys[:, None, :], -torch.inf)
    return out, lse


def _attend_rows(
    query: Tensor, block: KeyBlock, args: AttentionArgs, key_of_query: tuple[int, ...] | None, rows: Rows
) -> tuple[Tensor, Tensor]:
    key, value = (select_keys(x[rows.start : rows.stop], rows.keys) for x in (block.key, block.value))
    return attend(query[rows.start : rows.stop], KeyBlock(key, value, None), args, key_of_query)


def _repeat_heads(tensor: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of (batch, tokens, heads, head_dim), with repetitions.

    They are copied from views: a table of indices would cross to the device in every call.
    """
    per_head = tensor.unbind(2)
    return torch.stack([per_head[head] for head in heads], 2)


def additive_mask(key_mask: Tensor | None, is_causal: bool, num_queries: int, key: Tensor) -> Tensor:
    """A mask to be added to the scores: 0 where a query may attend a key, -inf elsewhere.

    It is (batch or 1, 1, q_tokens or 1, kv_tokens), with the dtype and device of the key.
    """
    if is_causal:
        allowed = torch.ones(num_queries, key.shape[1], dtype=torch.bool, device=key.device).tril()[None, None]
        allowed = allowed if key_mask is None else allowed & key_mask[:, None, None]
    elif key_mask is not None:
        allowed = key_mask[:, None, None]
    else:
        allowed = torch.ones(1, 1, 1, key.shape[1], dtype=torch.bool, device=key.device)
    return torch.zeros(allowed.shape, dtype=key.dtype, device=key.device).masked_fill_(~allowed, -torch.inf)
