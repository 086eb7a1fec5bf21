"""One pipeline of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from tests.library_versions import TRANSFORMERS, has


@dataclass(frozen=True)
class PipelineEntry:
    """A way to call one pipeline.

    Attributes:
        name: of the pipeline's class. variant: tells several entries of one class apart.
        build: the pipeline, of tiny components whose weights are random and the same on every rank.
        arguments: keyword arguments of one call, without generator, output_type (it is "pt" unless given) and
            num_inference_steps (it is 3 unless given).
        error: the most that the finished picture may be off, relative. Later steps and the VAE amplify the rounding of
            the first step; where that needs more than the default, the reason stands beside it.
        transformers: the first version of transformers that has what the pipeline imports.
    """

    name: str
    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    variant: str = ""
    error: float = 1e-5
    transformers: str = "0"

    @property
    def id(self) -> str:
        """For people."""
        return f"{self.name}, {self.variant}" if self.variant else self.name

    @property
    def runs_here(self) -> bool:
        """Whether the installed diffusers and transformers can run it."""
        return has(self.name) and Version(self.transformers) <= TRANSFORMERS
