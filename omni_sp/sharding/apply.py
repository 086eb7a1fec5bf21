"""Put a plan on a transformer: hooks that cut and join, attention sent to the core; all of it comes off again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from omni_sp.attention import Strategy
from omni_sp.errors import ShardingError, UnsupportedModelError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.forward import (
    Knowledge,
    OnCut,
    ShardedForward,
    current_forward,
    cut_piece,
    entered,
    signature_of,
)
from omni_sp.sharding.plan import Gather, ModulePlan, ShardingPlan, Split, TrackedPlan, matches
from omni_sp.sharding.plans.rows import TOKENWISE
from omni_sp.sharding.route import Route, backend_key, flex_in_pieces
from omni_sp.sharding.tracked import TokenTensor, cut, dealt_evenly, unwrapped

_MARK, _PIECE_OF = "_omni_sp_handle", "_omni_sp_piece_of"


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

    def hook(self, hook: torch.utils.hooks.RemovableHandle) -> None:
        """Take a torch hook off again in ``remove()``."""
        self._undo.append(hook.remove)

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
) -> ShardHandle:
    """Run ``model`` on tokens spread over ``mesh.sequence``. Instances are hooked, classes never.

    Args:
        model: a diffusers transformer. mesh: the ranks. plan: where its streams are cut and joined.
        strategy: carries out attention over all ranks (``omni_sp.attention.select_strategy``).
        kernel: name of the attention kernel. With "auto" on one rank the model keeps its own attention.

    Raises:
        UnsupportedModelError: the plan names what the model has not, or an attention cannot be reached.
        ShardingError: the model is sharded already.
    """
    if getattr(model, _MARK, None) is not None:
        raise ShardingError(f"{type(model).__name__} is parallelized already: remove() its handle first")
    tracked = isinstance(plan, TrackedPlan)
    resolved = _resolve(model, _as_modules(plan) if isinstance(plan, TrackedPlan) else plan)
    handle = ShardHandle(model)
    try:
        model.__dict__[_MARK] = handle
        handle.on_remove(lambda: model.__dict__.pop(_MARK))
        session = _Session(handle, mesh, strategy, kernel, tracked)
        handle.on_remove(lambda: session.leave(model, None, None))
        handle.hook(model.register_forward_pre_hook(session.enter, with_kwargs=True))
        for path, module, module_plan in resolved:
            _hook_streams(module, path or type(model).__name__, module_plan, mesh, handle, tracked)
        if isinstance(plan, ShardingPlan) and (mesh.sequence.size > 1 or kernel != "auto"):
            for path, module in _attentions(model):
                _hook_attention(module, path, handle)
                whole = any(matches(pattern, path) for pattern in plan.whole_keys)
                _route(module.processor, Route(path, whole_keys=whole), handle)
        if tracked:
            for module in model.modules():
                # A class that names a backend itself insists on it.
                if getattr(type(getattr(module, "processor", None)), "_attention_backend", "none") is None:
                    _route(module.processor, None, handle)
                if type(module).__name__ in TOKENWISE:
                    handle.hook(module.register_forward_pre_hook(_on_piece))
                    handle.hook(module.register_forward_hook(_as_piece))
            handle.hook(model.register_forward_hook(_made_whole))
        # Registered last, so that it runs after a join at the transformer itself.
        handle.hook(model.register_forward_hook(session.leave, always_call=True))
    except BaseException:
        handle.remove()
        raise
    return handle


def _on_piece(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give a token-wise module this rank's piece, as any other tensor."""
    if len(args) != 1 or not isinstance(args[0], TokenTensor) or args[0].cut_dim == args[0].ndim - 1:
        return None
    piece = args[0].local.view_as(args[0].local)
    piece.__dict__[_PIECE_OF] = args[0]
    return (piece,)


