"""The vocabulary of plans: which tensors of which modules are cut into pieces, and which are joined again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from omni_sp.errors import UnsupportedModelError


@dataclass(frozen=True)
class Split:
    """Keep this rank's piece of a tensor (or of each tensor in a list).

    Attributes:
        dim: the dim of the tokens; negative counts from the end.
        ndim: the number of dims that the tensor must have; None takes any.
        replicate_if_ndim_differs: with another number of dims the tensor has no token dim and stays whole. Without
            this, another number of dims is an error.
    """

    dim: int
    ndim: int | None = None
    replicate_if_ndim_differs: bool = False


@dataclass(frozen=True)
class Gather:
    """Join the pieces of a tensor along ``dim``; every rank gets the whole."""

    dim: int


@dataclass(frozen=True)
class ModulePlan:
    """What happens at one module.

    Attributes:
        inputs: parameter name of its ``forward`` -> Split.
        outputs: index of its output (0 where it returns one tensor) -> Split or Gather.
    """

    inputs: Mapping[str, Split] = field(default_factory=dict)
    outputs: Mapping[int, Split | Gather] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardingPlan:
    """A transformer's plan.

    Attributes:
        modules: module path -> ModulePlan; "" is the transformer itself, and a component ``*`` stands for any one name,
            as in ``blocks.*``.
        replicated_keys: paths (with ``*``) of attentions whose keys every rank holds whole, such as cross-attention
            to text that is not cut. They need no exchange. That the keys are the same on all ranks is looked at on
            the first forward of each shape.
    """

    modules: Mapping[str, ModulePlan]
    replicated_keys: tuple[str, ...] = ()

    def with_inputs(self, path: str, *, inputs: Mapping[str, Split]) -> ShardingPlan:
        """This plan with further (or replaced) inputs at one module."""
        before = self.modules.get(path, ModulePlan())
        changed = dataclasses.replace(before, inputs={**before.inputs, **inputs})
        return dataclasses.replace(self, modules={**self.modules, path: changed})


@dataclass(frozen=True)
class TrackedPlan:
    """Where a transformer's rows of tokens begin; what becomes of the pieces is followed through its own code.

    Attributes:
        cuts: module path (with ``*``) -> parameter name of its ``forward`` -> Split. What is in pieces already stays
            so, and everything else stays whole until it meets a piece. What is cut decides how fast a model is, never
            whether it is exact.
    """

    cuts: Mapping[str, Mapping[str, Split]]


def matches(pattern: str, path: str) -> bool:
    """True where ``path`` is what ``pattern`` says; ``*`` stands for exactly one component."""
    wanted, found = pattern.split("."), path.split(".")
    return len(wanted) == len(found) and all(w in ("*", f) for w, f in zip(wanted, found, strict=True))


def from_diffusers(cp_plan: Mapping[str, Any]) -> ShardingPlan:
    """A model's own ``_cp_plan`` in this vocabulary.

    Raises:
        UnsupportedModelError: it holds something that this vocabulary cannot say.
    """
    return ShardingPlan(modules=MappingProxyType({path: _module_plan(path, entry) for path, entry in cp_plan.items()}))


def _module_plan(path: str, entry: Any) -> ModulePlan:
    """One entry: a dict of splits, or a gather (or a list of them) of the outputs."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    if isinstance(entry, Mapping):
        inputs: dict[str, Split] = {}
        outputs: dict[int, Split | Gather] = {}
        for name, value in entry.items():
            # A list says the same for each tensor of a list, which is what Split does with a list anyway.
            alternatives = list(value) if isinstance(value, (list, tuple)) else [value]
            if len(set(alternatives)) != 1 or not isinstance(alternatives[0], ContextParallelInput):
                raise UnsupportedModelError(f"_cp_plan entry {path!r}.{name!r}: cannot take {value!r}")
            split = Split(alternatives[0].split_dim, alternatives[0].expected_dims)
            if alternatives[0].split_output:
                outputs[int(name)] = split
            else:
                inputs[str(name)] = split
        return ModulePlan(inputs, outputs)
    gathers = list(entry) if isinstance(entry, (list, tuple)) else [entry]
    if not all(gather is None or isinstance(gather, ContextParallelOutput) for gather in gathers):
        raise UnsupportedModelError(f"_cp_plan entry {path!r}: cannot take {entry!r}")
    return ModulePlan(outputs={i: Gather(gather.gather_dim) for i, gather in enumerate(gathers) if gather is not None})
