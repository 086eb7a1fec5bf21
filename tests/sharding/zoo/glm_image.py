"""GLM-Image."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build() -> Any:
    from diffusers import GlmImageTransformer2DModel

    return GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        text_embed_dim=20,
        time_embed_dim=32,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=50,
    )


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "prior_token_id": torch.arange(70).view(2, 35) % 50,
        "prior_token_drop": torch.zeros(2, 35, dtype=torch.bool),
        "timestep": torch.full((2,), 501.0),
        "target_size": torch.tensor([[80.0, 112.0]] * 2),
        "crop_coords": torch.zeros(2, 2),
    }


def _masked() -> Inputs:
    """Without a prior, and with a text mask."""
    return {
        **_inputs(),
        "prior_token_drop": torch.ones(2, 35, dtype=torch.bool),
        "attention_mask": key_mask((13, 5), 13).long(),
    }


def _cache(mode: str) -> Any:
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    cache = GlmImageKVCache(num_layers=2)
    if mode == "read":
        for layer in range(2):
            cache[layer].store(draw(10 + layer, 1, 21, 3, 16), draw(20 + layer, 1, 21, 3, 16))
    cache.set_mode(mode)
    return cache


def _edited() -> Inputs:
    """With keys and values of a picture that was written to the cache before."""
    return {**_inputs(), "kv_caches": _cache("read")}


def _written() -> Inputs:
    """A picture that is only written to the cache: no text."""
    return {
        "hidden_states": draw(1, 1, 4, 6, 14),
        "encoder_hidden_states": draw(2, 1, 0, 20),
        "prior_token_id": torch.arange(21).view(1, 21),
        "prior_token_drop": torch.zeros(1, 21, dtype=torch.bool),
        "timestep": torch.zeros(1),
        "target_size": torch.tensor([[48, 112]]),
        "crop_coords": torch.zeros(1, 2),
        "kv_caches": _cache("write"),
    }


ENTRIES = [
    Entry("GlmImageTransformer2DModel", _build, _inputs),
    Entry("GlmImageTransformer2DModel", _build, _masked, variant="text mask"),
    Entry("GlmImageTransformer2DModel", _build, _edited, variant="reads a cache"),
    Entry("GlmImageTransformer2DModel", _build, _written, variant="writes a cache"),
]
