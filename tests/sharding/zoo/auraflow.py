"""AuraFlow."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build() -> Any:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=256,
    )


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "timestep": torch.tensor([0.99, 0.31]),
    }


ENTRIES = [Entry("AuraFlowTransformer2DModel", _build, _inputs)]
