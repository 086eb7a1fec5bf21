"""Helios: video frames after a history of frames in three resolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from omni_sp.testing.components import TRANSFORMERS
from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build(**changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import HeliosTransformer3DModel

        config = {**TRANSFORMERS["WanTransformer3DModel"], "attention_head_dim": 16, "rope_dim": (8, 4, 4)}
        del config["rope_max_seq_len"]
        return HeliosTransformer3DModel(**{**config, **changes})

    return build


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 3, 6, 10),
        "timestep": torch.tensor([600, 250]),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "return_dict": False,
    }


def _history() -> Inputs:
    """4 frames long ago, 2 before, and the very first with the last: 2 + 6 + 30 tokens before 45."""
    first, long, middle, last, frames = torch.arange(11).split([1, 4, 2, 1, 3])
    return {
        **_inputs(),
        "indices_hidden_states": frames[None],
        "indices_latents_history_short": torch.cat([first, last])[None],
        "indices_latents_history_mid": middle[None],
        "indices_latents_history_long": long[None],
        "latents_history_short": draw(3, 2, 4, 2, 6, 10),
        "latents_history_mid": draw(4, 2, 4, 2, 6, 10),
        "latents_history_long": draw(5, 2, 4, 4, 6, 10),
    }


ENTRIES = [
    Entry("HeliosTransformer3DModel", _build(), _history),
    Entry("HeliosTransformer3DModel", _build(is_amplify_history=True), _history, "amplified history"),
    Entry(
        "HeliosTransformer3DModel",
        _build(guidance_cross_attn=False, zero_history_timestep=False),
        _inputs,
        "no history",
    ),
]
