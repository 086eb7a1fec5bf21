"""Plans by transformer class: diffusers' own ``_cp_plan``, corrected where it needs it. One short file per family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch

from omni_sp.errors import UnsupportedModelError
from omni_sp.sharding.plan import ShardingPlan, Split, TrackedPlan, from_diffusers
from omni_sp.sharding.plans import flux, qwen_image, wan
from omni_sp.sharding.plans.token_streams import TOKEN_STREAMS

_CORRECTIONS: dict[str, Callable[[ShardingPlan], ShardingPlan]] = {
    "FluxTransformer2DModel": flux.correct,
    "QwenImageTransformer2DModel": qwen_image.correct,
    "WanTransformer3DModel": wan.correct,
}


def planned_models() -> tuple[str, ...]:
    """Names of the transformer classes that have a plan of cuts and joins."""
    return tuple(sorted(_CORRECTIONS))


def plan_for(model: torch.nn.Module) -> ShardingPlan | TrackedPlan:
    """The plan for a transformer: its own, corrected, or where its rows begin.

    Raises:
        UnsupportedModelError: it has neither a plan nor a list of blocks.
    """
    name = type(model).__name__
    own = getattr(model, "_cp_plan", None)
    if name in _CORRECTIONS:
        return _CORRECTIONS[name](from_diffusers(own or {}))
    return tracked_plan_for(model)


def tracked_plan_for(model: torch.nn.Module) -> TrackedPlan:
    """Where a transformer's rows begin.

    Raises:
        UnsupportedModelError: it has no list of blocks.
    """
    return TrackedPlan(TOKEN_STREAMS.get(type(model).__name__) or find_token_streams(model))


def find_token_streams(model: torch.nn.Module) -> Mapping[str, Mapping[str, Split]]:
    """Where the rows of an unknown model begin: the first input of the blocks of each of its lists."""
    cuts = {}
    lists = list(model.named_children())
    for path, blocks in lists:
        if isinstance(blocks, torch.nn.ModuleDict):
            lists += [(f"{path}.{name}", child) for name, child in blocks.items()]
        # A list of bare layers, such as a head for each codebook, has no blocks.
        if not isinstance(blocks, torch.nn.ModuleList) or len(blocks) == 0 or not list(blocks[0].children()):
            continue
        for index, block in enumerate(blocks):
            parameters = list(inspect.signature(type(block).forward).parameters)[1:]
            if parameters:
                # Not the first alone: guidance that skips layers may skip it. What is in pieces already stays so.
                cuts[f"{path}.{index}"] = {parameters[0]: Split(dim=1, ndim=3, replicate_if_ndim_differs=True)}
    if not cuts:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no sharding plan and no list of blocks at its top, so it is not known where "
            "its tokens are: run it with degrees 1 x 1, or give parallelize(..., plan=TrackedPlan(...))"
        )
    return cuts
