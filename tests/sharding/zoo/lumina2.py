"""Lumina 2: a text and a picture refined apart, then one sequence whose length differs by sample."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build() -> Any:
    return transformer("Lumina2Transformer2DModel")


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "timestep": draw(2, 2).abs(),
        "encoder_hidden_states": draw(3, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
    }


def _even_inputs() -> Inputs:
    return _inputs() | {"encoder_attention_mask": key_mask((13, 13), 13).long()}


ENTRIES = [
    Entry("Lumina2Transformer2DModel", _build, _inputs),
    Entry("Lumina2Transformer2DModel", _build, _even_inputs, variant="texts of one length"),
]
