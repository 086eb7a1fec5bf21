"""AuraFlow."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build() -> Any:
    return transformer("AuraFlowTransformer2DModel")


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "timestep": torch.tensor([0.99, 0.31]),
    }


ENTRIES = [Entry("AuraFlowTransformer2DModel", _build, _inputs)]
