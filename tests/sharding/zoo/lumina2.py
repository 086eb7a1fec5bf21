"""Lumina 2: a text and a picture refined apart, then one sequence whose length differs by sample."""

from __future__ import annotations

from typing import Any

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build() -> Any:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=36,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(30, 16, 16),
        cap_feat_dim=20,
    )


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "timestep": draw(2, 2).abs(),
        "encoder_hidden_states": draw(3, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
    }


def _even_inputs() -> Inputs:
    return _inputs() | {"encoder_attention_mask": key_mask((13, 13), 13).long()}


ENTRIES = [
    Entry("Lumina2Transformer2DModel", _build, _inputs),
    Entry("Lumina2Transformer2DModel", _build, _even_inputs, variant="texts of one length"),
]
