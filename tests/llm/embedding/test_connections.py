"""Answers are read however their bytes arrive, and a broken one is an error that says whether the request was sent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from omni_sp.errors import ConfigError
from omni_sp.llm.embedding.connections import (
    Address,
    Answer,
    BlockingConnection,
    ConnectionLostError,
    Connections,
    parsed,
)

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Name:  value \r\n\r\nhello"
CHUNKED = b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n"


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize(("sent", "status"), [(PLAIN, 200), (CHUNKED, 201)])
def test_answers_in_pieces(sent: bytes, status: int, step: int) -> None:
    buffer = bytearray()
    parser, whole = parsed(buffer), None
    for start in range(0, len(sent), step):
        assert whole is None
        buffer += sent[start : start + step]
        try:
            next(parser)
        except StopIteration as stop:
            whole = stop.value
    assert isinstance(whole, Answer)
    assert (whole.status, whole.body, bytes(buffer)) == (status, b"hello", b"")


@pytest.mark.parametrize("sent", [b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"])
def test_what_is_no_http(sent: bytes) -> None:
    with pytest.raises(ValueError, match=r"begins with|invalid literal"):
        next(parsed(bytearray(sent)))


@contextlib.contextmanager
def scripted(*answers: bytes) -> Iterator[Address]:
    """A server that gives each connection one answer, and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)
                    if answer == b"":
                        connection.recv(1)  # says nothing until the client leaves

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Address("", "127.0.0.1", listener.getsockname()[1])
        thread.join(10)


def exchange(address: Address, *, blocking: bool, timeout_s: float = 10.0) -> Answer:
    if blocking:
        connection = BlockingConnection(address)
        try:
            return connection.exchange("POST", "/", b"{}", timeout_s=timeout_s)
        finally:
            connection.close()

    async def run() -> Answer:
        connections = Connections(address)
        try:
            return await connections.exchange("POST", "/", b"{}", timeout_s=timeout_s)
        finally:
            connections.close()

    return asyncio.run(run())


@pytest.mark.parametrize("blocking", [True, False])
def test_one_exchange(blocking: bool) -> None:
    with scripted(CHUNKED) as address:
        assert exchange(address, blocking=blocking).body == b"hello"
    for broken in (PLAIN[:-1], b"nonsense\r\n\r\n", PLAIN[:10]):
        with scripted(broken) as address, pytest.raises(ConnectionLostError) as lost:
            exchange(address, blocking=blocking)
        assert lost.value.was_sent
    with scripted(b"") as address, pytest.raises(TimeoutError, match=r"0\.2 s"):
        exchange(address, blocking=blocking, timeout_s=0.2)
    with pytest.raises(ConnectionLostError) as lost:
        exchange(address, blocking=blocking)  # nobody listens there any more
    assert not lost.value.was_sent


@pytest.mark.parametrize("url", ["127.0.0.1:8091", "ftp://host", "http://", "http://host:port"])
def test_urls(url: str) -> None:
    with pytest.raises(ConfigError, match="give a URL such as"):
        Address.of_url(url)
    assert Address.of_url("https://host/") == Address("", "host", 443, True)
