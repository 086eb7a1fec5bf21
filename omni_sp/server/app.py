"""The application: its routers and middleware, and what it does from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from omni_sp.async_omni import AsyncOmni
from omni_sp.server.api.chat import create_chat_router
from omni_sp.server.api.images import create_image_router
from omni_sp.server.api.reference import add_reference
from omni_sp.server.api.schemas import check_model
from omni_sp.server.api.videos import create_video_router
from omni_sp.server.errors import RETRY_AFTER_S, ApiError, add_error_handlers
from omni_sp.server.metrics import Metrics
from omni_sp.server.page import create_page_router
from omni_sp.server.pictures import MEDIA_TYPES
from omni_sp.server.proxies import Forwarded, RootPath
from omni_sp.server.security import BodyLimit, Guard, RequestIds
from omni_sp.server.settings import ServerSettings
from omni_sp.server.storage.file_store import FileStore
from omni_sp.server.uploads import Uploads

_HEALTH: dict[int | str, dict[str, Any]] = {
    503: {"description": "Not yet, or no longer: ``status`` says which.", "content": {"application/json": {}}}
}


def create_app(omni: AsyncOmni, settings: ServerSettings) -> FastAPI:
    """The server's application. Its lifespan starts the engine in the background, and drains and closes it at the end.

    During the lifespan ``state.starting`` is the task that starts the engine; its exception is why it does not start.
    """
    files = FileStore(
        settings.data_dir, max_age_s=settings.file_max_age_s, max_total_bytes=settings.file_max_total_bytes
    )
    metrics, uploads = Metrics(omni), Uploads(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        files.open()
        app.state.starting = asyncio.create_task(omni.start())
        # The exception is retrieved here, or asyncio would log that nobody did.
        app.state.starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            yield
        finally:
            await omni.drain(settings.drain_timeout_s)
            app.state.starting.cancel()
            uploads.close()
            await asyncio.to_thread(files.close)

    app = FastAPI(
        title="Omni-SP",
        summary=f"{settings.names[0]}, in OpenAI's shapes",
        lifespan=lifespan,
        docs_url=None,  # ours needs nothing from elsewhere
        redoc_url=None,
    )
    app.state.omni, app.state.settings = omni, settings
    app.include_router(_server_router(omni, settings, files, metrics))
    app.include_router(create_image_router(omni, settings, files, uploads))
    app.include_router(create_chat_router(omni, settings, uploads))
    app.include_router(create_video_router(omni, settings, files, uploads))
    app.include_router(create_page_router(omni, settings))
    add_reference(app, needs_key=bool(settings.api_keys))
    add_error_handlers(app)
    # The last one added is the first to see a request.
    app.add_middleware(Forwarded, allow_ips=settings.forwarded_allow_ips)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    app.add_middleware(Guard, settings=settings)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID"],
        )
    app.add_middleware(RequestIds, on_answer=metrics.on_answer)
    app.add_middleware(RootPath, root_path=settings.root_path)
    return app


def _server_router(omni: AsyncOmni, settings: ServerSettings, files: FileStore, metrics: Metrics) -> APIRouter:
    """The routes about the server itself, and the pictures that it keeps."""
    router = APIRouter(tags=["server"])
    created = int(time.time())

    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="200 once requests are drawn, else 503 and why", responses=_HEALTH)
    async def health() -> Response:
        status, replicas = omni.status, [replica.status for replica in omni.replicas]
        body = {"status": status, **({"replicas": replicas} if len(replicas) > 1 else {})}
        if status == "ready":
            return JSONResponse(body)
        return JSONResponse(body, 503, headers={"Retry-After": str(RETRY_AFTER_S)})

    @router.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse)
    async def metrics_page() -> Response:
        return Response(await asyncio.to_thread(metrics.page), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/models", summary="The model that is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, created) for name in settings.names]}

    @router.get("/v1/loras", summary="The LoRA adapters that requests may name")
    async def loras() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "lora"} for name in omni.info.capabilities.adapters]}

    @router.get("/v1/models/{name:path}", summary="The model that is served")
    async def model(name: str) -> dict[str, Any]:
        check_model(settings, name)
        return _model(name, created)

    @router.get(
        "/v1/files/{file_id}/content",
        name="file_content",
        summary="Fetch a picture",
        response_class=FileResponse,
        responses={200: {"content": {media_type: {} for media_type in MEDIA_TYPES.values()}}},
    )
    async def file_content(file_id: str) -> FileResponse:
        try:
            path, media_type = await asyncio.to_thread(files.path, file_id)
        except KeyError:
            raise ApiError(404, "there is no such file, or no longer", param="file_id", code="file_not_found") from None
        return FileResponse(path, media_type=media_type, headers={"Cache-Control": "private, max-age=3600"})

    return router


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "omni-sp"}
