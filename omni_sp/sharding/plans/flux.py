"""FLUX.1: everything is cut at the transformer's entry, position ids included, so that RoPE is computed per piece."""

from omni_sp.sharding.plan import ShardingPlan, Split


def correct(plan: ShardingPlan) -> ShardingPlan:
    """Ids may come with a batch dim (tokens are the last but one dim either way); ControlNet residuals are cut too."""
    return plan.with_inputs(
        "",
        inputs={
            "img_ids": Split(dim=-2),
            "txt_ids": Split(dim=-2),
            "controlnet_block_samples": Split(dim=1, ndim=3),
            "controlnet_single_block_samples": Split(dim=1, ndim=3),
        },
    )
