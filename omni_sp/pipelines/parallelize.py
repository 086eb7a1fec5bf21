"""One ordered recipe that makes a whole diffusers pipeline run on a mesh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch

from omni_sp.attention import TunedShape, check_kernel, check_strategy, select_strategy, tuned_kernels
from omni_sp.errors import ConfigError, ShardingError, UnsupportedModelError
from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines.branches import Branches
from omni_sp.pipelines.changed_components import ChangedComponents
from omni_sp.pipelines.pipeline_calls import calling_pipeline
from omni_sp.pipelines.shared_encoders import SharedEncoders
from omni_sp.pipelines.shared_vaes import SharedVaes
from omni_sp.sharding import BlockCounts, Plan, ShardHandle, VaeHandle, shard
from omni_sp.sharding.compiled import compile_options, require_no_graphs, require_not_compiled
from omni_sp.sharding.weights import held_bytes
from omni_sp.tested_versions import warn_if_untested
from omni_sp.validation import shown

_TRANSFORMERS_PACKAGE, _CONTROLNETS_PACKAGE = "diffusers.models.transformers.", "diffusers.models.controlnets."


class ParallelHandle:
    """A pipeline (or a transformer) that runs over several ranks until ``remove()`` is called.

    Attributes:
        mesh: the ranks.
        vaes: its autoencoders.
        encoders: its text and image encoders.
        branches: what shares the calls of its transformers among the groups of ``cfg_parallel_size``; None with one.
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        handles: list[ShardHandle],
        vaes: SharedVaes,
        encoders: SharedEncoders,
        branches: Branches | None = None,
    ) -> None:
        self.mesh, self.vaes, self.encoders, self.branches = mesh, vaes, encoders, branches
        self._handles = [*handles, *vaes.handles]

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

    @property
    def blocks(self) -> BlockCounts:
        """How the calls of blocks were made since reset_counts()."""
        counts = BlockCounts()
        for handle in self._handles:
            counts.add(handle.tapes.counts)
        return counts

    @property
    def weight_bytes(self) -> int:
        """The bytes of the transformers' weights that this rank holds now."""
        return sum(held_bytes(handle.model) for handle in self._handles if not isinstance(handle, VaeHandle))

    @property
    def tuned_kernels(self) -> dict[TunedShape, str]:
        """With ``attention_backend="tune"``: the kernel that was fastest, by the shape of attention on one rank."""
        return tuned_kernels(self.mesh)

    def on_compile(self, say: Callable[[str], None]) -> None:
        """Let ``say`` be called with a text whenever a block is about to be compiled, which takes long."""
        for handle in self._handles:
            handle.tapes.on_compile = say

    def reset_counts(self) -> None:
        """Begin anew to count tokens and gathers, and to note what ran where."""
        for handle in self._handles:
            handle.reset_counts()
        self.encoders.reset_counts()
        if self.branches is not None:
            self.branches.reset_counts()

    def drop(self) -> None:
        """Forget what ranks still had to exchange in a call of the pipeline that was left."""
        self.encoders.drop()
        if self.branches is not None:
            self.branches.drop()

    def __reduce_ex__(self, _protocol: object) -> Any:
        """Refuse to be copied or pickled.

        Raises:
            ShardingError: always.
        """
        raise ShardingError(
            "the handle of parallelize() belongs to this process and its process groups: parallelize() a copy instead"
        )

    def remove(self) -> None:
        """Restore the pipeline. A second call does nothing."""
        if self.branches is not None:
            self.branches.remove()
        self.encoders.remove()
        for handle in reversed(self._handles):
            handle.remove()


