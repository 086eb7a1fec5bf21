"""The rank processes of one engine: start, send, listen with a bound, and end them whatever happens."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from omni_sp.engine.devices import group_backend
from omni_sp.engine.messages import EngineOptions, RankExited, RankSettings, Stop
from omni_sp.engine.ranks import LOOPBACK, Launcher, OnWait, RankProcess

_POLL_S = 0.5
_LEAVE_S = 2.0
_DIE_S = 5.0


class RankProcesses:
    """All rank processes of one engine. After the constructor they are loading; ``end()`` leaves no process."""

    def __init__(self, options: EngineOptions, launcher: Launcher, on_wait: OnWait = lambda waited_for: None) -> None:
        placements = launcher.placements(options.config, options.device, on_wait)
        self.size = len(placements)
        self._owner = os.getpid()
        self._ranks: list[RankProcess] = []
        self._exited: set[int] = set()
        self._sending = threading.Lock()
        self._store, port = _store(launcher.rendezvous_host)
        # Each rank knows its own replica.
        options = replace(options, config=replace(options.config, data_parallel_size=1))
        backend = group_backend([(one.host, one.gpu or one.device) for one in placements])
        try:
            for rank, placement in enumerate(placements):
                process = launcher.start(rank)
                self._ranks.append(process)
                store = launcher.rendezvous_host, port
                settings = RankSettings(rank=rank, options=options, placement=placement, backend=backend, store=store)
                _send(process.connection, pickle.dumps(settings))
        except BaseException:
            self.end()
            raise

    def send(self, payload: bytes) -> None:
        """Send one pickled message to every rank, from any thread. A rank that is gone is noticed when listening."""
        with self._sending:
            for process in self._ranks:
                _send(process.connection, payload)

    def listen(self, until: float) -> list[tuple[int, Any]]:
        """Messages of any ranks, as (rank, message); empty once ``time.monotonic()`` has passed ``until``.

        A rank whose process has ended gives RankExited, once, after its last message.
        """
        while True:
            heard = self._poll(min(_POLL_S, max(0.0, until - time.monotonic())))
            if heard or time.monotonic() >= until:
                return heard

    def end(self, patience_s: float = 0.0) -> None:
        """End every process: Stop and ``patience_s`` to obey it, then SIGTERM, then SIGKILL. Idempotent."""
        if os.getpid() != self._owner:
            return  # a forked copy of the front does not own the ranks
        if patience_s:
            self.send(pickle.dumps(Stop()))
            _await(self._ranks, patience_s)
        for act, seconds in ((_terminate, _LEAVE_S), (_kill, _DIE_S)):
            alive = [process for process in self._ranks if process.poll() is None]
            for process in alive:
                act(process)
            _await(alive, seconds)
        for process in self._ranks:
            process.connection.close()
        self._store = None  # its port is free again, whoever still refers to this object

    def _poll(self, seconds: float) -> list[tuple[int, Any]]:
        listening = {process.connection: rank for rank, process in enumerate(self._ranks) if rank not in self._exited}
        heard: list[tuple[int, Any]] = []
        for connection in wait(list(listening), seconds):
            assert isinstance(connection, Connection)
            rank = listening.pop(connection)
            try:
                heard.append((rank, pickle.loads(connection.recv_bytes())))
            except (EOFError, OSError):
                heard.append(self._note_exit(rank))
        if not heard:
            # A pipe can outlive its rank where a grandchild holds it.
            heard = [self._note_exit(rank) for rank in listening.values() if self._ranks[rank].poll() is not None]
        return heard

    def _note_exit(self, rank: int) -> tuple[int, RankExited]:
        self._exited.add(rank)
        return rank, RankExited(exitcode=self._ranks[rank].wait(_DIE_S))


def _store(host: str) -> tuple[Any, int]:
    """A store for the ranks to meet at, on a free port. On the loopback, only this machine can reach it."""
    import torch.distributed as dist

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((LOOPBACK if host == LOOPBACK else "", 0))
        listener.listen(128)
        port = int(listener.getsockname()[1])
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
            master_listen_fd=listener.fileno(),
        )
    except BaseException:
        listener.close()
        raise
    listener.detach()  # the store closes it
    return store, port


def _send(connection: Connection, payload: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
        connection.send_bytes(payload)


def _await(processes: Iterable[RankProcess], seconds: float) -> None:
    until = time.monotonic() + seconds
    for process in processes:
        process.wait(max(0.0, until - time.monotonic()))


def _terminate(process: RankProcess) -> None:
    process.terminate()


def _kill(process: RankProcess) -> None:
    process.kill()
