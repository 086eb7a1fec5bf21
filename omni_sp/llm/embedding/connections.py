"""HTTP/1.1 as far as it is needed between these clients and servers: whole requests, whole answers, kept open."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Generator, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from omni_sp.errors import ConfigError

_LONGEST_HEAD = 64 * 2**20
_MAX_IDLE_S = 2.0
"""A connection that was idle for longer is not used again: uvicorn closes it after five seconds."""
_READ_BYTES = 2**18


class Answer(NamedTuple):
    """A whole answer; the names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error_message(self) -> str:
        """What the answer says of an error: OpenAI's message, or how its body begins."""
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return self.body[:500].decode("utf-8", "replace")


class ConnectionLostError(OSError):
    """No whole answer came: the other side is gone, cannot be reached, or sends what is no HTTP.

    Args:
        was_sent: whether the other side may have read the request.
    """

    def __init__(self, message: str, *, was_sent: bool) -> None:
        super().__init__(message)
        self.was_sent = was_sent


class Address(NamedTuple):
    """Where a server listens: a Unix socket, or host and port.

    Attributes:
        path: of the socket; "" where there is a host.
        host: its name.
        port: its port.
        is_encrypted: whether it speaks TLS.
    """

    path: str = ""
    host: str = "replica"
    port: int = 0
    is_encrypted: bool = False

    @classmethod
    def of_url(cls, url: str) -> Address:
        """The address in ``http://host:port``; ConfigError where there is none."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r}: {error}; give a URL such as http://127.0.0.1:8091") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r}: give a URL such as http://127.0.0.1:8091")
        is_encrypted = parts.scheme == "https"
        return cls("", parts.hostname, port or (443 if is_encrypted else 80), is_encrypted)

    def request(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        """A request as it is sent."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{self.port}" if self.port else f"Host: {host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode("latin-1") + body


class Connections:
    """Connections of one asyncio program to one server.

    Args:
        address: of the server.
        context: for TLS; by default the system's certificates are trusted.
    """

    def __init__(self, address: Address, context: ssl.SSLContext | None = None) -> None:
        self._address, self._context = address, context
        self._idle: list[tuple[float, _Exchange]] = []

    async def exchange(
        self, method: str, path: str, body: bytes = b"", *, headers: Mapping[str, str] | None = None, timeout_s: float
    ) -> Answer:
        """Send a request and wait for its answer. The connection of a cancelled one is closed.

        Raises:
            ConnectionLostError: there is no whole answer.
            TimeoutError: it did not come in time.
        """
        until = time.monotonic() + timeout_s
        connection = await self._connected(timeout_s)
        try:
            connection.send(self._address.request(method, path, body, headers or {}))
            await asyncio.wait({connection.answered}, timeout=max(0.0, until - time.monotonic()))
            if not connection.answered.done():
                raise TimeoutError(f"no answer within {timeout_s:g} s")
            answer = connection.answered.result()
        except BaseException:
            connection.close()
            raise
        if answer.headers.get("connection", "").lower() == "close":
            connection.close()
        else:
            self._idle.append((time.monotonic(), connection))
        return answer

    def close(self) -> None:
        """Close the connections that are not in use."""
        for _, connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connected(self, timeout_s: float) -> _Exchange:
        while self._idle:
            since, connection = self._idle.pop()
            if time.monotonic() - since < _MAX_IDLE_S and connection.is_open:
                return connection
            connection.close()
        loop, address = asyncio.get_running_loop(), self._address
        if address.path:
            connecting = loop.create_unix_connection(_Exchange, address.path)
        else:
            context = self._context or (ssl.create_default_context() if address.is_encrypted else None)
            connecting = loop.create_connection(_Exchange, address.host, address.port, ssl=context)
        # Not wait_for(): before Python 3.12 it loses a cancellation that comes together with the result.
        made = asyncio.ensure_future(connecting)
        try:
            await asyncio.wait({made}, timeout=timeout_s)
        except BaseException:
            made.add_done_callback(_close_unused)
            made.cancel()
            raise
        if not made.done():
            made.add_done_callback(_close_unused)
            made.cancel()
            raise TimeoutError(f"no connection within {timeout_s:g} s")
        try:
            return made.result()[1]
        except OSError as error:
            raise ConnectionLostError(f"cannot connect: {error}", was_sent=False) from error


def _close_unused(made: asyncio.Future[tuple[asyncio.Transport, _Exchange]]) -> None:
    """Close a connection that came too late."""
    if not made.cancelled() and made.exception() is None:
        made.result()[1].close()


