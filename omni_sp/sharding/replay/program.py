"""A recorded graph as a Python function that calls nothing but its operations."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_BINDINGS = {
    name: getattr(torch, name)
    for name in (
        "add", "sub", "mul", "div", "cat", "stack", "split", "chunk", "unbind", "transpose", "permute", "unsqueeze",
        "squeeze", "reshape", "flatten", "matmul", "mm", "bmm", "addmm", "sigmoid", "tanh", "neg", "rsqrt", "pow",
        "layer_norm", "rms_norm", "narrow", "select", "index_select", "clone", "mean", "sum", "relu", "unflatten",
        "view_as_complex", "view_as_real",
    )
} | {
    "view": torch.Tensor.view,
    "view_as": torch.Tensor.view_as,
    "expand": torch.Tensor.expand,
    "contiguous": torch.Tensor.contiguous,
    "linear": torch._C._nn.linear,
    "gelu": torch._C._nn.gelu,
    "silu": torch._C._nn.silu,
}  # fmt: skip
"""torch's own Python functions of these operators. They do the same, and are quicker to call than an overload."""


def as_function(graph: fx.Graph) -> Callable[..., tuple[Any, ...]]:
    """The graph as a function of its inputs; its operators are replaced by their bindings.

    torch's own generator does the same, and takes several times as long to write a program that looks its operators up
    by name at every call. As there, a tensor is let go after its last use.
    """
    writer, nodes = _Writer(), list(graph.nodes)
    last_users: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "call_function":
            node.target = _binding_of(node.target)
        last_users.update(dict.fromkeys(node.all_input_nodes, node))
    unused_after: dict[fx.Node, list[str]] = {}
    for node, user in last_users.items():
        unused_after.setdefault(user, []).append(writer.name_of(node))
    inputs = [writer.name_of(node) for node in nodes if node.op == "placeholder"]
    lines = [f"def forward({', '.join(inputs)}):"]
    for node in nodes:
        if node.op == "output":
            lines.append(f" return {writer.write(node.args[0])}")
        elif node.op == "call_function":
            kept = f"{writer.name_of(node)} = " if node.users else ""
            done = "".join(f"; {name} = None" for name in unused_after.get(node, ()))
            lines.append(f" {kept}{writer.call(node)}{done}")
    exec(compile("\n".join(lines), "<a recorded block>", "exec"), writer.values)
    function: Callable[..., tuple[Any, ...]] = writer.values["forward"]
    return function


class _Writer:
    """Writes expressions.

    Attributes:
        values: by name, what an expression uses and what is no literal.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._names: dict[fx.Node, str] = {}
        self._names_of_values: dict[int, str] = {}

    def name_of(self, node: fx.Node) -> str:
        return self._names.setdefault(node, f"x{len(self._names)}")

    def call(self, node: fx.Node) -> str:
        if node.target is operator.getitem:
            of, index = node.args
            return f"{self.write(of)}[{self.write(index)}]"
        arguments = [self.write(x) for x in node.args]
        arguments += [f"{name}={self.write(x)}" for name, x in node.kwargs.items()]
        return f"{self._value(_callable(node.target))}({', '.join(arguments)})"

    def write(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.name_of(value)
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self.write, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(self.write(x) + ', ' for x in value)})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{name!r}: {self.write(x)}' for name, x in value.items())}}}"
        return self._value(value)

    def _value(self, value: Any) -> str:
        """The name of a value, which ``values`` keeps: no other can get its identity."""
        name = self._names_of_values.setdefault(id(value), f"v{len(self._names_of_values)}")
        self.values[name] = value
        return name


def _binding_of(target: Any) -> Any:
    packet = getattr(target, "overloadpacket", None)
    if packet is None or not str(packet).startswith("aten."):
        return target
    return _BINDINGS.get(packet.__name__, target)


def _callable(target: Any) -> Any:
    """What to call for a node; an overload is a Python object around a function that is written in C."""
    return target._op if isinstance(target, torch._ops.OpOverload) else target
