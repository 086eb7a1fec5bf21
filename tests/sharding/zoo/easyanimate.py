"""EasyAnimate."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw

_SMALL: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "out_channels": 4,
    "patch_size": 2,
    "sample_width": 10,
    "sample_height": 6,
    "num_layers": 4,
    "mmdit_layers": 2,
    "time_embed_dim": 12,
    "text_embed_dim": 20,
}


def _build() -> Any:
    from diffusers import EasyAnimateTransformer3DModel

    return EasyAnimateTransformer3DModel(in_channels=4, add_norm_text_encoder=True, **_SMALL)


def _build_inpaint() -> Any:
    from diffusers import EasyAnimateTransformer3DModel

    # The video's latents, the mask and the masked video's latents, and a control's.
    return EasyAnimateTransformer3DModel(in_channels=13, text_embed_dim_t5=14, after_norm=True, **_SMALL)


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 3, 6, 10),
        "timestep": torch.tensor([999.0, 301.0]),
        "encoder_hidden_states": draw(2, 2, 13, 20),
    }


def _inputs_inpaint() -> Inputs:
    return {
        **_inputs(),
        "encoder_hidden_states_t5": draw(5, 2, 7, 14),
        "inpaint_latents": draw(6, 2, 5, 3, 6, 10),
        "control_latents": draw(7, 2, 4, 3, 6, 10),
    }


ENTRIES = [
    Entry("EasyAnimateTransformer3DModel", _build, _inputs),
    Entry("EasyAnimateTransformer3DModel", _build_inpaint, _inputs_inpaint, variant="inpainting, two texts"),
]
