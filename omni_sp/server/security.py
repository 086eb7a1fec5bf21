"""Middleware before every route: API keys, other people's web pages, the size and the pace of bodies, request ids."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni_sp.server.errors import ApiError
from omni_sp.server.logs import log_request
from omni_sp.server.settings import ServerSettings

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_DISCARD_S = 1.0
_MIN_BYTES_PER_S = 1024
_METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# The id in a finished picture's URL cannot be guessed, so whoever has the URL may fetch the picture without a key.
_OPEN = re.compile(r"/v1/files/[^/]+/content")

OnAnswer = Callable[[str, str, int], None]
"""Called with every answer: method, route ("other" where there is none), status."""


class RequestIds:
    """Gives every answer an ``X-Request-ID``, the client's own where it sends a valid one; counts and logs answers.

    What is noted in the scope's state, ``queue_s`` and ``steps``, comes into the line of the log.
    """

    def __init__(self, app: ASGIApp, on_answer: OnAnswer) -> None:
        self._app, self._on_answer = app, on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and name the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        state = scope.setdefault("state", {})
        state["request_id"] = name
        began, status = time.monotonic(), None

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = name
                headers.setdefault("X-Content-Type-Options", "nosniff")
                self._on_answer(_method(scope), _route(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception:
            status = status or 500  # which whoever catches it answers
            raise
        finally:
            log_request(name, _method(scope), _route(scope), status, time.monotonic() - began, state)


class Guard:
    """Refuses requests without an API key; where there are no keys, those of foreign web pages in a browser.

    Everything below /v1 is guarded, except what is fetched by an unguessable name. A page is foreign by its Origin; or,
    on a server for this machine only, by a host name of its own that it made point here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._origins = app, settings.allow_origins
        self._keys = [_digest(key) for key in settings.api_keys]
        self._is_local = _is_local(settings.host)
        self._hosts = {(urlsplit(origin).hostname or "").lower() for origin in settings.allow_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse."""
        if scope["type"] == "http":
            error = self._refusal(scope)
            if error is not None:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        method, headers = scope["method"], Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # every path begins with it: see RootPath
        if not (path == "/v1" or path.startswith("/v1/")) or is_open(method, path):
            return None
        if self._keys:
            return None if self._has_key(headers) else _unauthorized("authorization" in headers)
        host = (_hostname(headers.get("host", "")) or "").lower()
        if self._is_local and not (_is_local(host) or host in self._hosts or "*" in self._origins):
            return ApiError(
                403, f"this server does not go by the name {host[:80]!r}; see --allow-origin", code="foreign_host"
            )
        if method not in _SAFE_METHODS and self._is_foreign(headers):
            return ApiError(
                403, "a web page of another origin may not call this server; see --allow-origin", code="foreign_origin"
            )
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # Every key is compared, and each comparison takes the same time, so that the time of an answer shows nothing.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def _is_foreign(self, headers: Headers) -> bool:
        """Does a browser send this for a page that is not this server's own? Other clients send no Origin."""
        origin = headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return False
        site = headers.get("sec-fetch-site")
        if site is not None:
            return site != "same-origin"
        return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()


class BodyLimit:
    """Ends requests whose body is too large, or comes too slowly: reading such a body raises an ApiError, 413 or 408.

    An answer that is ready before the body has come waits a moment for it, and throws it away: a client that is still
    sending when the connection closes may lose the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a body that ends when it is too much."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        # Longer numbers than these are more than any limit, and than Python's int() reads.
        if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > self._max_bytes):
            if "expect" not in headers:  # a client that waits for "100 Continue" has sent nothing yet
                await self._discard(receive)
            await self._too_large().response()(scope, receive, send)
            return
        received, is_whole = 0, False
        began = time.monotonic()

        async def receive_some() -> Message:
            nonlocal received, is_whole
            if is_whole:  # the next message is that the client has left, for which there is no limit of time
                return await receive()
            # A byte now and then would keep a request for ever: the whole body has a bound too, which grows with it.
            left_s = began + self._timeout_s + received / _MIN_BYTES_PER_S - time.monotonic()
            if left_s <= 0:
                raise self._too_slow()
            message = await _received_within(min(self._timeout_s, left_s), receive)
            if message is None:
                raise self._too_slow()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
                if received > self._max_bytes:
                    raise self._too_large()
            return message

        async def send_after_body(message: Message) -> None:
            nonlocal is_whole
            if message["type"] == "http.response.start" and not is_whole:
                is_whole = True
                await self._discard(receive)
            await send(message)

        await self._app(scope, receive_some, send_after_body)

    async def _discard(self, receive: Receive) -> None:
        """Read the rest of a body, for a moment, and no more than may be sent here."""
        until, left = time.monotonic() + _DISCARD_S, self._max_bytes
        while left > 0 and (seconds := until - time.monotonic()) > 0:
            message = await _received_within(seconds, receive)
            if message is None:
                return
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request's body is larger than {self._max_bytes} bytes, which is the most here",
            code="body_too_large",
            headers={"Connection": "close"},
        )

    def _too_slow(self) -> ApiError:
        return ApiError(
            408,
            f"the request's body came too slowly: it may pause for {self._timeout_s:g} s, and take in all as much, and "
            "a second for each KiB",
            code="timeout",
            headers={"Connection": "close"},
        )


async def _received_within(seconds: float, receive: Receive) -> Message | None:
    """The next message; None where it takes longer.

    Not wait_for(): before Python 3.12 it loses a cancellation that comes together with the message.
    """
    receiving = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({receiving}, timeout=seconds)
        return receiving.result() if receiving.done() else None
    finally:
        receiving.cancel()


def _route(scope: Scope) -> str:
    """The pattern of a request's route; "other" where there is none."""
    return str(getattr(scope.get("route"), "path", "other"))


def _method(scope: Scope) -> str:
    """The method of a request; "other" for one that no route here has."""
    method = str(scope["method"])
    return method if method in _METHODS else "other"


def is_open(method: str, path: str) -> bool:
    """Is this path below /v1 open to whoever knows it?"""
    return method.upper() in ("GET", "HEAD") and _OPEN.fullmatch(path) is not None


def _hostname(netloc: str) -> str | None:
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None


def _is_local(host: str) -> bool:
    """Is this a name or an address of this machine that no other can reach?"""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthorized(is_given: bool) -> ApiError:
    message = "this API key is not known here" if is_given else "no API key: send the header Authorization: Bearer KEY"
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
