"""Programs that take turns: one runs, the others are stopped, and all end with the benchmark, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from omni_sp.testing.watcher import Watcher


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
