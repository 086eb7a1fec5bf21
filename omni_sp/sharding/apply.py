"""Put a plan on a transformer: a sharded forward whenever it is called; all of it comes off again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from omni_sp.attention import Strategy
from omni_sp.errors import ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.forward import Knowledge, ShardedForward, entered, signature_of
from omni_sp.sharding.parts import Parts, hook_streams, resolve, running
from omni_sp.sharding.plan import ShardingPlan, TrackedPlan
from omni_sp.sharding.route import flex_in_pieces
from omni_sp.sharding.tracked import unwrapped

_MARK = "_omni_sp_handle"


class ShardHandle:
    """A transformer that runs sharded, until ``remove()``.

    Attributes:
        model: the transformer. tokens: stream name -> global number of tokens, the most that one forward had since
            ``tokens.clear()`` (with guidance a picture takes forwards of two texts).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.tokens: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []

    def on_remove(self, undo: Callable[[], None]) -> None:
        """Have ``undo`` called by ``remove()``, in reverse order."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Make the transformer what it was. A second call does nothing."""
        while self._undo:
            self._undo.pop()()


def shard(
    model: torch.nn.Module,
    mesh: ParallelMesh,
    plan: ShardingPlan | TrackedPlan,
    *,
    strategy: Strategy,
    kernel: str = "auto",
    otherwise: TrackedPlan | None = None,
) -> ShardHandle:
    """Run ``model`` on tokens spread over ``mesh.sequence``. Instances are hooked, classes never.

    Args:
        model: a diffusers transformer. mesh: the ranks. plan: where its streams are cut and joined.
        strategy: carries out attention over all ranks (``omni_sp.attention.select_strategy``).
        kernel: name of the attention kernel. With "auto" on one rank the model keeps its own attention.
        otherwise: followed instead while the model is such that the plan would not do (see ``parts``).

    Raises:
        UnsupportedModelError: the plan names what the model has not, or an attention cannot be reached.
        ShardingError: the model is sharded already.
    """
    if getattr(model, _MARK, None) is not None:
        raise ShardingError(f"{type(model).__name__} is parallelized already: remove() its handle first")
    handle = ShardHandle(model)
    parts = Parts(model, mesh, plan, otherwise, routed=mesh.sequence.size > 1 or kernel != "auto")
    session = _Session(handle, parts, mesh, strategy, kernel)
    try:
        model.__dict__[_MARK] = handle
        handle.on_remove(lambda: model.__dict__.pop(_MARK))
        handle.on_remove(lambda: session.leave(model, None, None))
        handle.on_remove(parts.release)
        parts.settle()
        handle.on_remove(model.register_forward_pre_hook(session.enter, with_kwargs=True).remove)
        for chosen in (plan, otherwise):
            if chosen is not None:
                _hook_itself(model, chosen, parts, mesh, handle)
        handle.on_remove(model.register_forward_hook(_made_whole).remove)
        # Registered last, so that it runs after a join at the transformer itself.
        handle.on_remove(model.register_forward_hook(session.leave, always_call=True).remove)
    except BaseException:
        handle.remove()
        raise
    return handle


def _hook_itself(
    model: torch.nn.Module, plan: ShardingPlan | TrackedPlan, parts: Parts, mesh: ParallelMesh, handle: ShardHandle
) -> None:
    """What a plan cuts and joins at the transformer itself, while the parts go by that plan."""
    tracked = isinstance(plan, TrackedPlan)
    for path, module, module_plan in resolve(model, plan):
        if not path:
            name = type(model).__name__
            for hook in hook_streams(module, name, module_plan, mesh, tracked, lambda: parts.tracked == tracked):
                handle.on_remove(hook.remove)


def _made_whole(model: torch.nn.Module, _args: Any, output: Any) -> Any:
    """What a tracked forward gives back."""
    name = type(model).__name__
    forward = running(name)
    if not forward.tracked:
        return output
    if not forward.has_cut:
        raise ShardingError(
            f"no tensor of {name} was cut, so every rank would compute everything: its plan has to name a tensor of "
            "tokens; give parallelize(..., plan=TrackedPlan(...))"
        )
    return unwrapped(output)


class _Session:
    """Opens a sharded forward when the transformer is called, and closes it when it returns or raises."""

    def __init__(self, handle: ShardHandle, parts: Parts, mesh: ParallelMesh, strategy: Strategy, kernel: str) -> None:
        self._handle, self._parts, self._mesh = handle, parts, mesh
        self._strategy, self._kernel = strategy, kernel
        self._knowledge = Knowledge()
        self._open = ExitStack()

    def enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
        if self._mesh.sequence.size > 1 and trains:
            raise ShardingError(
                f"{type(module).__name__} was called with gradients enabled; sharded forwards are for inference: "
                "run under torch.no_grad()"
            )
        # Ctrl-C in the middle of a forward skips torch's hooks, also those that always run: what it left open ends
        # here.
        self._open.close()
        if self._parts.settle():
            self._knowledge = Knowledge()
        signature = signature_of((args, kwargs))
        forward = ShardedForward(
            mesh=self._mesh,
            strategy=self._strategy,
            kernel=self._kernel,
            table=self._knowledge.table(signature),
            until_left=self._open,
            tokens=self._handle.tokens,
            tracked=self._parts.tracked,
        )
        self._open.enter_context(entered(forward, signature))
        if forward.tracked:
            self._open.enter_context(flex_in_pieces())

    def leave(self, _module: torch.nn.Module, _args: Any, _output: Any) -> None:
        self._open.close()
