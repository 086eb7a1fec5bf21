"""One pass of tokens through a model: how its attention reaches the other ranks.

A pass travels through the model's own code as a keyword argument, down to the attention function that transformers
calls by name. So nothing global says what is under way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from omni_sp.attention import sequence_parallel_attention
from omni_sp.attention.distributed_kv import ChunkedPrefillAttention, decode_attention
from omni_sp.errors import ShardingError, UnsupportedAttentionError
from omni_sp.llm.hf.kv_cache import TokenCache
from omni_sp.llm.hf.sequence_shard import SequenceShard
from omni_sp.mesh import ParallelMesh

ATTENTION = "omni_sp"
"""The name by which transformers finds :func:`attention`."""


class AttentionPhase(Protocol):
    """How the attention of one pass is computed.

    Attributes:
        tokens: this rank's tokens in the pass; there may be one stand-in row where it has none.
        span: tokens that the row will come to have.
    """

    tokens: int
    span: int

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of (batch, tokens, heads, head_dim), for this rank's tokens."""


@dataclass
class Prefill:
    """A prompt, or its first chunk: through the causal core, the balanced ring or Ulysses or both.

    ``key_mask`` is (batch, own tokens). The pieces that a rank begins with are what it keeps, whatever the core
    exchanges meanwhile: all heads of its own tokens, so memory is shared evenly whatever the degrees and the heads.
    """

    mesh: ParallelMesh
    shard: SequenceShard
    key_mask: torch.Tensor | None
    span: int
    kernel: str
    cache: TokenCache | None = None
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.shard.tokens
        if self.cache is not None:
            self.cache.extend(self.tokens, self.key_mask)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Through the core; the cache keeps this rank's keys and values."""
        if self.cache is not None:
            self.cache.write(layer, key, value)
        return sequence_parallel_attention(
            query,
            key,
            value,
            mesh=self.mesh,
            key_mask=self.key_mask,
            is_causal=True,
            scale=scale,
            layout=self.shard.layout,
            kernel=self.kernel,
        )


@dataclass
class NextChunk:
    """A later chunk of a prompt: its queries come to the keys where they lie."""

    shard: SequenceShard
    key_mask: torch.Tensor | None
    span: int
    kernel: str
    cache: TokenCache
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.shard.tokens
        self.cache.extend(self.tokens, self.key_mask)
        self._queries = ChunkedPrefillAttention(self.shard.layout, self.shard.axis, self.shard.positions.device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """To all that came before, and causally to the chunk itself."""
        self.cache.write(layer, key, value)
        keys, values = self.cache.read(layer)
        return self._queries.attend(query, keys, values, key_mask=self.cache.mask, scale=scale, kernel=self.kernel)


@dataclass
class NextToken:
    """One new token, computed by all ranks alike; the rank whose turn it is keeps its key and value."""

    mesh: ParallelMesh
    mine: bool
    span: int
    kernel: str
    cache: TokenCache
    tokens: int = 1

    def __post_init__(self) -> None:
        self.cache.extend(int(self.mine))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Each rank to its own part, merged by one gather."""
        if self.mine:
            self.cache.write(layer, key, value)
        keys, values = self.cache.read(layer)
        mesh, mask = self.mesh, self.cache.mask
        return decode_attention(query, keys, values, axis=mesh.sequence, key_mask=mask, scale=scale, kernel=self.kernel)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    omni_sp: AttentionPhase | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in the place of sdpa or flash attention, with (batch, heads, tokens, head_dim).

    Raises:
        ShardingError: a layer was called past the model's own forward.
        UnsupportedAttentionError: an attention that is not the causal one over the whole row.
    """
    if omni_sp is None:
        raise ShardingError(
            f"layer {module.layer_idx} of a parallelized model was called by itself: call the model, or handle.remove()"
        )
    if sliding_window is not None and omni_sp.span > sliding_window:
        raise UnsupportedAttentionError(
            f"layer {module.layer_idx} attends to a sliding window of {sliding_window} tokens, and the row has "
            f"{omni_sp.span}: windows are not cut over ranks; keep prompt and answer within it, or run this model on "
            "one rank"
        )
    if dropout:
        raise UnsupportedAttentionError(f"attention with dropout {dropout}: call model.eval()")
    if is_causal is False:
        raise UnsupportedAttentionError("is_causal=False: causal models alone are parallelized; run this on one rank")
    q, k, v = (x.transpose(1, 2)[:, : omni_sp.tokens] for x in (query, key, value))
    out = omni_sp.attend(module.layer_idx, q, k, v, scaling)
    stand_in = query.shape[2] - omni_sp.tokens
    return F.pad(out, (0, 0, 0, 0, 0, stand_in)) if stand_in else out, None
