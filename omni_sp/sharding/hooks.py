"""The hooks on a transformer's modules, kept up to date with the modules that it has.

People change a transformer after it was parallelized: LoRA and IP-Adapters replace modules and processors, a step cache
puts its own code around blocks. So every forward begins with a look at the modules, and hooks them anew if any changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from omni_sp.errors import ShardingError, UnsupportedModelError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.attention_backend import AttentionTag, backend_key
from omni_sp.sharding.forward_context import OnShard, ShardedForward, current_forward, shard_plain
from omni_sp.sharding.models import TOKENWISE
from omni_sp.sharding.plan import Gather, ModulePlan, ShardingPlan, Split, TrackedPlan, matches
from omni_sp.sharding.tracked import TokenTensor, even_placement, local_shard

_LOCAL_OF = "_omni_sp_local_of"
_TRANSPARENT_HOOKS = frozenset(
    {
        "GroupOffloadingHook",
        "LazyPrefetchGroupOffloadingHook",
        "LayerExecutionTrackerHook",
        "LayerwiseCastingHook",
        "PeftInputAutocastDisableHook",
    }
)
"""Hooks of diffusers around a module's forward that move and cast tensors, and never look at their numbers."""


@dataclass(frozen=True)
class ModuleSnapshot:
    """One module as it was when hooks were registered on it, with what may be replaced in it."""

    parent: Mapping[str, torch.nn.Module | None]
    name: str
    module: torch.nn.Module
    forward: Any  # what its instance had in place of its class's forward, or None
    processor: Any

    def is_current(self) -> bool:
        """True while nobody has replaced the module, its forward or its processor."""
        now = self.parent.get(self.name)
        return (
            (now is self.module or getattr(now, "_orig_mod", None) is self.module)  # torch.compile wraps
            and vars(self.module).get("forward") is self.forward
            and _processor(self.module) is self.processor
        )


