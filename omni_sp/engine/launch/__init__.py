"""How rank processes come to be: started here (spawn), or already there (torchrun).

A launcher of another kind needs no more than ``Launcher`` and ``RankProcess``.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Protocol


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

    def start(self, rank: int) -> RankProcess:
        """Start one rank; it says nothing until it has had its RankSettings."""

    def front_pid(self) -> int:
        """The process whose death must end the ranks; 0 where they cannot watch it."""


__all__ = ["Launcher", "RankProcess"]
