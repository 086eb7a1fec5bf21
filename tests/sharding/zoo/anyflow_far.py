"""AnyFlow FAR: video in chunks, each of which sees those before it, the oldest of them in a smaller resolution."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import TRANSFORMERS
from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build() -> Any:
    from diffusers import AnyFlowFARTransformer3DModel

    changes = {"attention_head_dim": 16, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 2}
    config = {**TRANSFORMERS["WanTransformer3DModel"], **changes, "chunk_partition": (1, 1, 2)}
    return AnyFlowFARTransformer3DModel(**config)


def _all_chunks() -> Inputs:
    """Without a cache: a compressed chunk of one frame (2 tokens), then chunks of one and two (45 tokens)."""
    return {
        "hidden_states": draw(1, 2, 4, 4, 6, 10),
        "timestep": torch.tensor([[0.0, 0.0, 600.0, 600.0], [0.0, 0.0, 250.0, 250.0]]),
        "r_timestep": torch.tensor([[0.0, 0.0, 400.0, 400.0], [0.0, 0.0, 0.0, 0.0]]),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "chunk_partition": [1, 1, 2],
        "return_dict": False,
    }


def _next_chunk() -> Inputs:
    """The last chunk alone: keys and values of the chunks before lie in a cache, which is longer than what is in it."""
    return {
        **_all_chunks(),
        "hidden_states": draw(1, 2, 2, 4, 6, 10),
        "timestep": torch.tensor([[600.0, 600.0], [250.0, 250.0]]),
        "r_timestep": torch.tensor([[400.0, 400.0], [0.0, 0.0]]),
        "kv_cache": {
            i: {"compressed_cache": draw(3 + i, 2, 2, 3, 6, 16), "full_cache": draw(5 + i, 2, 2, 3, 60, 16)}
            for i in range(2)
        },
        "kv_cache_flag": {"is_cache_step": False, "num_cached_chunks": 2},
    }


ENTRIES = [
    Entry("AnyFlowFARTransformer3DModel", _build, _all_chunks),
    Entry("AnyFlowFARTransformer3DModel", _build, _next_chunk, "next chunk"),
]
