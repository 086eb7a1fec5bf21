"""Rank processes on this machine that are forks of one process, which has imported torch and diffusers once for all.

The imports are nearly all of a start's time, and each rank would do them anew. The process that forks does nothing
else: it loads no weights, starts no thread, and touches no GPU, because a fork has no use for what the CUDA driver
keeps. It lives as long as its launcher, so that ranks are back at once after a failure. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

from omni_sp.config import DiffusionParallelConfig
from omni_sp.engine.messages import RankPlacement
from omni_sp.engine.ranks import Launcher, OnWait, RankProcess
from omni_sp.engine.ranks.spawn import RANK_MAIN, SpawnLauncher, command_of, rank_title
from omni_sp.engine.worker import die_with_parent
from omni_sp.pipelines.load import ModelSource, import_classes

_MODULES = ("torch", "torch.distributed", "torch._dynamo", "diffusers", "omni_sp.engine.pipeline_runner")
_START_S = 600.0  # imports from a cold disk
_END_S = 5.0
_LOST = -int(signal.SIGKILL)  # how a rank ends whose parent is gone
_NOT_INITIALISED = 3  # CUDA_ERROR_NOT_INITIALIZED


@dataclass(frozen=True)
class _Preload:
    """Front -> server, the first message: whom to watch, and whose classes to import."""

    parent_pid: int
    source: ModelSource


@dataclass(frozen=True)
class _Fork:
    """Front -> server: start this rank, on the connection whose descriptor follows."""

    rank: int


@dataclass(frozen=True)
class _Signal:
    """Front -> server: send this signal to the process of this number, if it has not ended."""

    pid: int
    signal: int


@dataclass(frozen=True)
class _Started:
    """Server -> front: the process of the rank asked for."""

    pid: int


@dataclass(frozen=True)
class _Exited:
    """Server -> front: this process has ended."""

    pid: int
    exitcode: int


class ForkLauncher(Launcher):
    """Starts ranks by forks, with the interpreter and the import path of this process.

    Args:
        source: the model whose classes the ranks will need.
        thread_stays: the thread that starts the ranks lives until they have ended.
        replica: which of the replicas its ranks are of.
    """

    def __init__(self, source: ModelSource, *, thread_stays: bool = False, replica: int = 0) -> None:
        self._source = source
        self._owner = os.getpid()
        self._spawn = SpawnLauncher(__name__, "serve_forks", thread_stays=thread_stays, replica=replica)
        self._server: _Server | None = None

    @property
    @override
    def rendezvous_host(self) -> str:
        return self._spawn.rendezvous_host

    @override
    def placements(self, config: DiffusionParallelConfig, device: str | None, on_wait: OnWait) -> list[RankPlacement]:
        # Before anything else, which may take a while: it imports meanwhile.
        server = self._running_server()
        try:
            placements = self._spawn.placements(config, device, on_wait)
        except BaseException:
            self.close()
            raise
        return [replace(placement, parent_pid=server.pid) for placement in placements]

    @override
    def start(self, rank: int) -> RankProcess:
        here, there = Pipe()
        with there:
            return ForkedRank(self._running_server(), rank, here, there)

    @override
    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None and os.getpid() == self._owner:  # a forked copy of the front does not own it
            server.end()

    def _running_server(self) -> _Server:
        if self._server is None or self._server.is_lost:
            self.close()
            self._server = _Server(self._spawn, self._source)
        return self._server


def local_launcher(source: ModelSource, *, thread_stays: bool = False, replica: int = 0) -> Launcher:
    """The launcher for ranks on this machine; the arguments are ForkLauncher's."""
    if platform.system() == "Linux":
        return ForkLauncher(source, thread_stays=thread_stays, replica=replica)
    return SpawnLauncher(thread_stays=thread_stays, replica=replica)


class _Server:
    """The process that forks, as the front sees it."""

    def __init__(self, spawn: SpawnLauncher, source: ModelSource) -> None:
        self._connection, there = Pipe()
        with there:
            self._process = spawn.start_on(there, "omni_sp-rank-server")
        self._lock = threading.Lock()
        self._exits: dict[int, int] = {}
        self._started: list[int] = []
        self._has_started = False
        self.is_lost = False
        self.pid = self._process.pid
        self._send(_Preload(parent_pid=spawn.parent_pid(), source=source))

    def fork(self, rank: int, connection: Connection) -> int:
        """Start a rank on this connection; its process. A lost server gives one that has ended."""
        with self._lock:
            self._send(_Fork(rank))
            with contextlib.suppress(OSError):
                send_handle(self._connection, connection.fileno(), self.pid)
            until = time.monotonic() + _START_S
            while not self._started and not self.is_lost and time.monotonic() < until:
                self._listen(until - time.monotonic())
            return self._started.pop() if self._started else 0

    def send_signal(self, pid: int, number: int) -> None:
        with self._lock:
            self._send(_Signal(pid, number))

    def exit_of(self, pid: int, timeout_s: float = 0.0) -> int | None:
        """The exit code of a process that it forked; None while that runs."""
        until = time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._listen(min(0.1, max(0.0, until - time.monotonic())))
                if pid in self._exits or self.is_lost:
                    return self._exits.get(pid, _LOST)
            if time.monotonic() >= until:
                return None

    def end(self) -> None:
        """End it, and with it what it has forked."""
        self._connection.close()
        if not self._has_started:  # it imports, and does not hear that it is to end
            self._process.kill()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_END_S)

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone, which is noticed when listening
            self._connection.send_bytes(pickle.dumps(message))

    def _listen(self, timeout_s: float) -> None:
        """Take what it has sent, after so many seconds at most. Under the lock."""
        try:
            while not self.is_lost and self._connection.poll(timeout_s):
                said = pickle.loads(self._connection.recv_bytes())
                if isinstance(said, _Started):
                    self._started.append(said.pid)
                    self._has_started = True
                else:
                    self._exits[said.pid] = said.exitcode
                timeout_s = 0.0
        except (EOFError, OSError):
            self.is_lost = True


