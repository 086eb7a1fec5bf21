"""``/v1/images/generations`` and ``/v1/images/edits``, in the shapes of OpenAI's client, streamed or at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import JSONResponse, Response

from omni_sp.async_omni import AsyncOmni
from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.events import RequestDone, RequestEvent, RequestFailed, RequestProgress, RequestQueued
from omni_sp.outputs import OmniRequestOutput, dropped_tokens_note
from omni_sp.pipelines.arguments import Prompt, call_arguments
from omni_sp.pipelines.images import EncodedImage, input_image
from omni_sp.server.api.results import count_tokens, encode, kept_settings, pictures_of
from omni_sp.server.api.schemas import (
    EditFields,
    ImageFields,
    check_generation,
    from_form,
    require_pictures,
    sampling_params,
)
from omni_sp.server.api.streaming import (
    STREAMED,
    Chunks,
    Events,
    EventStream,
    event_bytes,
    run_to_completion,
    start_stream,
)
from omni_sp.server.errors import ApiError, refusal
from omni_sp.server.forms import MULTIPART, content_type, read_form, require_kind
from omni_sp.server.pictures import MEDIA_TYPES, SUFFIXES, as_base64
from omni_sp.server.settings import ServerSettings
from omni_sp.server.storage.file_store import FileStore
from omni_sp.server.uploads import Uploads
from omni_sp.validation import shown

_SHOWN_METRICS = (
    "text_encoder_s",
    "denoise_s",
    "denoise_step_s",
    "vae_s",
    "total_s",
    "num_steps",
    "ranks",
    "tokens",
    "dropped_tokens",
)
GENERATION, EDIT = "image_generation", "image_edit"


def create_image_router(omni: AsyncOmni, settings: ServerSettings, files: FileStore, uploads: Uploads) -> APIRouter:
    """The routes below ``/v1/images``; ``files`` keeps pictures whose URL is asked for."""
    router = APIRouter(prefix="/v1/images", tags=["images"])

    @router.post("/generations", summary="Draw pictures", responses=STREAMED)
    async def generations(fields: ImageFields, request: Request) -> Response:
        check_image(fields, settings)
        require_pictures(omni, settings)
        prompt, params = Prompt(text=fields.prompt), sampling_params(fields, settings)
        return await _answer(omni, settings, files, request, fields, prompt, params)

    @router.post("/edits", summary="Edit pictures", responses=STREAMED, openapi_extra=_form_schema())
    async def edits(request: Request) -> Response:
        fields, pictures, mask = await _form(request, settings)
        check_image(fields, settings)
        capabilities = require_pictures(omni, settings)
        extra: dict[str, Any] = {}
        if mask is not None:
            if "mask_image" not in capabilities.parameters:
                raise ApiError(400, f"{capabilities.name} takes no mask", param="mask", code="invalid_value")
            extra["mask_image"] = mask
        prompt = Prompt(text=fields.prompt, image=input_image(pictures))
        params = sampling_params(fields, settings, extra)
        call_arguments(capabilities, prompt, params)  # what the pipeline cannot take is refused before it is decoded
        await uploads.check(pictures, param="image", mask=mask)
        return await _answer(omni, settings, files, request, fields, prompt, params, EDIT)

    return router


def check_image(fields: ImageFields, settings: ServerSettings) -> None:
    """Refuse (ApiError 400 or 404) what does not fit together, or is more than the operator allows."""
    check_generation(fields, settings)
    if fields.stream:
        if fields.response_format == "url":
            reason = "response_format=url: a stream carries b64_json"
            raise ApiError(400, reason, param="response_format", code="invalid_value")
        return
    for name in ("partial_images", "progress"):
        if getattr(fields, name):
            raise ApiError(400, f"{name} needs stream=true", param=name, code="invalid_value")


def usage_of(metrics: dict[str, Any], num_results: int) -> dict[str, Any]:
    """OpenAI's usage: tokens of the text as input, and of the pictures as output."""
    text_tokens, image_tokens = count_tokens(metrics, num_results)
    return {
        "input_tokens": text_tokens,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": 0},
        "output_tokens": image_tokens,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": image_tokens},
        "total_tokens": text_tokens + image_tokens,
    }


async def _answer(
    omni: AsyncOmni,
    settings: ServerSettings,
    files: FileStore,
    request: Request,
    fields: ImageFields,
    prompt: Prompt,
    params: OmniDiffusionSamplingParams,
    kind: str = GENERATION,
) -> Response:
    if fields.stream:
        first, events = await start_stream(omni, request, prompt, params, previews=bool(fields.partial_images))
        return EventStream(_stream(first, events, fields, kind, settings), events, keep_alive_s=settings.keep_alive_s)
    output = await run_to_completion(omni, request, prompt, params)
    pictures = pictures_of(output)
    encoded = [await encode(picture, fields, kept_settings(output, settings)) for picture in pictures]
    if fields.gives_urls:
        data = [{"url": await _keep(files, request, one, fields)} for one in encoded]
    else:
        data = [{"b64_json": as_base64(one)} for one in encoded]
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": data,
            "background": "opaque" if pictures[0].mode == "RGB" else "transparent",
            "output_format": fields.output_format or "png",
            "size": _size(pictures[0]),
            "usage": usage_of(output.metrics, len(pictures)),
            "seed": output.metrics.get("seed"),
            "ignored": fields.ignored,
            "metrics": _metrics(output),
            "note": dropped_tokens_note(output.metrics),
        }
    )


