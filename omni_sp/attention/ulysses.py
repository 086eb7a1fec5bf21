"""Ulysses: trade tokens for heads, so that each rank holds all tokens of its Ulysses group for its share of the heads.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). Here one packed all-to-all brings query, key, value (and mask) to the
ranks that compute the heads, and one brings the output back. In a message each token is one vector (`packing`): its
query, key and value for the receiver's heads. So what a rank receives *is* query, key and value side by side, and is
not copied again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from omni_sp.attention.layout import HeadRun, HeadShare, head_runs
from omni_sp.attention.packing import PARTS_DIM, mask_elements, pack, unpack
from omni_sp.collectives import Exchange, exchange
from omni_sp.mesh import Axis


@dataclass(frozen=True)
class UlyssesLayout:
    """The heads that each rank of a Ulysses axis computes, and how many query and key tokens it holds."""

    axis: Axis
    heads: tuple[HeadShare, ...]
    query: tuple[int, ...]
    key: tuple[int, ...]

    @property
    def own_heads(self) -> HeadShare:
        """The heads that this rank computes."""
        return self.heads[self.axis.rank]


class _Messages(NamedTuple):
    """What follows from the layout for the messages of one exchange; it is worked out once.

    Attributes:
        send_sizes: elements for each rank.
        recv_sizes: elements from each rank.
        runs: ranks that get, or send, equal messages, and the first element of those.
        counts: heads of each tensor that this rank receives.
        tokens: tokens that it receives.
    """

    send_sizes: tuple[int, ...]
    recv_sizes: tuple[int, ...]
    runs: tuple[tuple[HeadRun, int], ...]
    counts: tuple[int, ...]
    tokens: int


@lru_cache(maxsize=512)
def _scatter_messages(
    heads: tuple[tuple[tuple[int, int], ...], ...],
    lengths: tuple[int, ...],
    rank: int,
    batch: int,
    head_dim: int,
    mask_width: int,
) -> _Messages:
    """Messages of tokens' vectors; ``heads`` has for each rank and each tensor the (start, stop) of its heads."""
    widths = [sum(stop - start for start, stop in ranges) * head_dim + mask_width for ranges in heads]
    send_sizes = [lengths[rank] * batch * width for width in widths]
    runs = tuple((run, sum(send_sizes[: run.start])) for run in head_runs(heads))
    counts = tuple(stop - start for start, stop in heads[rank])
    recv_sizes = tuple(length * batch * widths[rank] for length in lengths)
    return _Messages(tuple(send_sizes), recv_sizes, runs, counts, sum(lengths))


@lru_cache(maxsize=512)
def _gather_messages(
    heads: tuple[HeadShare, ...], lengths: tuple[int, ...], rank: int, batch: int, head_dim: int
) -> _Messages:
    """Messages of outputs, the way back."""
    num_heads = heads[rank].num_query
    send_sizes = tuple(length * batch * num_heads * head_dim for length in lengths)
    recv_sizes = tuple(lengths[rank] * batch * share.num_query * head_dim for share in heads)
    runs = tuple((run, sum(recv_sizes[: run.start])) for run in head_runs([(share.query,) for share in heads]))
    return _Messages(send_sizes, recv_sizes, runs, (heads[-1].query[1],), lengths[rank])


class _TokenScatter:
    """One exchange of tensors of the same tokens, which is started when this is made."""

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        heads: tuple[tuple[tuple[int, int], ...], ...],
        lengths: tuple[int, ...],
        mask: Tensor | None,
        axis: Axis,
    ) -> None:
        first = tensors[0]
        self._batch, _, _, self._head_dim = first.shape
        self._mask_width = mask_elements(mask, first.dtype)
        self._messages = _scatter_messages(heads, lengths, axis.rank, self._batch, self._head_dim, self._mask_width)
        send_sizes, recv_sizes, runs, *_ = self._messages
        self._exchange: Exchange = exchange(send_sizes, recv_sizes, first.dtype, first.device, axis)
        for run, start in runs:
            self._exchange.fill(pack(tensors, run, mask), PARTS_DIM, start)
        self._exchange.start()

    def wait(self) -> tuple[list[Tensor], Tensor | None]:
        """The tensors and the mask of all tokens of the group, for this rank's heads."""
        _, _, _, counts, tokens = self._messages
        return unpack(self._exchange.wait(), tokens, self._batch, counts, self._head_dim, self._mask_width)


class ScatterHeads:
    """Give up heads, gain tokens: (batch, own tokens, all heads, …) -> (batch, the group's tokens, own heads, …).

    Constructing it starts the exchange, or two where a rank may hold other numbers of queries than of keys. That looks
    at all ranks' lengths, never at this rank's alone: all ranks must decide alike.

    Args:
        query: (batch, own query tokens, all heads, head_dim).
        key: (batch, own key tokens, all key/value heads, head_dim).
        value: (batch, own key tokens, all key/value heads, head_dim).
        key_mask: (batch, own key tokens) bool, passed by all ranks or by none.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, layout: UlyssesLayout
    ) -> None:
        heads, axis = layout.heads, layout.axis
        if layout.query == layout.key:
            together = tuple((share.query, share.key, share.key) for share in heads)
            self._scatters = [_TokenScatter((query, key, value), together, layout.query, key_mask, axis)]
        else:
            of_query, of_key = (
                tuple((share.query,) for share in heads),
                tuple((share.key, share.key) for share in heads),
            )
            self._scatters = [
                _TokenScatter((query,), of_query, layout.query, None, axis),
                _TokenScatter((key, value), of_key, layout.key, key_mask, axis),
            ]

    def wait(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and mask of the tokens of the Ulysses group, for this rank's heads."""
        received = [scatter.wait() for scatter in self._scatters]
        query, key, value = (tensor for tensors, _ in received for tensor in tensors)
        return query, key, value, received[-1][1]


class GatherHeads:
    """The way back: (batch, the group's tokens, own heads, head_dim) -> (batch, own tokens, all heads, head_dim).

    Constructing it starts the exchange. Results are contiguous in heads and head_dim.
    """

    def __init__(self, out: Tensor, layout: UlyssesLayout) -> None:
        batch, _, _, head_dim = out.shape
        self._messages = _gather_messages(layout.heads, layout.query, layout.axis.rank, batch, head_dim)
        send_sizes, recv_sizes, *_ = self._messages
        self._exchange = exchange(send_sizes, recv_sizes, out.dtype, out.device, layout.axis)
        self._exchange.fill([out.transpose(0, 1)])
        self._exchange.start()

    def write(self, result: Tensor) -> None:
        """Wait, and write the heads of this layout into ``result``, (batch, own tokens, all heads, head_dim)."""
        received = self._exchange.wait()
        batch, tokens, _, head_dim = result.shape
        of_batch, of_token, of_head, _ = result.stride()
        for run, start in self._messages.runs:
            first, step, count = run.heads[0]
            width = count * head_dim
            size = (batch, tokens, run.num_ranks, width)
            message = received.as_strided(size, (width, batch * width, tokens * batch * width, 1), start)
            heads = result.as_strided(size, (of_batch, of_token, step * of_head, 1), first * of_head)
            heads.copy_(message)
