"""AnyFlow: Wan with two timesteps for each frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from omni_sp.testing.components import TRANSFORMERS
from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build(**changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import AnyFlowTransformer3DModel

        return AnyFlowTransformer3DModel(**{**TRANSFORMERS["WanTransformer3DModel"], **changes})

    return build


def _inputs() -> Inputs:
    """Frames come before channels."""
    return {
        "hidden_states": draw(1, 2, 3, 4, 6, 10),
        "timestep": torch.tensor([[600.0, 500.0, 400.0], [250.0, 250.0, 250.0]]),
        "r_timestep": torch.tensor([[400.0, 300.0, 200.0], [0.0, 0.0, 0.0]]),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "return_dict": False,
    }


def _image() -> Inputs:
    return {**_inputs(), "encoder_hidden_states_image": draw(3, 2, 11, 28)}


ENTRIES = [
    Entry("AnyFlowTransformer3DModel", _build(), _inputs),
    Entry("AnyFlowTransformer3DModel", _build(image_dim=28, deltatime_type="t-r"), _image, "image"),
]