def _as_piece(_module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
    """What it gives back is a piece again."""
    whole = args[0].__dict__.get(_PIECE_OF) if args and isinstance(args[0], torch.Tensor) else None
    return output if whole is None else whole.like(output)


def _made_whole(model: torch.nn.Module, _args: Any, output: Any) -> Any:
    """What a tracked forward gives back."""
    name = type(model).__name__
    if not _running(name).has_cut:
        raise ShardingError(
            f"no tensor of {name} was cut, so every rank would compute everything: its plan has to name a tensor of "
            "tokens; give parallelize(..., plan=TrackedPlan(...))"
        )
    return unwrapped(output)


def _as_modules(plan: TrackedPlan) -> ShardingPlan:
    """The same cuts in the words of a plan."""
    return ShardingPlan({path: ModulePlan(inputs) for path, inputs in plan.cuts.items()})


def _resolve(model: torch.nn.Module, plan: ShardingPlan) -> list[tuple[str, torch.nn.Module, ModulePlan]]:
    """Find the modules that the plan speaks of, and see that they take what it names."""
    name = type(model).__name__
    resolved = []
    for pattern, module_plan in plan.modules.items():
        found = [(path, module) for path, module in model.named_modules() if matches(pattern, path)]
        if not found:
            raise UnsupportedModelError(f"the plan for {name} speaks of {pattern!r}, which it has not")
        for path, module in found:
            unknown = set(module_plan.inputs) - set(_parameters(module))
            if unknown:
                raise UnsupportedModelError(
                    f"the plan for {name} cuts {sorted(unknown)} of {(path or name)!r}, whose forward takes "
                    f"{_parameters(module)}"
                )
            resolved.append((path, module, module_plan))
    return resolved


def _parameters(module: torch.nn.Module) -> list[str]:
    """Names that the module's class takes in ``forward``; the instance's may be wrapped by offloading hooks."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _attentions(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The attention modules, all of which must be reachable through diffusers' dispatcher."""
    found: list[tuple[str, Any]] = [
        (path, module) for path, module in model.named_modules() if getattr(module, "processor", None) is not None
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention processor, so its attention cannot be reached"
        )
    for path, module in found:
        if not hasattr(module.processor, "_attention_backend"):
            raise UnsupportedModelError(
                f"{type(model).__name__}.{path}: {type(module.processor).__name__} does not call diffusers' attention "
                "dispatcher, so its attention cannot be reached"
            )
    return found


class _Session:
    """Opens a sharded forward when the transformer is called, and closes it when it returns or raises."""

    def __init__(self, handle: ShardHandle, mesh: ParallelMesh, strategy: Strategy, kernel: str, tracked: bool) -> None:
        self._handle, self._mesh, self._strategy, self._kernel = handle, mesh, strategy, kernel
        self._tracked = tracked
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
        signature = signature_of((args, kwargs))
        forward = ShardedForward(
            mesh=self._mesh,
            strategy=self._strategy,
            kernel=self._kernel,
            table=self._knowledge.table(signature),
            until_left=self._open,
            tokens=self._handle.tokens,
            tracked=self._tracked,
        )
        self._open.enter_context(entered(forward, signature))
        if self._tracked:
            self._open.enter_context(flex_in_pieces())

    def leave(self, _module: torch.nn.Module, _args: Any, _output: Any) -> None:
        self._open.close()


def _running(path: str) -> ShardedForward:
    forward = current_forward()
    if forward is None:
        raise ShardingError(
            f"{path} was called on its own; call the transformer as a whole, or remove() its handle first"
        )
    return forward


def _hook_streams(
    module: torch.nn.Module, path: str, plan: ModulePlan, mesh: ParallelMesh, handle: ShardHandle, tracked: bool
) -> None:
    """Cut inputs before the module runs; cut or join outputs after it."""
    names = _parameters(module)
    cut = cut_tracked if tracked else cut_piece

    def on_cut() -> OnCut | None:
        # A compiled graph holds the cut alone: what is noted besides is Python's business.
        return None if torch.compiler.is_compiling() else _running(path).note_cut

    def before(
        _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional = list(args)
        for name, split in plan.inputs.items():
            index = names.index(name)
            if name in kwargs:
                kwargs = {**kwargs, name: cut(kwargs[name], split, mesh, f"{path}.{name}", on_cut())}
            elif index < len(positional):
                positional[index] = cut(positional[index], split, mesh, f"{path}.{name}", on_cut())
        return tuple(positional), kwargs

    def after(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
        single = isinstance(output, torch.Tensor)
        items = [output] if single else list(output)
        for index, step in plan.outputs.items():
            where = f"{path} output {index}"
            if isinstance(step, Gather):
                items[index] = _running(path).join(items[index], step.dim, where)
            else:
                items[index] = cut(items[index], step, mesh, where, on_cut())
        return items[0] if single else type(output)(items)

    if plan.inputs:
        handle.hook(module.register_forward_pre_hook(before, with_kwargs=True))
    if plan.outputs:
        handle.hook(module.register_forward_hook(after))


def cut_tracked(value: Any, split: Split, mesh: ParallelMesh, where: str, on_cut: OnCut | None) -> Any:
    """A tensor (or list of them) in pieces that still looks whole. What is in pieces already stays so."""
    if isinstance(value, (list, tuple)):
        return type(value)([cut_tracked(item, split, mesh, where, on_cut) for item in value])
    if (
        not isinstance(value, torch.Tensor)
        or isinstance(value, TokenTensor)
        or value.ndim != (split.ndim or value.ndim)
    ):
        return value
    axis, dim = mesh.sequence, split.dim % value.ndim
    spans = dealt_evenly(value.shape[dim], axis.size)
    if on_cut is not None:
        on_cut(where, value, value.shape[dim], spans.lengths[axis.rank])
    # A copy: the model may write to its piece, and the caller's tensor would then differ from rank to rank.
    return TokenTensor(cut(value, dim, spans, axis).clone(memory_format=torch.contiguous_format), dim, spans, axis)


def _hook_attention(module: torch.nn.Module, path: str, handle: ShardHandle) -> None:
    """See that an attention went through the core: local attention is a silent error.

    Inside a compiled graph nothing is counted: there the route was fixed, and guarded, when the graph was made.
    """

    def before(_module: torch.nn.Module, _args: Any) -> None:
        if not torch.compiler.is_compiling():
            _running(path).attentions.append(0)

    def after(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
        if not torch.compiler.is_compiling() and _running(path).attentions.pop() == 0:
            raise ShardingError(
                f"{path} did not pass through the parallel attention (its processor or attention backend was changed "
                "after parallelize?): remove() the handle and parallelize again"
            )

    handle.hook(module.register_forward_pre_hook(before))
    handle.hook(module.register_forward_hook(after))


def _route(processor: Any, route: Route | None, handle: ShardHandle) -> None:
    """Point one processor instance at our attention backend. Over tracked tensors any backend does without a route."""
    for name, value in (("_attention_backend", backend_key()), ("_parallel_config", route)):
        if not hasattr(processor, name) or value is None:
            continue
        had = name in vars(processor)
        before = vars(processor).get(name)
        setattr(processor, name, value)

        def undo(name: str = name, had: bool = had, before: Any = before) -> None:
            if had:
                setattr(processor, name, before)
            else:
                vars(processor).pop(name, None)

        handle.on_remove(undo)
