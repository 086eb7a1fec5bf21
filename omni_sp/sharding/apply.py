"""Apply a plan to a transformer: every call of it is a sharded forward, until the handle is removed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from omni_sp.attention import Strategy
from omni_sp.errors import ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.attention_backend import tracking_flex_attention
from omni_sp.sharding.forward_context import LayoutCache, ShardedForward, activate, signature_of
from omni_sp.sharding.hooks import ModuleHooks, install_stream_hooks, require_running, resolve_plan
from omni_sp.sharding.plan import ShardingPlan, TrackedPlan
from omni_sp.sharding.tracked import to_full_tensors

_MARK = "_omni_sp_handle"


class ShardHandle:
    """A transformer that runs sharded until ``remove()`` is called.

    Attributes:
        model: the transformer.
        tokens: stream name -> global number of tokens, the most that one forward had since ``reset_counts()`` (with
            guidance a picture takes forwards of two texts).
        gathers: operation of the model's code -> how often it needed a full tensor since ``reset_counts()``, such as
            ``{"aten.sort.default": 4}``; such operations are exact, and slow. A planned model has none.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.tokens: dict[str, int] = {}
        self.gathers: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []

    def reset_counts(self) -> None:
        """Begin anew to count tokens and gathers."""
        self.tokens.clear()
        self.gathers.clear()

    def on_remove(self, undo: Callable[[], None]) -> None:
        """Let ``remove()`` call ``undo``; the last registered is called first."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Restore the transformer. A second call does nothing."""
        while self._undo:
            self._undo.pop()()


def shard(
    model: torch.nn.Module,
    mesh: ParallelMesh,
    plan: ShardingPlan | TrackedPlan,
    *,
    strategy: Strategy,
    kernel: str = "auto",
    fallback_plan: TrackedPlan | None = None,
) -> ShardHandle:
    """Shard the tokens of ``model`` over ``mesh.sequence``. Instances are hooked, classes never.

    Args:
        model: a diffusers transformer.
        mesh: the ranks.
        plan: where its token streams are split and gathered.
        strategy: carries out attention over all ranks (``omni_sp.attention.select_strategy``).
        kernel: name of the attention kernel. With "auto" on one rank the model keeps its own attention.
        fallback_plan: takes the plan's place while the model is such that the plan does not suffice, see
            `omni_sp.sharding.hooks.ModuleHooks`.

    Returns:
        The handle that removes all of it.

    Raises:
        UnsupportedModelError: the plan names what the model does not have, or an attention cannot be reached.
        ShardingError: the model is sharded already.
    """
    if getattr(model, _MARK, None) is not None:
        raise ShardingError(f"{type(model).__name__} is parallelized already: remove() its handle first")
    handle = ShardHandle(model)
    hooks = ModuleHooks(model, mesh, plan, fallback_plan, routed=mesh.sequence.size > 1 or kernel != "auto")
    forward_hooks = _ForwardHooks(handle, hooks, mesh, strategy, kernel)
    try:
        model.__dict__[_MARK] = handle
        handle.on_remove(lambda: model.__dict__.pop(_MARK))
        handle.on_remove(lambda: forward_hooks.end(model, None, None))
        handle.on_remove(hooks.remove)
        hooks.refresh()
        handle.on_remove(model.register_forward_pre_hook(forward_hooks.begin, with_kwargs=True).remove)
        for chosen in (plan, fallback_plan):
            if chosen is not None:
                _hook_root(model, chosen, hooks, mesh, handle)
        handle.on_remove(model.register_forward_hook(_to_full_output).remove)
        # Registered last, so that it runs after a join at the transformer itself.
        handle.on_remove(model.register_forward_hook(forward_hooks.end, always_call=True).remove)
    except BaseException:
        handle.remove()
        raise
    return handle


def _hook_root(
    model: torch.nn.Module,
    plan: ShardingPlan | TrackedPlan,
    hooks: ModuleHooks,
    mesh: ParallelMesh,
    handle: ShardHandle,
) -> None:
    """Shard and gather at the transformer itself what a plan names there, while its modules run by that plan."""
    name, tracked = type(model).__name__, isinstance(plan, TrackedPlan)
    for path, module, module_plan in resolve_plan(model, plan):
        if not path:
            for hook in install_stream_hooks(
                module, name, module_plan, mesh, tracked, lambda: hooks.tracked == tracked
            ):
                handle.on_remove(hook.remove)


def _to_full_output(model: torch.nn.Module, _args: Any, output: Any) -> Any:
    """Turn what a tracked forward returns into full tensors."""
    name = type(model).__name__
    forward = require_running(name)
    if not forward.tracked:
        return output
    if not forward.has_sharded:
        raise ShardingError(
            f"no tensor of {name} was cut, so every rank would compute everything: its plan has to name a tensor of "
            "tokens; give parallelize(..., plan=TrackedPlan(...))"
        )
    return to_full_tensors(output)


class _ForwardHooks:
    """Hooks that begin a sharded forward when the transformer is called, and end it when it returns or raises."""

    def __init__(
        self, handle: ShardHandle, hooks: ModuleHooks, mesh: ParallelMesh, strategy: Strategy, kernel: str
    ) -> None:
        self._handle, self._hooks, self._mesh = handle, hooks, mesh
        self._strategy, self._kernel = strategy, kernel
        self._layout_cache = LayoutCache()
        self._exit_stack = ExitStack()

    def begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
        if self._mesh.sequence.size > 1 and trains:
            raise ShardingError(
                f"{type(module).__name__} was called with gradients enabled; sharded forwards are for inference: "
                "run under torch.no_grad()"
            )
        # Ctrl-C in the middle of a forward skips torch's hooks, also those that always run: such a forward ends here.
        self._exit_stack.close()
        if self._hooks.refresh():
            self._layout_cache = LayoutCache()
        signature = signature_of((args, kwargs))
        forward = ShardedForward(
            mesh=self._mesh,
            strategy=self._strategy,
            kernel=self._kernel,
            layouts=self._layout_cache.layouts(signature),
            exit_stack=self._exit_stack,
            tokens=self._handle.tokens,
            gathers=self._handle.gathers,
            tracked=self._hooks.tracked,
        )
        self._exit_stack.enter_context(activate(forward, signature))
        if forward.tracked:
            self._exit_stack.enter_context(tracking_flex_attention())

    def end(self, _module: torch.nn.Module, _args: Any, _output: Any) -> None:
        self._exit_stack.close()
