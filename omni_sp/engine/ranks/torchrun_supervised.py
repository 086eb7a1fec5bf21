"""Rank processes under torchrun, on one machine or several, that a front can start again.

Each process that torchrun started is the agent of one rank, which is a child process: the rank may die and be started
again while its agent stays. The process of rank 0 also holds the front, which tells the other agents what to do.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import secrets
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge, wait
from typing import Any

from typing_extensions import override

from omni_sp.config import DiffusionParallelConfig
from omni_sp.engine.devices import joined_device, threads_per_rank
from omni_sp.engine.messages import RankPlacement
from omni_sp.engine.ranks import LOOPBACK, Launcher, RankProcess
from omni_sp.engine.ranks.spawn import SpawnLauncher, rank_title
from omni_sp.engine.ranks.torchrun import job_around, job_rank, rendezvous, require_job_of
from omni_sp.errors import ConfigError, RankFailedError

GATHER_S = 300.0
"""How long the processes of a job may take to find each other."""
_START_S = 60.0
_LOST = 255  # the exit code of a rank whose agent is gone
_KEY = "omni_sp/front"
_POLL_S = 0.2


@dataclass(frozen=True)
class _AgentReady:
    """Agent -> front: its rank, and where that runs, or why it cannot run."""

    rank: int
    placement: RankPlacement | ConfigError


@dataclass(frozen=True)
class _Start:
    """Front -> agent: start the rank, on a connection that sends this number."""

    number: int


@dataclass(frozen=True)
class _Started:
    """A rank's connection -> front: which rank it belongs to."""

    rank: int
    number: int


@dataclass(frozen=True)
class _Signal:
    """Front -> agent: send this signal to the process of this number."""

    number: int
    signal: int


@dataclass(frozen=True)
class _Exited:
    """Agent -> front: the process of this number has ended."""

    number: int
    exitcode: int


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


class TorchrunLauncher(Launcher):
    """The front's side, in the process of rank 0. Its own rank is a plain child of it."""

    def __init__(self) -> None:
        self._own = SpawnLauncher(thread_stays=True)
        self._host, bound = _addresses()
        self._key = secrets.token_bytes(32)
        self._listener = Listener((bound, 0), backlog=128)
        self._store: Any = None
        self._changed = threading.Condition()
        self._agents: dict[int, _Agent] = {}
        self._arrived: dict[tuple[int, int], Connection] = {}

    @property
    @override
    def rendezvous_host(self) -> str:
        return self._host

    @override
    def placements(self, config: DiffusionParallelConfig, device: str | None) -> list[RankPlacement]:
        is_first = self._store is None
        if is_first:
            threading.Thread(target=self._accept_connections, name="omni-sp-agents", daemon=True).start()
            self._store = rendezvous(GATHER_S)
            self._store.set(_KEY, pickle.dumps((self._host, self._listener.address[1], self._key)))
        others = range(1, config.world_size)
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._agents) == len(others), GATHER_S):
                missing = ", ".join(str(rank) for rank in others if rank not in self._agents)
                raise ConfigError(f"no word from the processes of ranks {missing} of the job in {GATHER_S:g} s")
        if is_first:
            # All have read it. A second front of this job must not be looked for at this address.
            self._store.delete_key(_KEY)
        own = placement_here(config, device, parent_pid=self._own.parent_pid())
        return [own, *(self._agents[rank].placement() for rank in others)]

    @override
    def start(self, rank: int) -> RankProcess:
        if rank == 0:
            return self._own.start(0)
        agent = self._agents[rank]
        number = agent.start()
        with self._changed:
            self._changed.wait_for(lambda: (rank, number) in self._arrived or agent.is_lost, _START_S)
            connection = self._arrived.pop((rank, number), None)
        if connection is None:
            raise RankFailedError(f"rank {rank} of the job cannot be started: its process is gone or silent", rank=rank)
        return _SupervisedRank(agent, number, connection)

    @override
    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.close()
        for agent in self._agents.values():
            agent.disconnect()

    def _accept_connections(self) -> None:
        """Take connections: the first one of each agent, and one for every rank process that it starts."""
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return  # closed
            # Each on its own: one that says nothing must not keep the others out.
            threading.Thread(target=self._handshake, args=(connection,), daemon=True).start()

    def _handshake(self, connection: Connection) -> None:
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            said = pickle.loads(connection.recv_bytes())  # from somebody who has the key
        except (AuthenticationError, EOFError, OSError):
            connection.close()
            return
        with self._changed:
            if isinstance(said, _Started):
                self._arrived[said.rank, said.number] = connection
            else:
                self._agents[said.rank] = _Agent(connection, said.placement, self._changed)
            self._changed.notify_all()


