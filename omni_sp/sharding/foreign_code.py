"""Code that somebody put around a module's forward: it may look at numbers, and would take a shard for the full tensor.

Step caches, skipped layers, guidance and people's own experiments do this by hooks, by another ``forward`` on an
instance or on the class, or by modules and processors of their own. The libraries' own code around a forward that moves
or casts tensors is not foreign, and neither is ours.
"""

from __future__ import annotations

import dis
import functools
import importlib.util
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
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
_IMPLICIT = ("__getitem__", "__iter__", "__len__", "__contains__", "__bool__", "__getattr__", "__enter__", "__exit__")
_ATTENTION_DISPATCHER = "dispatch_attention_fn"
_TENSOR_METHODS = frozenset(dir(torch.Tensor))
_OPERATORS = {name for name in _TENSOR_METHODS if name.strip("_").removeprefix("r") in vars(operator)}
"""What an expression calls without a name."""
_OF_TENSORS, _OF_MODULES = vars(torch.Tensor), vars(torch.nn.Module)
_INSIDE = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_FORWARDS = ("forward", "_old_forward", "_compiled_call_impl")
_Lookup = tuple[Mapping[str, Any], str]
"""The names of a module or class, and one that is looked up there."""
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
    """What the methods of some classes look up by name, as it was found, to see whether anybody replaces any of it.

    People replace functions of libraries, torch's own attention among them, to have others called.

    Attributes:
        foreign: the classes whose methods call code of unknown packages.
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        self.foreign: set[type] = set()
        looked_up: dict[int, tuple[Mapping[str, Any], dict[str, bool]]] = {}
        for kind, names, name in _Search({*kinds}).lookups():
            _, found = looked_up.setdefault(id(names), (names, {}))
            if name not in found:
                found[name] = is_foreign_function(names.get(name))
            if found[name]:
                self.foreign.add(kind)
        self._unique: list[tuple[Callable[[Any], Any], Mapping[str, Any], Any]] = []
        self._others: list[tuple[Mapping[str, Any], str, Any]] = []
        self._absent: list[tuple[KeysView[str], frozenset[str]]] = []
        functions: dict[int, FunctionType] = {}
        for names, found in looked_up.values():
            values = {name: names[name] for name in found if name in names}
            functions |= {id(x): x for value in values.values() for x in _functions_in(value)}
            # What is equal to itself alone is compared at once, which takes a fraction of the time.
            unique = [name for name, x in values.items() if _is_unique(x)]
            if unique:
                get = operator.itemgetter(*unique)
                self._unique.append((get, names, get(names)))
            self._others += [(names, name, x) for name, x in values.items() if not _is_unique(x)]
            if found.keys() - values.keys():
                self._absent.append((names.keys(), frozenset(found.keys() - values.keys())))
        self._functions = list(functions.values())
        self._insides = [_inside(function) for function in self._functions]

    @classmethod
    def of(cls, kinds: Iterable[type]) -> FunctionWatch:
        """A watch over these classes; one that was made before, where nobody has replaced anything since."""
        every = frozenset(kinds)
        found = _WATCHES.get(every)
        if found is None or not found.holds():
            _WATCHES.pop(every, None)
            found = _WATCHES[every] = cls(every)
            for oldest in list(_WATCHES)[:-_MOST_WATCHES]:
                _WATCHES.pop(oldest, None)
        return found

    def holds(self) -> bool:
        """True while nobody has replaced anything."""
        try:
            for get, names, values in self._unique:
                if get(names) != values:
                    return False
            for names, name, value in self._others:
                if names[name] is not value:
                    return False
            for present, absent in self._absent:
                if not present.isdisjoint(absent):
                    return False
            # Tools that load a changed file again give the functions that are there other code.
            return list(map(_INSIDE, self._functions)) == self._insides
        except (KeyError, RuntimeError):  # defaults may be tensors, which are compared by their numbers
            return False


# By their classes, the newest last: finding what methods look up takes a hundred times as long as comparing it.
_WATCHES: dict[frozenset[type], FunctionWatch] = {}
_MOST_WATCHES = 8


def _is_unique(value: Any) -> bool:
    """Whether a value is equal to itself alone."""
    is_inherited = type(value).__eq__ is object.__eq__  # type: ignore[comparison-overlap]
    return is_inherited or isinstance(value, BuiltinFunctionType)


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """The functions in Python that a method, a property or a decorated function consists of."""
    function = getattr(value, "fget", None) or getattr(value, "__func__", value)
    while isinstance(function, FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


def _inside(function: FunctionType) -> tuple[Any, ...]:
    """A function's code and defaults, to be compared with later."""
    code, defaults, keyword_defaults = _INSIDE(function)
    return code, defaults, None if keyword_defaults is None else dict(keyword_defaults)


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


