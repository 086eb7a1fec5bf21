"""Rank processes on this machine, each a fresh interpreter.

They are started as programs of their own, not by ``multiprocessing``: the user's main module is not imported again in
each of them, so a script needs no ``if __name__ == "__main__"`` guard, a notebook works, and no tracker process stays.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe

from typing_extensions import override

from omni_sp.config import DiffusionParallelConfig
from omni_sp.engine.devices import rank_devices, threads_per_rank
from omni_sp.engine.messages import RankPlacement
from omni_sp.engine.ranks import LOOPBACK, Launcher, OnWait, RankProcess
from omni_sp.errors import ConfigError

_BOOTSTRAP = """
import importlib, json, sys
from multiprocessing.connection import Connection
sys.path[:], module, function = json.loads(sys.argv[2])
getattr(importlib.import_module(module), function)(Connection(int(sys.argv[1])))
"""
# The front reports that a rank ended; torch's C++ warnings about them would flood the terminal.
_EVERY_RANK = {"TORCH_CPP_LOG_LEVEL": "ERROR"}


RANK_MAIN = "omni_sp.engine.worker", "rank_main"
"""What a rank runs: a module, and a function that is called with the rank's end of the pipe."""


class SpawnedRank(RankProcess):
    """A rank in a child process."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self._process = process
        self._connection = connection
        self.pid = process.pid

    @property
    @override
    def connection(self) -> Connection:
        return self._connection

    @override
    def poll(self) -> int | None:
        return self._process.poll()

    @override
    def wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    @override
    def terminate(self) -> None:
        self._process.terminate()

    @override
    def kill(self) -> None:
        self._process.kill()


class SpawnLauncher(Launcher):
    """Starts ranks with the interpreter and the import path of this process.

    Args:
        module: where the function that a rank runs is defined.
        function: its name; it is called with the rank's end of the pipe.
        thread_stays: the thread that starts the ranks lives until they have ended.
        replica: which of the replicas its ranks are of.
    """

    def __init__(
        self,
        module: str = RANK_MAIN[0],
        function: str = RANK_MAIN[1],
        *,
        thread_stays: bool = False,
        replica: int = 0,
    ) -> None:
        self._target = (module, function)
        self._thread_stays = thread_stays
        self._replica = replica

    @property
    @override
    def rendezvous_host(self) -> str:
        return LOOPBACK

    @override
    def placements(self, config: DiffusionParallelConfig, device: str | None, on_wait: OnWait) -> list[RankPlacement]:
        devices = rank_devices(device, config, self._replica)
        threads, parent_pid = threads_per_rank(len(devices) * config.data_parallel_size), self.parent_pid()
        return [
            RankPlacement(host=platform.node(), device=own, num_threads=threads, parent_pid=parent_pid)
            for own in devices
        ]

    @override
    def start(self, rank: int) -> SpawnedRank:
        here, there = Pipe()
        process = self.start_on(there, rank_title(rank))
        there.close()
        return SpawnedRank(process, here)

    def start_on(self, connection: Connection, title: str) -> subprocess.Popen[bytes]:
        """Start one process on its end of a pipe, which stays open here; ``title`` is its command's last word."""
        if os.name != "posix" or not sys.executable:
            raise ConfigError("rank processes need Linux or macOS, and a Python program to start: use degrees 1 × 1")
        return subprocess.Popen(
            command_of(self._target, connection, [entry or os.getcwd() for entry in sys.path], title),
            stdin=subprocess.DEVNULL,
            stdout=_standard_error(),
            pass_fds=(connection.fileno(),),
            env=_EVERY_RANK | os.environ,
            # A session of their own: Ctrl-C reaches the front alone, which then ends the ranks.
            start_new_session=True,
        )

    @override
    def close(self) -> None:
        """There is nothing to close."""

    def parent_pid(self) -> int:
        """The process that ranks watch, if they can.

        Linux watches the *thread* that started them: the main thread lives as long as the process, others may not.
        """
        stays = self._thread_stays or threading.current_thread() is threading.main_thread()
        return os.getpid() if stays else 0


def rank_title(rank: int) -> str:
    """The last word of a rank's command."""
    return f"omni_sp-rank-{rank}"


def command_of(target: tuple[str, str], connection: Connection, path: Sequence[str], title: str) -> list[str]:
    """The command that calls a function, given by module and name, with an inherited connection."""
    return [sys.executable, "-c", _BOOTSTRAP, str(connection.fileno()), json.dumps([list(path), *target]), title]


def _standard_error() -> int:
    """Where ranks print: not to the front's standard output, which another program may read."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2
