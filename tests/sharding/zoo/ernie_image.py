"""ERNIE-Image, whose rows are (tokens, batch, channels)."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build() -> Any:
    from diffusers import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel(
        hidden_size=48,
        num_attention_heads=3,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=8,
        out_channels=8,
        patch_size=1,
        text_in_dim=20,
        rope_axes_dim=(4, 6, 6),
    )


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 8, 5, 7),
        "timestep": torch.full((2,), 501.0),
        "text_bth": draw(2, 2, 13, 20),
        "text_lens": torch.tensor([13, 5]),
    }


ENTRIES = [Entry("ErnieImageTransformer2DModel", _build, _inputs)]
