"""Plans by transformer class: diffusers' own ``_cp_plan``, corrected where it needs it. One short file per family."""

from __future__ import annotations

from collections.abc import Callable

import torch

from omni_sp.errors import UnsupportedModelError
from omni_sp.sharding.plan import ShardingPlan, from_diffusers
from omni_sp.sharding.plans import flux, qwen_image, wan

_CORRECTIONS: dict[str, Callable[[ShardingPlan], ShardingPlan]] = {
    "FluxTransformer2DModel": flux.correct,
    "QwenImageTransformer2DModel": qwen_image.correct,
    "WanTransformer3DModel": wan.correct,
}


def planned_models() -> tuple[str, ...]:
    """Names of the transformer classes that are proven exact."""
    return tuple(sorted(_CORRECTIONS))


def plan_for(model: torch.nn.Module) -> ShardingPlan:
    """The plan for a transformer.

    Raises:
        UnsupportedModelError: there is none.
    """
    name = type(model).__name__
    own = getattr(model, "_cp_plan", None)
    if own is None:
        raise UnsupportedModelError(
            f"{name} has no sharding plan, so its tokens cannot be split over ranks: run it with degrees 1 x 1, or "
            f"give parallelize(..., plan=ShardingPlan(...)); planned are {', '.join(planned_models())}, and any class "
            "that carries a _cp_plan"
        )
    plan = from_diffusers(own)
    return _CORRECTIONS[name](plan) if name in _CORRECTIONS else plan
