"""Wan: video tokens are cut at the first block; text (and the first picture's embedding) stays whole on every rank."""

import dataclasses

from omni_sp.sharding.plan import ShardingPlan, Split


def correct(plan: ShardingPlan) -> ShardingPlan:
    """Only a per-token timestep (Wan 2.2 TI2V) has tokens to cut; cross-attention sees whole keys."""
    plan = plan.extended("", inputs={"timestep": Split(dim=1, ndim=2, whole_otherwise=True)})
    return dataclasses.replace(plan, whole_keys=("blocks.*.attn2",))