class ForkedRank(RankProcess):
    """A rank that the server has forked."""

    def __init__(self, server: _Server, rank: int, here: Connection, there: Connection) -> None:
        self._server, self._connection = server, here
        self.pid = server.fork(rank, there)

    @property
    @override
    def connection(self) -> Connection:
        return self._connection

    @override
    def poll(self) -> int | None:
        return self._server.exit_of(self.pid)

    @override
    def wait(self, timeout_s: float) -> int | None:
        return self._server.exit_of(self.pid, timeout_s)

    @override
    def terminate(self) -> None:
        self._server.send_signal(self.pid, signal.SIGTERM)

    @override
    def kill(self) -> None:
        self._server.send_signal(self.pid, signal.SIGKILL)


def serve_forks(front: Connection) -> None:
    """The process that forks: import, then start ranks, signal them and report their ends, until the front is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = pickle.loads(front.recv_bytes())
    die_with_parent(settings.parent_pid)
    _preload(settings.source)
    children: set[int] = set()
    with contextlib.suppress(EOFError, OSError), _child_ends() as ends:
        while True:
            for ready in wait([front, ends]):
                if isinstance(ready, int):
                    os.read(ready, 4096)
                    _report_exits(front, children)
                    continue
                order = pickle.loads(front.recv_bytes())
                if isinstance(order, _Fork):
                    with Connection(recv_handle(front)) as connection:
                        children.add(pid := _fork(order.rank, connection, front))
                    front.send_bytes(pickle.dumps(_Started(pid)))
                elif isinstance(order, _Signal) and order.pid in children:
                    os.kill(order.pid, order.signal)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os._exit(0)


def _preload(source: ModelSource) -> None:
    """Import what ranks need. What cannot be imported is reported by the ranks, which try it again."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # libraries ask for GPUs as they are imported
    gc.disable()
    with contextlib.suppress(Exception):
        for module in _MODULES:
            importlib.import_module(module)
        import_classes(source)
    gc.freeze()  # a collection in a rank would copy pages that all share
    gc.enable()


def _fork(rank: int, connection: Connection, front: Connection) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        front.close()
        os.setsid()  # Ctrl-C reaches the front alone, which then ends the ranks
        _run_rank(rank, connection)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _run_rank(rank: int, connection: Connection) -> NoReturn:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    title = rank_title(rank)
    if _touched_cuda():
        # Only a new program can use the driver then.
        os.set_inheritable(connection.fileno(), True)
        os.execv(sys.executable, command_of(RANK_MAIN, connection, sys.path, title))
    _set_title(title)
    module, function = RANK_MAIN
    getattr(importlib.import_module(module), function)(connection)
    os._exit(0)


def _touched_cuda() -> bool:
    """Whether something has initialised the CUDA driver in this process, or in the one that it is a fork of."""
    if "libcuda.so" not in _loaded_libraries():
        return False
    try:
        return bool(ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALISED)
    except (OSError, AttributeError):
        return True


def _loaded_libraries() -> str:
    return Path("/proc/self/maps").read_text()


def _set_title(title: str) -> None:
    """Show this instead of the command's last word, for people who look at processes."""
    with contextlib.suppress(Exception):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, counted from the third field
        room = len(Path("/proc/self/cmdline").read_bytes().split(b"\0")[-2])
        if 0 < room < end - start:
            ctypes.memmove(end - 1 - room, title.encode()[:room].ljust(room, b"\0"), room)


@contextlib.contextmanager
def _child_ends() -> Any:
    """A descriptor that can be read whenever a child has ended."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    signal.set_wakeup_fd(writer)
    yield reader


def _report_exits(front: Connection, children: set[int]) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            children.discard(pid)
            front.send_bytes(pickle.dumps(_Exited(pid, os.waitstatus_to_exitcode(status))))
