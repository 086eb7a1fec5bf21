"""A server in a thread of the test's own process, on a free port, over FakeOmni or any other AsyncOmni."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import uvicorn

from omni_sp.async_omni import AsyncOmni
from omni_sp.server.app import create_app
from omni_sp.server.settings import ServerSettings

PATIENCE_S = 60.0


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
    app = create_app(omni, ServerSettings(**{"drain_timeout_s": 5.0, **settings}))
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5, lifespan="on")
    server = uvicorn.Server(config)
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
