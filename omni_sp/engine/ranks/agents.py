"""Ranks on other machines: an agent on each of them starts, signals and watches one rank for the front.

What brings the agents there is a launcher's (torchrun, Ray). An agent connects to the front, and starts its rank as a
child process when it is asked to, so that the rank may die and be started again while the agent stays. Each side ends
what it has once the other is gone, or was out of reach for CUT_OFF_S.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge, wait
from typing import Any

from omni_sp.engine.messages import RankPlacement
from omni_sp.engine.ranks import OUT_OF_REACH, RankProcess
from omni_sp.engine.ranks.spawn import SpawnLauncher, rank_title
from omni_sp.errors import ConfigError, RankFailedError

CUT_OFF_S = 30.0
"""A connection whose other end answers nothing for so long, not even the kernel there, is over."""
_PROBE_S = 5.0
_START_S = 60.0
_LEAVE_S = 2.0  # for agents to end their ranks
_POLL_S = 0.2


@dataclass(frozen=True)
class AgentAddress:
    """Where an agent finds the front, and the key that it must know."""

    host: str
    port: int
    key: bytes

    def connect(self) -> Connection:
        """A new connection to the front."""
        connection = Client((self.host, self.port), authkey=self.key)
        _end_when_cut_off(connection)
        return connection


@dataclass(frozen=True)
class AgentReady:
    """Agent -> front: its number, and where its rank runs, or why it cannot run."""

    agent: int
    placement: RankPlacement | ConfigError


@dataclass(frozen=True)
class _Start:
    """Front -> agent: start this rank, on a connection that sends this number."""

    rank: int
    number: int


@dataclass(frozen=True)
class _Started:
    """A rank's connection -> front: which agent's process it is."""

    agent: int
    number: int


@dataclass(frozen=True)
class _Signal:
    """Front -> agent: send this signal to the process of this number."""

    number: int
    signal: int


@dataclass(frozen=True)
class _Over:
    """Front -> agent: the front ends in order. A connection that ends without this word was lost."""


@dataclass(frozen=True)
class _Exited:
    """Agent -> front: the process of this number has ended."""

    number: int
    exitcode: int


class Agents:
    """The agents of a front, each of which has a number.

    Args:
        host: the name at which they reach this machine.
        bound: the address to listen on.
    """

    def __init__(self, host: str, bound: str) -> None:
        self._listener = Listener((bound, 0), backlog=128)
        self.address = AgentAddress(host, self._listener.address[1], secrets.token_bytes(32))
        self._changed = threading.Condition()
        self._agents: dict[int, _Agent] = {}
        self._arrived: dict[tuple[int, int], Connection] = {}
        threading.Thread(target=self._accept_connections, name="omni-sp-agents", daemon=True).start()

    def missing(self, agents: Iterable[int], timeout_s: float, on_wait: Callable[[], None]) -> list[int]:
        """Those of these agents that have not connected in time; ``on_wait`` is called several times a second."""
        until = time.monotonic() + timeout_s
        while True:
            with self._changed:
                missing = [agent for agent in agents if agent not in self._agents]
                if missing and time.monotonic() < until:
                    self._changed.wait(_POLL_S)
            if not missing or time.monotonic() >= until:
                return missing
            on_wait()

    def lost(self, agents: Collection[int]) -> list[int]:
        """Those of these agents that were there, and are gone or out of reach."""
        with self._changed:
            return [agent for agent in agents if agent in self._agents and self._agents[agent].is_lost]

    def placement(self, agent: int) -> RankPlacement:
        """Where the rank of an agent runs.

        Raises:
            ConfigError: why it cannot.
        """
        placement = self._agents[agent].placement
        if isinstance(placement, ConfigError):
            raise placement
        return placement

    def start(self, agent: int, rank: int) -> RankProcess:
        """Have an agent start its rank.

        Raises:
            RankFailedError: it is gone.
        """
        watching = self._agents[agent]
        number = watching.start(rank)
        with self._changed:
            self._changed.wait_for(lambda: (agent, number) in self._arrived or watching.is_lost, _START_S)
            connection = self._arrived.pop((agent, number), None)
        if connection is None:
            raise RankFailedError(f"rank {rank} of the job cannot be started: its process is gone or silent", rank=rank)
        return _SupervisedRank(watching, number, connection)

    def close(self) -> None:
        """Let all agents go; each ends its rank. Idempotent."""
        with contextlib.suppress(OSError):
            self._listener.close()
        agents, until = list(self._agents.values()), time.monotonic() + _LEAVE_S
        for agent in agents:
            agent.dismiss()
        with self._changed:
            self._changed.wait_for(lambda: all(agent.is_lost for agent in agents), until - time.monotonic())
        for agent in agents:
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
            _end_when_cut_off(connection)
            deliver_challenge(connection, self.address.key)
            answer_challenge(connection, self.address.key)
            said = pickle.loads(connection.recv_bytes())  # from somebody who has the key
        except (AuthenticationError, EOFError, OSError):
            connection.close()
            return
        with self._changed:
            if isinstance(said, _Started):
                self._arrived[said.agent, said.number] = connection
            else:
                self._agents[said.agent] = _Agent(connection, said.placement, self._changed)
            self._changed.notify_all()


def run_agent(address: AgentAddress, agent: int, placement: RankPlacement | ConfigError) -> bool:
    """Be an agent until the front is gone. In the thread that the rank is to end with: see SpawnLauncher.parent_pid().

    Args:
        address: of the front.
        agent: this one's number.
        placement: where its rank runs, or the error for the front to raise: one process reports it to people.

    Returns:
        True where the front has ended in order; False where it, or the way to it, was lost.
    """
    with address.connect() as front:
        return _AgentLoop(address, agent, front).run(placement)


class _Agent:
    """An agent as the front sees it."""

    def __init__(
        self, connection: Connection, placement: RankPlacement | ConfigError, changed: threading.Condition
    ) -> None:
        self._connection, self._changed = connection, changed
        self._ends: dict[int, int] = {}
        self._number = 0
        self.placement = placement
        self.is_lost = False
        threading.Thread(target=self._listen, name="omni-sp-agent", daemon=True).start()

    def start(self, rank: int) -> int:
        """Have a rank started; its number."""
        self._number += 1
        self._send(_Start(rank, self._number))
        return self._number

    def send_signal(self, number: int, which: int) -> None:
        self._send(_Signal(number, which))

    def end_of(self, number: int, timeout_s: float = 0.0) -> int | None:
        """The exit code of the rank of this number; None while it runs."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._ends or self.is_lost, timeout_s)
            return self._ends.get(number, OUT_OF_REACH if self.is_lost else None)

    def dismiss(self) -> None:
        """Say that it is over. What ends the connection is the agent then, so that this word cannot be lost."""
        self._send(_Over())

    def disconnect(self) -> None:
        with contextlib.suppress(OSError), socket_of(self._connection) as there:
            # Also where this process has another thread in a read: closing alone would not end that.
            there.shutdown(socket.SHUT_RDWR)
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

    def __init__(self, address: AgentAddress, agent: int, front: Connection) -> None:
        self._address, self._agent, self._front = address, agent, front
        self._launcher = SpawnLauncher()
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def run(self, placement: RankPlacement | ConfigError) -> bool:
        try:
            self._send(AgentReady(self._agent, placement))
            while True:
                if wait([self._front], _POLL_S):
                    order = pickle.loads(self._front.recv_bytes())
                    if isinstance(order, _Over):
                        return True
                    self._handle(order)
                self._report_exits()
        except (EOFError, OSError):
            return False  # the front is gone
        finally:
            for child in self._children.values():
                child.kill()
                child.wait()

    def _handle(self, order: Any) -> None:
        if isinstance(order, _Start):
            with self._address.connect() as connection:
                connection.send_bytes(pickle.dumps(_Started(self._agent, order.number)))
                self._children[order.number] = self._launcher.start_on(connection, rank_title(order.rank))
        elif isinstance(order, _Signal) and order.number in self._children:
            self._children[order.number].send_signal(order.signal)

    def _report_exits(self) -> None:
        for number, child in list(self._children.items()):
            if (exitcode := child.poll()) is not None:
                del self._children[number]
                self._send(_Exited(number, exitcode))

    def _send(self, message: Any) -> None:
        self._front.send_bytes(pickle.dumps(message))


def _end_when_cut_off(connection: Connection) -> None:
    """Let the kernel end a connection whose other end cannot be reached: a machine that is gone says no word of it."""
    options = {
        "TCP_KEEPIDLE": _PROBE_S,  # on Linux; elsewhere the system's own bounds hold
        "TCP_KEEPINTVL": _PROBE_S,
        "TCP_KEEPCNT": CUT_OFF_S / _PROBE_S - 1,
        "TCP_USER_TIMEOUT": CUT_OFF_S * 1000,
    }
    with socket_of(connection) as there:
        there.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                there.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), int(value))


def socket_of(connection: Connection) -> socket.socket:
    """The socket below a connection, to be closed by itself."""
    return socket.socket(fileno=os.dup(connection.fileno()))
