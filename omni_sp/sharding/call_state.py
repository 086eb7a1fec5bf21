"""Whether a model keeps something from one call to the next, so that it matters who skips a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from omni_sp.sharding.apply import refresh_hooks
from omni_sp.sharding.diffusers_internals import contexts_of_stateful_hooks
from omni_sp.sharding.foreign_code import has_foreign_forward, has_foreign_hooks, has_foreign_parts, has_global_hooks
from omni_sp.sharding.replay.state import ModuleState


@dataclass(frozen=True)
class CallState:
    """What a call of a model will find.

    Attributes:
        reason: why no call may be skipped: gradients, or code that may keep something, and nobody knows for which
            calls.
        context: the name of diffusers' cache context, where hooks keep something for each context; else None.
        modules: equal for the same modules and attention processors; another one is never taken for one that is gone.
    """

    reason: str | None
    context: str | None
    modules: tuple[Any, ...]


def call_state(model: torch.nn.Module) -> CallState:
    """Look at the modules of a model on this rank, before a call of it."""
    contexts: set[str | None] = set()
    reason = "gradients are enabled" if torch.is_grad_enabled() else None
    if has_global_hooks():
        reason = "hooks run around all modules"
    seen = []
    for module in model.modules():
        attributes = vars(module)
        seen += [_reference(module), _reference(attributes.get("processor"))]
        if "_diffusers_hook" in attributes:
            contexts.update(contexts_of_stateful_hooks(attributes["_diffusers_hook"]))
        if has_foreign_hooks(module) or ("forward" in attributes and has_foreign_forward(module, of_diffusers=False)):
            reason = f"code of others runs around a {type(module).__name__}"
    if None in contexts:
        reason = "a step cache keeps results without a context"
    elif len(contexts) > 1:
        reason = "step caches are in several contexts at once"
    return CallState(reason, next(iter(contexts), None), tuple(seen))


def _reference(x: Any) -> Any:
    """What equals this object's alone, also once it is gone and another has its address, as happens on some ranks."""
    try:
        return weakref.ref(x)
    except TypeError:
        return x


def changes_while(model: torch.nn.Module, run: Callable[[], Any]) -> tuple[Any, bool]:
    """What ``run`` returns, and whether it changed the model's attributes, or others' modules in it may have."""
    refresh_hooks(model)
    before = ModuleState(model)
    result = run()
    return result, not before.is_current() or any(map(has_foreign_parts, model.modules()))