class _Exchange(asyncio.Protocol):
    """One connection, on which requests follow each other."""

    answered: asyncio.Future[Answer]

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._parser: Generator[None, None, Answer] | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes) -> None:
        assert self._transport is not None, "it is connected"
        self.answered = asyncio.get_running_loop().create_future()
        self._parser = parsed(self._buffer)
        next(self._parser)
        self._transport.write(request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        if self._parser is not None and self.answered.cancel():
            self._parser = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._parser is None:
            self._lose("bytes that nobody asked for")
            return
        try:
            next(self._parser)
        except StopIteration as stop:
            self._parser = None
            if not self.answered.done():
                self.answered.set_result(stop.value)
        except ValueError as error:
            self._lose(f"no HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose("the connection broke" if exc is None else f"the connection broke: {exc}")

    def _lose(self, reason: str) -> None:
        if self._transport is not None:
            self._transport.abort()
        if self._parser is not None and not self.answered.done():
            self.answered.set_exception(ConnectionLostError(reason, was_sent=True))
        self._parser = None


class BlockingConnection:
    """A connection of a program without asyncio.

    Args:
        address: of the server.
        context: for TLS; by default the system's certificates are trusted.
    """

    def __init__(self, address: Address, context: ssl.SSLContext | None = None) -> None:
        self._address, self._context = address, context
        self._socket: socket.socket | None = None
        self._used_at = 0.0

    def exchange(
        self, method: str, path: str, body: bytes = b"", *, headers: Mapping[str, str] | None = None, timeout_s: float
    ) -> Answer:
        """Send a request and wait for its answer; raises what Connections.exchange() raises."""
        until = time.monotonic() + timeout_s
        if time.monotonic() - self._used_at > _MAX_IDLE_S:
            self.close()
        is_whole = False
        try:
            connection = self._socket = self._socket or self._connect(timeout_s)
            connection.settimeout(timeout_s)
            connection.sendall(self._address.request(method, path, body, headers or {}))
            buffer = bytearray()
            parser = parsed(buffer)
            while True:
                try:
                    next(parser)
                except StopIteration as stop:
                    answer: Answer = stop.value
                    break
                connection.settimeout(max(0.001, until - time.monotonic()))
                data = connection.recv(_READ_BYTES)
                if not data:
                    raise ConnectionLostError("the connection broke", was_sent=True)
                buffer += data
            is_whole = answer.headers.get("connection", "").lower() != "close"
        except TimeoutError as error:
            raise TimeoutError(f"no answer within {timeout_s:g} s") from error
        except ConnectionLostError:
            raise
        except (OSError, ValueError) as error:
            raise ConnectionLostError(f"the connection broke: {error}", was_sent=True) from error
        finally:
            self._used_at = time.monotonic()
            if not is_whole:
                self.close()
        return answer

    def close(self) -> None:
        """Close the connection. The next request opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self, timeout_s: float) -> socket.socket:
        address = self._address
        connection: socket.socket | None = None
        try:
            connection = socket.create_connection((address.host, address.port), timeout_s)
            if address.is_encrypted:
                context = self._context or ssl.create_default_context()
                connection = context.wrap_socket(connection, server_hostname=address.host)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                message = f"cannot connect to {address.host}, port {address.port}: {error}"
                raise ConnectionLostError(message, was_sent=False) from error
            raise
        return connection


def parsed(buffer: bytearray) -> Generator[None, None, Answer]:
    """Read one answer from a buffer, which grows between two steps and keeps what comes after the answer.

    Raises:
        ValueError: this is no answer.
    """
    while (end := buffer.find(b"\r\n\r\n")) < 0:
        if len(buffer) > _LONGEST_HEAD:
            raise ValueError(f"headers of more than {_LONGEST_HEAD} bytes")
        yield
    first, *lines = buffer[:end].decode("latin-1").split("\r\n")
    del buffer[: end + 4]
    version, _, status = first.partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(f"an answer that begins with {first[:40]!r}")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding", "").lower() != "chunked":
        length = int(headers.get("content-length", "0"))
        while len(buffer) < length:
            yield
        with memoryview(buffer) as view:
            body = bytes(view[:length])
        del buffer[:length]
        return Answer(int(status[:3]), headers, body)
    whole = bytearray()
    while True:
        while (end := buffer.find(b"\r\n", 0, 64)) < 0:
            if len(buffer) >= 64:
                raise ValueError("a chunk without a length")
            yield
        size = int(buffer[:end].split(b";")[0], 16)
        while len(buffer) < end + size + 4:
            yield
        whole += buffer[end + 2 : end + 2 + size]
        del buffer[: end + size + 4]
        if size == 0:  # no trailers come from uvicorn
            return Answer(int(status[:3]), headers, bytes(whole))
