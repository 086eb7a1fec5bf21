"""What tests and benchmarks start ends with them, however they end: by SIGKILL too, and though it is stopped."""

from __future__ import annotations

import subprocess
import sys

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