def supervise_rank(config: DiffusionParallelConfig, device: str | None) -> None:
    """Start, signal and watch this process's rank until the front is gone.

    It is called in the main thread, in all processes but that of rank 0. Signals that ask to end are left to the front,
    which disconnects the agents once it has finished what runs.

    Raises:
        ConfigError: no front was found in time.
    """
    store = rendezvous(GATHER_S)
    try:
        store.wait([_KEY], timedelta(seconds=GATHER_S))
    except Exception as error:
        raise ConfigError(f"no word from the process of rank 0 in {GATHER_S:g} s: {error}") from error
    host, port, key = pickle.loads(store.get(_KEY))
    with _ignoring_signals(), Client((host, port), authkey=key) as front:
        _AgentLoop((host, port), key, front).run(_placement_or_error(config, device))


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


class _Agent:
    """An agent as the front sees it."""

    def __init__(
        self, connection: Connection, placement: RankPlacement | ConfigError, changed: threading.Condition
    ) -> None:
        self._connection, self._placement, self._changed = connection, placement, changed
        self._ends: dict[int, int] = {}
        self._number = 0
        self.is_lost = False
        threading.Thread(target=self._listen, name="omni-sp-agent", daemon=True).start()

    def placement(self) -> RankPlacement:
        if isinstance(self._placement, ConfigError):
            raise self._placement
        return self._placement

    def start(self) -> int:
        """Have a rank started; its number."""
        self._number += 1
        self._send(_Start(self._number))
        return self._number

    def send_signal(self, number: int, which: int) -> None:
        self._send(_Signal(number, which))

    def end_of(self, number: int, timeout_s: float = 0.0) -> int | None:
        """The exit code of the rank of this number; None while it runs."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._ends or self.is_lost, timeout_s)
            return self._ends.get(number, _LOST if self.is_lost else None)

    def disconnect(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.close()

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # lost; heard where it is waited for
            self._connection.send_bytes(pickle.dumps(message))

    def _listen(self) -> None:
        while True:
            try:
                said = pickle.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                said = None
            with self._changed:
                if isinstance(said, _Exited):
                    self._ends[said.number] = said.exitcode
                else:
                    self.is_lost = True
                self._changed.notify_all()
            if said is None:
                return


class _SupervisedRank(RankProcess):
    """A rank process that an agent started."""

    def __init__(self, agent: _Agent, number: int, connection: Connection) -> None:
        self._agent, self._number, self._connection = agent, number, connection

    @property
    def connection(self) -> Connection:
        return self._connection

    def poll(self) -> int | None:
        return self._agent.end_of(self._number)

    def wait(self, timeout_s: float) -> int | None:
        return self._agent.end_of(self._number, timeout_s)

    def terminate(self) -> None:
        self._agent.send_signal(self._number, signal.SIGTERM)

    def kill(self) -> None:
        self._agent.send_signal(self._number, signal.SIGKILL)


class _AgentLoop:
    """Starts, signals and reports the exits of one rank's processes, until the front is gone."""

    def __init__(self, address: tuple[str, int], key: bytes, front: Connection) -> None:
        self._address, self._key, self._front = address, key, front
        self._launcher = SpawnLauncher()
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def run(self, placement: RankPlacement | ConfigError) -> None:
        self._send(_AgentReady(job_rank(), placement))
        try:
            while True:
                if wait([self._front], _POLL_S):
                    self._handle(pickle.loads(self._front.recv_bytes()))
                self._report_exits()
        except (EOFError, OSError):
            pass  # the front is gone
        finally:
            for child in self._children.values():
                child.kill()
                child.wait()

    def _handle(self, order: Any) -> None:
        if isinstance(order, _Start):
            with Client(self._address, authkey=self._key) as connection:
                connection.send_bytes(pickle.dumps(_Started(job_rank(), order.number)))
                self._children[order.number] = self._launcher.start_on(connection, rank_title(job_rank()))
        elif isinstance(order, _Signal) and order.number in self._children:
            self._children[order.number].send_signal(order.signal)

    def _report_exits(self) -> None:
        for number, child in list(self._children.items()):
            if (exitcode := child.poll()) is not None:
                del self._children[number]
                self._send(_Exited(number, exitcode))

    def _send(self, message: Any) -> None:
        self._front.send_bytes(pickle.dumps(message))


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
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Sends nothing; asks the kernel which of its addresses would be the sender's.
            probe.connect((master, int(os.environ["MASTER_PORT"])))
            own = str(probe.getsockname()[0])
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
