"""What decides what a call does: the modules as they are, the modes of this thread, and the arguments."""

from __future__ import annotations

import operator
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from omni_sp.sharding.diffusers_internals import active_attention_backend
from omni_sp.sharding.foreign_code import has_global_hooks
from omni_sp.sharding.replay.tape import signature_of
from omni_sp.sharding.tracked import TokenTensor
from omni_sp.sharding.weight_parts import leaves_of

_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device)
_TYPE = operator.attrgetter("dtype", "shape")
_FUNCTIONS = (FunctionType, MethodType, partial)


class ModuleState:
    """A module's modules, attributes and weights as they were, to see whether anybody changed them.

    Attributes:
        weights: its parameters and buffers, each as often as it is there; of a quantised one the tensors it is made of.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        modules = list(module.modules())
        # Each as often as it is there, so that blocks which share other weights among their modules differ.
        held = [x for part in modules for x in (*part.parameters(False), *part.buffers(False))]
        self.weights = [leaf for x in held for leaf in leaves_of(x)]
        # Whoever moves a quantised weight gives it other tensors, and it stays the same weight.
        self._made_of = [(x, tuple(leaves_of(x))) for x in held if hasattr(x, "__tensor_flatten__")]
        self._module = module
        self._types = list(map(_TYPE, self.weights))
        self._dicts = [vars(owner) for owner in attribute_owners(modules)]
        self._copies = [_copied(owned) for owned in self._dicts]
        found = {id(x): x for owned in self._dicts for x in _values_in(owned)}
        self._contents = [(x, content) for x in found.values() if (content := _content_of(x)) is not None]
        # Tensors of one element are compared by their numbers, and another one may hold the same.
        dicts = (x for part in modules for x in (part._parameters, part._buffers))
        self._single = [
            (x, name, one) for x in dicts for name, one in x.items() if one is not None and one.shape.numel() < 2
        ]

    def description(self) -> Any:
        """A hashable value that is equal for modules that do the same, but for their weights' numbers."""
        return (*(_describe_module(path, part) for path, part in self._module.named_modules()), aliases(self.weights))

    def is_current(self) -> bool:
        """True while nothing was replaced: not a module, an attribute, a hook, or a weight."""
        try:
            # Containers in containers are compared in depth, since their copies are no longer the same objects.
            if self._dicts != self._copies or any(_content_of(x) != content for x, content in self._contents):
                return False
        except (RuntimeError, ValueError, TypeError):  # tensors and arrays that are compared by their numbers
            return False
        return (
            list(map(_TYPE, self.weights)) == self._types
            and all(held[name] is tensor for held, name, tensor in self._single)
            and all(all(map(operator.is_, leaves_of(x), leaves)) for x, leaves in self._made_of)
        )


def attribute_owners(modules: Sequence[torch.nn.Module]) -> list[Any]:
    """Modules, their processors, and the plain objects among their attributes: all whose attributes count."""
    owners: list[Any] = list(modules)
    known = set(map(id, owners))
    for owner in owners:  # it grows on the way
        # What hooks of libraries hold in containers is of their own.
        is_hook = type(owner).__module__.startswith(("diffusers.hooks.", "accelerate."))
        for x in vars(owner).values() if is_hook else _values_in(vars(owner)):
            if id(x) not in known and _has_attributes(x):
                known.add(id(x))
                owners.append(x)
    return owners


def _values_in(value: Any, inside: tuple[int, ...] = ()) -> Iterator[Any]:
    """A value, or what is in it where it is a container."""
    if isinstance(value, (dict, list, tuple, set)):
        for x in () if id(value) in inside else value.values() if isinstance(value, dict) else value:
            yield from _values_in(x, (*inside, id(value)))
    else:
        yield value


def _copied(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """A container, and the containers in it, to be compared with later."""
    if id(value) in inside:
        return value
    if isinstance(value, dict):
        return {name: _copied(x, (*inside, id(value))) for name, x in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_copied(x, (*inside, id(value))) for x in value)
    return set(value) if isinstance(value, set) else value


def _content_of(value: Any) -> Any:
    """What is in an object whose content may change although it stays the same object; None for any other."""
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, (deque, bytearray, array)):
        return tuple(value)
    if isinstance(value, partial):
        return value.func, value.args, tuple(value.keywords.items())
    slots = _slots_of(type(value))  # type: ignore[arg-type]
    return tuple([(name, getattr(value, name)) for name in slots if hasattr(value, name)]) if slots else None


