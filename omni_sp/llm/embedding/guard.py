"""Stands between a server and one replica: when the server is gone, however it ended, so are the replica's processes.

It runs as a program of the standard library alone, ``python -I -S guard.py FOLDER COMMAND...``, as the leader of a
process group. FOLDER, where the sockets are, goes with the server too. Standard input is a pipe that nobody writes to:
it ends with the server. vLLM's own processes outlive a server that is killed, and Linux' signal at a parent's death
reaches children only, not theirs.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from types import FrameType

_POLL_S = 0.25


def main() -> None:
    """Run the command, pass SIGTERM on to it, and end as it does."""
    _, folder, *command = sys.argv
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        child.terminate()

    signal.signal(signal.SIGTERM, on_signal)
    while True:
        code = child.poll()
        server_is_gone = bool(select.select([0], [], [], 0 if code is not None else _POLL_S)[0])
        if server_is_gone:
            shutil.rmtree(folder, ignore_errors=True)
            os.killpg(0, signal.SIGKILL)  # this process too
        if code is not None:
            sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