async def _stream(
    first: RequestEvent, events: Events, fields: ImageFields, kind: str, settings: ServerSettings
) -> Chunks:
    """OpenAI's events of one request, and our own for progress."""
    common = {
        "background": "auto",
        "output_format": fields.output_format or "png",
        "quality": "auto",
        "size": fields.size or "auto",
    }
    wanted, shown, step = fields.partial_images or 0, 0, (0, 0)
    if isinstance(first, RequestQueued) and fields.progress:
        yield _progress(kind, position=first.position)
    async for event in events:
        if isinstance(event, RequestQueued) and fields.progress:
            yield _progress(kind, position=event.position)
        elif isinstance(event, RequestProgress):
            is_shown = _is_due(event, shown, wanted)
            if fields.progress and (event.done, event.total) != step:
                step = event.done, event.total
                # Of several previews, OpenAI's events show but one.
                previews = event.previews if is_shown and len(event.previews) > 1 else ()
                yield _progress(kind, event=event, previews=[await _preview(one, fields) for one in previews])
            if event.preview is not None and is_shown:
                yield event_bytes(
                    {
                        "type": f"{kind}.partial_image",
                        "partial_image_index": shown,
                        "b64_json": as_base64(await encode(event.preview, fields)),
                        "created_at": int(time.time()),
                        **common,
                    }
                )
                shown += 1
        elif isinstance(event, RequestDone):
            for picture in pictures_of(event.output):
                yield event_bytes(await _completed(kind, picture, event.output, fields, settings, common))
        elif isinstance(event, RequestFailed):
            raise event.error


def _is_due(event: RequestProgress, shown: int, wanted: int) -> bool:
    """Is it time for the next preview? They are spread evenly over the steps, without the finished picture."""
    return shown < wanted and event.done * (wanted + 1) >= event.total * (shown + 1) and event.done < event.total


def _progress(
    kind: str, *, position: int = 0, event: RequestProgress | None = None, previews: Sequence[dict[str, str]] = ()
) -> bytes:
    """Our own event: ``position`` requests come before this one; ``step`` of ``total``, null while it waits.

    Of several pictures, ``previews`` are added when a preview is due: one of each.
    """
    step, total = (None, None) if event is None else (event.done, event.total)
    body = {"type": f"{kind}.progress", "step": step, "total": total, "position": position}
    return event_bytes({**body, "previews": previews} if previews else body)


async def _preview(picture: Image.Image, fields: ImageFields) -> dict[str, str]:
    return {"b64_json": as_base64(await encode(picture, fields)), "output_format": fields.output_format or "png"}


async def _completed(
    kind: str,
    picture: Image.Image,
    output: OmniRequestOutput,
    fields: ImageFields,
    settings: ServerSettings,
    common: dict[str, Any],
) -> dict[str, Any]:
    return {
        "type": f"{kind}.completed",
        "b64_json": as_base64(await encode(picture, fields, kept_settings(output, settings))),
        "created_at": int(time.time()),
        **common,
        "size": _size(picture),
        "background": "opaque" if picture.mode == "RGB" else "transparent",
        "usage": usage_of(output.metrics, 1),
        "seed": output.metrics.get("seed"),
        "ignored": fields.ignored,
        "metrics": _metrics(output),
        "note": dropped_tokens_note(output.metrics),
    }


async def _keep(files: FileStore, request: Request, data: bytes, fields: ImageFields) -> str:
    kind = fields.output_format or "png"
    file_id = await asyncio.to_thread(files.put, data, suffix=SUFFIXES[kind], media_type=MEDIA_TYPES[kind])
    return str(request.url_for("file_content", file_id=file_id))


def _size(picture: Image.Image) -> str:
    return f"{picture.width}x{picture.height}"


def _metrics(output: OmniRequestOutput) -> dict[str, Any]:
    return {name: output.metrics[name] for name in _SHOWN_METRICS if name in output.metrics}


async def _form(
    request: Request, settings: ServerSettings
) -> tuple[EditFields, list[EncodedImage], EncodedImage | None]:
    """Read the form of an edit: its fields, the files of its pictures, and the file of its mask."""
    kind = content_type(request)
    if kind != MULTIPART:
        message = f"content-type {shown(kind) if kind else 'missing'}: send {MULTIPART}"
        raise ApiError(415, message, code="unsupported_media_type")
    fields: dict[str, str] = {}
    pictures: list[EncodedImage] = []
    mask: EncodedImage | None = None
    async with read_form(request, max_files=settings.max_images + 1) as form:
        for name, value in form.multi_items():
            require_kind(name, value, files=("image", "image[]", "mask"), fields=EditFields.model_fields)
            if name != "image[]" and name != "image" and (name in fields or (name == "mask" and mask is not None)):
                raise ApiError(400, f"{name} is given twice: give it once", param=name, code="invalid_value")
            if isinstance(value, str):
                fields[name] = value
            elif name == "mask":
                mask = EncodedImage(await value.read(), is_mask=True)
            else:
                pictures.append(EncodedImage(await value.read()))
    checked = from_form(EditFields, fields)
    if not pictures:
        raise refusal("image", "upload the picture to edit", code="missing_required_parameter")
    if len(pictures) > settings.max_images:
        message = f"{len(pictures)} pictures: this server takes up to {settings.max_images}"
        raise ApiError(400, message, param="image", code="invalid_value")
    return checked, pictures, mask


def _form_schema() -> dict[str, Any]:
    """The API's description of the form, which FastAPI cannot know: it is read by hand."""
    schema = EditFields.model_json_schema()
    file = {"type": "string", "format": "binary"}
    several = {"type": "array", "items": file, "description": "the pictures to edit"}
    schema["properties"] |= {"image": several, "mask": file}
    schema["required"] = ["prompt", "image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
