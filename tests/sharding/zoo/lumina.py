"""Lumina-Next."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build() -> Any:
    from diffusers import LuminaNextDiT2DModel

    return LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=20,
    )


def _inputs() -> Inputs:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "timestep": torch.tensor([0.99, 0.31]),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_mask": key_mask((13, 5), 13).long(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 16, 16, linear_factor=1.0, ntk_factor=1.5),
        "cross_attention_kwargs": {"base_sequence_length": 16},
    }


ENTRIES = [Entry("LuminaNextDiT2DModel", _build, _inputs)]
