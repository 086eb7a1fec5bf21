"""A UNet's transformer along the frames of a video: I2VGen-XL, text-to-video."""

from __future__ import annotations

from typing import Any

from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build() -> Any:
    from diffusers.models import TransformerTemporalModel

    return TransformerTemporalModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=24, num_layers=2, norm_num_groups=4
    )


def _inputs() -> Inputs:
    """Two videos of 5 frames of 3 x 7 positions; each position attends along the frames."""
    return {"hidden_states": draw(1, 10, 24, 3, 7), "num_frames": 5, "return_dict": False}


ENTRIES = [Entry("TransformerTemporalModel", _build, _inputs)]
