"""What an engine knows of its ranks (RankGroup), and how rank processes are started (Launcher, RankProcess).

A group is this process itself (``local``) or processes of their own (``remote``), which a launcher starts on this
machine (``spawn``, ``fork``) or through agents elsewhere (``agents``): the processes of a torchrun job
(``torchrun_supervised``), or actors on a Ray cluster (``ray``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Protocol

from omni_sp.config import DiffusionParallelConfig
from omni_sp.engine.messages import Call, Done, OnProgress, RankPlacement, Ready
from omni_sp.engine.startup import Startup

LOOPBACK = "127.0.0.1"
OUT_OF_REACH = 1000
"""In place of an exit code, which no process can have: the machine is gone, or whoever watched the rank there."""
OnWait = Callable[[str], None]
"""Called with what is waited for, several times a second. It may raise, to give up."""


class RankGroup(Protocol):
    """The ranks of one engine, wherever they run. Calls come one at a time; abort() and end() come from any thread."""

    @property
    def is_main(self) -> bool:
        """True in the one process that shows progress to people."""

    def start(self, startup: Startup, is_cancelled: Callable[[], bool]) -> Ready:
        """Load the model on the ranks, reporting to ``startup``; ``is_cancelled`` says whether to give up meanwhile."""

    def run(self, call: Call, on_progress: OnProgress | None, is_aborted: Callable[[], bool]) -> Done:
        """Run one call on all ranks; ``is_aborted``, asked now and then, says whether to abort() it.

        Raises:
            InvalidInputError: the pipeline refused the call, on all ranks alike.
            RequestAbortedError: the call was aborted.
            ShardingError: the ranks make different calls.
            CallFailedError: all ranks raised alike, and stand ready for the next call.
            RankFailedError: a rank raised by itself, died, or fell silent.
        """

    def abort(self, request_id: str) -> None:
        """Have the ranks leave a call before its next step; run() then raises RequestAbortedError."""

    def require_alive(self) -> None:
        """Between two calls, raise RankFailedError where a rank has ended."""

    def broadcast(self, number: int) -> int:
        """The number that the first rank gives, on every rank of the program."""

    @property
    def can_start_again(self) -> bool:
        """Whether other ranks can take the place of ranks that have failed, without a new program."""

    def survives(self, error: BaseException) -> bool:
        """Whether the ranks stand ready for the next call after run() raised this error."""

    def end(self, patience_s: float = 0.0) -> None:
        """End the ranks, after so many seconds in which they may leave by themselves. Idempotent."""


class RankProcess(Protocol):
    """One rank's process as the front sees it."""

    @property
    def connection(self) -> Connection:
        """The front's end of the pipe to this rank. End of file means that the rank is gone."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def wait(self, timeout_s: float) -> int | None:
        """Wait so long at most for its end. Returns what poll() returns then."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


class Launcher(Protocol):
    """Starts rank processes; each runs ``omni_sp.engine.worker.rank_main`` on its end of a pipe."""

    @property
    def rendezvous_host(self) -> str:
        """The address of the front's machine at which all ranks reach it; LOOPBACK where all are on that machine."""

    def placements(
        self, config: DiffusionParallelConfig, device: str | None, on_wait: OnWait
    ) -> Sequence[RankPlacement]:
        """Where the ranks will run, in rank order; ``device`` is what the user gave. Also again, after ranks failed.

        Raises:
            ConfigError: there are too few GPUs, or too few machines or processes to start ranks from.
        """

    def start(self, rank: int) -> RankProcess:
        """Start one rank; it sends nothing until it has its RankSettings. Also again, after it has ended."""

    def close(self) -> None:
        """No rank will be started again. Idempotent."""


__all__ = ["LOOPBACK", "OUT_OF_REACH", "Launcher", "OnWait", "RankGroup", "RankProcess"]
