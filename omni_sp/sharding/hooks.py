"""The hooks on a transformer's modules, kept up to date with the modules that it has.

People change a transformer after it was parallelized: LoRA and IP-Adapters replace modules and processors, a step cache
puts its own code around blocks. So every forward begins with a look at the modules, and hooks them anew if any changed.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from omni_sp.errors import ShardingError, UnsupportedModelError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.attention_backend import backend_key
from omni_sp.sharding.foreign_code import (
    FunctionWatch,
    functions_among_attributes,
    has_foreign_code,
    has_foreign_hooks,
    has_global_hooks,
    num_hooks_registered,
)
from omni_sp.sharding.forward_context import OnShard, ShardedForward, current_forward
from omni_sp.sharding.models import TOKENWISE, plan_for
from omni_sp.sharding.plan import Plan, Split, matches
from omni_sp.sharding.replay import BlockPlayer, TapeStore, block_lists
from omni_sp.sharding.replay.state import attribute_owners
from omni_sp.sharding.tracked import TokenTensor, even_placement, local_shard
from omni_sp.sharding.weights import WeightShards

_LOCAL_OF = "_omni_sp_local_of"
_COMPILED_CALL = "_compiled_call_impl"  # where Module.compile() puts what is called in place of the module's own code
_ROOT = "the transformer itself"


@dataclass(frozen=True)
class ModuleSnapshot:
    """One module as it was when hooks were registered on it, with what may be replaced in it."""

    parent: Mapping[str, torch.nn.Module | None]
    name: str
    module: torch.nn.Module
    kind: type
    forward: Any  # what its instance had in place of its class's forward, or None
    processor: Any
    num_attributes: int
    functions: tuple[Any, ...]

    def is_current(self) -> bool:
        """True while nobody has replaced the module, its forward or its processor."""
        now = self.parent.get(self.name)
        return (
            (now is self.module or getattr(now, "_orig_mod", None) is self.module)  # torch.compile wraps
            and vars(self.module).get("forward") is self.forward
            and _processor(self.module) is self.processor
            and type(self.module) is self.kind
            and len(vars(self.module)) == self.num_attributes
            and (not self.functions or all(map(operator.is_, functions_among_attributes(self.module), self.functions)))
        )


class ModuleHooks:
    """The hooks on all modules of a transformer but the transformer itself.

    Args:
        model: the transformer.
        mesh: the ranks.
        plan: where its token streams begin; None finds that out, and does so again when its modules change.
        tracks: sharded tensors are tracked, see ``tracked``. Else there is one rank, and its streams are only counted.
        tapes: what was recorded of blocks; None where they are followed every time.
        weights: of the blocks, where they are sharded.

    Attributes:
        foreign: the paths of the modules that other people's code runs in or around.
        num_changes: how often the modules were found to be others than before.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mesh: ParallelMesh,
        plan: Plan | None,
        *,
        tracks: bool,
        tapes: TapeStore | None,
        weights: WeightShards | None = None,
    ) -> None:
        self._weights = weights
        self._model, self._mesh, self._plan, self._tracks, self._tapes = model, mesh, plan, tracks, tapes
        self._undo = ExitStack()
        self._snapshots: list[ModuleSnapshot] = []
        self._players: list[tuple[torch.nn.Module, Callable[..., Any]]] = []
        self._watch = FunctionWatch(())
        self.foreign: tuple[str, ...] = ()
        self.num_changes = 0
        self._foreign_hooks: frozenset[str] = frozenset()
        self._num_hooks = 0

    def refresh(self) -> None:
        """Hook the modules that are there now, unless they are the same as before."""
        if self._snapshots and self._is_current():
            return
        self.num_changes += bool(self._snapshots)
        self.remove()
        if self._tapes is not None:
            self._tapes.clear()
        self._foreign_hooks = self._find_foreign_hooks()
        self._watch = FunctionWatch.of(map(type, attribute_owners(list(self._model.modules()))))
        self.foreign = tuple(
            path or _ROOT
            for path, module in self._model.named_modules()
            if (path or _ROOT) in self._foreign_hooks or self._is_foreign(module)
        )
        try:
            self._install()
        except BaseException:
            self.remove()
            raise
        # As they are with our own hooks on them.
        self._snapshots = _snapshots(self._model)
        self._num_hooks = num_hooks_registered()

    def remove(self) -> None:
        """Remove all hooks."""
        self._undo.close()
        self._snapshots, self._players = [], []

    def _is_current(self) -> bool:
        """True while the modules, their forwards, and other people's hooks on them are those that were hooked."""
        if not all(snapshot.is_current() for snapshot in self._snapshots):
            return False
        if not all(block._compiled_call_impl is player for block, player in self._players) or not self._watch.holds():
            return False
        # Looking at every module's hooks takes a while, and is only needed where any may have come or gone.
        if self._foreign_hooks or self._num_hooks != num_hooks_registered():
            self._num_hooks = num_hooks_registered()
            return self._find_foreign_hooks() == self._foreign_hooks
        return True

    def _find_foreign_hooks(self) -> frozenset[str]:
        """The paths of the modules that other people's hooks run on."""
        every = has_global_hooks()
        return frozenset(
            path or _ROOT for path, module in self._model.named_modules() if every or has_foreign_hooks(module)
        )

    def _is_foreign(self, module: torch.nn.Module) -> bool:
        """Whether code of an unknown package runs in or around a module's forward."""
        kinds = {type(module), type(_processor(module))}
        return has_foreign_code(module) or not kinds.isdisjoint(self._watch.foreign)

    def _install(self) -> None:
        plan = plan_for(self._model) if self._plan is None else self._plan
        for path, module, inputs in resolve_plan(self._model, plan):
            if path:
                hook = install_stream_hook(module, path, inputs, self._mesh, tracks=self._tracks)
                self._undo.callback(hook.remove)
        if not self._tracks:
            return
        for module in self._model.modules():
            # A class that names a backend keeps it.
            if getattr(type(_processor(module)), "_attention_backend", "none") is None:
                self._set_backend(_processor(module))
            # Foreign code in such a module sees full tensors like anywhere else.
            if type(module).__name__ in TOKENWISE and not any(map(self._is_foreign, module.modules())):
                self._undo.callback(module.register_forward_pre_hook(_to_local).remove)
                self._undo.callback(module.register_forward_hook(_from_local).remove)
        for block in block_lists(self._model):
            if self._tapes is not None:
                self._install_player(block, self._tapes)
            elif any(module._compiled_call_impl is not None for module in block.modules()):
                raise UnsupportedModelError(
                    f"a {type(block).__name__} of {type(self._model).__name__} is compiled, and a block that is "
                    "followed every time cannot be: parallelize without replay=False"
                )
            elif self._weights is not None:
                self._put_in_front(block, block._call_impl)

    def _install_player(self, block: torch.nn.Module, tapes: TapeStore) -> None:
        """Put a player in the place of a compiled call; where there was one, what the player records is compiled."""
        compile_options = tapes.compile_options
        for module in block.modules():
            compiled_call = vars(module).pop(_COMPILED_CALL, None)
            if compiled_call is not None:
                # The rules of sharded tensors are no part of a graph, so nothing is followed through compiled code.
                self._undo.callback(_restore_compiled_call, module, compiled_call)
                compile_options = compile_options or {}
        is_foreign = any(map(self._is_foreign, block.modules()))
        player = BlockPlayer(block, tapes, is_foreign=is_foreign, compile_options=compile_options)
        self._put_in_front(block, player)

    def _put_in_front(self, block: torch.nn.Module, player: Callable[..., Any]) -> None:
        """Let a block be called by what replays it, with its weights whole where they are sharded."""
        if self._weights is not None:
            player = self._weights.of(block).around(player)
        block._compiled_call_impl = player
        self._players.append((block, player))
        self._undo.callback(_remove_player, block, player)

    def _set_backend(self, processor: Any) -> None:
        """Select our attention backend for one processor instance."""
        if "_attention_backend" in vars(processor):
            self._undo.callback(setattr, processor, "_attention_backend", vars(processor)["_attention_backend"])
        else:
            self._undo.callback(vars(processor).pop, "_attention_backend", None)
        processor._attention_backend = backend_key()


