"""One transformer class of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version

from tests.library_versions import DIFFUSERS, has

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A way to run one class.

    Attributes:
        name: name of the class.
        build: makes a tiny model, whose weights the caller randomises.
        inputs: makes the arguments of one forward, by name.
        variant: distinguishes several entries of one class.
        error: the most that it may be off, relative: more than float32's rounding where the model's own code rounds to
            bfloat16 on the way, which another order of additions can tip over.
        since: the first version of diffusers whose class can run it.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[], Inputs]
    variant: str = ""
    error: float = 1e-5
    since: str = "0"

    @property
    def id(self) -> str:
        """For people."""
        return f"{self.name}, {self.variant}" if self.variant else self.name

    @property
    def runs_here(self) -> bool:
        """Whether the installed diffusers can run it."""
        return has(self.name) and Version(self.since) <= DIFFUSERS


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal numbers, the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def key_mask(lengths: tuple[int, ...], tokens: int) -> torch.Tensor:
    """(batch, tokens) bool: the first ``lengths[i]`` tokens of each sample are valid."""
    return torch.stack([torch.arange(tokens) < length for length in lengths])
