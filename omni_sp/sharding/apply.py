"""Apply a plan to a transformer: every call of it is a sharded forward, until the handle is removed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from omni_sp.attention import Strategy
from omni_sp.errors import ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.attention_backend import tracking_flex_attention
from omni_sp.sharding.compiled import compile_blocks, is_compiled, require_not_compiled
from omni_sp.sharding.foreign_code import has_foreign_forward, has_foreign_hooks
from omni_sp.sharding.forward_context import ShardedForward, activate
from omni_sp.sharding.hooks import ModuleHooks, install_stream_hook, require_running, resolve_plan
from omni_sp.sharding.lazy import full_tensors
from omni_sp.sharding.models import plan_for
from omni_sp.sharding.plan import Plan
from omni_sp.sharding.replay import BlockCounts, ForwardGraphs, TapeStore
from omni_sp.sharding.same_call import CallToken, SameCallCheck, Surroundings
from omni_sp.sharding.tracked import to_full_tensors
from omni_sp.sharding.weights import WeightShards, require_not_offloaded

_MARK = "_omni_sp_handle"


class ShardHandle:
    """A model that runs sharded until ``remove()`` is called.

    Args:
        compile_options: as of `shard`.

    Attributes:
        model: a transformer, or a VAE.
        tokens: stream name -> global number of tokens, the most that one forward had since ``reset_counts()`` (with
            guidance a picture takes forwards of two texts).
        gathers: operation of the model's code -> how often it needed a full tensor since ``reset_counts()``, such as
            ``{"aten.sort.default": 4}``; such operations are exact, and slow.
        tapes: what was recorded of blocks, and how their calls were made.
        refresh: brings the hooks up to date with the modules that the model has; every forward begins with it.
        release: keeps this rank's part again of weights that somebody has read, where its group skips a forward.
    """

    def __init__(self, model: torch.nn.Module, compile_options: Mapping[str, Any] | None = None) -> None:
        self.model = model
        self.tokens: dict[str, int] = {}
        self.gathers: dict[str, int] = {}
        self.tapes = TapeStore(compile_options)
        self.refresh: Callable[[], None] = lambda: None
        self.release: Callable[[], None] = lambda: None
        self._undo: list[Callable[[], None]] = []

    def reset_counts(self) -> None:
        """Begin anew to count tokens and gathers."""
        self.tokens.clear()
        self.gathers.clear()
        self.tapes.counts = BlockCounts()

    def on_remove(self, undo: Callable[[], None]) -> None:
        """Let ``remove()`` call ``undo``; the last registered is called first."""
        self._undo.append(undo)

    def attach(self) -> None:
        """Mark the model as parallelized, so that it is not parallelized twice, nor copied.

        Raises:
            ShardingError: it is parallelized already.
        """
        attributes = self.model.__dict__
        if attributes.get(_MARK) is not None:
            raise ShardingError(f"{type(self.model).__name__} is parallelized already: remove() its handle first")
        # copy and pickle look it up on the instance, and before anything of the model is copied.
        attributes |= {_MARK: self, "__reduce_ex__": self.__reduce_ex__}
        for name in (_MARK, "__reduce_ex__"):
            self.on_remove(functools.partial(attributes.pop, name))

    def __reduce_ex__(self, _protocol: object) -> Any:
        """Refuse to be copied or pickled: hooks and process groups belong to this model, in this process.

        Raises:
            ShardingError: always. The model itself, and a pipeline that holds it, are refused by it too.
        """
        name = type(self.model).__name__
        raise ShardingError(
            f"{name} is parallelized, and a copy of it would not be: call remove() of the handle that parallelize() "
            "gave before copy.deepcopy(), pickle or torch.save(), and parallelize() again after it; its state_dict() "
            "can be saved at any time"
        )

    def remove(self) -> None:
        """Restore the model. A second call does nothing."""
        while self._undo:
            self._undo.pop()()


def refresh_hooks(model: torch.nn.Module) -> None:
    """Bring a model's hooks up to date, where it is sharded: what its next forward changes is then not ours."""
    handle = vars(model).get(_MARK)
    if isinstance(handle, ShardHandle):
        handle.refresh()


def release_weights(model: torch.nn.Module) -> None:
    """Keep this rank's part alone of a model's weights that were read, where its group skips a forward.

    Without it a group whose turn never comes would hold what somebody has read for good.
    """
    handle = vars(model).get(_MARK)
    if isinstance(handle, ShardHandle):
        handle.release()


