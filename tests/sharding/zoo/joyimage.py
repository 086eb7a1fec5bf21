"""JoyImage Edit and Edit Plus."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask

_CONFIG = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "text_dim": 20,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}


def _edit(rope_type: str = "rope") -> Any:
    from diffusers import JoyImageEditTransformer3DModel

    return JoyImageEditTransformer3DModel(**_CONFIG, rope_type=rope_type)


def _edit_inputs() -> Inputs:
    """Two pictures a sample: the one to draw and the one to edit."""
    return {
        "hidden_states": draw(1, 2, 2, 4, 1, 10, 14),
        "timestep": torch.full((2,), 501.0),
        "encoder_hidden_states": draw(2, 2, 13, 20),
    }


def _drawn() -> Inputs:
    """A picture alone."""
    return {**_edit_inputs(), "hidden_states": draw(1, 2, 4, 1, 10, 14)}


def _edit_plus() -> Any:
    from diffusers import JoyImageEditPlusTransformer3DModel

    return JoyImageEditPlusTransformer3DModel(**_CONFIG)


def _edit_plus_inputs() -> Inputs:
    """Pictures of several sizes a sample, padded to the longest sample."""
    return {
        "hidden_states": draw(1, 2, 35, 4, 1, 2, 2),
        "timestep": torch.full((2,), 501.0),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_hidden_states_mask": key_mask((13, 5), 13).long(),
        "shape_list": [[(1, 3, 5), (1, 4, 5)], [(1, 3, 5), (1, 2, 3)]],
    }


ENTRIES = [
    Entry("JoyImageEditTransformer3DModel", _edit, _edit_inputs),
    Entry("JoyImageEditTransformer3DModel", lambda: _edit("mrope"), _drawn, variant="one picture"),
    Entry("JoyImageEditPlusTransformer3DModel", _edit_plus, _edit_plus_inputs),
]
