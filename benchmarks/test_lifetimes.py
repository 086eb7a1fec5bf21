"""What a benchmark has started is gone when the benchmark is, though that was killed and they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.test_gpu_check import is_alive

ROOT = Path(__file__).resolve().parent.parent
# A program that starts another one, as an engine of vLLM starts its ranks, and the numbers of both.
STARTED = ["sh", "-c", 'sleep 100 & echo "answer [$$, $!]"; wait']
ENGINE = """
import sys, time
from benchmarks.lifetimes import TurnProgram
started = []
class Shown(TurnProgram):
    def ask(self, question):
        started.append(super().ask(question))
Shown(sys.argv[1:], {})
print(*started[0], flush=True)
time.sleep(100)
"""
SERVER = """
import contextlib, signal, subprocess, sys, time
from omni_sp.testing.watcher import Watcher
process = subprocess.Popen(["sleep", "100"], text=True)
ended = subprocess.Popen(["sleep", "100"], text=True)
watcher = Watcher(ended, signal.SIGTERM)
ended.kill()
ended.wait()
watcher.close()
with contextlib.closing(Watcher(process, signal.SIGTERM)):
    print(process.pid, flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("program", [ENGINE, SERVER])
def test_what_a_killed_benchmark_has_started_ends(program: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *STARTED]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        started = [int(word) for word in benchmark.stdout.readline().split()]
        assert len(started) == (2 if program == ENGINE else 1)
        if program == ENGINE:
            assert becomes_true(lambda: all(map(is_stopped, started)), 10.0)
        benchmark.send_signal(signal.SIGKILL)
    try:
        assert becomes_true(lambda: not any(map(is_alive, started)), 10.0)
    finally:
        for pid in filter(is_alive, started):
            os.kill(pid, signal.SIGKILL)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def becomes_true(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()
