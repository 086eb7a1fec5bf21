"""Wan-Animate 2: a reference video leaves its keys and values in a cache, and every step attends to them by frames."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build() -> Any:
    from diffusers import WanAnimate2Transformer3DModel
    from diffusers.models.transformers import transformer_wan_animate_2 as module

    model = WanAnimate2Transformer3DModel(
        text_len=13,
        in_dim=12,
        dim=48,
        ffn_dim=40,
        freq_dim=16,
        text_dim=20,
        out_dim=4,
        num_heads=3,
        num_layers=2,
    )
    create = module.create_block_mask

    def eagerly(*args: Any, **kwargs: Any) -> Any:
        return create(*args, **{**kwargs, "_compile": False})

    # The model would compile this mask, which takes longer than all the rest.
    with mock.patch.object(module, "create_block_mask", eagerly):
        model.block_masks[3, 15] = model.create_mask(3, 15, torch.device("cpu"))
    return model


def _inputs(frames: int) -> Inputs:
    return {
        "hidden_states": [draw(1, 4, frames, 6, 10), draw(2, 4, frames, 6, 10)],
        "condition_latents": [draw(3, 8, frames, 6, 10), draw(4, 8, frames, 6, 10)],
        "timestep": torch.tensor([600.0, 250.0]),
        "encoder_hidden_states": [draw(5, 13, 20), draw(6, 5, 20)],
        "encoder_hidden_states_image": draw(7, 2, 11, 1280),
        "seq_len": frames * 15,
        "return_dict": False,
    }


def _reference() -> Inputs:
    """3 frames, whose keys and values go to the cache."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        **_inputs(3),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "offset_grid_sizes": torch.tensor([[3, 3, 5]] * 2),
    }


def _generation() -> Inputs:
    """4 frames: the character, then those of the reference."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    cache = WanAnimate2KVCache(2)
    for layer in range(2):
        cache.get(layer).store(draw(8 + layer, 2, 45, 3, 16), draw(10 + layer, 2, 45, 3, 16))
    return {
        **_inputs(4),
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "reference_grid_sizes": torch.tensor([[3, 3, 5]] * 2),
        "origin_len": 9,
        "origin_area": [48, 80],
    }


ENTRIES = [
    Entry("WanAnimate2Transformer3DModel", _build, _reference, "reference"),
    Entry("WanAnimate2Transformer3DModel", _build, _generation, "generation"),
]
