"""Callbacks for a pipeline's steps that go wrong on one rank only. Ranks import them from here."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class RaiseOnRank:
    """Raises after the first step, on one rank."""

    rank: int

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if dist.get_rank() == self.rank:
            raise RuntimeError("an accident in the middle")
        return tensors


@dataclass(frozen=True)
class RaiseOnAllRanks:
    """Raises after the first step, on every rank."""

    error: type[Exception] = IndexError

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise self.error("an accident of all")


@dataclass(frozen=True)
class KillRank:
    """Kills the process of one rank after the first step."""

    rank: int

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if dist.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return tensors
