"""What plans are made of: which tensors of which modules are sharded, and which are gathered again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from omni_sp.errors import UnsupportedModelError


@dataclass(frozen=True)
class Split:
    """Keep this rank's shard of a tensor (or of each tensor in a list).

    Attributes:
        dim: the dim of the tokens; a negative one counts from the end.
        ndim: the number of dims that the tensor must have; None takes any.
        replicate_if_ndim_differs: a tensor with another number of dims has no token dim and stays replicated. Where
            this is False, another number of dims is an error.
    """

    dim: int
    ndim: int | None = None
    replicate_if_ndim_differs: bool = False


@dataclass(frozen=True)
class Gather:
    """Gather the shards of a tensor along ``dim``; every rank gets the full tensor.

    Attributes:
        dim: the dim of the tokens; a negative one counts from the end.
    """

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
    """Where the token streams of a transformer are split, and where they are gathered.

    Attributes:
        modules: module path -> ModulePlan; "" is the transformer itself, and a component ``*`` stands for any one name,
            as in ``blocks.*``.
        replicated_keys: paths (with ``*``) of attentions whose keys are replicated, such as cross-attention to a text
            that is not split. They need no exchange. The first forward of each shape checks that the keys are the same
            on all ranks.
    """

    modules: Mapping[str, ModulePlan]
    replicated_keys: tuple[str, ...] = ()

    def with_inputs(self, path: str, *, inputs: Mapping[str, Split]) -> ShardingPlan:
        """Add (or replace) inputs at one module.

        Args:
            path: the module's path, a key of ``modules`` or a new one.
            inputs: parameter name of its ``forward`` -> Split.

        Returns:
            A new plan.
        """
        before = self.modules.get(path, ModulePlan())
        changed = dataclasses.replace(before, inputs={**before.inputs, **inputs})
        return dataclasses.replace(self, modules={**self.modules, path: changed})


@dataclass(frozen=True)
class TrackedPlan:
    """Where a transformer's token streams begin; from there the sharded tensors are tracked through its own code.

    Attributes:
        inputs: module path (with ``*``) -> parameter name of its ``forward`` -> Split. A tensor that is sharded already
            stays as it is, and every other tensor stays replicated until it meets a sharded one. The choice decides
            how fast a model is, never whether it is exact.
    """

    inputs: Mapping[str, Mapping[str, Split]]


def matches(pattern: str, path: str) -> bool:
    """True where ``path`` matches ``pattern``; ``*`` stands for exactly one component."""
    expected, actual = pattern.split("."), path.split(".")
    return len(expected) == len(actual) and all(e in ("*", a) for e, a in zip(expected, actual, strict=True))


def from_diffusers(cp_plan: Mapping[str, Any]) -> ShardingPlan:
    """The ``_cp_plan`` of a diffusers model as a ShardingPlan.

    Raises:
        UnsupportedModelError: the ``_cp_plan`` holds something that a ShardingPlan cannot express.
    """
    return ShardingPlan(modules=MappingProxyType({path: _module_plan(path, entry) for path, entry in cp_plan.items()}))


def _module_plan(path: str, entry: Any) -> ModulePlan:
    """One entry of a ``_cp_plan``: a dict of splits, or a gather (or a list of them) of the outputs."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    if isinstance(entry, Mapping):
        inputs: dict[str, Split] = {}
        outputs: dict[int, Split | Gather] = {}
        for name, value in entry.items():
            # A list holds one split for each tensor of a list, all alike: Split treats a list of tensors the same way.
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