class ModuleHooks:
    """The hooks on all modules of a transformer but the transformer itself.

    Args:
        fallback_plan: takes the plan's place where the plan does not suffice: an attention does not call the
            dispatcher, or there is foreign code around the blocks (a step cache, skipped layers), which would take a
            shard for the full tensor. None keeps the plan; an attention that the core cannot reach is then an error.
        routed: attention goes to the core, also on one rank.

    Attributes:
        tracked: sharded tensors look like full tensors, see ``tracked``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mesh: ParallelMesh,
        plan: ShardingPlan | TrackedPlan,
        fallback_plan: TrackedPlan | None,
        *,
        routed: bool,
    ) -> None:
        self._model, self._mesh, self._routed = model, mesh, routed
        self._plan, self._fallback_plan = plan, fallback_plan
        self._undo = ExitStack()
        self._snapshots: list[ModuleSnapshot] = []
        self.tracked = isinstance(plan, TrackedPlan)

    def refresh(self) -> bool:
        """Hook the modules that are there now; False where they are the same as before."""
        if self._snapshots and all(snapshot.is_current() for snapshot in self._snapshots):
            return False
        self.remove()
        plan = self._choose_plan()
        self.tracked = isinstance(plan, TrackedPlan)
        try:
            self._install(plan)
        except BaseException:
            self.remove()
            raise
        return True

    def remove(self) -> None:
        """Remove all hooks."""
        self._undo.close()
        self._snapshots = []

    def _choose_plan(self) -> ShardingPlan | TrackedPlan:
        if self._fallback_plan is None or isinstance(self._plan, TrackedPlan):
            return self._plan
        reached = all(hasattr(module.processor, "_attention_backend") for _, module in _attention_modules(self._model))
        if reached and not any(_has_foreign_code(module) for module in self._model.modules()):
            return self._plan
        return self._fallback_plan

    def _install(self, plan: ShardingPlan | TrackedPlan) -> None:
        name = type(self._model).__name__
        resolved = resolve_plan(self._model, plan)
        attentions = _attention_modules(self._model)
        # Foreign code around any module sees full tensors where they are tracked, and else would see a shard.
        hooked = [path for path, *_ in resolved] + [path for path, _ in attentions]
        self._snapshots = _snapshots(
            self._model, hooked if self.tracked else [path for path, _ in self._model.named_modules()]
        )
        for path, module, module_plan in resolved:
            if path:
                for hook in install_stream_hooks(module, path, module_plan, self._mesh, self.tracked):
                    self._undo.callback(hook.remove)
        if isinstance(plan, TrackedPlan):
            self._install_tracking()
        elif self._routed:
            if not attentions:
                raise UnsupportedModelError(f"{name} has no attention processor, so its attention cannot be reached")
            for path, module in attentions:
                if not hasattr(module.processor, "_attention_backend"):
                    raise UnsupportedModelError(
                        f"{name}.{path}: {type(module.processor).__name__} does not call diffusers' attention "
                        "dispatcher, so its attention cannot be reached"
                    )
            for path, module in attentions:
                self._assert_routed(module, path)
                replicated = any(matches(pattern, path) for pattern in plan.replicated_keys)
                self._set_backend(module.processor, AttentionTag(path, replicated_keys=replicated))

    def _install_tracking(self) -> None:
        """What tracking needs besides the sharded inputs."""
        for module in self._model.modules():
            # A class that names a backend keeps it.
            if getattr(type(_processor(module)), "_attention_backend", "none") is None:
                self._set_backend(_processor(module), None)
            if type(module).__name__ in TOKENWISE:
                self._undo.callback(module.register_forward_pre_hook(_to_local).remove)
                self._undo.callback(module.register_forward_hook(_from_local).remove)

    def _assert_routed(self, module: torch.nn.Module, path: str) -> None:
        """Raise where an attention does not pass through the core: local attention is a silent error.

        Inside a compiled graph nothing is counted: there the route was fixed, and guarded, when the graph was made.
        """

        def before(_module: torch.nn.Module, _args: Any) -> None:
            if not torch.compiler.is_compiling():
                require_running(path).attentions.append(0)

        def after(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
            if not torch.compiler.is_compiling() and require_running(path).attentions.pop() == 0:
                raise ShardingError(
                    f"{path} did not pass through the parallel attention (its processor or attention backend was "
                    "changed after parallelize?): remove() the handle and parallelize again"
                )

        self._undo.callback(module.register_forward_pre_hook(before).remove)
        self._undo.callback(module.register_forward_hook(after).remove)

    def _set_backend(self, processor: Any, tag: AttentionTag | None) -> None:
        """Select our attention backend for one processor instance. Tracked tensors need no tag."""
        for name, value in (("_attention_backend", backend_key()), ("_parallel_config", tag)):
            if not hasattr(processor, name) or value is None:
                continue
            if name in vars(processor):
                self._undo.callback(setattr, processor, name, vars(processor)[name])
            else:
                self._undo.callback(vars(processor).pop, name, None)
            setattr(processor, name, value)


def require_running(path: str) -> ShardedForward:
    """The forward that the module at ``path`` runs in; an error where it was called on its own."""
    forward = current_forward()
    if forward is None:
        raise ShardingError(
            f"{path} was called on its own; call the transformer as a whole, or remove() its handle first"
        )
    return forward


def resolve_plan(
    model: torch.nn.Module, plan: ShardingPlan | TrackedPlan
) -> list[tuple[str, torch.nn.Module, ModulePlan]]:
    """Find the modules that the plan names, and check that their forwards take the parameters that it names."""
    name = type(model).__name__
    if isinstance(plan, TrackedPlan):
        modules: Mapping[str, ModulePlan] = {path: ModulePlan(inputs) for path, inputs in plan.inputs.items()}
    else:
        modules = plan.modules
    resolved = []
    for pattern, module_plan in modules.items():
        found = [(path, module) for path, module in model.named_modules() if matches(pattern, path)]
        if not found:
            raise UnsupportedModelError(f"the plan for {name} speaks of {pattern!r}, which it has not")
        for path, module in found:
            unknown = set(module_plan.inputs) - set(_forward_parameters(module))
            if unknown:
                raise UnsupportedModelError(
                    f"the plan for {name} cuts {sorted(unknown)} of {(path or name)!r}, whose forward takes "
                    f"{_forward_parameters(module)}"
                )
            resolved.append((path, module, module_plan))
    return resolved


def install_stream_hooks(
    module: torch.nn.Module,
    path: str,
    plan: ModulePlan,
    mesh: ParallelMesh,
    tracked: bool,
    is_active: Callable[[], bool] | None = None,
) -> list[Any]:
    """Hook a module to shard inputs before it runs, and shard or gather outputs after it, while ``is_active()``."""
    names = _forward_parameters(module)
    shard_value = shard_tracked if tracked else shard_plain
    hooks = []

    def on_shard() -> OnShard | None:
        # A compiled graph holds the operations on tensors alone, so nothing is recorded there.
        return None if torch.compiler.is_compiling() else require_running(path).record_shard

    def before(
        _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if is_active is not None and not is_active():
            return args, kwargs
        positional = list(args)
        for name, split in plan.inputs.items():
            index = names.index(name)
            if name in kwargs:
                kwargs = {**kwargs, name: shard_value(kwargs[name], split, mesh, f"{path}.{name}", on_shard())}
            elif index < len(positional):
                positional[index] = shard_value(positional[index], split, mesh, f"{path}.{name}", on_shard())
        return tuple(positional), kwargs

    def after(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
        if is_active is not None and not is_active():
            return output
        single = isinstance(output, torch.Tensor)
        items = [output] if single else list(output)
        for index, step in plan.outputs.items():
            location = f"{path} output {index}"
            if isinstance(step, Gather):
                items[index] = require_running(path).gather_output(items[index], step.dim, location)
            else:
                items[index] = shard_value(items[index], step, mesh, location, on_shard())
        return items[0] if single else type(output)(items)

    if plan.inputs:
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
    if plan.outputs:
        hooks.append(module.register_forward_hook(after))
    return hooks


def shard_tracked(value: Any, split: Split, mesh: ParallelMesh, location: str, on_shard: OnShard | None) -> Any:
    """A tensor, or each tensor of a list, as a TokenTensor. One that is sharded already stays as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)([shard_tracked(item, split, mesh, location, on_shard) for item in value])
    if (
        not isinstance(value, torch.Tensor)
        or isinstance(value, TokenTensor)
        or value.ndim != (split.ndim or value.ndim)
    ):
        return value
    axis, dim = mesh.sequence, split.dim % value.ndim
    placement = even_placement(value.shape[dim], axis.size)
    if on_shard is not None:
        on_shard(location, value, value.shape[dim], placement.lengths[axis.rank])
    # The shard is copied: the model may write to it, and the caller's tensor would then differ from rank to rank.
    local = local_shard(value, dim, placement, axis).clone(memory_format=torch.contiguous_format)
    return TokenTensor(local, dim, placement, axis)


