"""Bria Fibo 2: gist tokens of the text, the picture's, and those of pictures to edit, in one stream."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask

TEXT = 13


def _build() -> Any:
    from diffusers import BriaFibo2Transformer2DModel

    return BriaFibo2Transformer2DModel(
        in_channels=4,
        patch_size=2,
        dim=48,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=3,
        cap_feat_dim=20,
        injection_layer_ids=(1,),
        perceiver_num_layers=2,
        min_num_gist_tokens=3,
        max_num_gist_tokens=11,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(32, 16, 16),
    )


def _inputs() -> Inputs:
    # One bundle of features for the gist, one for each block that reads the text.
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "timestep": torch.tensor([0.6, 0.6]),
        "encoder_hidden_states": draw(2, 2, 2, TEXT, 20),
    }


def _padded_inputs() -> Inputs:
    """Prompts of two lengths: their gists have different lengths too, and go last."""
    return {**_inputs(), "encoder_attention_mask": key_mask((TEXT, 5), TEXT)}


def _edit_inputs() -> Inputs:
    """Two pictures to edit, each of a size of its own."""
    return {**_padded_inputs(), "context_latents": [draw(3, 2, 4, 6, 10), draw(4, 2, 4, 2, 6)]}


ENTRIES = [
    Entry("BriaFibo2Transformer2DModel", _build, _inputs),
    Entry("BriaFibo2Transformer2DModel", _build, _padded_inputs, "two prompts"),
    Entry("BriaFibo2Transformer2DModel", _build, _edit_inputs, "edit"),
]
