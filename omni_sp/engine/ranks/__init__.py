"""How rank processes come to be: started on this machine (spawn), or by the processes that torchrun started (carried).

A launcher of another kind needs no more than ``Launcher`` and ``RankProcess``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from omni_sp.config import DiffusionParallelConfig

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class RankPlacement:
    """Where a rank runs.

    Attributes:
        machine: its name. device: the rank's own, such as "cuda:1".
        num_threads: for the CPU's kernels; 0 leaves torch's choice.
        guardian: the process there whose death must end the rank; 0 where the rank cannot watch it.
    """

    host: str
    device: str
    num_threads: int
    parent_pid: int


class RankProcess(Protocol):
    """One rank's process as the front sees it."""

    @property
    def connection(self) -> Connection:
        """The front's end of the pipe to this rank. End of file means that the rank is gone."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def wait(self, timeout_s: float) -> int | None:
        """Wait so long at most for its end; then as poll()."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


class Launcher(Protocol):
    """Starts rank processes; each runs ``omni_sp.engine.worker.rank_main`` on its end of a pipe."""

    @property
    def rendezvous_host(self) -> str:
        """The address of the front's machine at which all ranks reach it; LOOPBACK where all are on that machine."""

    def placements(self, config: DiffusionParallelConfig, device: str | None) -> Sequence[RankPlacement]:
        """Where the ranks will run, in rank order; ``device`` as the user gave it.

        Raises:
            ConfigError: there are too few GPUs, or too few processes to carry them.
        """

    def start(self, rank: int) -> RankProcess:
        """Start one rank; it says nothing until it has had its RankSettings. Also again, after it has ended."""

    def close(self) -> None:
        """No rank will be started again. Idempotent."""


__all__ = ["LOOPBACK", "Launcher", "RankPlacement", "RankProcess"]
