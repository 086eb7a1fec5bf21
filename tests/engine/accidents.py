"""Callbacks for a pipeline's steps that go wrong on one rank only. Ranks import them from here."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from omni_sp.pipelines import branches


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


@dataclass(frozen=True)
class AccidentIn:
    """On one rank, kills its process in a later stage, or raises in its next branch of guidance.

    Attributes:
        stage: "exchange" of the branches, "decode", "encode" of the next call, in the encoder that this rank runs for
            all, or "branch", which raises.
    """

    rank: int
    stage: str

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if dist.get_rank() != self.rank or step:
            return tensors

        def kill(*_args: Any, **_kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

        def fail(*_args: Any, **_kwargs: Any) -> Any:
            del pipe.transformer._call_impl
            raise ValueError("there is no such branch")

        if self.stage == "exchange":
            vars(branches)["exchange_results"] = kill
        elif self.stage == "branch":
            pipe.transformer._call_impl = fail
        elif self.stage == "encode":
            pipe.text_encoder._call_impl = kill
        else:
            pipe.vae.decode = kill
        return tensors