class _Search:
    """Finds what the methods of some classes look up by name, once they are called.

    A method is called where its name is looked up by another one, of any of the classes.
    """

    def __init__(self, kinds: set[type]) -> None:
        self._bases = {kind: [base for base in kind.__mro__[:-1] if base is not torch.nn.Module] for kind in kinds}
        self._names = {base: vars(base) for bases in self._bases.values() for base in bases}
        self._by_function: dict[int, tuple[list[_Lookup], list[FunctionType]]] = {}
        methods: dict[str, list[FunctionType]] = {}
        for own in self._names.values():
            for name, value in own.items():
                methods.setdefault(name, []).extend(_functions_in(value))
        self._called = {*_CALLS, *_IMPLICIT}
        functions = [function for name in self._called for function in methods.get(name, ())]
        known = set(map(id, functions))
        for function in functions:  # it grows on the way
            more = _names_in(function.__code__) - self._called
            self._called |= more
            found = [x for name in more for x in methods.get(name, ())] + self._looked_up_in(function)[1]
            functions += {id(x): x for x in found if id(x) not in known}.values()
            known.update(map(id, found))

    def lookups(self) -> Iterator[tuple[type, Mapping[str, Any], str]]:
        """Each class, the names of a module or class that its methods look into, and one that they look up there."""
        for kind, bases in self._bases.items():
            # Also where they are not there yet: somebody may give a class what it inherits.
            called = self._called.intersection(*[{name for base in bases for name in self._names[base]}]).union(_CALLS)
            own = [(self._names[base], name) for base in bases for name in called]
            yield from ((kind, names, name) for names, name in own)
            yield from ((kind, _OF_MODULES, name) for name in _CALLS)
            for function in self._closure(x for names, name in own for x in _functions_in(names.get(name))):
                yield from ((kind, names, name) for names, name in self._looked_up_in(function)[0])

    def _closure(self, functions: Iterable[FunctionType]) -> list[FunctionType]:
        """Functions, and those of libraries that they call, and so on."""
        found = {id(function): function for function in functions}
        every = list(found.values())
        for function in every:  # it grows on the way
            for called in self._looked_up_in(function)[1]:
                if id(called) not in found:
                    found[id(called)] = called
                    every.append(called)
        return every

    def _looked_up_in(self, function: FunctionType) -> tuple[list[_Lookup], list[FunctionType]]:
        """What the code of one function looks up, and the functions of libraries among that."""
        known = self._by_function.get(id(function))
        if known is None:
            lookups = list(_looked_up_in(function))
            called = [x for names, name in lookups for x in _functions_in(names.get(name)) if _is_librarys(x)]
            known = self._by_function[id(function)] = lookups, called
        return known


def _is_librarys(function: FunctionType) -> bool:
    """Whether what a function calls may be replaced too. Torch's own calls what is written in C."""
    return str(function.__module__).partition(".")[0] in KNOWN_PACKAGES - {"torch"}


def _looked_up_in(function: FunctionType) -> Iterator[_Lookup]:
    """What the code of one function looks up by name: in its module, in modules that it names, and of tensors."""
    called, scopes = _names_in(function.__code__), [function.__globals__]
    scopes += [vars(module) for module in _modules_imported_in(function.__code__, function.__globals__)]
    known = set(map(id, scopes))
    for names in scopes:  # it grows on the way
        for name in called & names.keys():
            yield names, name
            value = names[name]
            if isinstance(value, ModuleType) and _is_watched(value) and id(vars(value)) not in known:
                known.add(id(vars(value)))
                scopes.append(vars(value))
    for name in called & _TENSOR_METHODS | _OPERATORS:
        yield _OF_TENSORS, name
    if _ATTENTION_DISPATCHER in called:  # its backends are found in a table; ours calls torch's attention
        yield vars(torch.nn.functional), "scaled_dot_product_attention"


def _is_watched(module: ModuleType) -> bool:
    """Whether people may replace functions of a module that decide what others compute."""
    package = module.__name__.partition(".")[0]
    return package in KNOWN_PACKAGES or package in ("math", "numpy", "einops")


@functools.cache
def _names_in(code: CodeType) -> frozenset[str]:
    """The names that code looks up, also by ``getattr``, and those of functions that are defined in it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    texts = (constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier())
    return frozenset(code.co_names).union(texts, *map(_names_in, inner))


def _modules_imported_in(code: CodeType, names: Mapping[str, Any]) -> Iterator[ModuleType]:
    """The modules that a function imports when it is called."""
    package = str(names.get("__package__") or "")
    for level, name in _imports_in(code):
        path = importlib.util.resolve_name("." * level + name, package) if level else name
        module = sys.modules.get(path)
        if isinstance(module, ModuleType) and _is_watched(module):
            yield module


@functools.cache
def _imports_in(code: CodeType) -> tuple[tuple[int, str], ...]:
    """How many packages up, and the name, of each import in code and in the functions that are defined in it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    found = [one for function in inner for one in _imports_in(function)]
    if dis.opmap["IMPORT_NAME"] in code.co_code[::2]:
        instructions = list(dis.get_instructions(code))
        for place, instruction in enumerate(instructions):
            if instruction.opname == "IMPORT_NAME":  # the level and the names to import were loaded before
                found.append((int(instructions[place - 2].argval or 0), str(instruction.argval)))
    return tuple(found)


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