def _to_local(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give a token-wise module this rank's shard as a plain tensor."""
    if len(args) != 1 or not isinstance(args[0], TokenTensor) or args[0].shard_dim == args[0].ndim - 1:
        return None
    local = args[0].local.view_as(args[0].local)
    local.__dict__[_LOCAL_OF] = args[0]
    return (local,)


def _from_local(_module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
    """Turn the output of a token-wise module into a TokenTensor again."""
    sharded = args[0].__dict__.get(_LOCAL_OF) if args and isinstance(args[0], torch.Tensor) else None
    # A module that two models share (Z-Image's ControlNet runs the transformer's refiners) has these hooks twice.
    return output if sharded is None or isinstance(output, TokenTensor) else sharded.wrap(output)


def _forward_parameters(module: torch.nn.Module) -> list[str]:
    """Names that the module's class takes in ``forward``; offloading hooks may wrap the instance's ``forward``."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _processor(module: torch.nn.Module) -> Any:
    """The attention processor of a module, or None. Torch's own look-up is slow where there is none."""
    return vars(module).get("processor") or module._modules.get("processor")


def _attention_modules(model: torch.nn.Module) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in model.named_modules() if _processor(module) is not None]


def _has_foreign_code(module: torch.nn.Module) -> bool:
    """True where somebody put code around a module's forward that may look at the numbers of its tensors."""
    if "forward" not in vars(module):
        return False
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None:
        return any(type(hook).__name__ not in _TRANSPARENT_HOOKS for hook in registry.hooks.values())
    return not hasattr(module, "_hf_hook")  # accelerate's offloading


def _snapshots(model: torch.nn.Module, paths: Iterable[str]) -> list[ModuleSnapshot]:
    """The modules at these paths, and all modules that contain them, as they are now."""
    prefixes = {prefix for path in paths for prefix in accumulate(path.split("."), "{}.{}".format)}
    snapshots = [ModuleSnapshot({"": model}, "", model, vars(model).get("forward"), _processor(model))]
    for path in sorted(prefixes - {""}):
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(path)
        forward, processor = vars(module).get("forward"), _processor(module)
        snapshots.append(ModuleSnapshot(model.get_submodule(parent)._modules, name, module, forward, processor))
    return snapshots
