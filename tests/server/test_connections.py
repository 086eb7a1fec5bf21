"""Clients that do not send, or do not take: half of a request ends, whatever it is half of, and half of an answer."""

from __future__ import annotations

import asyncio
import socket
import types
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import pytest
import uvicorn

from omni_sp.server.connections import http_protocol
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


def test_a_client_that_takes_nothing_of_its_answers_is_left() -> None:
    with serving(FakeOmni(), answer_timeout_s=0.3) as served:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", served.port))
        # Its answers are more than the buffers between the two hold.
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400)
        until(lambda: served.get("/health").status_code == 200 and is_left(connection))
        connection.close()


def is_left(connection: socket.socket) -> bool:
    """Whether the server has broken the connection; nothing is read of it."""
    try:
        connection.send(b"x")
    except ConnectionError:
        return True
    return False


def test_a_client_that_takes_an_answer_slowly_gets_it() -> None:
    timers: list[Callable[[], None]] = []
    left = [3000]
    transport = MagicMock()
    transport.get_write_buffer_size = lambda: left[0]

    async def protocol_of() -> Any:
        config = uvicorn.Config(lambda: None)
        config.load()
        made = http_protocol(20.0, 120.0)(config, uvicorn.server.ServerState(), {})  # type: ignore[call-arg]
        made.connection_made(transport)
        return made

    def call_later(_seconds: float, function: Callable[..., None], *args: Any) -> MagicMock:
        timers.append(partial(function, *args))
        return MagicMock()

    protocol = asyncio.run(protocol_of())
    protocol.loop = types.SimpleNamespace(call_later=call_later)
    protocol.pause_writing()
    for left[0] in (2000, 1999):
        timers.pop()()
        transport.abort.assert_not_called()
    timers.pop()()
    transport.abort.assert_called_once()


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
