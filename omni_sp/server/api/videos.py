"""``/v1/videos``: OpenAI's Videos API. A video is a job; its file is fetched when it is done."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import Field
from starlette.datastructures import UploadFile

from omni_sp.async_omni import AsyncOmni
from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.engine.messages import new_seed
from omni_sp.errors import ConfigError
from omni_sp.pipelines.arguments import frames_per_second
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.pipelines.export import require_video_writer
from omni_sp.pipelines.images import EncodedImage
from omni_sp.server.api.schemas import (
    Count,
    Fields,
    Lora,
    NumberOrText,
    Scale,
    Seed,
    Size,
    Text,
    as_adapters,
    check_model,
    from_form,
    parse_size,
    require_at_most,
)
from omni_sp.server.errors import ApiError, refusal, unreadable_json
from omni_sp.server.forms import MULTIPART, content_type, read_form, require_kind
from omni_sp.server.pictures import files_at
from omni_sp.server.settings import ServerSettings
from omni_sp.server.storage.file_store import FileStore
from omni_sp.server.storage.job_store import COMPLETED, FAILED, VideoJob
from omni_sp.server.storage.video_jobs import VideoJobs
from omni_sp.server.uploads import Uploads
from omni_sp.validation import shown

_POLL_AFTER_MS = 500
"""Milliseconds that OpenAI's client waits between two looks at a video that is not done."""
_PICTURE = "input_reference"


class VideoFields(Fields):
    """The fields of a request for a video, beside the picture ``input_reference``. The model decides what is left out.

    ``size`` is "WIDTHxHEIGHT" in pixels or "auto". ``seconds`` is rounded to what the model can make, ``num_frames`` is
    exact; ``fps`` are the frames to show in a second. The same ``seed`` makes the same video. ``true_cfg_scale`` is
    classifier-free guidance with the negative prompt, of models that know it. ``lora`` names adapters of
    ``/v1/loras``, each with a ``scale``. Numbers may come as text; ``user`` and ``safety_identifier`` are not looked
    at.
    """

    without_effect: ClassVar[tuple[str, ...]] = ("user", "safety_identifier")

    prompt: Annotated[Text, Field(min_length=1)] | None = None
    model: str | None = None
    seconds: Annotated[float, Field(gt=0, le=3600), NumberOrText] | None = None
    size: Size | None = None
    num_frames: Count | None = None
    fps: Annotated[float, Field(ge=0.1, le=240), NumberOrText] | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Scale | None = None
    true_cfg_scale: Scale | None = None
    negative_prompt: Text | None = None
    seed: Seed = None
    lora: Lora | None = None
    user: str | None = None
    safety_identifier: str | None = None


def create_video_router(omni: AsyncOmni, settings: ServerSettings, files: FileStore, uploads: Uploads) -> APIRouter:
    """The routes below ``/v1/videos``. Their jobs start and end with the application (the router has a lifespan).

    ``files`` keeps videos and jobs; whoever opened it closes it after the application's end.
    """

    async def read_picture(data: bytes) -> EncodedImage:
        picture = EncodedImage(data)
        await uploads.check([picture], param=_PICTURE)
        return picture

    jobs = VideoJobs(omni, files, model=settings.names[0], max_age_s=settings.file_max_age_s, read_picture=read_picture)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await jobs.start()
        try:
            yield
        finally:
            await jobs.close(settings.drain_timeout_s)

    router = APIRouter(prefix="/v1/videos", tags=["videos"], lifespan=lifespan)
    _add_create(router, omni, settings, jobs)
    _add_jobs(router, jobs)
    _add_content(router, jobs)
    return router


def _add_create(router: APIRouter, omni: AsyncOmni, settings: ServerSettings, jobs: VideoJobs) -> None:
    @router.post("", summary="Make a video", openapi_extra=_body_schema())
    async def create(request: Request) -> JSONResponse:
        fields, picture = await _read_request(request, settings)
        job = _job(fields, omni.info.capabilities, settings, has_picture=picture is not None)
        try:
            return _answer(await jobs.submit(job, picture))
        except sqlite3.Error as error:
            raise ApiError(507, f"the job could not be written down: {error}", code="storage_failed") from error


def _add_jobs(router: APIRouter, jobs: VideoJobs) -> None:
    @router.get("", summary="List videos")
    async def list_videos(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> JSONResponse:
        try:
            page, has_more = jobs.page(limit=limit, after=after, ascending=order == "asc")
        except KeyError:
            raise ApiError(400, f"after={shown(after)}: there is no such video", param="after") from None
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        data = [as_video(job) for job in page]
        return JSONResponse({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more})

    @router.get("/{video_id}", summary="How far a video is")
    async def retrieve(video_id: str) -> JSONResponse:
        return _answer(_found(jobs, video_id))

    @router.delete("/{video_id}", summary="Remove a video; stop it where it is being made")
    async def delete(video_id: str) -> JSONResponse:
        _found(jobs, video_id)
        await jobs.delete(video_id)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})


