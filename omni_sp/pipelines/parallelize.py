"""One ordered recipe that makes a whole diffusers pipeline run on a mesh."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from omni_sp.attention import check_strategy, kernel_names, select_strategy
from omni_sp.errors import UnsupportedAttentionError, UnsupportedModelError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding import ShardHandle, ShardingPlan, TrackedPlan, plan_for, shard, tracked_plan_for

_OF_TRANSFORMERS, _OF_CONTROLNETS = "diffusers.models.transformers.", "diffusers.models.controlnets."


class ParallelHandle:
    """What ``parallelize`` put on; ``remove()`` takes it off again.

    Attributes:
        mesh: the ranks.
    """

    def __init__(self, mesh: ParallelMesh, shards: list[ShardHandle]) -> None:
        self.mesh = mesh
        self._shards = shards

    @property
    def tokens(self) -> dict[str, int]:
        """Stream name -> number of tokens, over all ranks: the most that one forward had since reset_counts()."""
        tokens: dict[str, int] = {}
        for handle in self._shards:
            for stream, count in handle.tokens.items():
                tokens[stream] = max(count, tokens.get(stream, 0))
        return tokens

    @property
    def gathers(self) -> dict[str, int]:
        """Operation of a model's code -> how often it needed a full tensor since reset_counts()."""
        gathers: Counter[str] = Counter()
        for handle in self._shards:
            gathers.update(handle.gathers)
        return dict(gathers)

    def reset_counts(self) -> None:
        """Begin anew to count tokens and gathers."""
        for handle in self._shards:
            handle.reset_counts()

    def remove(self) -> None:
        """Give back the pipeline as it was. A second call does nothing."""
        for handle in reversed(self._shards):
            handle.remove()


def parallelize(
    pipe_or_transformer: Any,
    mesh: ParallelMesh,
    *,
    attention_backend: str = "auto",
    attention_strategy: str = "omni_sp",
    plan: ShardingPlan | TrackedPlan | None = None,
) -> ParallelHandle:
    """Spread the tokens of a pipeline's transformers (or of one transformer) over the ranks of ``mesh``.

    Its ControlNets are spread as well. LoRA, IP-Adapters and diffusers' step caches may come before or after.
    Every rank calls it, and then runs the same, unmodified calls on the same inputs.

    Args:
        pipe_or_transformer: a diffusers pipeline, or a transformer alone.
        mesh: the ranks. On one rank nothing is split, and any pipeline will do.
        attention_backend: name of the attention kernel, one of ``omni_sp.attention.kernel_names()``.
        attention_strategy: "omni_sp", or "yunchang" to have that library carry out the attention (for comparing; it
            refuses most shapes).
        plan: instead of the transformer's own plan, or for one whose rows of tokens cannot be found.

    Raises:
        UnsupportedModelError: no transformer, or one whose rows of tokens cannot be found.
        UnsupportedAttentionError: no kernel or strategy of that name, or its package is missing.
        ShardingError: it is parallelized already.
    """
    if attention_backend not in kernel_names():
        raise UnsupportedAttentionError(
            f"no attention kernel is called {attention_backend!r}; choose from {', '.join(kernel_names())}"
        )
    check_strategy(attention_strategy)
    models = [model for _, model in transformers_of(pipe_or_transformer)]
    if not models and mesh.sequence.size > 1:
        raise UnsupportedModelError(
            f"{type(pipe_or_transformer).__name__} has no transformer, so there are no tokens to split over "
            f"{mesh.sequence.size} ranks: run it with degrees 1 x 1"
        )
    strategy = select_strategy(attention_strategy, mesh, attention_backend)
    shards: list[ShardHandle] = []
    try:
        for model in models:
            try:
                chosen = plan if plan is not None else plan_for(model)
                # Where people changed the model so that its plan will not do, it is followed; a given plan is obeyed.
                fallback_plan = tracked_plan_for(model) if plan is None and isinstance(chosen, ShardingPlan) else None
                options: dict[str, Any] = {
                    "strategy": strategy,
                    "kernel": attention_backend,
                    "fallback_plan": fallback_plan,
                }
                shards.append(shard(model, mesh, chosen, **options))
            except UnsupportedModelError:
                # One rank runs what it is given; only a split needs a plan.
                if mesh.sequence.size > 1 or plan is not None or attention_backend != "auto":
                    raise
    except BaseException:
        for handle in shards:
            handle.remove()
        raise
    return ParallelHandle(mesh, shards)


def transformers_of(pipe_or_transformer: Any) -> list[tuple[str, torch.nn.Module]]:
    """The transformer itself, or those among a pipeline's components, with their names; their ControlNets last."""
    if isinstance(pipe_or_transformer, torch.nn.Module):
        return [("transformer", pipe_or_transformer)]
    parts = getattr(pipe_or_transformer, "components", None) or getattr(pipe_or_transformer, "__dict__", {})
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    found = {
        name: module
        for name, module in modules.items()
        if name.startswith("transformer") or type(module).__module__.startswith(_OF_TRANSFORMERS)
    }
    if found:  # a ControlNet beside a UNet has no rows of tokens
        for name, module in modules.items():
            if name not in found and type(module).__module__.startswith(_OF_CONTROLNETS):
                nets = getattr(module, "nets", None)
                found |= {name: module} if nets is None else {f"{name}.nets.{i}": net for i, net in enumerate(nets)}
    return list(found.items())
