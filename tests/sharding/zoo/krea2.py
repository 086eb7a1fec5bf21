"""Krea 2: text features of several layers, fused, then one stream with grouped queries."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask

HEIGHT, WIDTH, TEXT = 5, 7, 13


def _build() -> Any:
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=40,
        timestep_embed_dim=20,
        text_hidden_dim=24,
        num_text_layers=4,
        text_num_attention_heads=3,
        text_num_key_value_heads=3,
        text_intermediate_size=28,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )


def _inputs() -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    return {
        "hidden_states": draw(1, 2, HEIGHT * WIDTH, 16),
        "encoder_hidden_states": draw(2, 2, TEXT, 4, 24),
        "timestep": torch.full((2,), 0.6),
        "position_ids": torch.cat([torch.zeros(TEXT, 3, dtype=torch.long), positions]),
        "encoder_attention_mask": key_mask((TEXT, 5), TEXT),
    }


ENTRIES = [Entry("Krea2Transformer2DModel", _build, _inputs)]