def parallelize(
    pipe_or_transformer: Any,
    mesh: ParallelMesh,
    *,
    attention_backend: str = "auto",
    attention_strategy: str = "omni_sp",
    plan: Plan | None = None,
    replay: bool = True,
    compile: bool | str | Mapping[str, Any] = False,
    cuda_graphs: bool = False,
) -> ParallelHandle:
    """Shard the tokens of a pipeline's transformers (or of one transformer) over the ranks of ``mesh``.

    With ``cfg_parallel_size`` groups the calls of a denoising step are shared among them.
    The tokens of its ControlNets are sharded as well. The mesh's configuration says whether its autoencoders run over
    the ranks (``vae_parallel``), and whether each rank keeps only its part of the transformers' weights
    (``shard_weights``; reading such weights, and ``remove()``, are then for all ranks together). LoRA, IP-Adapters and
    diffusers' step caches may be added before or after. Every rank calls this, and then runs the same, unmodified calls
    on the same inputs.

    Args:
        pipe_or_transformer: a diffusers pipeline, or a transformer alone.
        mesh: the ranks. On one rank nothing is sharded, and any pipeline is taken.
        attention_backend: name of the attention kernel, one of ``omni_sp.attention.kernel_names()``. "auto" chooses by
            device and shape; "tune" times the exact ones at the first attention of each shape.
        attention_strategy: "omni_sp", or "yunchang" to have that library carry out the attention (for comparing; it
            refuses most shapes).
        plan: says where the token streams of the transformer begin, where they cannot be found or begin elsewhere.
        replay: blocks are followed once, and then replayed: the same operations and the same exchanges, without the
            cost of following on the host.
        compile: what is replayed is compiled by ``torch.compile``, one compilation for each kind of block and each
            shape; a mode of it ("max-autotune-no-cudagraphs"), or a dict of its "mode", "backend" and "options". On one
            rank the model's blocks are compiled as diffusers does it. Blocks that are compiled already, or later, are
            compiled anyway.
        cuda_graphs: forwards whose blocks are all replayed are captured as CUDA graphs, one for each shape; others run
            as ever, and ``blocks`` of the handle says why.

    Returns:
        The handle that restores the pipeline.

    Raises:
        UnsupportedModelError: there is no transformer, or one whose token streams cannot be found, or that is compiled
            as a whole, or whose weights are both sharded and offloaded.
        UnsupportedAttentionError: no kernel or strategy has that name, or its package is missing.
        ConfigError: torch.compile has no such mode or option, what is never replayed cannot be compiled, weights
            that move with ``shard_weights`` cannot be captured in CUDA graphs, or ``mesh`` or ``plan`` is none.
        ShardingError: the pipeline is parallelized already.
    """
    _require_kinds(pipe_or_transformer, mesh, plan)
    if mesh.rank == 0:  # the others would say the same
        warn_if_untested("diffusers")
        warn_if_untested("transformers")
    check_kernel(attention_backend)
    check_strategy(attention_strategy)
    options = compile_options(compile, replay=replay)
    if mesh.weights.size > 1:
        require_no_graphs(options, cuda_graphs=cuda_graphs)
    models = [model for _, model in transformers_of(pipe_or_transformer)]
    if not models and mesh.world_size > 1:
        raise UnsupportedModelError(
            f"{type(pipe_or_transformer).__name__} has no transformer, so there are no tokens to split over "
            f"{mesh.world_size} ranks: run it with degrees 1 x 1"
        )
    if mesh.cfg.size > 1:
        _require_shareable(pipe_or_transformer, mesh, cuda_graphs=cuda_graphs)

    def call_token() -> object:
        pipe = calling_pipeline() or pipe_or_transformer
        return getattr(getattr(pipe, "scheduler", None), "timesteps", None)

    changed = ChangedComponents(pipe_or_transformer)
    strategy = select_strategy(attention_strategy, mesh, attention_backend)
    handles: list[ShardHandle] = []
    vae_handles: list[VaeHandle] = []
    try:
        for model in models:
            if mesh.sequence.size > 1:
                require_not_compiled(model)
            try:
                handle = shard(
                    model,
                    mesh,
                    plan,
                    strategy=strategy,
                    kernel=attention_backend,
                    call_token=call_token,
                    surroundings=changed.describe,
                    replay=replay,
                    compile_options=options,
                    cuda_graphs=cuda_graphs,
                )
                handles.append(handle)
            except UnsupportedModelError:
                # One rank runs any model; only sharding needs a plan.
                if mesh.sequence.size > 1 or plan is not None or attention_backend != "auto":
                    raise
        vaes = SharedVaes(pipe_or_transformer, mesh)
        vae_handles = vaes.handles
        encoders = SharedEncoders(pipe_or_transformer, mesh, changed)
    except BaseException:
        for handle in [*handles, *vae_handles]:
            handle.remove()
        raise
    branches = None
    if mesh.cfg.size > 1:
        # A ControlNet's results are arguments of the next call, which another group may compute.
        shared = [model for model in models if not type(model).__module__.startswith(_CONTROLNETS_PACKAGE)]
        branches = Branches(pipe_or_transformer, shared, mesh, call_token, changed.describe)
    changed.note()
    return ParallelHandle(mesh, handles, vaes, encoders, branches)


def _require_kinds(pipe: Any, mesh: Any, plan: Any) -> None:
    """Refuse what is mistaken for a pipeline, a mesh or a plan."""
    if not isinstance(mesh, ParallelMesh):
        raise ConfigError(f"mesh={shown(mesh)}: give parallelize() a ParallelMesh(config), which every rank builds")
    if plan is not None and not isinstance(plan, Plan):
        raise ConfigError(f"plan={shown(plan)}: give a Plan, or leave it out")
    if pipe is None or isinstance(pipe, (str, bytes, PathLike, int, float, list, tuple, dict, type)):
        raise UnsupportedModelError(
            f"parallelize() takes a loaded pipeline or transformer, and this is {shown(pipe)}: load it first, by "
            "DiffusionPipeline.from_pretrained(...)"
        )


def _require_shareable(pipe: Any, mesh: ParallelMesh, *, cuda_graphs: bool) -> None:
    """Refuse what has no branches that groups of ranks could share."""
    option = f"cfg_parallel_size {mesh.cfg.size}"
    if isinstance(pipe, torch.nn.Module):
        raise UnsupportedModelError(
            f"{option} shares the calls that a pipeline makes in a denoising step: give parallelize() the pipeline, "
            "or leave cfg_parallel_size at 1"
        )
    if cuda_graphs:
        raise ConfigError(
            f"cuda_graphs=True captures calls that run on every rank, and {option} skips calls on some: "
            "leave one of them out"
        )


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
