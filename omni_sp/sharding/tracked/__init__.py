"""Tensors in pieces that look whole to a model's code: any transformer runs on them, unmodified and unplanned."""

from omni_sp.sharding.tracked import attention, rules, shapes
from omni_sp.sharding.tracked.attention import tracked_attention
from omni_sp.sharding.tracked.spans import Spans, dealt_evenly
from omni_sp.sharding.tracked.tensor import GATHERED, TokenTensor, cut, unwrapped

__all__ = [
    "GATHERED",
    "Spans",
    "TokenTensor",
    "attention",
    "cut",
    "dealt_evenly",
    "rules",
    "shapes",
    "tracked_attention",
    "unwrapped",
]
