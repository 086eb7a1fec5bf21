"""Mochi."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def build_mochi(in_channels: int = 4) -> Any:
    return transformer("MochiTransformer3DModel", in_channels=in_channels)


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 3, 6, 10),
        "encoder_hidden_states": draw(2, 2, 13, 16),
        "encoder_attention_mask": key_mask((13, 5), 13),
        "timestep": torch.tensor([999.0, 301.0]),
    }


ENTRIES = [Entry("MochiTransformer3DModel", build_mochi, _inputs)]
