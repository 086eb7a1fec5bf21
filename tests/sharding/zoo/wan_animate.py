"""Wan-Animate: a character moved by the poses and the face of another video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from omni_sp.testing.components import TRANSFORMERS
from tests.sharding.zoo.entry import Entry, Inputs, draw
from tests.sharding.zoo.wan import IMAGE


def _build(**changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import WanAnimateTransformer3DModel

        config: dict[str, Any] = {
            **TRANSFORMERS["WanTransformer3DModel"],
            **IMAGE,
            "in_channels": 12,
            "latent_channels": 4,
            "num_layers": 4,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 6},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
            "motion_encoder_batch_size": 4,
        }
        return WanAnimateTransformer3DModel(**{**config, **changes})

    return build


def _inputs(text: int = 512) -> Inputs:
    """3 frames of latents, of which the first is the character; 5 frames of the face make 2 of latents."""
    return {
        "hidden_states": draw(1, 2, 12, 3, 6, 10),
        "timestep": torch.tensor([600, 250]),
        "encoder_hidden_states": draw(2, 2, text, 20),
        "encoder_hidden_states_image": draw(3, 2, 11, 28),
        "pose_hidden_states": draw(4, 2, 4, 2, 6, 10),
        "face_pixel_values": draw(5, 2, 3, 5, 16, 16).clamp(-1, 1),
        "return_dict": False,
    }


ENTRIES = [
    Entry("WanAnimateTransformer3DModel", _build(), _inputs),
    Entry("WanAnimateTransformer3DModel", _build(added_kv_proj_dim=None), lambda: _inputs(13), "image among the text"),
]
