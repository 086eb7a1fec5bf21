"""Clients that do not send: half of a request ends, whatever it is half of."""

from __future__ import annotations

import asyncio
import socket
import types
from typing import Any

import pytest

from omni_sp.server.security import BodyLimit
from tests.server.fakes import FakeOmni, held
from tests.server.serving import PATIENCE_S, Served, serving, until
from tests.server.test_images import open_request

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def connected(served: Served, sends: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE_S)
    connection.sendall(sends)
    return connection


def rest_of(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    received = b""
    with connection:
        while some := connection.recv(65536):
            received += some
    return received


def test_half_sent_heads_end_and_what_runs_goes_on() -> None:
    omni = held()
    with serving(omni, header_timeout_s=0.3) as served:
        running = open_request(served, {"prompt": "x"})
        until(lambda: omni.requests)
        silent = connected(served)
        halves = [connected(served, HEAD[:length]) for length in (1, 20, len(HEAD))]
        second = connected(served, HEAD + b"\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += second.recv(65536)
        second.sendall(HEAD)
        assert rest_of(silent) == b""
        for connection in (*halves, second):
            assert rest_of(connection).startswith(b"HTTP/1.1 408 ")
        omni.go_on.set()
        assert running.recv(65536).startswith(b"HTTP/1.1 200")
        running.close()


def test_a_head_that_trickles_ends() -> None:
    with serving(FakeOmni(), header_timeout_s=0.3) as served, connected(served) as connection:
        connection.settimeout(0.02)
        answer = b""
        for byte in HEAD * 20:  # far more than the time allows
            try:
                connection.sendall(bytes([byte]))
                answer = connection.recv(65536)
                break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("it was never ended")
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(("bytes_per_message", "is_ended"), [(1, True), (100_000, False)])
def test_a_body_that_trickles_ends(bytes_per_message: int, is_ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message comes in time; together they take an hour."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("omni_sp.server.security.time", types.SimpleNamespace(monotonic=lambda: clock.now))
    left = 100

    async def receive() -> dict[str, Any]:
        nonlocal left
        clock.now += 36.0
        left -= 1
        return {"type": "http.request", "body": b"x" * bytes_per_message, "more_body": left > 0}

    async def read_all(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def send(message: Any) -> None:
        raise AssertionError("it answers nothing itself")

    limit = BodyLimit(read_all, max_bytes=2**30, timeout_s=60.0)
    scope = {"type": "http", "headers": []}
    if is_ended:
        with pytest.raises(Exception, match="too slowly"):
            asyncio.run(limit(scope, receive, send))
        assert left > 90
    else:
        asyncio.run(limit(scope, receive, send))
        assert left == 0
