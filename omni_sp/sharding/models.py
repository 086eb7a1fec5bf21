"""What is specific to one model class, as data; and the plan of a transformer, which is looked up there.

A class that has no entry here is tracked, and its token streams begin at the blocks of its lists.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping

import torch

from omni_sp.errors import UnsupportedModelError
from omni_sp.sharding.plan import ModulePlan, ShardingPlan, Split, TrackedPlan, from_diffusers

PLANNED: Mapping[str, ShardingPlan] = {
    # Ids of positions are split, so that each rank computes RoPE of its own tokens. Ids may have a batch dim: their
    # tokens are the last dim but one either way. Residuals of a ControlNet are added to the tokens between blocks.
    "FluxTransformer2DModel": ShardingPlan(
        {
            "": ModulePlan(
                {
                    "img_ids": Split(dim=-2),
                    "txt_ids": Split(dim=-2),
                    "controlnet_block_samples": Split(dim=1, ndim=3),
                    "controlnet_single_block_samples": Split(dim=1, ndim=3),
                }
            )
        }
    ),
    # Residuals of a ControlNet are added to the picture's tokens between blocks.
    "QwenImageTransformer2DModel": ShardingPlan({"": ModulePlan({"controlnet_block_samples": Split(dim=1, ndim=3)})}),
    # Only a timestep for each token (Wan 2.2 TI2V) has tokens. Text and the first picture's embedding stay replicated.
    "WanTransformer3DModel": ShardingPlan(
        {"": ModulePlan({"timestep": Split(dim=1, ndim=2, replicate_if_ndim_differs=True)})},
        replicated_keys=("blocks.*.attn2",),
    ),
}
"""Classes that run by diffusers' own ``_cp_plan``, and what has to be added to it."""

TOKEN_STREAMS: Mapping[str, Mapping[str, Mapping[str, Split]]] = {
    # Its other list of blocks begins with the few tokens of a face.
    "ConsisIDTransformer3DModel": {"transformer_blocks.0": {"hidden_states": Split(dim=1)}},
    # Each stream is a tensor of (tokens, channels), without a batch dim.
    "Cosmos3OmniTransformer": {"layers.0": {"und_seq": Split(dim=0), "gen_seq": Split(dim=0)}},
    "LTX2VideoTransformer3DModel": {
        "transformer_blocks.0": {"hidden_states": Split(dim=1), "audio_hidden_states": Split(dim=1)}
    },
    "WanVACETransformer3DModel": {
        "vace_blocks.0": {"hidden_states": Split(dim=1), "control_hidden_states": Split(dim=1)},
        "blocks.0": {"hidden_states": Split(dim=1)},
    },
    # Tokens come first here, the batch second.
    "ErnieImageTransformer2DModel": {"layers.0": {"x": Split(dim=0, ndim=3)}},
    # The positions of a picture come first here, and each attends along its frames, which are few.
    "TransformerTemporalModel": {"transformer_blocks.0": {"hidden_states": Split(dim=0, ndim=3)}},
}
"""Tracked classes whose token streams do not begin at the first input of their blocks."""

TOKENWISE = frozenset({"FeedForward", "MOEFeedForwardSwiGLU"})
"""Modules of one input (batch, tokens, channels) that treat each token alone: they run on the shards as they are, also
where their code (a mixture of experts sorts tokens) does not look like it."""


def plan_for(model: torch.nn.Module) -> ShardingPlan | TrackedPlan:
    """The plan for a transformer: diffusers' own with our additions, or where its token streams begin.

    Args:
        model: a diffusers transformer.

    Raises:
        UnsupportedModelError: it has neither a plan nor a list of blocks.
    """
    additions = PLANNED.get(type(model).__name__)
    if additions is None:
        return tracked_plan_for(model)
    plan = from_diffusers(getattr(model, "_cp_plan", None) or {})
    for path, module_plan in additions.modules.items():
        plan = plan.with_inputs(path, inputs=module_plan.inputs)
    return dataclasses.replace(plan, replicated_keys=additions.replicated_keys)


def tracked_plan_for(model: torch.nn.Module) -> TrackedPlan:
    """Where a transformer's token streams begin.

    Args:
        model: a diffusers transformer.

    Raises:
        UnsupportedModelError: it has no list of blocks.
    """
    return TrackedPlan(TOKEN_STREAMS.get(type(model).__name__) or _find_token_streams(model))


def _find_token_streams(model: torch.nn.Module) -> Mapping[str, Mapping[str, Split]]:
    """Where the token streams of an unknown model begin: the first input of the blocks of each of its lists."""
    streams = {}
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
                # Every block, since guidance that skips layers may skip the first. A sharded tensor stays as it is.
                streams[f"{path}.{index}"] = {parameters[0]: Split(dim=1, ndim=3, replicate_if_ndim_differs=True)}
    if not streams:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no sharding plan and no list of blocks at its top, so it is not known where "
            "its tokens are: run it with degrees 1 x 1, or give parallelize(..., plan=TrackedPlan(...))"
        )
    return streams
