"""What processes there are, for tests that must leave none."""

from __future__ import annotations

import contextlib
import os
import re
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path


def children(pid: int | None = None) -> set[int]:
    """The live child processes of a process, by default of this one."""
    parent = os.getpid() if pid is None else pid
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # pid (command) state ppid …; a command may hold spaces and brackets
                state, ppid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            if int(ppid) == parent and state != "Z":
                found.add(int(entry.name))
    return found


def descendants(pid: int | None = None) -> set[int]:
    """The live processes below a process, by default below this one."""
    below = children(pid)
    return below.union(*map(descendants, below))


def rank_processes(pid: int | None = None, *, but: Collection[int] = ()) -> list[int]:
    """The ranks among them, in their order, but for some processes."""
    found: dict[int, int] = {}
    for process in descendants(pid).difference(but):
        with contextlib.suppress(OSError):  # it has just ended
            name = re.search(rb"omni_sp-rank-(\d+)", Path(f"/proc/{process}/cmdline").read_bytes())
            if name is not None:
                found[int(name[1])] = process
    return [found[rank] for rank in sorted(found)]


def alive(pid: int) -> bool:
    """True while the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def becomes_true(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for it, so long at most."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def said_by_forked_copy(act: Callable[[], object]) -> str:
    """The error, with its class, that ``act`` raises in a forked copy of this process, which ends then; or ""."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads that a fork does not copy
        pid = os.fork()
    if pid == 0:
        said = ""
        try:
            act()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read().decode()
    os.waitpid(pid, 0)
    return said
