"""A command that runs programs as ``python`` does, as forks of one process that has imported torch and diffusers.

Those imports take seconds of a core, and tests start dozens of programs, which start others: torchrun its processes,
the front its ranks. Programs of this command have their own arguments, folder, environment, import path, descriptors,
signals and exit code, and start others by the same command. What they do not have is their place among processes:
their parent is the process that forks. Tests of that, and of the start itself, run ``sys.executable``.

Only the standard library is imported here: the process that forks must not have imported what is tested.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import fcntl
import importlib.util
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

_COMMAND = """#!{python} -IS
import array, json, os, signal, socket, struct, sys

words = sys.argv[1:]
unbuffered = False
while words and words[0] in ("-u", "-B"):
    unbuffered |= words.pop(0) == "-u"
if not words or words[0].startswith("-") and words[0] not in ("-c", "-m"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
FORWARDED = {{signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}}
signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
descriptors = []
for descriptor in sorted(map(int, os.listdir("/proc/self/fd"))):
    try:
        os.fstat(descriptor)
    except OSError:
        continue
    descriptors.append(descriptor)
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
parents = os.getppid(), os.getpid()
request = json.dumps([words, unbuffered, os.getcwd(), dict(os.environ), parents, descriptors])
sent = array.array("i", descriptors)
server.sendmsg([struct.pack("i", len(request.encode()))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, sent)])
server.sendall(request.encode())


def number():
    received = server.recv(4, socket.MSG_WAITALL)
    return struct.unpack("i", received)[0] if len(received) == 4 else -signal.SIGKILL


pid = number()
for name in FORWARDED:
    signal.signal(name, lambda name, _: os.kill(pid, name))
signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
code = number()
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""
_FOR_VLLM = (
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.adapters",
    "vllm.model_executor.models.llama",
)
_MOST_DESCRIPTORS = 253  # in one message
_FIRST_FREE = 1000


_OPEN = contextlib.ExitStack()
_COMMANDS: list[str] = []


def python() -> str:
    """The command, which is there from its first use to the end of the session."""
    if sys.platform != "linux":
        return sys.executable
    if not _COMMANDS:
        _COMMANDS.append(_OPEN.enter_context(_started(Path(_OPEN.enter_context(tempfile.TemporaryDirectory())))))
    return _COMMANDS[0]


def close() -> None:
    """End the process that forks, and with it what it has forked."""
    _COMMANDS.clear()
    _OPEN.close()


