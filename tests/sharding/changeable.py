"""A block that uses everything that somebody may change between two calls, and the changes."""

from __future__ import annotations

import copy
import functools
import math
import random
from array import array
from collections import deque
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIMIT = 1.5
TABLE = {"factor": 1.0}
Undo = Callable[[], Any]


def scaled(x: Tensor, by: float = 1.5, *, and_by: float = 1.0) -> Tensor:
    return x * by * and_by


def imported_when_called(x: Tensor) -> Tensor:
    return x * 1.25


class Slotted:
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0


class Activation:
    """What is called, and is no module."""

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


class Parent(nn.Module):
    inherited_factor = 1.0

    def inherited(self, x: Tensor) -> Tensor:
        return x * 1.125


class Block(Parent):
    of_class = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.settings = [SimpleNamespace(factor=1.0)]
        self.nested: Any = {"a": [1.0, (2.0, {"b": 3.0})]}
        self.numbers = np.ones(2)
        self.bytes = array("d", [1.0])
        self.queue = deque([1.0])
        self.slotted = Slotted()
        self.activation = Activation()
        self.partial = functools.partial(scaled, by=1.0)
        self.tensor = torch.ones(())  # no buffer

    @property
    def of_property(self) -> float:
        return 1.0

    def forward(self, x: Tensor, other: Any, uses: str) -> Tensor:
        y: Tensor = self.layer(x)
        if uses == "attributes":
            y = y * self.of_class * self.inherited_factor * self.of_property * self.settings[0].factor
            y = y * self.nested["a"][1][1]["b"] * float(self.numbers[0]) * self.bytes[0] * self.queue[0]
            y = self.partial(self.activation(y * self.slotted.factor))
        elif uses == "number of a tensor":
            y = y * self.tensor.item()
        elif uses == "numpy's view of a tensor":
            y = y * float(np.from_dlpack(self.tensor))
        elif uses == "functions":
            from tests.sharding.changeable import imported_when_called

            y = self.inherited(imported_when_called(scaled(F.silu(y)))).clamp(-LIMIT, LIMIT) * math.sqrt(
                TABLE["factor"]
            )
            y = torch.tanh(y) + 1
        elif uses == "numbers":
            y = y + (torch.tensor([2.0**24 + 1] * 8) - 2**24).to(y.dtype)  # 0 in float32, 1 in float64
        elif uses == "python's random numbers":
            y = y * random.random()
        elif uses == "numpy's random numbers":
            y = y * np.random.random()
        elif uses == "a list":
            other.append(float(len(other)))
            y = y * other[-1]
        elif uses == "a dict":
            y = y * other.pop("factor", 1.0)
        elif uses == "training":
            y = F.dropout(y, 1.0, self.training)
        elif uses == "a complex tensor":
            y = y + (other * (1 + 2j)).real
        elif uses == "a mask":
            y = y * 2 if bool(other.all()) else y
        elif uses == "a place in memory":
            y = y + other.as_strided((8,), (1,), other.storage_offset())
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, other: Any, uses: str) -> Any:
        for block in self.blocks:
            x = block(x, other, uses)
        return x


def put(owner: Any, name: str, value: Any) -> Undo:
    """Set an attribute. Returns what undoes it."""
    if name in vars(owner) or isinstance(owner, FunctionType):
        before = vars(owner).get(name, getattr(owner, name, None))
        setattr(owner, name, value)
        return lambda: setattr(owner, name, before)
    setattr(owner, name, value)
    return lambda: delattr(owner, name)


def in_place(held: Any, key: Any, value: Any) -> Undo:
    """Set an item. Returns what undoes it."""
    before = copy.copy(held[key])
    held[key] = value
    return lambda: held.__setitem__(key, before)


def louder(function: Any) -> Any:
    return lambda *args, **kwargs: 1.5 * function(*args, **kwargs)


def wide_numbers() -> Undo:
    torch.set_default_dtype(torch.float64)
    return lambda: torch.set_default_dtype(torch.float32)


def new_weights(model: Any) -> None:
    model.load_state_dict({name: x.flip(0) for name, x in model.state_dict().items()}, assign=True)


def parametrized(model: Any) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    nn.utils.parametrize.register_parametrization(model.blocks[1].layer, "weight", Double())


