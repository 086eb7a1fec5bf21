"""A diffusers transformer over ranks: where its token streams begin, and how its blocks run on shards."""

from typing import Any

from omni_sp.errors import UnsupportedModelError
from omni_sp.sharding.apply import ShardHandle, shard
from omni_sp.sharding.models import plan_for
from omni_sp.sharding.plan import Plan, Split
from omni_sp.sharding.replay import BlockCounts
from omni_sp.sharding.vae import VaeHandle, shard_vae

__all__ = ["BlockCounts", "Plan", "ShardHandle", "Split", "VaeHandle", "plan_for", "shard", "shard_vae"]

_REPLACED = {"ShardingPlan", "ModulePlan", "Gather", "TrackedPlan", "tracked_plan_for"}


def __getattr__(name: str) -> Any:
    """Say what took the place of the plans of earlier versions."""
    if name in _REPLACED:
        raise UnsupportedModelError(
            f"omni_sp.sharding has no {name} any more: every model is followed through its own code, so a plan only "
            'says where its token streams begin: plan=Plan({"transformer_blocks.0": {"hidden_states": Split(dim=1)}}); '
            "outputs are gathered, and keys that are replicated are found, without a word. plan_for(model) gives the "
            "plan of a model"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
