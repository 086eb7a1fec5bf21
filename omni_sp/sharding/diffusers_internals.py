"""Everything private that we rely on inside diffusers. Differences between its versions are handled in this file only.

Where a version lacks something, None is returned; only without the registry of attention backends nothing can be
sharded. The versions are in ``omni_sp.tested_versions``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from omni_sp.errors import UnsupportedModelError
from omni_sp.tested_versions import TESTED

HOOK_REGISTRY = "diffusers.hooks.hooks"
"""The module that puts hooks around a module's forward."""

TRANSPARENT_HOOKS = frozenset(
    {
        "GroupOffloadingHook",
        "LazyPrefetchGroupOffloadingHook",
        "LayerExecutionTrackerHook",
        "LayerwiseCastingHook",
        "PeftInputAutocastDisableHook",
    }
)
"""Hooks of diffusers around a module's forward that move and cast tensors, and never look at their numbers."""


def attention_backends() -> dict[Any, Callable[..., Any]]:
    """Diffusers' registry of attention backends: its name, a member of an enum -> the function.

    Raises:
        UnsupportedModelError: this version of diffusers has no such registry.
    """
    backends = getattr(_found("diffusers.models.attention_dispatch", "_AttentionBackendRegistry"), "_backends", None)
    if not isinstance(backends, dict):
        raise _unknown("has no registry of attention backends")
    return backends


def register_attention_backend(name: str, attend: Callable[..., Any]) -> Any:
    """The key of our backend in the registry, which is registered on first use.

    The keys of the registry are an enum, which cannot be extended. A value of that type that is no member of it is
    looked up like any other key, and changes nothing for other users of the registry.
    """
    for key in attention_backends():
        if key.value == name:
            return key
    names, registry = (
        _found("diffusers.models.attention_dispatch", known)
        for known in ("AttentionBackendName", "_AttentionBackendRegistry")
    )
    if names is None or not hasattr(registry, "register"):
        raise _unknown("registers attention backends in another way")
    key = str.__new__(names, name)
    key._name_, key._value_ = name.upper(), name
    registry.register(key)(attend)
    return key


def flex_attention_key() -> Any:
    """The key of diffusers' flex attention in the registry, or None."""
    return next((key for key in attention_backends() if key.value == "flex"), None)


def active_attention_backend() -> Any:
    """The key of the backend that attention goes to where a model names none.

    Raises:
        UnsupportedModelError: this version of diffusers keeps it elsewhere.
    """
    registry = _found("diffusers.models.attention_dispatch", "_AttentionBackendRegistry")
    if not hasattr(registry, "_active_backend"):
        raise _unknown("has no active attention backend")
    return registry._active_backend


def hook_and_forward_below(function: Any) -> tuple[Any, Any] | None:
    """The hook that diffusers' registry put around a forward, and the forward that it calls.

    Args:
        function: a function of ``HOOK_REGISTRY`` that stands in a forward's place.

    Returns:
        None where this version keeps them elsewhere.
    """
    found = inspect.getclosurevars(function).nonlocals.get("function_reference")
    hook = getattr(getattr(found, "pre_forward", None), "__self__", None)
    forward = getattr(found, "original_forward", None) or getattr(found, "forward", None)
    return None if hook is None or forward is None else (hook, forward)


def contexts_of_stateful_hooks(registry: Any) -> set[str | None]:
    """The cache contexts that the stateful hooks of one registry are in.

    Args:
        registry: what diffusers keeps in a module's ``_diffusers_hook``.

    Returns:
        Names of contexts; None stands for a hook that keeps something and is in no context.
    """
    found: set[str | None] = set()
    for hook in getattr(registry, "hooks", {}).values():
        if getattr(hook, "_is_stateful", True):
            managers = [x for x in vars(hook).values() if type(x).__name__ == "StateManager"]
            contexts = [getattr(x, "_context", None) or getattr(x, "_current_context", None) for x in managers]
            found.update(getattr(context, "name", context) for context in contexts or [None])
    return found


def has_group_offloading(module: Any) -> bool:
    """Whether diffusers moves the weights of a module between devices, in groups."""
    hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
    return any(str(name).endswith("group_offloading") for name in hooks)


def without_initialisation() -> AbstractContextManager[None]:
    """While it lasts, modules are built without numbers in their weights, as where they are read from a file next."""
    found = _found("diffusers.models.modeling_utils", "no_init_weights")
    return nullcontext() if found is None else cast("AbstractContextManager[None]", found())


def kept_in_float32(model_class: Any) -> tuple[str, ...]:
    """Names of modules that ``from_pretrained`` leaves in float32, whatever the dtype of the others is."""
    names = getattr(model_class, "_keep_in_fp32_modules", None) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _found(module: str, name: str) -> Any:
    """A name of a module, or None where either is missing."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not module.startswith(str(error.name)):
            raise  # the module is there, and something else is missing
        return None


def _unknown(difference: str) -> UnsupportedModelError:
    import diffusers

    oldest, newest = TESTED["diffusers"]
    return UnsupportedModelError(
        f"diffusers {diffusers.__version__} {difference}, and sharding relies on that: use {oldest} to {newest}, which "
        "it is tested with"
    )
