"""What is specific to one model class, as data; and the plan of a transformer, which is looked up there.

The token streams of a class that has no entry here begin at the blocks of its lists.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from omni_sp.errors import UnsupportedModelError
from omni_sp.sharding.plan import Plan, Split

TOKEN_STREAMS: Mapping[str, Mapping[str, Mapping[str, Split]]] = {
    # Its other list of blocks begins with the few tokens of a face.
    "ConsisIDTransformer3DModel": {
        "transformer_blocks.0": {"hidden_states": Split(dim=1), "encoder_hidden_states": Split(dim=1)}
    },
    # Each stream is a tensor of (tokens, channels), without a batch dim.
    "Cosmos3OmniTransformer": {"layers.0": {"und_seq": Split(dim=0), "gen_seq": Split(dim=0)}},
    # Tokens come first here, the batch second.
    "ErnieImageTransformer2DModel": {"layers.0": {"x": Split(dim=0, ndim=3)}},
    # The positions of a picture come first here, and each attends along its frames, which are few.
    "TransformerTemporalModel": {"transformer_blocks.0": {"hidden_states": Split(dim=0, ndim=3)}},
}
"""Classes whose token streams are not those that all blocks of their lists take and return."""

TOKENWISE = frozenset({"FeedForward", "MOEFeedForwardSwiGLU"})
"""Modules of one input (batch, tokens, channels) that treat each token alone: they run on the shards as they are, also
where their code (a mixture of experts sorts tokens) does not look like it."""


def plan_for(model: torch.nn.Module) -> Plan:
    """Where a transformer's token streams begin.

    Args:
        model: a diffusers transformer.

    Raises:
        UnsupportedModelError: it has no list of blocks.
    """
    return Plan(TOKEN_STREAMS.get(type(model).__name__) or _find_token_streams(model))


def _find_token_streams(model: torch.nn.Module) -> Mapping[str, Mapping[str, Split]]:
    """Where the token streams of an unknown model begin: at the blocks of each of its lists."""
    streams: dict[str, Mapping[str, Split]] = {}
    seen: set[torch.nn.Module] = set()
    lists = list(model.named_children())
    for path, blocks in lists:
        if isinstance(blocks, torch.nn.ModuleDict):
            lists += [(f"{path}.{name}", child) for name, child in blocks.items()]
        # A list of bare layers, such as a head for each codebook, has no blocks.
        if not isinstance(blocks, torch.nn.ModuleList) or len(blocks) == 0 or not list(blocks[0].children()):
            continue
        for index, block in enumerate(blocks):
            # Every block, since guidance that skips layers may skip the first. A sharded tensor stays as it is.
            inputs = {name: Split(dim=1, ndim=3) for name in _streams_of(type(block).forward)}
            if inputs and block not in seen:  # one that stands in several places is known by the first
                seen.add(block)
                streams[f"{path}.{index}"] = inputs
    if not streams:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks at its top, so it is not known where its tokens are: run it "
            "with degrees 1 x 1, or give parallelize(..., plan=Plan(...))"
        )
    return streams


@cache
def _streams_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters of a block's forward that are streams of tokens: its first, and others that it returns."""
    parameters = [*inspect.signature(forward).parameters.values()]
    named = [x.name for x in parameters[1:] if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)]
    if not named:  # a wrapper that passes on what it gets; or a block without inputs
        return ("",) if any(x.kind == x.VAR_POSITIONAL for x in parameters) else ()
    first, *others = named
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # a class without source
        tree = ast.Module([], [])
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    returned = {x.id for value in values if isinstance(value, ast.Tuple) for x in value.elts if isinstance(x, ast.Name)}
    return (first, *(name for name in others if name in returned))
