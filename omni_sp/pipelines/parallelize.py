"""One ordered recipe that makes a whole diffusers pipeline run on a mesh."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.attention import check_strategy, kernel_names, select_strategy
from omni_sp.errors import UnsupportedAttentionError, UnsupportedModelError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding import ShardHandle, ShardingPlan, TrackedPlan, plan_for, shard

_TRANSFORMERS = ("transformer", "transformer_2")


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
        """Stream name -> number of tokens, over all ranks: the most that one forward had since forget_tokens()."""
        tokens: dict[str, int] = {}
        for handle in self._shards:
            for stream, count in handle.tokens.items():
                tokens[stream] = max(count, tokens.get(stream, 0))
        return tokens

    def forget_tokens(self) -> None:
        """Begin to count anew."""
        for handle in self._shards:
            handle.tokens.clear()

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
                shards.append(shard(model, mesh, chosen, strategy=strategy, kernel=attention_backend))
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
    """The transformer itself, or those among a pipeline's components, with their names."""
    if isinstance(pipe_or_transformer, torch.nn.Module):
        return [("transformer", pipe_or_transformer)]
    found = ((name, getattr(pipe_or_transformer, name, None)) for name in _TRANSFORMERS)
    return [(name, model) for name, model in found if isinstance(model, torch.nn.Module)]
