"""Mochi."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def build_mochi(in_channels: int = 4) -> Any:
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=18,
        in_channels=in_channels,
        text_embed_dim=16,
        time_embed_dim=12,
        max_sequence_length=13,
    )


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 3, 6, 10),
        "encoder_hidden_states": draw(2, 2, 13, 16),
        "encoder_attention_mask": key_mask((13, 5), 13),
        "timestep": torch.tensor([999.0, 301.0]),
    }


ENTRIES = [Entry("MochiTransformer3DModel", build_mochi, _inputs)]
