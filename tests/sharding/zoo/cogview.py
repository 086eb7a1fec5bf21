"""CogView3-Plus and CogView4."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build_three() -> Any:
    from diffusers import CogView3PlusTransformer2DModel

    return CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        out_channels=4,
        text_embed_dim=20,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
    )


def _build_four() -> Any:
    from diffusers import CogView4Transformer2DModel

    return CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        out_channels=4,
        text_embed_dim=20,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "timestep": torch.tensor([999, 301]),
        "original_size": torch.tensor([[80.0, 112.0]]).repeat(2, 1),
        "target_size": torch.tensor([[80.0, 112.0]]).repeat(2, 1),
        "crop_coords": torch.tensor([[0.0, 8.0]]).repeat(2, 1),
    }


def _masked() -> Inputs:
    return {**_inputs(), "attention_mask": key_mask((13, 5), 13).long()}


ENTRIES = [
    Entry("CogView3PlusTransformer2DModel", _build_three, _inputs),
    Entry("CogView4Transformer2DModel", _build_four, _inputs),
    Entry("CogView4Transformer2DModel", _build_four, _masked, variant="masked"),
]