@contextlib.contextmanager
def _started(folder: Path) -> Iterator[str]:
    from omni_sp.testing.ranks import fork_context

    command, address = folder / "python", str(folder / "socket")
    command.write_text(_COMMAND.format(python=sys.executable, address=address))
    command.chmod(0o755)
    # What a new program finds, without what this process has added.
    shown = subprocess.run([sys.executable, "-Ic", "import sys; print(*sys.path, sep='\\n')"], capture_output=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        arguments = (Listener(listener), str(command), shown.stdout.decode().splitlines())
        process = fork_context().Process(target=_serve, args=arguments, daemon=True)
        process.start()
    # It has the socket alone: once it is gone, nobody waits for an answer.
    try:
        yield str(command)
    finally:
        process.kill()
        process.join()


class Listener:
    """A socket that the process has too which this is sent to."""

    def __init__(self, socket: socket.socket) -> None:
        self.socket = socket

    def __reduce__(self) -> Any:
        from multiprocessing.reduction import DupFd

        return _received, (DupFd(self.socket.fileno()),)


def _received(sent: Any) -> Listener:
    return Listener(socket.socket(fileno=sent.detach()))


def _serve(listener: Listener, command: str, path: list[str]) -> None:
    """Fork a program for each request, report its end, and kill it when whoever asked is gone."""
    if importlib.util.find_spec("vllm") is not None:
        for module in _FOR_VLLM:
            importlib.import_module(module)
    selector = selectors.DefaultSelector()
    selector.register(listener.socket, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                asked, _ = listener.socket.accept()
                request, descriptors = _receive(asked)
                if request is None:
                    asked.close()
                    for descriptor in descriptors:
                        os.close(descriptor)
                    continue
                pid = os.fork()
                if pid == 0:
                    _become(request, descriptors, command, path)
                for descriptor in descriptors:
                    os.close(descriptor)
                asked.sendall(struct.pack("i", pid))
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, asked))
                selector.register(asked, selectors.EVENT_READ, (pid, None))
                continue
            pid, asked = key.data
            if asked is None:
                selector.unregister(key.fileobj)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                continue
            selector.unregister(key.fileobj)
            os.close(key.fd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(KeyError):
                selector.unregister(asked)
            with contextlib.suppress(OSError):
                asked.sendall(struct.pack("i", code))
            asked.close()


def _receive(asked: socket.socket) -> tuple[Any, list[int]]:
    """What is asked for, and its descriptors; None of one that left before it had asked."""
    numbers = array.array("i")
    size, extra, *_ = asked.recvmsg(4, socket.CMSG_SPACE(_MOST_DESCRIPTORS * numbers.itemsize))
    for _level, _type, data in extra:
        numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    if len(size) < 4:
        return None, []
    length = struct.unpack("i", size)[0]
    text = asked.recv(length, socket.MSG_WAITALL)
    return json.loads(text) if len(text) == length else None, list(numbers)


def _become(request: Any, received: list[int], command: str, path: list[str]) -> NoReturn:
    """Be the program that was asked for, from its start to its end."""
    code = 1
    try:
        words, unbuffered, folder, environment, parents, descriptors = request
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _FIRST_FREE) for descriptor in received]
        os.closerange(0, _FIRST_FREE)
        for source, target in zip(high, descriptors, strict=True):
            os.dup2(source, target)
            os.close(source)
        _set_streams(unbuffered)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        _set_parents(*parents)
        sys.executable = command
        sys.path[:] = [entry or folder for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry] + path
        _forget_the_test()
        code = _run(words)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _set_parents(parent: int, known_as: int) -> None:
    """Let ranks find the parent that they are to watch: here, and in forks of this process."""
    own, real = os.getpid(), os.getppid

    def getppid() -> int:
        if os.getpid() == own:
            return parent
        return known_as if real() == own else real()

    os.getppid = getppid


def _set_streams(unbuffered: bool) -> None:
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        stream = open(number, "w", encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        stream.reconfigure(write_through=unbuffered, line_buffering=number == 2 or stream.isatty())
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _forget_the_test() -> None:
    """Take back what being a process of multiprocessing, and of a test, has left."""
    from multiprocessing import process, resource_tracker

    main: Any = process.current_process()
    main._name, main._identity, main._parent_pid = "MainProcess", (), None
    main._config.pop("daemon", None)
    process._parent_process = None  # type: ignore[attr-defined]
    multiprocessing.set_start_method(None, force=True)
    tracker: Any = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None
    multiprocessing.set_executable(sys.executable)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("__mp_main__", "tests", "omni_sp")]:
        del sys.modules[name]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    torch = sys.modules.get("torch")
    if torch is not None:
        # Always: two threads that come first to a pool of threads from before the fork would both make it anew.
        torch.set_num_threads(int(threads) if threads.isdigit() else torch.get_num_threads())


def _run(words: list[str]) -> int:
    """Run the program as Python does; its exit code."""
    code = 0
    try:
        match words:
            case ["-c", program, *rest]:
                sys.argv = ["-c", *rest]
                sys.path.insert(0, "")
                sys.modules["__main__"] = main = types.ModuleType("__main__")
                exec(compile(program, "<string>", "exec"), main.__dict__)
            case ["-m", module, *rest]:
                sys.argv = ["-m", *rest]
                sys.path.insert(0, os.getcwd())
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case [program, *rest]:
                sys.argv = [program, *rest]
                sys.path.insert(0, os.path.dirname(os.path.realpath(program)))
                runpy.run_path(program, run_name="__main__")
    except SystemExit as stopped:
        if stopped.code is not None and not isinstance(stopped.code, int):
            print(stopped.code, file=sys.stderr)
            code = 1
        else:
            code = stopped.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code
