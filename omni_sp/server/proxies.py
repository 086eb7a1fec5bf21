"""A server behind a proxy: below a path, and with the addresses that its clients have for it."""

from __future__ import annotations

import ipaddress
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from omni_sp.server.settings import trusted_networks

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}(:[0-9]{1,5})?|\[[0-9a-fA-F:.]{2,45}\](:[0-9]{1,5})?")


class RootPath:
    """Gives every request a path that begins with the root path, whether the proxy passes that on or takes it off.

    So there is one form of a path for all that is behind it: the guard sees what the routes see.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with the root path."""
        if scope["type"] == "http":
            path = scope["path"]
            is_below = path == self._root_path or path.startswith(f"{self._root_path}/")
            scope = {**scope, "root_path": self._root_path, "path": path if is_below else self._root_path + path}
        await self._app(scope, receive, send)


class Forwarded:
    """Takes ``X-Forwarded-Proto`` and ``X-Forwarded-Host`` of trusted proxies for the URLs in answers, and only there.

    It comes after the guard: a web page may send these headers too.
    """

    def __init__(self, app: ASGIApp, allow_ips: str) -> None:
        self._app, self._networks = app, trusted_networks(allow_ips)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, under the address that the proxy's client used."""
        if scope["type"] == "http" and self._trusts(scope.get("client")):
            headers = Headers(scope=scope)
            scheme = _last(headers.get("x-forwarded-proto"))
            host = _last(headers.get("x-forwarded-host"))
            scope["headers"] = list(scope["headers"])  # in place: RequestIds reads the route from this scope
            if scheme in ("http", "https"):
                scope["scheme"] = scheme
            if _HOST.fullmatch(host):
                MutableHeaders(scope=scope)["host"] = host
        await self._app(scope, receive, send)

    def _trusts(self, client: tuple[str, int] | None) -> bool:
        try:
            address = ipaddress.ip_address(client[0].partition("%")[0] if client else "")
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)


def _last(value: str | None) -> str:
    """What the nearest proxy has added to a header."""
    return (value or "").rpartition(",")[2].strip()
