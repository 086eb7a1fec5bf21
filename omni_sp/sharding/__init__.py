"""A diffusers transformer as data: where its token streams are cut and joined, how its attention reaches the core."""

from omni_sp.sharding.apply import ShardHandle, shard
from omni_sp.sharding.plan import Gather, ModulePlan, ShardingPlan, Split, TrackedPlan
from omni_sp.sharding.plans import plan_for, tracked_plan_for

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