@lru_cache(maxsize=1024)
def _slots_of(kind: type) -> tuple[str, ...]:
    """The names of attributes that an object of a class has outside of a ``__dict__``."""
    if kind.__module__.partition(".")[0] == "torch":
        return ()
    slots = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = (name for one in slots for name in ([one] if isinstance(one, str) else one))
    return tuple(name for name in names if not name.startswith("__"))


def _describe_module(path: str, module: torch.nn.Module) -> Any:
    """What of a module decides which operations it does, but for its weights' numbers."""
    weights = tuple(
        (name, None if x is None else (x.shape, x.stride(), x.dtype, type(x), _describe_parts(x)))
        for held in (module._parameters, module._buffers)
        for name, x in held.items()
    )
    # Of the names with an underscore most are torch's own, and objects of this one module; but a list of names may say
    # which adapters are on.
    attributes = {name: x for name, x in vars(module).items() if not name.startswith("_") or _is_plain(x)}
    if type(module).__module__.startswith("peft.") and isinstance(attributes.get("kwargs"), dict):
        # How a LoRA layer was made, which says where in the model it is. Its forward does not look at it.
        attributes["kwargs"] = {name: x for name, x in attributes["kwargs"].items() if name != "target_name"}
    return path, type(module), _plain(attributes), weights


def _describe_parts(weight: torch.Tensor) -> Any:
    """Of a weight that is made of several tensors, what decides which operations are done to them."""
    if not hasattr(weight, "__tensor_flatten__"):
        return None
    names, context = weight.__tensor_flatten__()
    parts = [getattr(weight, name) for name in names]
    shapes = tuple((x.shape, x.stride(), x.dtype, _describe_parts(x)) for x in parts)
    return tuple(names), shapes, _plain(context)


def _is_plain(value: Any) -> bool:
    """Whether it is a plain value, or a list of such alone."""
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))


def _plain(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """A hashable value that is equal where objects do the same; of unknown objects their identity."""
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if id(value) in inside:
        return _Identity(value)
    inside = (*inside, id(value))
    if isinstance(value, (list, tuple)):
        return tuple(_plain(x, inside) for x in value)
    if isinstance(value, dict):
        return tuple((str(name), _plain(x, inside)) for name, x in value.items())
    content = _content_of(value)
    if content is not None or _has_attributes(value):
        return type(value), _plain(content, inside), _plain(getattr(value, "__dict__", None), inside)
    return _Identity(value)


class _Identity:
    """Equal to itself alone. It keeps its object, since the address of one that is gone may become another's."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def _has_attributes(value: Any) -> bool:
    """Whether an attribute of a module is an object whose own attributes count."""
    if isinstance(value, (type, torch.nn.Module, torch.Tensor, *_FUNCTIONS)) or not hasattr(value, "__dict__"):
        return False
    package = type(value).__module__.partition(".")[0]
    return package != "omni_sp" and not (package == "torch" and callable(value))  # our handle; torch's operators


def modes() -> tuple[Any, ...]:
    """The state of this thread that decides what operators do.

    Raises:
        ValueError: somebody watches or changes operators.
    """
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        raise ValueError("autocast is on")
    if has_global_hooks():
        raise ValueError("there is foreign code around every forward")
    watchers = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    # Fake tensors are computed like others.
    if torch._C._len_torch_function_stack() or not all(isinstance(mode, FakeTensorMode) for mode in watchers):
        raise ValueError("a mode of torch is active")
    grad_modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *grad_modes, torch.get_default_dtype(), active_attention_backend()


def describe(value: Any, arguments: list[torch.Tensor]) -> Any:
    """A hashable description of arguments, whose tensors are added to ``arguments``.

    Raises:
        ValueError: an argument is of a kind that may do anything.
    """
    if isinstance(value, torch.Tensor):
        arguments.append(value)
        return signature_of(value)
    if isinstance(value, (list, tuple)):
        return (type(value), *[describe(x, arguments) for x in value])
    if isinstance(value, dict):
        return tuple([(name, describe(x, arguments)) for name, x in value.items()])
    if isinstance(value, _PLAIN):
        return (type(value), value)
    raise ValueError(f"an argument is a {type(value).__name__}")


def aliases(arguments: Sequence[torch.Tensor]) -> tuple[int, ...] | None:
    """Which arguments are one tensor, or sharded ones of one shard; None where all are different ones."""
    ids = [id(x._local) if type(x) is TokenTensor else id(x) for x in arguments]
    return None if len({*ids}) == len(ids) else tuple(map(ids.index, ids))