def _add_content(router: APIRouter, jobs: VideoJobs) -> None:
    @router.get(
        "/{video_id}/content",
        summary="Fetch a finished video",
        response_class=FileResponse,
        responses={200: {"content": {media_type: {} for media_type in ("video/mp4", "image/webp", "audio/wav")}}},
    )
    async def content(video_id: str, variant: str = "video") -> FileResponse:
        job = _found(jobs, video_id)
        if variant not in ("video", "thumbnail", "audio"):
            raise ApiError(400, f"variant={shown(variant)}: there are video, thumbnail and audio", param="variant")
        if job.status == FAILED:
            raise ApiError(400, f"{video_id} failed: {job.error_message}", code="video_failed")
        if job.status != COMPLETED:
            message = f"{video_id} is {job.status}, {job.progress} %: fetch it when it is completed"
            raise ApiError(400, message, code="video_not_ready")
        try:
            path, media_type = jobs.file(job, variant)
        except KeyError:
            reason = "it is no longer kept" if variant in job.files else "this video has none"
            raise ApiError(404, f"{video_id} has no {variant}: {reason}", code="content_not_found") from None
        return FileResponse(
            path,
            media_type=media_type,
            filename=f"{video_id}{path.suffix}",
            content_disposition_type="inline",
            headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "private"},
        )


def as_video(job: VideoJob) -> dict[str, Any]:
    """A job in the shape that OpenAI's client reads, with fields of our own: seed, num_frames, fps, note."""
    error = {"code": job.error_code, "message": job.error_message} if job.status == FAILED else None
    times = {"completed_at": job.completed_at, "expires_at": job.expires_at}
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        **{name: None if value is None else int(value) for name, value in times.items()},
        "prompt": job.prompt,
        "size": job.size,
        "seconds": None if job.seconds is None else f"{job.seconds:.3f}".rstrip("0").rstrip("."),
        "error": error,
        "remixed_from_video_id": None,
        "seed": job.params.get("seed"),
        "num_frames": job.params.get("num_frames"),
        "fps": job.params.get("fps"),
        "note": job.note,
    }


def _answer(job: VideoJob) -> JSONResponse:
    headers = {} if job.is_over else {"openai-poll-after-ms": str(_POLL_AFTER_MS)}
    return JSONResponse(as_video(job), headers=headers)


def _found(jobs: VideoJobs, video_id: str) -> VideoJob:
    try:
        return jobs.get(video_id)
    except KeyError:
        raise ApiError(404, f"there is no video {shown(video_id)}", param="video_id", code="video_not_found") from None


# Requests


async def _read_request(request: Request, settings: ServerSettings) -> tuple[VideoFields, bytes | None]:
    """Read the fields of a form or of JSON, and the picture's file."""
    kind = content_type(request)
    if kind in (MULTIPART, "application/x-www-form-urlencoded"):
        body = await _form_fields(request, settings.max_body_bytes)  # a data: URL may be long
        picture = body.pop(_PICTURE, None)
        fields = from_form(VideoFields, body)
    elif kind == "application/json":
        body = _json_fields(await request.body())
        picture = body.pop(_PICTURE, None)
        fields = VideoFields.model_validate(body)
    else:
        message = f"content-type {shown(kind) if kind else 'missing'}: send {MULTIPART} or application/json"
        raise ApiError(415, message, code="unsupported_media_type")
    if picture is None or isinstance(picture, bytes):
        return fields, picture
    if isinstance(picture, dict) and set(picture) == {"image_url"}:
        picture = picture["image_url"]
    (data,) = await asyncio.to_thread(files_at, [picture], settings, param=_PICTURE)
    return fields, data


