"""What a benchmark starts ends with it, however it ends: by SIGKILL too, and though it is stopped (SIGSTOP)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

# It reads a pipe of which this process alone holds the other end: Linux closes that when the process is gone.
_WATCH = "import os, sys; sys.stdin.buffer.read(); os.kill(int(sys.argv[1]), int(sys.argv[2]))"


class Watcher:
    """A process that sends a signal to a program when this process is gone.

    The program cannot do so itself while it is stopped, and a signal at a parent's death reaches children alone, not
    what they have started.

    Args:
        process: the program; ``close()`` comes after its end.
        number: the signal.
        is_group: send it to the whole process group, of which the program is the leader.
    """

    def __init__(self, process: subprocess.Popen[str], number: int, *, is_group: bool = False) -> None:
        target = -process.pid if is_group else process.pid
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCH, str(target), str(int(number))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C at the terminal is not for it
        )

    def close(self) -> None:
        """End it without the signal. Idempotent."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


class TurnProgram:
    """A program in a process group of its own, stopped between its turns. It ends with this process.

    Args:
        command: of the program. It prints a line "answer JSON" when it is ready, and one for each line that it reads.
        environment: variables beside those of this process.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the program
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self._watcher = Watcher(self._process, signal.SIGKILL, is_group=True)
        try:
            self.ask(None)
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def turn(self, question: dict[str, Any]) -> dict[str, Any]:
        """Continue, answer, and stop again."""
        self._signal(signal.SIGCONT)
        try:
            return self.ask(question)
        finally:
            self._signal(signal.SIGSTOP)

    def ask(self, question: dict[str, Any] | None) -> dict[str, Any]:
        """The program's answer; None waits until it is ready."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if question is not None:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                answer: dict[str, Any] = json.loads(line.removeprefix("answer "))
                return answer
        self._log.seek(0)
        raise SystemExit(self._log.read()[-4000:] + "\na program ended; its log is above")

    def close(self) -> None:
        """End the program and all processes that it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._watcher.close()
        self._log.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # all have ended, and ask() shows their log
            os.killpg(self._process.pid, number)
