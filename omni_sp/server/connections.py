"""Connections that send nothing, or half of a request: uvicorn's own HTTP protocol keeps them for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def http_protocol(header_timeout_s: float) -> type[asyncio.Protocol]:
    """The HTTP protocol of uvicorn with a bound: a connection ends whose next request has no whole head in time.

    The seconds count from the beginning of the connection, and later from the first byte of each further request. What
    comes before that byte, uvicorn bounds itself (``timeout_keep_alive``); what comes after the head, BodyLimit does.
    """

    class BoundedProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # h11's or httptools'
        _timer: asyncio.TimerHandle | None = None
        _has_received = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(header_timeout_s, self._give_up)

        def data_received(self, data: bytes) -> None:
            self._has_received = True
            if self._timer is None and self._is_between_requests():
                self._timer = self.loop.call_later(header_timeout_s, self._give_up)
            super().data_received(data)
            if not self._is_between_requests():
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _is_between_requests(self) -> bool:
            # A cycle is made once a head is whole.
            return self.cycle is None or bool(self.cycle.response_complete)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                if self._has_received:
                    self.transport.write(_TIMED_OUT)
                self.transport.close()

    return BoundedProtocol
