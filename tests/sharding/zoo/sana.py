"""Sana: linear attention, convolutions over the picture between the blocks."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build(**more: Any) -> Any:
    return transformer("SanaTransformer2DModel", **more)


def _sprint() -> Any:
    return _build(guidance_embeds=True, qk_norm="rms_norm_across_heads", interpolation_scale=1, patch_size=2)


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 5, 7),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
        "timestep": draw(3, 2).abs() * 100,
    }


def _sprint_inputs() -> Inputs:
    return _inputs() | {"hidden_states": draw(1, 2, 4, 10, 14), "guidance": draw(4, 2).abs()}


def _control_inputs() -> Inputs:
    return _inputs() | {"controlnet_block_samples": (draw(5, 2, 35, 24),)}


ENTRIES = [
    Entry("SanaTransformer2DModel", _build, _inputs),
    Entry("SanaTransformer2DModel", _sprint, _sprint_inputs, variant="guidance embedding"),
    Entry("SanaTransformer2DModel", _build, _control_inputs, variant="controlnet"),
]
