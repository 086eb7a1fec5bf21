"""How attention is computed over the ranks in each phase: prefill, a later chunk of the prompt, a new token.

The phase passes through the model's own code as a keyword argument, down to the attention function that transformers
calls by name, so there is no global state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from omni_sp.attention import sequence_parallel_attention
from omni_sp.attention.distributed_kv import ChunkedPrefillAttention, decode_attention
from omni_sp.errors import ShardingError, UnsupportedAttentionError
from omni_sp.llm.hf.kv_cache import TokenCache
from omni_sp.llm.hf.sequence_shard import SequenceShard
from omni_sp.mesh import ParallelMesh

ATTENTION = "omni_sp"
"""The name under which transformers finds `attention`."""


class AttentionPhase(Protocol):
    """How the attention of one forward is computed.

    Attributes:
        tokens: number of this rank's tokens; where it is 0, the model runs on a stand-in token.
        span: number of tokens of the prompt and the answer together.
    """

    tokens: int
    span: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of this rank's tokens, (batch, tokens, heads, head_dim), to all tokens before them."""


@dataclass
class Prefill:
    """A prompt, or its first chunk: causal attention by Ulysses, the ring, or both.

    The cache stores all heads of this rank's own tokens, not what the exchange brings, so that memory is shared evenly
    whatever the degrees and the number of heads. ``key_mask`` is (batch, own tokens).
    """

    mesh: ParallelMesh
    shard: SequenceShard
    key_mask: Tensor | None
    span: int
    kernel: str
    cache: TokenCache | None = None
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.shard.tokens
        if self.cache is not None:
            self.cache.extend(self.tokens, self.key_mask)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend causally to the prompt, or to its first chunk."""
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
    """A later chunk of a prompt: its queries travel, the keys stay on their ranks."""

    shard: SequenceShard
    key_mask: Tensor | None
    span: int
    kernel: str
    cache: TokenCache
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.shard.tokens
        self.cache.extend(self.tokens, self.key_mask)
        self._attention = ChunkedPrefillAttention(self.shard.layout, self.shard.axis, self.shard.positions.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend to all earlier chunks, and causally to this one."""
        self.cache.write(layer, key, value)
        keys, values = self.cache.read(layer)
        return self._attention.attend(query, keys, values, key_mask=self.cache.mask, scale=scale, kernel=self.kernel)


@dataclass
class NextToken:
    """One new token, the same on all ranks; one rank stores its key and value."""

    mesh: ParallelMesh
    is_stored_here: bool
    span: int
    kernel: str
    cache: TokenCache
    tokens: int = 1

    def __post_init__(self) -> None:
        self.cache.extend(int(self.is_stored_here))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend to the keys of each rank, and merge the results by one gather."""
        if self.is_stored_here:
            self.cache.write(layer, key, value)
        keys, values = self.cache.read(layer)
        mesh, mask = self.mesh, self.cache.mask
        return decode_attention(query, keys, values, axis=mesh.sequence, key_mask=mask, scale=scale, kernel=self.kernel)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    omni_sp: AttentionPhase | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls instead of sdpa or flash attention, on (batch, heads, tokens, …).

    Raises:
        ShardingError: a layer was called by itself, not by the model.
        UnsupportedAttentionError: the attention is not causal over the whole sequence.
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