def shard(
    model: torch.nn.Module,
    mesh: ParallelMesh,
    plan: Plan | None,
    *,
    strategy: Strategy,
    kernel: str = "auto",
    call_token: CallToken | None = None,
    surroundings: Surroundings | None = None,
    replay: bool = True,
    compile_options: Mapping[str, Any] | None = None,
    cuda_graphs: bool = False,
) -> ShardHandle:
    """Shard the tokens of ``model`` over ``mesh.sequence``. Instances are hooked, classes never.

    Args:
        model: a diffusers transformer.
        mesh: the ranks.
        plan: where its token streams begin; None finds that out, see `omni_sp.sharding.plan_for`.
        strategy: carries out attention over all ranks (``omni_sp.attention.select_strategy``).
        kernel: name of the attention kernel. With "auto" on one rank the model runs as it is.
        call_token: gives an object that is another one in every call of the pipeline, see
            `omni_sp.sharding.same_call.SameCallCheck`.
        surroundings: describes the rest of the pipeline, to be compared between the ranks.
        replay: blocks that were followed once are replayed, see ``omni_sp.sharding.replay``.
        compile_options: what is replayed is compiled, by ``torch.compile`` with these options; None leaves it as it is,
            but for blocks that are compiled already.
        cuda_graphs: forwards whose blocks are all replayed are captured as CUDA graphs, see
            `omni_sp.sharding.replay.graphs`.

    Returns:
        The handle that removes all of it.

    Raises:
        UnsupportedModelError: the plan names what the model does not have, or more than its blocks is compiled.
        ShardingError: the model is sharded already.
    """
    handle = ShardHandle(model, compile_options)
    tracks = mesh.sequence.size > 1 or kernel != "auto"
    try:
        handle.attach()
        weights = WeightShards(model, mesh.weights) if mesh.weights.size > 1 else None
        if weights is not None:
            require_not_offloaded(model)
            handle.on_remove(functools.partial(_restore_weights, handle, weights))
        hooks = ModuleHooks(model, mesh, plan, tracks=tracks, tapes=handle.tapes if replay else None, weights=weights)
        check = SameCallCheck(model, mesh.sequence, always=mesh.check, call_token=call_token, surroundings=surroundings)
        forward_hooks = _ForwardHooks(handle, hooks, mesh, strategy, check, weights)
        if compile_options is not None and not tracks:
            handle.on_remove(compile_blocks(model, compile_options))
        if cuda_graphs and tracks:
            forward_hooks.graphs = graphs = ForwardGraphs(
                model, mesh, handle.tapes, handle.gathers, forward_hooks.before_forward
            )
            model._compiled_call_impl = graphs
            handle.on_remove(functools.partial(vars(model).pop, "_compiled_call_impl", None))
        handle.on_remove(lambda: forward_hooks.end(model, None, None))
        handle.on_remove(hooks.remove)
        hooks.refresh()
        handle.refresh = hooks.refresh
        handle.on_remove(model.register_forward_pre_hook(forward_hooks.begin, with_kwargs=True).remove)
        for path, module, inputs in resolve_plan(model, plan_for(model) if plan is None else plan):
            if not path:
                name = type(model).__name__
                handle.on_remove(install_stream_hook(module, name, inputs, mesh, tracks=tracks).remove)
        if tracks:
            handle.on_remove(model.register_forward_hook(_to_full_output).remove)
        # Registered last, so that it runs after the outputs are gathered.
        handle.on_remove(model.register_forward_hook(forward_hooks.end, always_call=True).remove)
        if weights is not None:
            weights.refresh()
            handle.release = weights.release
    except BaseException:
        handle.remove()
        raise
    return handle


def _restore_weights(handle: ShardHandle, weights: WeightShards) -> None:
    try:
        weights.remove()
    except ShardingError:
        handle.on_remove(functools.partial(_restore_weights, handle, weights))  # another remove() tries again
        raise


def _to_full_output(model: torch.nn.Module, _args: Any, output: Any) -> Any:
    """Turn what a forward returns into full tensors."""
    name = type(model).__name__
    # Foreign code around the whole transformer may have answered in its place.
    if not require_running(name).has_sharded and not (has_foreign_hooks(model) or has_foreign_forward(model)):
        raise ShardingError(
            f"no tensor of {name} was cut, so every rank would compute everything: its plan has to name a tensor of "
            "tokens; give parallelize(..., plan=Plan(...))"
        )
    return to_full_tensors(output)


class _ForwardHooks:
    """Hooks that begin a sharded forward when the transformer is called, and end it when it returns or raises."""

    def __init__(
        self,
        handle: ShardHandle,
        hooks: ModuleHooks,
        mesh: ParallelMesh,
        strategy: Strategy,
        check: SameCallCheck,
        weights: WeightShards | None,
    ) -> None:
        self._handle, self._hooks, self._mesh = handle, hooks, mesh
        self._strategy, self._check, self._weights = strategy, check, weights
        self._exit_stack = ExitStack()
        self.graphs: ForwardGraphs | None = None

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[str]:
        """Look at the modules and compare the ranks. Returns the modules that other people's code runs in."""
        self._hooks.refresh()
        self._check.before_forward(args, kwargs, self._hooks.foreign, self._hooks.num_changes)
        if self._weights is not None:
            self._weights.refresh()
        return self._hooks.foreign

    def begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        args, kwargs = full_tensors((args, kwargs), type(module).__name__)
        if self._mesh.sequence.size > 1:
            if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
                raise ShardingError(
                    f"{type(module).__name__} was called with gradients enabled; sharded forwards are for inference: "
                    "run under torch.no_grad()"
                )
            if is_compiled(module) and (self.graphs is None or module._compiled_call_impl is not self.graphs):
                require_not_compiled(module)
        # Ctrl-C in the middle of a forward skips torch's hooks, also those that always run: such a forward ends here.
        self._exit_stack.close()
        if self.graphs is None or not self.graphs.is_capturing:
            self.before_forward(args, kwargs)
        forward = ShardedForward(self._mesh, self._strategy, self._handle.tokens, self._handle.gathers)
        self._exit_stack.enter_context(activate(forward))
        self._exit_stack.enter_context(tracking_flex_attention())
        return args, kwargs

    def end(self, _module: torch.nn.Module, _args: Any, _output: Any) -> None:
        self._exit_stack.close()
