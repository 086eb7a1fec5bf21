"""Where the token streams of a transformer begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Keep this rank's shard of a tensor (or of each tensor in a list).

    Attributes:
        dim: the dim of the tokens; a negative one counts from the end.
        ndim: the number of dims of a tensor that has tokens; one with another number stays replicated. None takes any.
    """

    dim: int
    ndim: int | None = None


@dataclass(frozen=True)
class Plan:
    """Where a transformer's token streams begin; from there the sharded tensors are tracked through its own code.

    Attributes:
        inputs: module path (with ``*``) -> parameter name of its ``forward`` -> Split. "" is the transformer itself,
            and a component ``*`` stands for any one name, as in ``blocks.*``. The parameter "" is the first argument of
            a call, whatever its name. A tensor that is sharded already stays as
            it is, and every other tensor stays replicated until it meets a sharded one. The choice decides how fast a
            model is, never whether it is exact.
    """

    inputs: Mapping[str, Mapping[str, Split]]


def matches(pattern: str, path: str) -> bool:
    """True where ``path`` matches ``pattern``; ``*`` stands for exactly one component."""
    expected, actual = pattern.split("."), path.split(".")
    return len(expected) == len(actual) and all(e in ("*", a) for e, a in zip(expected, actual, strict=True))
