"""Code that somebody put around a module's forward: it may look at numbers, and would take a shard for the full tensor.

Step caches, skipped layers, guidance and people's own experiments do this by hooks, by another ``forward`` on an
instance or on the class, or by modules and processors of their own. The libraries' own code around a forward that moves
or casts tensors is not foreign, and neither is ours.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from omni_sp.sharding.diffusers_internals import HOOK_REGISTRY, TRANSPARENT_HOOKS, hook_and_forward_below

KNOWN_PACKAGES = {
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "optimum",
    "torchao",
}
"""Packages whose modules compute their outputs and do nothing else. Code of others is foreign in a model of theirs."""

_HARMLESS = {"omni_sp", "numpy", "einops", "PIL", "safetensors", "huggingface_hub", *sys.stdlib_module_names}
_CALLS = ("forward", "__call__", "_wrapped_call_impl", "_call_impl")
_ATTENTION_DISPATCHER = "dispatch_attention_fn"
_FORWARDS = ("forward", "_old_forward", "_compiled_call_impl")
_ACCELERATE, _OURS = "accelerate.hooks", "omni_sp."


def has_foreign_code(module: torch.nn.Module) -> bool:
    """True where code that is neither the libraries' nor ours runs in or around a module's own forward."""
    return has_foreign_hooks(module) or has_foreign_forward(module) or has_foreign_parts(module)


def has_foreign_parts(module: torch.nn.Module) -> bool:
    """True where the module, its attention processor, or a function among its attributes is somebody's own."""
    processor = vars(module).get("processor") or module._modules.get("processor")
    kind = type(processor)
    if processor is not None and not (_is_known(kind) and _is_own(kind, kind.__call__)):
        return True
    return not _is_known(type(module)) or any(map(is_foreign_function, functions_among_attributes(module)))


def functions_among_attributes(module: torch.nn.Module) -> list[Any]:
    """What somebody may have put on an instance in place of a method; its forward is looked at by itself."""
    return [
        value
        for name, value in vars(module).items()
        if callable(value) and not isinstance(value, (type, torch.nn.Module)) and name not in _FORWARDS
    ]


class FunctionWatch:
    """What the methods of some classes call by name, as it was found, to see whether anybody replaces any of it.

    People replace functions of libraries, torch's own attention among them, to have others called.

    Attributes:
        foreign: the classes whose methods call code of unknown packages.
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        self.foreign: set[type] = set()
        self._found: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
        for kind in {*kinds}:
            for owner, names, name in _called_by(kind):
                value = names.get(name)
                self._found[id(owner), name] = names, name, value
                if is_foreign_function(value):
                    self.foreign.add(kind)

    def holds(self) -> bool:
        """True while nobody has replaced anything."""
        return all(names.get(name) is value for names, name, value in self._found.values())


def is_foreign_function(value: Any) -> bool:
    """True for code of an unknown package that can be called; classes are none."""
    if isinstance(value, functools.partial):
        return is_foreign_function(value.func)
    function = getattr(value, "fget", None) or getattr(value, "__func__", value)
    if isinstance(function, type) or not callable(function):
        return False
    while function is not None:
        # What functools.wraps copies, such as __module__, tells nothing; the globals are those of the file it is in.
        # What has none, such as a cache around a function, is of its class's package.
        names = getattr(function, "__globals__", None)
        home = type(function).__module__ if names is None else str(names.get("__name__"))
        package = home.partition(".")[0]
        if package not in KNOWN_PACKAGES and package not in _HARMLESS:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _called_by(kind: type) -> Iterator[tuple[object, Mapping[str, Any], str]]:
    """Where the methods of a class find what they call by name: whose names, the names, the name.

    The functions of diffusers that they call, and those that these call, are looked into as well.
    """
    functions: list[Any] = []
    for base in kind.__mro__:
        own = vars(base)
        # Also where they are not there yet.
        yield from ((base, own, name) for name in _CALLS)
        if base in (object, torch.nn.Module):
            continue
        for name, method in own.items():
            function = inspect.unwrap(getattr(method, "fget", None) or getattr(method, "__func__", method))
            if hasattr(function, "__code__"):
                yield base, own, name
                functions.append(function)
    for function in functions:  # it grows on the way
        called = _names_in(function.__code__)
        places = [function.__globals__]
        places += [vars(torch.nn.functional)] if {"F", "functional"} & called else []
        places += [vars(torch)] if "torch" in called else []
        for names in places:
            for name in called & names.keys():
                yield names, names, name
                value = names[name]
                if name == _ATTENTION_DISPATCHER:  # its backends are found in a table; ours calls torch's attention
                    attention = vars(torch.nn.functional)
                    yield attention, attention, "scaled_dot_product_attention"
                is_diffusers = str(getattr(value, "__module__", "")).partition(".")[0] == "diffusers"
                if is_diffusers and hasattr(value, "__code__") and value not in functions:
                    functions += {value, inspect.unwrap(value)}


def _names_in(code: CodeType) -> set[str]:
    """The names that code looks up, and those that the functions look up which are defined in it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*map(_names_in, inner))


