"""Attention over ranks as one operator of torch, which compiled steps call and torch.compile does not look into.

vLLM compiles a decoder without guards, so a graph holds as constants what it cannot see change. The exchange reads how
the ranks share the tokens of the current step, so it must stay out of the graph: what was true of the step that was
traced would be taken for true of every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omni_sp.llm.vllm import internals

_FORWARD = "forward_over_ranks"


@torch.library.custom_op("omni_sp::attention_over_ranks", mutates_args=())
def attention_over_ranks(query: Tensor, key: Tensor, value: Tensor, layer_name: str) -> Tensor:
    """The attention of a layer of the current step's model.

    Args:
        query: of this rank's tokens and all heads of its matrices, (tokens, heads x head size).
        key: likewise.
        value: likewise.
        layer_name: vLLM's name of the layer's KV cache.

    Returns:
        What attention gives for the query, of its shape.
    """
    out: Tensor = getattr(internals.attention_layer(layer_name), _FORWARD)(query, key, value)
    return out


@attention_over_ranks.register_fake
def _shape(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def call_as_operator(attention: Any) -> None:
    """Let vLLM's attention layer run what is its ``forward`` now, where the compiler does not see it."""
    name = attention.layer_name

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = attention_over_ranks(query, key, value, name)
        return out

    setattr(attention, _FORWARD, attention.forward)
    attention.forward = call
