"""Connections that send half of a request, or take half of an answer: uvicorn alone keeps them for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def http_protocol(header_timeout_s: float, answer_timeout_s: float) -> type[asyncio.Protocol]:
    """The HTTP protocol of uvicorn with bounds: a connection ends whose client sends or takes nothing any more.

    The first seconds count from the beginning of the connection, and later from the first byte of each further request.
    What comes before that byte, uvicorn bounds itself (``timeout_keep_alive``); what comes after the head, BodyLimit
    does.

    Args:
        header_timeout_s: seconds that the head of a request may take.
        answer_timeout_s: the longest pause, in seconds, of a client that is to take an answer. Meanwhile the answer is
            in memory.
    """

    class BoundedProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # h11's or httptools'
        _timer: asyncio.TimerHandle | None = None
        _has_received = False
        _sending: asyncio.TimerHandle | None = None

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
            self._stop_sending()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._await_reader()

        def resume_writing(self) -> None:
            self._stop_sending()
            super().resume_writing()

        def _await_reader(self) -> None:
            self._stop_sending()
            left = self.transport.get_write_buffer_size()
            self._sending = self.loop.call_later(answer_timeout_s, self._look_at_reader, left)

        def _look_at_reader(self, left: int) -> None:
            if self.transport.get_write_buffer_size() < left:  # a slow one, of a large answer
                self._await_reader()
            else:
                self.transport.abort()

        def _stop_sending(self) -> None:
            if self._sending is not None:
                self._sending.cancel()
                self._sending = None

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