def require_running(path: str) -> ShardedForward:
    """The forward that the module at ``path`` runs in; an error where it was called on its own."""
    forward = current_forward()
    if forward is None:
        raise ShardingError(
            f"{path} was called on its own; call the transformer as a whole, or remove() its handle first"
        )
    return forward


def resolve_plan(model: torch.nn.Module, plan: Plan) -> list[tuple[str, torch.nn.Module, Mapping[str, Split]]]:
    """Find the modules that the plan names, and check that their forwards take the parameters that it names."""
    name = type(model).__name__
    resolved = []
    for pattern, inputs in plan.inputs.items():
        found = [(path, module) for path, module in model.named_modules() if matches(pattern, path)]
        if not found:
            raise UnsupportedModelError(f"the plan for {name} speaks of {pattern!r}, which it has not")
        for path, module in found:
            unknown = set(inputs) - {*_forward_parameters(module), ""}
            if unknown:
                raise UnsupportedModelError(
                    f"the plan for {name} cuts {sorted(unknown)} of {(path or name)!r}, whose forward takes "
                    f"{_forward_parameters(module)}"
                )
            resolved.append((path, module, inputs))
    return resolved


def install_stream_hook(
    module: torch.nn.Module, path: str, inputs: Mapping[str, Split], mesh: ParallelMesh, *, tracks: bool
) -> Any:
    """Hook a module to shard some of its inputs before it runs; where nothing is tracked, they are only counted."""
    names = _forward_parameters(module)

    def before(
        _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if torch.compiler.is_compiling():  # on one rank, where there is nothing to shard
            return args, kwargs
        positional, forward = list(args), require_running(path)
        if not forward.splits_tokens:
            return args, kwargs
        on_shard = forward.record_shard
        for name, split in inputs.items():
            index = names.index(name) if name else 0
            if not name and not args:
                name = next(iter(kwargs), name)
            if name in kwargs:
                kwargs = {**kwargs, name: shard_input(kwargs[name], split, mesh, f"{path}.{name}", on_shard, tracks)}
            elif index < len(positional):
                positional[index] = shard_input(positional[index], split, mesh, f"{path}.{name}", on_shard, tracks)
        return tuple(positional), kwargs

    return module.register_forward_pre_hook(before, with_kwargs=True)


def shard_input(value: Any, split: Split, mesh: ParallelMesh, location: str, on_shard: OnShard, tracks: bool) -> Any:
    """A tensor, or each tensor of a list, as a TokenTensor. One that is sharded already stays as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)([shard_input(item, split, mesh, location, on_shard, tracks) for item in value])
    if (
        not isinstance(value, torch.Tensor)
        or isinstance(value, TokenTensor)
        or value.ndim != (split.ndim or value.ndim)
    ):
        return value
    axis, dim = mesh.sequence, split.dim % value.ndim
    on_shard(location, value, value.shape[dim])
    if not tracks:
        return value
    placement = even_placement(value.shape[dim], axis.size)
    # The shard is copied: the model may write to it, and the caller's tensor would then differ from rank to rank.
    local = local_shard(value, dim, placement, axis).clone(memory_format=torch.contiguous_format)
    return TokenTensor(local, dim, placement, axis)


def _remove_player(block: torch.nn.Module, player: Callable[..., Any]) -> None:
    if block._compiled_call_impl is player:  # else the block was compiled since
        vars(block).pop(_COMPILED_CALL)


def _restore_compiled_call(module: torch.nn.Module, compiled_call: Any) -> None:
    vars(module).setdefault(_COMPILED_CALL, compiled_call)


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


def _snapshots(model: torch.nn.Module) -> list[ModuleSnapshot]:
    """All modules as they are now."""
    snapshots = [_snapshot({"": model}, "", model)]
    for parent in model.modules():
        snapshots += [_snapshot(parent._modules, name, x) for name, x in parent._modules.items() if x is not None]
    return snapshots


def _snapshot(parent: Mapping[str, torch.nn.Module | None], name: str, module: torch.nn.Module) -> ModuleSnapshot:
    return ModuleSnapshot(
        parent=parent,
        name=name,
        module=module,
        kind=type(module),
        forward=vars(module).get("forward"),
        processor=_processor(module),
        num_attributes=len(vars(module)),
        functions=tuple(functions_among_attributes(module)),
    )
