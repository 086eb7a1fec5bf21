"""A diffusers transformer as data: where its token streams are split and gathered, how its attention is routed."""

from omni_sp.sharding.apply import ShardHandle, shard
from omni_sp.sharding.models import plan_for, tracked_plan_for
from omni_sp.sharding.plan import Gather, ModulePlan, ShardingPlan, Split, TrackedPlan

__all__ = [
    "Gather",
    "ModulePlan",
    "ShardHandle",
    "ShardingPlan",
    "Split",
    "TrackedPlan",
    "plan_for",
    "shard",
    "tracked_plan_for",
]
