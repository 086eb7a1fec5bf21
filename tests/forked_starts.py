"""Rank processes of tests as forks of one process that has imported torch and diffusers, instead of new programs.

The imports of a new program take seconds of a core, which a session would spend a hundred times. Apart from them the
processes are what they are outside tests: one's own session, environment, import path, standard error and command line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import pytest

from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.testing.ranks import fork_context


class ForkedProgram:
    """As much of ``subprocess.Popen`` as launchers use."""

    def __init__(self, target: tuple[str, str], connection: Connection, title: str) -> None:
        context = fork_context()
        arguments = (target, connection, title, DupFdLater(2), dict(os.environ), list(sys.path))
        self._process = context.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        with self._lock:
            self._process.join(timeout)
            exitcode = self._process.exitcode
        if exitcode is None:
            raise subprocess.TimeoutExpired([], timeout or 0.0)
        return exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


class DupFdLater:
    """A descriptor that the process has too which this is sent to, as ``descriptor``."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> Any:
        return _received, (DupFd(self.descriptor),)


def _received(sent: Any) -> DupFdLater:
    return DupFdLater(sent.detach())


def _run(
    target: tuple[str, str],
    connection: Connection,
    title: str,
    stderr: DupFdLater,
    environment: dict[str, str],
    path: list[str],
) -> None:
    os.setsid()
    gc.freeze()  # as in omni_sp.engine.ranks.fork
    for descriptor in (1, 2):
        os.dup2(stderr.descriptor, descriptor)
    os.close(stderr.descriptor)
    os.environ.clear()
    os.environ.update({"TORCH_CPP_LOG_LEVEL": "ERROR"} | environment)
    sys.path[:] = path
    _set_last_word(title)
    module, function = target
    getattr(importlib.import_module(module), function)(connection)
    os._exit(0)


def _set_last_word(title: str) -> None:
    """Let the command end with this word, as a new program's does."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    end = int(fields[46])
    word = b"\0" + title.encode() + b"\0"
    ctypes.memmove(end - len(word), word, len(word))


def _start_on(self: SpawnLauncher, connection: Connection, title: str) -> Any:
    return ForkedProgram(self._target, connection, title)


def _parent_pid(_: object = None) -> int:
    fork_context()
    server: Any = multiprocessing.forkserver._forkserver
    server.ensure_running()
    return int(server._forkserver_pid)


_NEW_PROGRAMS = SpawnLauncher.start_on, SpawnLauncher.parent_pid
_FORKS = (_start_on, _parent_pid) if sys.platform == "linux" else _NEW_PROGRAMS


@contextlib.contextmanager
def rank_starts(*, forked: bool) -> Iterator[None]:
    """Let launchers fork their processes, or start new programs, as long as this lasts."""
    start_on, parent_pid = _FORKS if forked else _NEW_PROGRAMS
    if forked:  # which tests that count processes must not take for one of theirs
        _parent_pid()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpawnLauncher, "start_on", start_on)
        patch.setattr(SpawnLauncher, "parent_pid", parent_pid)
        yield
