"""Ranks that do what the doctor asks: processes that the engine starts, on the devices that an engine would use."""

from __future__ import annotations

import pickle
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from omni_sp.engine.devices import set_threads
from omni_sp.engine.messages import EngineOptions, Failed, Join, Loaded, RankExited, RankSettings, Stop
from omni_sp.engine.ranks.failures import as_message, raise_for, wait_after_failure_s
from omni_sp.engine.ranks.processes import RankProcesses
from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.engine.worker import Aborted, Inbox, Report, join_ranks, run_rank
from omni_sp.errors import RankFailedError

if TYPE_CHECKING:
    import torch

    from omni_sp.mesh import ParallelMesh

_LEAVE_S = 2.0


@dataclass(frozen=True)
class Rank:
    """What a function that runs on a rank gets first.

    Attributes:
        mesh: all ranks.
        device: this rank's.
        options: of the engine that they would be.
    """

    mesh: ParallelMesh
    device: torch.device
    options: EngineOptions


@dataclass(frozen=True)
class _Job:
    """Front -> ranks: call a function of a module's top level, as ``function(rank, *arguments)``."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Answer:
    """Rank -> front: what the function returned; of the first one, that the ranks have joined."""

    value: Any


class DoctorRanks:
    """Rank processes, started and joined.

    Args:
        options: the degrees and devices; the model is loaded where a function asks for it.
        timeout_s: seconds that each wait takes at the most.

    Raises:
        ConfigError: there are too few GPUs.
        RankFailedError: a rank raised, died, or said nothing in time.
    """

    def __init__(self, options: EngineOptions, timeout_s: float) -> None:
        self.size = options.config.world_size
        self._timeout_s = timeout_s
        self._processes = RankProcesses(options, SpawnLauncher(__name__, "rank_main"))
        try:
            self._collect(Loaded)
            self._processes.send(pickle.dumps(Join()))
            self._collect(_Answer)
        except BaseException:
            self.close()
            raise

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(rank, *arguments)`` on every rank.

        Args:
            function: of a module's top level.
            *arguments: further ones, the same for all ranks.

        Returns:
            What each rank returned, in order.

        Raises:
            RankFailedError: a rank raised, died, or did not answer in time; the ranks are of no use any more.
        """
        self._processes.send(pickle.dumps(_Job(function, arguments)))
        return [answer.value for answer in self._collect(_Answer)]

    def close(self, patience_s: float = 0.0) -> None:
        """End the processes, after so many seconds in which they may leave by themselves. Idempotent."""
        self._processes.end(patience_s)

    def __enter__(self) -> DoctorRanks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(_LEAVE_S if kind is None else 0.0)

    def _collect(self, kind: type) -> list[Any]:
        """One message of a kind from each rank, or the error that their failures amount to."""
        answers: dict[int, Any] = {}
        failures: dict[int, Failed | RankExited] = {}
        until = time.monotonic() + self._timeout_s
        while len(answers) + len(failures) < self.size:
            heard = self._processes.listen(until)
            if not heard:
                break
            for rank, message in heard:
                if isinstance(message, kind):
                    answers[rank] = message
                else:
                    failures[rank] = message
                    # The others may wait for this rank in an exchange.
                    until = min(until, time.monotonic() + wait_after_failure_s(message))
        if failures:
            raise_for(failures, self.size, independent=True)
        if silent := {*range(self.size)} - set(answers):
            raise RankFailedError(
                f"no word from rank {', '.join(map(str, sorted(silent)))} for {self._timeout_s:g} s",
                rank=min(silent),
                kind="silent",
            )
        return [answers[rank] for rank in range(self.size)]


def rank_main(connection: Connection) -> None:
    """Run one rank until the front says Stop or is gone."""
    run_rank(connection, _serve)


def _serve(settings: RankSettings, inbox: Inbox, _aborted: Aborted, report: Report) -> None:
    """Join the others, and do one job after the other until Stop."""
    import torch

    if settings.rank > 0:
        warnings.simplefilter("ignore")
    set_threads(settings.placement.num_threads)
    device = torch.device(settings.placement.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    report(Loaded())
    if isinstance(inbox.get(), Stop):
        return
    rank = Rank(join_ranks(settings), device, settings.options)
    report(_Answer(None))
    while not isinstance(job := inbox.get(), Stop):
        try:
            if isinstance(job, Exception):
                raise job
            report(_Answer(job.function(rank, *job.arguments)))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            report(as_message(error))
