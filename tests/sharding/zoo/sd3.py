"""Stable Diffusion 3."""

from __future__ import annotations

from typing import Any

from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "pooled_projections": draw(3, 2, 12),
        "timestep": draw(4, 2).abs(),
    }


ENTRIES = [Entry("SD3Transformer2DModel", _build, _inputs)]
