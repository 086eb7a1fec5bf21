"""Sharded tensors that look like full tensors to a model's code: any transformer runs on them, unmodified."""

from omni_sp.sharding.tracked import attention, compute_rules, picture_rules, row_rules, view_rules, window_rules
from omni_sp.sharding.tracked.attention import tracked_attention
from omni_sp.sharding.tracked.placement import Placement, even_placement, local_shard
from omni_sp.sharding.tracked.tensor import TokenTensor, to_full_tensors

__all__ = [
    "Placement",
    "TokenTensor",
    "attention",
    "compute_rules",
    "even_placement",
    "local_shard",
    "picture_rules",
    "row_rules",
    "to_full_tensors",
    "tracked_attention",
    "view_rules",
    "window_rules",
]
