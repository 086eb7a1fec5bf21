"""Wan: video tokens are cut at the first block; text (and the first picture's embedding) stays whole on every rank."""

import dataclasses

from omni_sp.sharding.plan import ShardingPlan, Split


def correct(plan: ShardingPlan) -> ShardingPlan:
    """Only a per-token timestep (Wan 2.2 TI2V) has tokens to cut; cross-attention sees whole keys."""
    plan = plan.with_inputs("", inputs={"timestep": Split(dim=1, ndim=2, replicate_if_ndim_differs=True)})
    return dataclasses.replace(plan, replicated_keys=("blocks.*.attn2",))
