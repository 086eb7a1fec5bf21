"""One ordered recipe that makes a whole diffusers pipeline run on a mesh."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from omni_sp.attention import check_kernel, check_strategy, select_strategy
from omni_sp.errors import UnsupportedModelError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding import ShardHandle, ShardingPlan, TrackedPlan, plan_for, shard, tracked_plan_for

_TRANSFORMERS_PACKAGE, _CONTROLNETS_PACKAGE = "diffusers.models.transformers.", "diffusers.models.controlnets."


class ParallelHandle:
    """A pipeline (or a transformer) that runs over several ranks until ``remove()`` is called.

    Attributes:
        mesh: the ranks.
    """

    def __init__(self, mesh: ParallelMesh, handles: list[ShardHandle]) -> None:
        self.mesh = mesh
        self._handles = handles

    @property
    def tokens(self) -> dict[str, int]:
        """Stream name -> number of tokens, over all ranks: the most that one forward had since reset_counts()."""
        tokens: dict[str, int] = {}
        for handle in self._handles:
            for stream, count in handle.tokens.items():
                tokens[stream] = max(count, tokens.get(stream, 0))
        return tokens

    @property
    def gathers(self) -> dict[str, int]:
        """Operation of a model's code -> how often it needed a full tensor since reset_counts()."""
        gathers: Counter[str] = Counter()
        for handle in self._handles:
            gathers.update(handle.gathers)
        return dict(gathers)

    def reset_counts(self) -> None:
        """Begin anew to count tokens and gathers."""
        for handle in self._handles:
            handle.reset_counts()

    def remove(self) -> None:
        """Restore the pipeline. A second call does nothing."""
        for handle in reversed(self._handles):
            handle.remove()


def parallelize(
    pipe_or_transformer: Any,
    mesh: ParallelMesh,
    *,
    attention_backend: str = "auto",
    attention_strategy: str = "omni_sp",
    plan: ShardingPlan | TrackedPlan | None = None,
) -> ParallelHandle:
    """Shard the tokens of a pipeline's transformers (or of one transformer) over the ranks of ``mesh``.

    The tokens of its ControlNets are sharded as well. LoRA, IP-Adapters and diffusers' step caches may be added before
    or after. Every rank calls this, and then runs the same, unmodified calls on the same inputs.

    Args:
        pipe_or_transformer: a diffusers pipeline, or a transformer alone.
        mesh: the ranks. On one rank nothing is sharded, and any pipeline is taken.
        attention_backend: name of the attention kernel, one of ``omni_sp.attention.kernel_names()``.
        attention_strategy: "omni_sp", or "yunchang" to have that library carry out the attention (for comparing; it
            refuses most shapes).
        plan: replaces the plan of the transformer, or is for one whose token streams cannot be found.

    Returns:
        The handle that restores the pipeline.

    Raises:
        UnsupportedModelError: there is no transformer, or one whose token streams cannot be found.
        UnsupportedAttentionError: no kernel or strategy has that name, or its package is missing.
        ShardingError: the pipeline is parallelized already.
    """
    check_kernel(attention_backend)
    check_strategy(attention_strategy)
    models = [model for _, model in transformers_of(pipe_or_transformer)]
    if not models and mesh.sequence.size > 1:
        raise UnsupportedModelError(
            f"{type(pipe_or_transformer).__name__} has no transformer, so there are no tokens to split over "
            f"{mesh.sequence.size} ranks: run it with degrees 1 x 1"
        )
    strategy = select_strategy(attention_strategy, mesh, attention_backend)
    handles: list[ShardHandle] = []
    try:
        for model in models:
            try:
                chosen = plan if plan is not None else plan_for(model)
                # Where people changed the model so that its plan does not suffice, it is tracked; a plan that the
                # caller gives is obeyed.
                fallback = tracked_plan_for(model) if plan is None and isinstance(chosen, ShardingPlan) else None
                handle = shard(model, mesh, chosen, strategy=strategy, kernel=attention_backend, fallback_plan=fallback)
                handles.append(handle)
            except UnsupportedModelError:
                # One rank runs any model; only sharding needs a plan.
                if mesh.sequence.size > 1 or plan is not None or attention_backend != "auto":
                    raise
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    return ParallelHandle(mesh, handles)


def transformers_of(pipe_or_transformer: Any) -> list[tuple[str, torch.nn.Module]]:
    """The transformer itself, or the transformers of a pipeline, with their names; ControlNets come last."""
    if isinstance(pipe_or_transformer, torch.nn.Module):
        return [("transformer", pipe_or_transformer)]
    components = getattr(pipe_or_transformer, "components", None) or getattr(pipe_or_transformer, "__dict__", {})
    modules = {name: component for name, component in components.items() if isinstance(component, torch.nn.Module)}
    found = {
        name: module
        for name, module in modules.items()
        if name.startswith("transformer") or type(module).__module__.startswith(_TRANSFORMERS_PACKAGE)
    }
    if found:  # a ControlNet beside a UNet has no token streams
        for name, module in modules.items():
            if name not in found and type(module).__module__.startswith(_CONTROLNETS_PACKAGE):
                nets = getattr(module, "nets", None)
                found |= {name: module} if nets is None else {f"{name}.nets.{i}": net for i, net in enumerate(nets)}
    return list(found.items())
