"""Fetch files that clients name by URL, from public addresses only: the server's own network is not theirs to reach."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from omni_sp.server.errors import ApiError, refusal

_TIMEOUT_S = 20.0
"""The longest pause of a host."""
_LONGEST_S = 60.0
"""What an answer may take in all: one that comes byte by byte never pauses."""


def fetch(url: str, *, max_bytes: int, param: str) -> bytes:
    """Fetch the file at an http(s) URL. Redirects are not followed.

    Raises:
        ApiError: 400: no such host, an address that is not public, another status than 200, too large, or too slow.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _refusal(param, f"no URL: {error}") from error
    if not host or parts.scheme not in ("http", "https"):
        raise _refusal(param, "give a URL that begins with https://")
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=ssl.create_default_context())
    else:
        connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    # The address that is checked is the one that the connection goes to, not one that the name had a moment before.
    connection._create_connection = _connect  # type: ignore[attr-defined]
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "omni-sp"})
        with _ended_after(connection.sock, _LONGEST_S):
            answer = connection.getresponse()
            if answer.status != 200:
                raise _refusal(param, f"{host} answered with status {answer.status}")
            data = answer.read(max_bytes + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _refusal(param, f"the picture at {host} cannot be fetched: {error}") from error
    finally:
        connection.close()
    if len(data) > max_bytes:
        raise _refusal(param, f"the picture at {host} is larger than {max_bytes} bytes")
    return data


@contextmanager
def _ended_after(connection: socket.socket, seconds: float) -> Iterator[None]:
    """Shut a connection down where the block takes longer, which ends what it waits for with an OSError.

    Raises:
        OSError: it took longer.
    """
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        with suppress(OSError):  # it has ended by itself
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        if not is_late.is_set():
            raise
    finally:
        timer.cancel()
    if is_late.is_set():  # what has come is a part of it
        raise OSError(f"its answer takes longer than {seconds:g} s")


def is_public(address: str) -> bool:
    """Is this an IP address of the open internet?"""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_global and not ip.is_multicast


def _refusal(param: str, reason: str) -> ApiError:
    return refusal(param, reason, code="invalid_image_url")


def _connect(address: tuple[str, int], *args: Any, **kwargs: Any) -> socket.socket:
    host, port = address
    for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not is_public(str(found[4][0])):
            raise OSError("it is at no public address")
    connection = socket.create_connection(address, *args, **kwargs)
    if not is_public(connection.getpeername()[0]):
        connection.close()
        raise OSError("it is at no public address")
    return connection
