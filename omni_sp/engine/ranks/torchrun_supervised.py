"""Rank processes under torchrun, on one machine or several, that a front can start again.

Each process that torchrun started is the agent of one rank (see agents.py). The process of rank 0 also holds the front,
which tells the other agents what to do; its own rank is a child of it. With replicas the job has a process for each of
their ranks.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from typing_extensions import override

from omni_sp.config import DiffusionParallelConfig
from omni_sp.engine.devices import joined_device, threads_per_rank
from omni_sp.engine.messages import RankPlacement
from omni_sp.engine.ranks import LOOPBACK, Launcher, OnWait, RankProcess
from omni_sp.engine.ranks.addresses import address_towards
from omni_sp.engine.ranks.agents import CUT_OFF_S, Agents, run_agent
from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.engine.ranks.torchrun import job_around, job_rank, rendezvous, require_job_of
from omni_sp.errors import ConfigError, RankFailedError

GATHER_S = 300.0
"""How long the processes of a job may take to find each other."""
_KEY = "omni_sp/front"


def require_supervised_job_of(config: DiffusionParallelConfig) -> None:
    """Refuse a job of another size, or one that has process groups of its own, on each of its processes alike.

    Raises:
        ConfigError: the job has another number of processes than the degrees need, or the program uses
            torch.distributed itself.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        raise ConfigError(
            "torch.distributed is initialised in this program already, and AsyncOmni starts ranks of its own: leave "
            "that to it, or use Omni, which joins this program's ranks"
        )
    require_job_of(config)


class TorchrunAgents:
    """The agents of a torchrun job, as the process of rank 0 has them: one for each rank of all replicas but its own.

    They are looked for when a replica starts first. An agent's number is its process's rank in the job.
    """

    def __init__(self, config: DiffusionParallelConfig) -> None:
        self.host, bound = _addresses()
        self.agents = Agents(self.host, bound)
        self._others = range(1, config.num_processes)
        self._lock = threading.Lock()
        self._store: Any = None
        self._is_complete = False

    def gather(self, on_wait: OnWait) -> None:
        """Wait until all are there.

        Raises:
            ConfigError: some are not there in time.
        """
        with self._lock:
            if self._is_complete:
                return
            on_wait("looking for the other processes of the job")
            if self._store is None:
                self._store = rendezvous(GATHER_S)
                self._store.set(_KEY, pickle.dumps(self.agents.address))
            missing = self.agents.missing(
                self._others, GATHER_S, lambda: on_wait("waiting for the other processes of the job")
            )
            if missing:
                ranks = ", ".join(map(str, missing))
                raise ConfigError(f"no word from the processes of ranks {ranks} of the job in {GATHER_S:g} s")
            # All have read it. A second front of this job must not be looked for at this address.
            self._store.delete_key(_KEY)
            self._is_complete = True


class TorchrunLauncher(Launcher):
    """The front's side, in the process of rank 0. The first rank of the first replica is a plain child of it.

    Args:
        job: the agents of all replicas.
        replica: which of the replicas its ranks are of.
    """

    def __init__(self, job: TorchrunAgents, replica: int = 0) -> None:
        self._job, self._replica = job, replica
        self._own = SpawnLauncher(thread_stays=True)
        self._first = 0

    @property
    @override
    def rendezvous_host(self) -> str:
        return self._job.host

    @override
    def placements(self, config: DiffusionParallelConfig, device: str | None, on_wait: OnWait) -> list[RankPlacement]:
        self._job.gather(on_wait)
        self._first = self._replica * config.world_size
        processes = range(self._first, self._first + config.world_size)
        if lost := self._job.agents.lost(processes):
            ranks = ", ".join(map(str, lost))
            raise ConfigError(f"out of reach or gone: the job's process of rank {ranks}; start the job anew")
        own = self._own.parent_pid()
        return [
            self._job.agents.placement(number) if number else placement_here(config, device, parent_pid=own)
            for number in processes
        ]

    @override
    def start(self, rank: int) -> RankProcess:
        process = self._first + rank
        return self._job.agents.start(process, rank) if process else self._own.start(rank)

    @override
    def close(self) -> None:
        self._job.agents.close()


def torchrun_launchers(config: DiffusionParallelConfig) -> list[TorchrunLauncher]:
    """What starts the ranks of each replica, in the process of rank 0."""
    job = TorchrunAgents(config)
    return [TorchrunLauncher(job, replica) for replica in range(config.data_parallel_size)]


def supervise_rank(config: DiffusionParallelConfig, device: str | None) -> None:
    """Start, signal and watch this process's rank until the front is gone.

    It is called in the main thread, in all processes but that of rank 0. Signals that ask to end are left to the front,
    which disconnects the agents once it has finished what runs.

    Raises:
        ConfigError: no front was found in time.
        RankFailedError: the front did not end in order: its process, its machine or the network is gone. A process that
            ends with an error has torchrun end at once, and not wait for the other machines.
    """
    store = rendezvous(GATHER_S)
    try:
        store.wait([_KEY], timedelta(seconds=GATHER_S))
    except Exception as error:
        raise ConfigError(f"no word from the process of rank 0 in {GATHER_S:g} s: {error}") from error
    address = pickle.loads(store.get(_KEY))
    with _ignoring_signals():
        is_over = run_agent(address, job_rank(), _placement_or_error(config, device))
    if not is_over:
        raise RankFailedError(
            f"rank 0's process of the job is gone, or was out of reach for {CUT_OFF_S:g} s: start the job anew", rank=0
        )


def placement_here(config: DiffusionParallelConfig, device: str | None, *, parent_pid: int) -> RankPlacement:
    """Where this process's rank runs.

    Raises:
        ConfigError: this machine has no GPU for it.
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return RankPlacement(
        host=platform.node(),
        device=joined_device(device, config),
        num_threads=threads_per_rank(local_size),
        parent_pid=parent_pid,
    )


def _placement_or_error(config: DiffusionParallelConfig, device: str | None) -> RankPlacement | ConfigError:
    """The placement, or the error for the front to raise: one process reports it to people."""
    try:
        return placement_here(config, device, parent_pid=SpawnLauncher().parent_pid())
    except ConfigError as error:
        return error


def _addresses() -> tuple[str, str]:
    """The name at which the job's other processes reach this machine, and the address to listen on.

    A job on one machine stays on its loopback, where nobody else can reach it.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        return LOOPBACK, LOOPBACK
    master = os.environ["MASTER_ADDR"]
    try:
        own = address_towards(master, int(os.environ["MASTER_PORT"]))
        is_master = own == socket.gethostbyname(master) or own.startswith("127.")
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"no such address as MASTER_ADDR and MASTER_PORT say ({error}): {job_around()}") from error
    return (master if is_master else own), "0.0.0.0"


@contextlib.contextmanager
def _ignoring_signals() -> Iterator[None]:
    """Do nothing on the signals that ask to end; when the block is over, as before."""

    def ignore(_number: int, _frame: Any) -> None:
        """Children do not inherit a handler, as they would the order to ignore a signal."""

    before: list[tuple[int, Callable[..., Any] | int | None]] = []
    if threading.current_thread() is threading.main_thread():
        asked = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = [
            (number, signal.signal(number, ignore)) for number in asked if signal.getsignal(number) != signal.SIG_IGN
        ]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
