"""LTX-Video."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build() -> Any:
    return transformer("LTXVideoTransformer3DModel")


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 45, 8),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "timestep": torch.tensor([600.0, 250.0]),
        "encoder_attention_mask": key_mask((13, 5), 13),
        "num_frames": 3,
        "height": 3,
        "width": 5,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }


def _conditioned() -> Inputs:
    """Given frames come first: tokens have timesteps and positions in time and space of their own."""
    inputs = _inputs()
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del inputs[name]
    timestep = torch.tensor([[600.0], [250.0]]).repeat(1, 45)
    timestep[:, :15] = 0
    positions = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), torch.arange(5), indexing="ij"))
    coordinates = positions.flatten(1).float() * torch.tensor([8 / 25, 32.0, 32.0])[:, None]
    return {**inputs, "timestep": timestep, "video_coords": coordinates[None].repeat(2, 1, 1)}


ENTRIES = [
    Entry("LTXVideoTransformer3DModel", _build, _inputs),
    Entry("LTXVideoTransformer3DModel", _build, _conditioned, "conditioned"),
]
