"""Qwen-Image: picture and text are cut where the first block takes them; ControlNet's residuals are added here."""

from omni_sp.sharding.plan import ShardingPlan, Split


def correct(plan: ShardingPlan) -> ShardingPlan:
    """Residuals of a ControlNet are added to the picture's piece between blocks: cut them like it."""
    return plan.with_inputs("", inputs={"controlnet_block_samples": Split(dim=1, ndim=3)})
