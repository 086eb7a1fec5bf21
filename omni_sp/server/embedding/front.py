"""The application before the replicas: it splits, sends and joins. All judgement of a request is vLLM's own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from omni_sp.errors import InvalidInputError
from omni_sp.llm.embedding.balance import is_ids
from omni_sp.llm.embedding.dispatch import Dispatcher, RequestTimedOutError
from omni_sp.llm.embedding.replicas import READY, Replicas
from omni_sp.server.api.streaming import is_done_before_disconnect
from omni_sp.server.embedding.answers import DTYPES, ENDIANNESS, FLOAT, FORMATS, joined, passed_on, replica_format
from omni_sp.server.embedding.metrics import EmbeddingMetrics
from omni_sp.server.errors import CLIENT_CLOSED, RETRY_AFTER_S, ApiError, add_error_handlers, unreadable_json
from omni_sp.server.security import BodyLimit, Guard, RequestIds
from omni_sp.server.settings import ServerSettings

_Inputs = list[str | list[int]]


def create_embedding_app(replicas: Replicas, dispatcher: Dispatcher, settings: ServerSettings) -> FastAPI:
    """The application. Its lifespan starts the replicas in the background, and ends them.

    During the lifespan ``state.starting`` is the task that starts them; its exception is why they do not start.
    """
    metrics = EmbeddingMetrics(replicas, dispatcher)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.starting = asyncio.create_task(replicas.start())
        # The exception is retrieved here, or asyncio would log that nobody did.
        app.state.starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            yield
        finally:
            await dispatcher.drain(settings.drain_timeout_s)
            app.state.starting.cancel()
            await replicas.close()

    app = FastAPI(title="Omni-SP embeddings", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(_router(replicas, dispatcher, metrics))
    add_error_handlers(app)
    app.add_exception_handler(RequestTimedOutError, _answer_timeout)
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    app.add_middleware(Guard, settings=settings)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "metadata"],
        )
    app.add_middleware(RequestIds, on_answer=metrics.on_answer)
    return app


def _router(replicas: Replicas, dispatcher: Dispatcher, metrics: EmbeddingMetrics) -> APIRouter:
    router = APIRouter()

    @router.head("/health")
    @router.get("/health")
    async def health() -> Response:
        body = {"status": replicas.status, "replicas": [replica.status for replica in replicas.all]}
        if dispatcher.is_draining:
            body["status"] = "draining"
        if body["status"] == READY:
            return JSONResponse(body)
        return JSONResponse(body, 503, headers={"Retry-After": str(RETRY_AFTER_S)})

    @router.get("/metrics")
    async def metrics_page() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/models")
    async def models() -> Response:
        return passed_on(await dispatcher.get("/v1/models"))

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:
            raise _client_left() from None
        began = time.monotonic()
        fields = _fields(request, body)
        inputs = None if fields is None else _inputs(fields)
        if fields is None or inputs is None:
            answer = await _unless_left(request, dispatcher.forward(body, _forwarded_headers(request)))
            return passed_on(answer)
        encoding_format = fields.pop("encoding_format", FLOAT)
        del fields["input"]
        asked = {**fields, "encoding_format": replica_format(encoding_format)}
        if encoding_format == FLOAT:  # whatever else it says of the format, JSON has plain numbers
            asked |= {"embed_dtype": "float32", "endianness": "native"}
        request_id = request.headers.get("x-request-id") or fields.get("request_id") or uuid.uuid4().hex[:16]
        answered = await _unless_left(request, dispatcher.embed(asked, inputs))
        if answered[0][1].status != 200:
            return passed_on(answered[0][1])
        response = await joined(answered, encoding_format, f"embd-{request_id}", replicas.all[0].usage)
        metrics.on_embedded(len(inputs), time.monotonic() - began)
        return response

    return router


def _fields(request: Request, body: bytes) -> dict[str, Any] | None:
    """The fields of a request whose inputs can be split; None for what vLLM shall see, and refuse, as it is."""
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        return None
    try:
        fields = json.loads(body)
    except RecursionError as error:
        raise unreadable_json(error) from error
    except ValueError:
        return None
    if not isinstance(fields, dict) or "messages" in fields:
        return None
    known = (("encoding_format", FORMATS), ("embed_dtype", DTYPES), ("endianness", ENDIANNESS))
    if any(name in fields and fields[name] not in values for name, values in known):
        return None
    return fields if isinstance(fields.get("request_id", ""), str) else None


def _inputs(fields: dict[str, Any]) -> _Inputs | None:
    """The inputs of a request, one an entry; None where ``input`` is nothing that vLLM embeds as texts or ids."""
    given = fields.get("input")
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        return None
    kinds = set(map(type, given))
    if kinds == {str}:
        return given
    if kinds == {int}:
        return [given]
    return given if kinds == {list} and all(map(is_ids, given)) else None


def _forwarded_headers(request: Request) -> dict[str, str]:
    """The headers of a request that vLLM is to see."""
    names = ("content-type", "x-request-id")
    return {name: request.headers[name] for name in names if name in request.headers}


async def _unless_left(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of the work, which is cancelled where the client leaves: ApiError 499."""
    task = asyncio.create_task(work)
    if not await is_done_before_disconnect(task, request.receive):
        raise _client_left()
    try:
        return task.result()
    except InvalidInputError as error:
        raise ApiError(400, str(error), param="input", code="invalid_value") from error


def _client_left() -> ApiError:
    return ApiError(CLIENT_CLOSED, "the client went away", code="aborted", kind="request_aborted_error")


async def _answer_timeout(_request: Request, error: Exception) -> Response:
    return ApiError(504, str(error), code="timeout", kind="timeout_error").response()