def normalized(block: Any) -> None:
    nn.utils.parametrizations.weight_norm(block.layer)
    block.layer.parametrizations.weight.original0.data.fill_(3.0)


def by_data(model: Any) -> None:
    weight = model.blocks[1].layer.weight
    weight.data = weight.data.T.contiguous().T * 2


def changes() -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """What the block uses, and the change to a model: its result undoes it, where it is more than the model's."""
    from tests.sharding import changeable

    def of_block(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda model: change(model.blocks[1])

    attributes: dict[str, Callable[[Any], Any]] = {
        "attribute of a class": lambda _: put(Block, "of_class", 2.0),
        "attribute of a parent": lambda _: put(Parent, "inherited_factor", 2.0),
        "attribute in place of a parent's": lambda _: put(Block, "inherited_factor", 2.0),
        "attribute of an instance": of_block(lambda block: put(block, "of_class", 2.0)),
        "property": lambda _: put(Block, "of_property", property(lambda _: 2.0)),
        "object in a list": of_block(lambda block: put(block.settings[0], "factor", 2.0)),
        "dict in a tuple": of_block(lambda block: in_place(block.nested["a"][1][1], "b", 4.0)),
        "array of numpy": of_block(lambda block: in_place(block.numbers, 0, 2.0)),
        "array": of_block(lambda block: in_place(block.bytes, 0, 2.0)),
        "deque": of_block(lambda block: in_place(block.queue, 0, 2.0)),
        "slot": of_block(lambda block: setattr(block.slotted, "factor", 2.0)),
        "object that is called": of_block(lambda block: put(block.activation, "factor", 2.0)),
        "argument of a partial": of_block(lambda block: in_place(block.partial.keywords, "by", 2.0)),
        "weights assigned": new_weights,
        "weights of another layout": by_data,
        "parametrization": parametrized,
        "weight_norm": of_block(normalized),
        "module": of_block(lambda block: setattr(block, "layer", nn.Sequential(block.layer, nn.Tanh()))),
    }
    functions: dict[str, Callable[[Any], Any]] = {
        "function of a module": lambda _: put(changeable, "scaled", louder(scaled)),
        "default": lambda _: put(scaled, "__defaults__", (3.0,)),
        "keyword default": lambda _: put(scaled, "__kwdefaults__", {"and_by": 3.0}),
        "code": lambda _: put(scaled, "__code__", (lambda x, by=1.5, *, and_by=1.0: x * by * 4).__code__),
        "function imported when called": lambda _: put(
            changeable, "imported_when_called", louder(imported_when_called)
        ),
        "function of torch.nn.functional": lambda _: put(F, "silu", louder(F.silu)),
        "function of torch": lambda _: put(torch, "tanh", louder(torch.tanh)),
        "function of math": lambda _: put(math, "sqrt", louder(math.sqrt)),
        "method of tensors": lambda _: put(Tensor, "clamp", louder(Tensor.clamp)),
        "operator of tensors": lambda _: put(Tensor, "__add__", louder(Tensor.__add__)),
        "method of a parent": lambda _: put(Parent, "inherited", louder(Parent.inherited)),
        "method in place of a parent's": lambda _: put(Block, "inherited", louder(Parent.inherited)),
        "method of an instance": of_block(lambda block: put(block, "inherited", louder(block.inherited))),
        "global": lambda _: put(changeable, "LIMIT", 0.25),
    }
    tensors: dict[str, Callable[[Any], Any]] = {
        "in place": of_block(lambda block: in_place(block.tensor, (), 2.0)),
        "by its data": of_block(lambda block: in_place(block.tensor.data, (), 2.0)),
        "replaced": of_block(lambda block: put(block, "tensor", torch.full((), 2.0))),
    }
    return {
        **{name: ("attributes", change) for name, change in attributes.items()},
        **{name: ("functions", change) for name, change in functions.items()},
        **{f"tensor {name}": ("number of a tensor", change) for name, change in tensors.items()},
        "tensor by numpy": ("numpy's view of a tensor", tensors["in place"]),
        "default dtype": ("numbers", lambda _: wide_numbers()),
        "training": ("training", lambda model: model.train() and None),
    }