async def _form_fields(request: Request, max_part_size: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    async with read_form(request, max_files=1, max_text_bytes=max_part_size) as form:
        for name, value in form.multi_items():
            if name in (f"{_PICTURE}[image_url]", f"{_PICTURE}[]"):
                name = _PICTURE
            if name in fields:
                raise ApiError(400, f"{name} is given twice: give it once", param=name, code="invalid_value")
            require_kind(name, value, files=(_PICTURE,), fields=(*VideoFields.model_fields, _PICTURE))
            fields[name] = await value.read() if isinstance(value, UploadFile) else value
    return fields


def _json_fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise unreadable_json(error) from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is no JSON object", code="invalid_json")
    return fields


def _job(
    fields: VideoFields, capabilities: PipelineCapabilities, settings: ServerSettings, *, has_picture: bool
) -> VideoJob:
    """The job for a request, within the operator's limits. What the pipeline cannot take is refused in its queue.

    A seed is drawn where none is given, so that a job that starts again after a crash makes the same video.
    """
    check_model(settings, fields.model)
    if not capabilities.makes_videos:
        where = "use /v1/images/generations" if capabilities.makes == "picture" else "serve a video model"
        message = f"{settings.names[0]} ({capabilities.name}) makes {capabilities.makes}s and no videos: {where}"
        raise ApiError(400, message, param="model", code="unsupported_model")
    if fields.prompt is None and not has_picture:
        raise refusal("prompt", "say what the video is to show", code="missing_required_parameter")
    try:
        require_video_writer()
    except ConfigError as error:
        raise ApiError(501, str(error), code="no_video_writer") from error
    width, height = parse_size(fields.size, settings)
    frames_per_s = frames_per_second(capabilities, capabilities.sampling_defaults, fields.fps)
    num_frames = _num_frames(fields, capabilities, frames_per_s, settings)
    require_at_most("num_inference_steps", fields.num_inference_steps, settings.max_steps)
    seed = fields.seed
    if seed is None and capabilities.argument_name("generator") is not None:
        seed = new_seed()
    params = OmniDiffusionSamplingParams(
        height=height,
        width=width,
        num_frames=num_frames,
        fps=fields.fps,
        num_inference_steps=fields.num_inference_steps,
        guidance_scale=fields.guidance_scale,
        true_cfg_scale=fields.true_cfg_scale,
        negative_prompt=fields.negative_prompt,
        seed=seed,
        lora=as_adapters(fields.lora),
    )
    capabilities.require_adapters(name for name, _ in params.adapters)
    shown = {name: getattr(params, name) or _default(capabilities, name) for name in ("width", "height", "num_frames")}
    steps = params.num_inference_steps or _default(capabilities, "num_inference_steps")
    _require_affordable({**shown, "num_inference_steps": steps}, settings)
    return VideoJob(
        id=f"video_{secrets.token_hex(16)}",
        model=settings.names[0],
        created_at=time.time(),
        prompt=fields.prompt,
        params={name: value for name, value in vars(params).items() if value is not None and name != "extra_args"},
        seconds=shown["num_frames"] / frames_per_s if shown["num_frames"] else None,
        size=f"{shown['width']}x{shown['height']}" if shown["width"] and shown["height"] else None,
    )


def _num_frames(
    fields: VideoFields, capabilities: PipelineCapabilities, fps: float, settings: ServerSettings
) -> int | None:
    """The requested number of frames; for ``seconds``, the nearest number that the model can make."""
    if fields.seconds is not None and fields.num_frames is not None:
        message = "seconds and num_frames say the same: give one of them"
        raise ApiError(400, message, param="num_frames", code="invalid_value")
    num_frames, name = fields.num_frames, "num_frames"
    if fields.seconds is not None:
        name, multiple = "seconds", capabilities.frames_multiple
        if capabilities.argument_name("num_frames") is None:
            raise ApiError(400, f"{capabilities.name} alone decides how long a video is: leave seconds out", param=name)
        # The nearest, with .5 rounded up; one frame at least.
        num_frames = multiple * math.floor((fields.seconds * fps - 1) / multiple + 0.5) + 1
        num_frames = max(1, num_frames)
    if num_frames is not None and num_frames > settings.max_frames:
        message = f"{num_frames} frames: this server allows up to {settings.max_frames}"
        raise ApiError(400, message, param=name, code="invalid_value")
    return num_frames


def _require_affordable(factors: Mapping[str, int | None], settings: ServerSettings) -> None:
    """Refuse a video that costs more than the operator allows: its size, frames and steps may each be small enough."""
    known = {name: value for name, value in factors.items() if value}
    cost = math.prod(known.values())
    if cost > settings.max_video_pixel_steps:
        product = " × ".join(f"{name} {value}" for name, value in known.items())
        reason = f"{product} = {cost} is more than {settings.max_video_pixel_steps}, which is the most of a video here"
        raise refusal("size", f"{reason}: ask for a smaller size, fewer frames or fewer steps")


def _default(capabilities: PipelineCapabilities, name: str) -> int | None:
    """The pipeline's own default of a parameter; None where only the pipeline knows it."""
    value = capabilities.sampling_defaults.get(
        name, capabilities.parameters.get(capabilities.argument_name(name) or "")
    )
    return value if isinstance(value, int) else None


def _body_schema() -> dict[str, Any]:
    """The API's description of the body, which FastAPI cannot know: it is read by hand, as a form or as JSON."""
    schema = VideoFields.model_json_schema()
    picture = {"type": "string", "format": "binary", "description": "the picture to start from"}
    form = {**schema, "properties": {**schema["properties"], _PICTURE: picture}}
    url = {"type": "object", "properties": {"image_url": {"type": "string"}}}
    plain = {**schema, "properties": {**schema["properties"], _PICTURE: url}}
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": plain}}
    return {"requestBody": {"required": True, "content": content}}
