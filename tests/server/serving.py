"""A server on a free port: in a thread of the test's own process over FakeOmni, say; or a process of its own."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]
import uvicorn

from omni_sp.async_omni import AsyncOmni
from omni_sp.server.app import create_app
from omni_sp.server.process import uvicorn_config
from omni_sp.server.settings import ServerSettings
from tests.engine.processes import alive, becomes_true, descendants, rank_processes

PATIENCE_S = 60.0
START_S = 180.0
_LEAVE_S = 30.0


class Served:
    """A running server: ``url``, ``port``, and a client for it."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False)

    def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        return self.client.post(path, json=body, **more)

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return self.client.get(path, **more)

    def wait_until_ready(self) -> None:
        until(lambda: self.get("/health").status_code == 200)

    def stream(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The events of a stream; comments and the [DONE] left out."""
        with self.client.stream("POST", path, json=body) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in answer.iter_lines() if line.startswith("data: ") and line != "data: [DONE]"]
        return [json.loads(line.removeprefix("data: ")) for line in lines]


@contextlib.contextmanager
def serving(omni: AsyncOmni, *, ready: bool = True, **settings: Any) -> Iterator[Served]:
    """Serve this AsyncOmni with these settings; ``ready``: wait until it draws."""
    listener = socket.create_server(("127.0.0.1", 0))
    chosen = ServerSettings(**{"drain_timeout_s": 5.0, **settings})
    server = uvicorn.Server(uvicorn_config(create_app(omni, chosen), chosen))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    served = Served(listener.getsockname()[1])
    try:
        until(lambda: server.started or not thread.is_alive())
        assert thread.is_alive(), "the server ended at once"
        if ready:
            served.wait_until_ready()
        yield served
    finally:
        served.client.close()
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()
        assert not thread.is_alive(), "the server did not end"


class Program(Served):
    """``omni-sp serve`` as a process of its own, with ranks below it. What it tells people is in ``errors``."""

    def __init__(self, process: subprocess.Popen[str], port: int, errors: Path) -> None:
        super().__init__(port)
        self.process, self.errors = process, errors

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that run, in their order."""
        return rank_processes(self.process.pid)

    def listening_ports(self) -> set[int]:
        """Ports on which the front listens: for clients, and for its ranks to meet."""
        connections = psutil.Process(self.process.pid).net_connections("inet")
        return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}

    def draw(self, **fields: Any) -> Drawing:
        """Ask for a picture, and watch it come."""
        return Drawing(self, fields)

    def wait_until_ended(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE_S)


class Drawing:
    """One streamed request. It is read only as far as a test asks for."""

    def __init__(self, served: Served, fields: dict[str, Any]) -> None:
        body = {"stream": True, "progress": True, **fields}
        request = served.client.build_request("POST", "/v1/images/generations", json=body)
        self._answer = served.client.send(request, stream=True)
        assert self._answer.status_code == 200, self._answer.read()
        self._lines = self._answer.iter_lines()

    def wait_for_step(self, step: int) -> None:
        """Read until so many steps are done."""
        while (self._next().get("step") or 0) < step:
            pass

    def wait_until_queued(self) -> None:
        """Read until it is known to wait."""
        while self._next().get("position", 0) < 1:
            pass

    def picture(self) -> bytes:
        """Read to the end; the picture's file."""
        last = self._last()
        assert last["type"] == "image_generation.completed", last
        return base64.b64decode(last["b64_json"])

    def error(self) -> dict[str, Any]:
        """Read to the end, which must be an error: OpenAI's object."""
        last = self._last()
        assert last["type"] == "error", last["type"]
        error: dict[str, Any] = last["error"]
        return error

    def leave(self) -> None:
        """Go away, as a client that is closed."""
        self._answer.close()

    def _last(self) -> dict[str, Any]:
        while (event := self._next())["type"] == "image_generation.progress":
            pass
        self.leave()
        return event

    def _next(self) -> dict[str, Any]:
        line = next(line for line in self._lines if line.startswith("data: "))
        event: dict[str, Any] = json.loads(line.removeprefix("data: "))
        return event


@contextlib.contextmanager
def running(errors: Path, *words: str, ready: bool = True) -> Iterator[Program]:
    """The demo model's server on two ranks of the CPU, with further options; ``errors``: a file for its stderr.

    After it there is no process and no listening port of its.
    """
    command = [sys.executable, "-m", "omni_sp.server", "--usp", "2", "--device", "cpu", "--port", "0", *words]
    with errors.open("w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    ranks: set[int] = set()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # a process that ends closes it
        port = re.search(r"listening on http://127\.0\.0\.1:(\d+)", line)
        assert port is not None, line + errors.read_text()
        program = Program(process, int(port[1]), errors)
        try:
            if ready:
                until(lambda: program.get("/health").status_code == 200 or process.poll() is not None, START_S)
                assert process.poll() is None, errors.read_text()
            yield program
        finally:
            ranks = descendants(process.pid)
            program.client.close()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.communicate()
        assert becomes_true(lambda: not any(alive(pid) for pid in ranks), _LEAVE_S), "a rank is left"
    assert is_free(program.port)


def is_free(port: int) -> bool:
    """Can a new server listen there?"""
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait for a condition."""
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """OpenAI's error object; the answer must be one."""
    body = answer.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error