def has_foreign_hooks(module: torch.nn.Module, *, known: tuple[str, ...] = ()) -> bool:
    """True where somebody registered a forward hook, or a forward pre-hook, on the module.

    Args:
        module: one module.
        known: prefixes of the names of modules whose hooks are not foreign either.
    """
    own = vars(module)
    hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
    return _any_foreign(hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith((*known, _OURS)))


def has_global_hooks() -> bool:
    """True where somebody registered a hook that runs around the forward of every module."""
    return _any_foreign(torch_module._global_forward_hooks.values()) or _any_foreign(
        torch_module._global_forward_pre_hooks.values()
    )


def num_hooks_registered() -> int:
    """How many hooks were registered in this process so far, on whatever: it only ever grows."""
    return int(torch.utils.hooks.RemovableHandle.next_id)


def has_foreign_forward(module: torch.nn.Module, *, of_diffusers: bool = True) -> bool:
    """True where the forward that runs is not the class's own.

    diffusers' registry of hooks and accelerate's hooks keep the forward that they found, and call it: what they found
    is looked at as well.

    Args:
        of_diffusers: diffusers' hooks that look at numbers count as foreign.
    """
    forward = vars(module).get("forward")
    while forward is not None:
        function = getattr(forward, "__func__", None)
        if function is not None and getattr(forward, "__self__", None) is module:
            return not _is_own(type(module), function)
        if not isinstance(forward, functools.partial):
            return True
        made_in = getattr(forward.func, "__globals__", {}).get("__name__")
        if made_in == _ACCELERATE:
            if not _is_accelerates(vars(module).get("_hf_hook")):
                return True
            forward = vars(module).get("_old_forward")
        elif made_in == HOOK_REGISTRY:
            found = hook_and_forward_below(forward.func)
            if found is None or not _is_expected(type(found[0]), of_diffusers=of_diffusers):
                return True
            forward = found[1]
        else:
            return True
    return not _is_own(type(module), type(module).forward)


def _is_own(kind: type, function: Any) -> bool:
    """True where a class's forward, and all that decorates it, was written where the class was, or in a library."""
    owners = (base for base in kind.__mro__ if not {"forward", "__call__"}.isdisjoint(vars(base)))
    writers = {base.__module__.partition(".")[0] for base in owners} | KNOWN_PACKAGES
    while function is not None:
        # What functools.wraps copies, such as __module__, tells nothing; the globals are those of the file it is in.
        if getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] not in writers:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _is_expected(hook: type, *, of_diffusers: bool) -> bool:
    """True for a hook of diffusers that only moves and casts tensors, or else any of its own."""
    return hook.__name__ in TRANSPARENT_HOOKS if of_diffusers else hook.__module__.startswith("diffusers.")


def _is_known(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in KNOWN_PACKAGES


def _is_accelerates(hook: Any) -> bool:
    """True for a hook of accelerate's own, and a sequence of such."""
    return type(hook).__module__ == _ACCELERATE and all(map(_is_accelerates, getattr(hook, "hooks", ())))


def _any_foreign(hooks: Iterable[Any]) -> bool:
    return any(not str(getattr(hook, "__module__", "")).startswith(_OURS) for hook in hooks)
