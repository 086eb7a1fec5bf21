"""Flux 2 and Flux 3: ids of four axes, modulation shared by the blocks."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw

HEIGHT, WIDTH, TEXT = 5, 7, 13
TOKENS = HEIGHT * WIDTH
REFERENCE = 3 * 5
"""Tokens of a reference picture."""


def _img_ids(height: int, width: int, time: int = 0) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    zeros = torch.zeros_like(rows)
    return torch.stack([zeros + time, rows, columns, zeros], dim=-1).reshape(-1, 4)


def _txt_ids() -> torch.Tensor:
    positions = torch.zeros(TEXT, 4, dtype=torch.long)
    positions[:, 3] = torch.arange(TEXT)
    return positions


def _flux2() -> Any:
    return transformer("Flux2Transformer2DModel")


def _flux2_kv() -> Any:
    """As the pipeline that keeps the keys of reference pictures leaves it."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    model = _flux2()
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


def _flux2_inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, TOKENS, 16),
        "encoder_hidden_states": draw(2, 2, TEXT, 24),
        "timestep": torch.full((2,), 0.6),
        "guidance": torch.full((2,), 4.0),
        "img_ids": _img_ids(HEIGHT, WIDTH)[None].repeat(2, 1, 1),
        "txt_ids": _txt_ids()[None].repeat(2, 1, 1),
    }


def _flux2_extract_inputs() -> Inputs:
    """The first step: reference tokens stand before the picture's, and see only themselves."""
    ids = torch.cat([_img_ids(3, 5, time=10), _img_ids(HEIGHT, WIDTH)])
    return {
        **_flux2_inputs(),
        "hidden_states": draw(1, 2, REFERENCE + TOKENS, 16),
        "img_ids": ids[None].repeat(2, 1, 1),
        "kv_cache_mode": "extract",
        "num_ref_tokens": REFERENCE,
    }


def _flux2_cached_inputs() -> Inputs:
    """The later steps: their keys and values come from outside."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    cache = Flux2KVCache(num_double_layers=2, num_single_layers=2)
    cache.num_ref_tokens = REFERENCE
    for index, layer in enumerate([*cache.double_block_caches, *cache.single_block_caches]):
        layer.store(draw(20 + index, 2, REFERENCE, 3, 16), draw(30 + index, 2, REFERENCE, 3, 16))
    return {**_flux2_inputs(), "kv_cache": cache, "kv_cache_mode": "cached"}


def _flux3(flow_map: bool = False) -> Any:
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=12,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        timestep_channels=20,
        axes_dims_rope=(4, 4, 4, 4),
        flow_map=flow_map,
    )


def _flux3_inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, TOKENS, 16),
        "encoder_hidden_states": draw(2, 2, TEXT, 24),
        "timestep": torch.full((2,), 0.6),
        "img_ids": _img_ids(HEIGHT, WIDTH),
        "txt_ids": _txt_ids(),
    }


def _flux3_reference_inputs() -> Inputs:
    return {
        **_flux3_inputs(),
        "image_cond_hidden_states": draw(3, 2, REFERENCE, 12),
        "image_cond_ids": _img_ids(3, 5, time=10),
        "target_timestep": torch.full((2,), 0.3),
    }


ENTRIES = [
    Entry("Flux2Transformer2DModel", _flux2, _flux2_inputs),
    Entry("Flux2Transformer2DModel", _flux2_kv, _flux2_extract_inputs, "reference, first step"),
    Entry("Flux2Transformer2DModel", _flux2_kv, _flux2_cached_inputs, "reference, later step"),
    Entry("Flux3Transformer2DModel", _flux3, _flux3_inputs),
    Entry("Flux3Transformer2DModel", lambda: _flux3(flow_map=True), _flux3_reference_inputs, "reference, flow map"),
]
