"""Stable Diffusion 3."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build() -> Any:
    return transformer("SD3Transformer2DModel")


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "pooled_projections": draw(3, 2, 12),
        "timestep": draw(4, 2).abs(),
    }


ENTRIES = [Entry("SD3Transformer2DModel", _build, _inputs)]
