"""One request under way: its events, a client that may go away meanwhile, and what is streamed of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from omni_sp.async_omni import AsyncOmni
from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.events import RequestDone, RequestEvent, RequestFailed
from omni_sp.outputs import OmniRequestOutput
from omni_sp.server.errors import CLIENT_CLOSED, ApiError, to_api_error

KEEP_ALIVE = b": still here\n\n"
"""A comment, which clients of server-sent events skip; it keeps proxies from closing a silent connection."""

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "At once, or with ``stream`` as events.", "content": {"text/event-stream": {}}}
}
"""What the API's description says of a route whose answer may be an EventStream."""

Events = AsyncGenerator[RequestEvent | None, None]


async def run_to_completion(
    omni: AsyncOmni, request: Request, prompt: Any, params: OmniDiffusionSamplingParams
) -> OmniRequestOutput:
    """Draw, and wait for it. A client that goes away meanwhile aborts it.

    Raises:
        OmniSPError: as AsyncOmni.generate and its RequestFailed have it. ApiError: 499: the client went away.
    """
    drawing = asyncio.create_task(_last(omni, prompt, params))
    leaving = asyncio.create_task(wait_disconnect(request.receive))
    try:
        await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            raise ApiError(CLIENT_CLOSED, "the client went away", code="aborted", kind="request_aborted_error")
        return drawing.result()
    finally:
        await _end(drawing, leaving)


async def start_stream(
    omni: AsyncOmni, prompt: Any, params: OmniDiffusionSamplingParams, *, previews: bool, pause_s: float
) -> Events:
    """Draw, and tell the events; None after every ``pause_s`` without one. Closing it aborts the request.

    Raises:
        OmniSPError: at once, where the request is refused.
    """
    events = with_keepalive(omni.generate(prompt, params, previews=previews), pause_s)
    # Advanced to its first event here: a refusal must become a status, which comes before any stream.
    first = await anext(events)
    return _after(first, events)


class EventStream(Response):
    """Server-sent events. When the client goes away, the chunks and what they are made from are closed at once."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], source: Events) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._source = chunks, source
        self.background: BackgroundTask | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until it is over or nobody listens."""
        assert scope["type"] == "http"
        sending = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(wait_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with contextlib.suppress(OSError):  # the connection broke
                    sending.result()
        finally:
            await _end(sending, leaving)
            await self._chunks.aclose()
            # A generator that was never begun does not close what it would have read.
            await self._source.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event_bytes(body: dict[str, Any], *, named: bool = True) -> bytes:
    """One server-sent event; ``named`` after its type, as OpenAI's image events are."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    name = f"event: {body['type']}\n" if named else ""
    return f"{name}data: {data}\n\n".encode()


def error_bytes(error: BaseException) -> bytes:
    """The event that ends a stream which went wrong; OpenAI's client raises it."""
    told = to_api_error(error)
    body = {"type": "error", **told.body, "status": told.status}
    return b"event: error\n" + event_bytes(body, named=False)


async def _last(omni: AsyncOmni, prompt: Any, params: OmniDiffusionSamplingParams) -> OmniRequestOutput:
    async with contextlib.aclosing(omni.generate(prompt, params)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, RequestFailed):
                raise event.error
            if isinstance(event, RequestDone):
                return event.output
    raise AssertionError("a request ends with RequestDone or RequestFailed")


async def _after(first: RequestEvent | None, events: Events) -> Events:
    async with contextlib.aclosing(events):
        yield first
        async for event in events:
            yield event


async def with_keepalive(events: AsyncIterator[RequestEvent], pause_s: float) -> Events:
    """The events; None after every pause."""
    pending: asyncio.Task[RequestEvent | None] | None = None
    try:
        while True:
            pending = pending or asyncio.create_task(_next(events))
            done, _ = await asyncio.wait({pending}, timeout=pause_s)
            if not done:
                yield None
                continue
            event, pending = pending.result(), None
            if event is None:
                return
            yield event
    finally:
        if pending is not None:
            await _end(pending)
        await events.aclose()  # type: ignore[attr-defined]  # it is an async generator


async def _next(events: AsyncIterator[RequestEvent]) -> RequestEvent | None:
    return await anext(events, None)


async def wait_disconnect(receive: Receive) -> None:
    """Return when the client has left; its body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
