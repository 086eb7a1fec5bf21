"""A request under way: the wait for its result or its events, for a client that may go away meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from fastapi import Request
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from omni_sp.async_omni import AsyncOmni
from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.events import RequestDone, RequestEvent, RequestFailed, RequestProgress
from omni_sp.outputs import OmniRequestOutput
from omni_sp.pipelines.arguments import Prompt
from omni_sp.server.errors import CLIENT_CLOSED, ApiError, to_api_error

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "At once, or with ``stream`` as events.", "content": {"text/event-stream": {}}}
}
"""The API's description of a route whose answer may be an EventStream."""
# A comment, which clients of server-sent events skip; it keeps proxies from closing a silent connection.
_KEEP_ALIVE = b": still here\n\n"

Events = AsyncGenerator[RequestEvent, None]
Chunks = AsyncGenerator[bytes, None]


async def run_to_completion(
    omni: AsyncOmni, request: Request, prompt: Prompt, params: OmniDiffusionSamplingParams
) -> OmniRequestOutput:
    """Draw, and wait for the result. A client that goes away meanwhile aborts the request: ApiError 499."""
    generating = asyncio.create_task(_result(_noted(cast(Events, omni.generate(prompt, params)), request)))
    if not await is_done_before_disconnect(generating, request.receive):
        raise ApiError(CLIENT_CLOSED, "the client went away", code="aborted", kind="request_aborted_error")
    return generating.result()


async def start_stream(
    omni: AsyncOmni, request: Request, prompt: Prompt, params: OmniDiffusionSamplingParams, *, previews: bool = False
) -> tuple[RequestEvent, Events]:
    """Queue a request whose events are to be streamed.

    A refusal must become a status, which is sent before any stream: so this returns after the first event.

    Returns:
        The first event, and the events after it. Closing them aborts the request.

    Raises:
        OmniSPError: the request is refused.
    """
    events = _noted(cast(Events, omni.generate(prompt, params, previews=previews)), request)
    return await anext(events), events


class EventStream(Response):
    """Server-sent events. When the client goes away, the chunks and what they are made from are closed at once.

    Args:
        chunks: what is sent. An exception becomes the last event: the status has gone out before.
        source: the events that the chunks are made from.
        keep_alive_s: pause in seconds after which a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: Chunks, source: Events, *, keep_alive_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._source, self._keep_alive_s = chunks, source, keep_alive_s
        self.background: BackgroundTask | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until it is over or nobody listens."""
        assert scope["type"] == "http"
        sending = asyncio.create_task(self._send_all(send))
        try:
            if await is_done_before_disconnect(sending, receive):
                with contextlib.suppress(OSError):  # the connection broke
                    sending.result()
        finally:
            await self._chunks.aclose()
            # A generator that was never begun does not close what it would have read.
            await self._source.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        next_chunk: asyncio.Task[bytes | None] | None = None
        try:
            while True:
                next_chunk = next_chunk or asyncio.create_task(_next(self._chunks))
                await asyncio.wait({next_chunk}, timeout=self._keep_alive_s)
                if next_chunk.done():
                    chunk, next_chunk = next_chunk.result(), None
                    if chunk is None:
                        break
                else:
                    chunk = _KEEP_ALIVE
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            if next_chunk is not None:
                await _cancel(next_chunk)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event_bytes(body: dict[str, Any], *, named: bool = True) -> bytes:
    """One server-sent event; ``named`` by its type, as OpenAI's image events are."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    name = f"event: {body['type']}\n" if named else ""
    return f"{name}data: {data}\n\n".encode()


def _error_bytes(error: Exception) -> bytes:
    """The event that ends a stream which went wrong; OpenAI's client raises it."""
    api_error = to_api_error(error)
    body = {"type": "error", **api_error.body, "status": api_error.status}
    return b"event: error\n" + event_bytes(body, named=False)


async def _next(chunks: Chunks) -> bytes | None:
    """The next chunk; an exception as its event, after which a generator has no more; None at the end."""
    try:
        return await anext(chunks, None)
    except Exception as error:
        return _error_bytes(error)


async def _noted(events: Events, request: Request) -> Events:
    """The same events. How long the request waited and how far it came are noted for its line in the log."""
    began, notes = time.monotonic(), request.scope["state"]
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, RequestProgress):
                notes.setdefault("queue_s", time.monotonic() - began)
                notes["steps"] = event.done
            yield event


async def _result(events: Events) -> OmniRequestOutput:
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, RequestFailed):
                raise event.error
            if isinstance(event, RequestDone):
                return event.output
    raise AssertionError("a request ends with RequestDone or RequestFailed")


async def is_done_before_disconnect(work: asyncio.Task[Any], receive: Receive) -> bool:
    """Wait for a task; False, with the task cancelled, where the client leaves before it is done."""
    leaving = asyncio.create_task(_wait_disconnect(receive))
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return work.done()
    finally:
        await _cancel(work, leaving)


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
