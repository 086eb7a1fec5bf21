"""``/v1/chat/completions`` that answers with pictures, as vLLM-Omni and OpenRouter shape them, streamed or at once."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from omni_sp.async_omni import AsyncOmni
from omni_sp.events import RequestDone, RequestFailed
from omni_sp.outputs import OmniRequestOutput, dropped_tokens_note
from omni_sp.pipelines.arguments import Prompt, call_arguments
from omni_sp.pipelines.images import EncodedImage, input_image
from omni_sp.server.api.results import count_tokens, encode, kept_settings, pictures_of
from omni_sp.server.api.schemas import (
    MAX_PROMPT_CHARS,
    Count,
    Fields,
    GenerationFields,
    check_generation,
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
from omni_sp.server.pictures import MEDIA_TYPES, as_base64, files_at
from omni_sp.server.settings import ServerSettings
from omni_sp.server.uploads import Uploads

# For the API's description; the errors about a message come from last_user_message().
_PART = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["text", "image_url"]},
        "text": {"type": "string"},
        "image_url": {"type": "object", "required": ["url"], "properties": {"url": {"type": "string"}}},
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"type": "string"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]},
    },
}
_DONE = b"data: [DONE]\n\n"
_OF_TEXT = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "top_logprobs", "stop", "tools",
    "parallel_tool_calls", "reasoning_effort", "verbosity", "prompt_cache_key", "service_tier", "metadata", "store",
)  # fmt: skip
"""Fields that steer the writing of text."""


class StreamOptions(Fields):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(Fields):
    """The format of the text in an answer, which is plain: there is none."""

    type: Literal["text"]


class ChatFields(GenerationFields):
    """A chat that ends with what is to be drawn. Earlier messages are not looked at.

    Of the last message of the user, the texts are the prompt, and the pictures are edited. ``n`` asks for as many
    choices of a picture each; ``num_outputs_per_prompt`` for as many pictures in one choice; ``height`` and ``width``
    may stand for ``size``. Fields that steer the writing of text are accepted, as chat programs send them with every
    request, and change nothing here; of tools, none is ever called.
    """

    without_effect: ClassVar[tuple[str, ...]] = (*GenerationFields.without_effect, *_OF_TEXT)

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, json_schema_extra={"items": _MESSAGE})]
    stream_options: StreamOptions | None = None
    num_outputs_per_prompt: Count | None = None
    height: Count | None = None
    width: Count | None = None
    modalities: list[Literal["text", "image"]] | None = None

    response_format: TextFormat | None = None
    tool_choice: Literal["none", "auto"] | None = None

    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    stop: Any = None
    tools: Any = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    prompt_cache_key: Any = None
    service_tier: Any = None
    metadata: Any = None
    store: Any = None


def create_chat_router(omni: AsyncOmni, settings: ServerSettings, uploads: Uploads) -> APIRouter:
    """The route ``/v1/chat/completions``."""
    router = APIRouter(prefix="/v1/chat", tags=["chat"])

    @router.post("/completions", summary="Draw pictures, as the answer in a chat", responses=STREAMED)
    async def completions(fields: ChatFields, request: Request) -> Response:
        one_choice = fields.num_outputs_per_prompt is not None
        request_fields = _as_generation(fields)
        check_generation(request_fields, settings)
        text, urls = last_user_message(fields.messages, settings)
        capabilities = require_pictures(omni, settings)
        pictures = [EncodedImage(data) for data in await asyncio.to_thread(files_at, urls, settings, param="messages")]
        prompt = Prompt(text=text, image=input_image(pictures))
        params = sampling_params(request_fields, settings)
        call_arguments(capabilities, prompt, params)  # what the pipeline cannot take is refused before it is decoded
        await uploads.check(pictures, param="messages")
        answer = _Answer(fields, settings, one_choice)
        if fields.stream:
            _, events = await start_stream(omni, request, prompt, params)
            return EventStream(_stream(events, answer), events, keep_alive_s=settings.keep_alive_s)
        return JSONResponse(await answer.at_once(await run_to_completion(omni, request, prompt, params)))

    return router


def last_user_message(messages: list[dict[str, Any]], settings: ServerSettings) -> tuple[str, list[str]]:
    """The text of the user's last message, and its pictures' URLs; ApiError 400 where it says nothing to draw."""
    index, message = next(
        ((index, one) for index, one in reversed([*enumerate(messages)]) if one.get("role") == "user"), (0, None)
    )
    if message is None:
        raise refusal("messages", 'none has the role "user"', code="missing_required_parameter")
    where = f"messages[{index}].content"
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise refusal(where, "give a string or a list of parts")
    texts, urls = [], []
    for part in parts:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            image_url = part.get("image_url")
            url = image_url.get("url") if isinstance(image_url, dict) else image_url
            if not isinstance(url, str):
                raise refusal(where, "a part of type image_url has no url")
            urls.append(url)
        else:
            raise refusal(where, f"a part of type {str(kind)[:40]!r}: give text and image_url only")
    text = "\n".join(texts).strip()
    if not text:
        raise refusal(where, "it holds no text: say what to draw", code="missing_required_parameter")
    if len(text) > MAX_PROMPT_CHARS:
        raise refusal(where, f"{len(text)} characters of text are more than {MAX_PROMPT_CHARS}")
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise refusal(where, "it holds half of a character")
    if len(urls) > settings.max_images:
        raise refusal(where, f"{len(urls)} pictures: this server takes up to {settings.max_images}")
    return text, urls


class _Answer:
    """The shapes of one answer, at once or in chunks."""

    def __init__(self, fields: ChatFields, settings: ServerSettings, one_choice: bool) -> None:
        self._fields, self._settings, self._one_choice = fields, settings, one_choice
        model = settings.names[0]
        self._common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    async def at_once(self, output: OmniRequestOutput) -> dict[str, Any]:
        """The answer in one body."""
        choices = [
            {
                "index": index,
                # vLLM-Omni's clients read the content, OpenRouter's the images.
                "message": {"role": "assistant", "content": parts, "images": parts, "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
            for index, parts in enumerate(await self._choices(output))
        ]
        return {
            **self._common,
            "object": "chat.completion",
            "choices": choices,
            "usage": _usage(output),
            "seed": output.metrics.get("seed"),
            "dropped_tokens": output.metrics.get("dropped_tokens") or {},
            "note": dropped_tokens_note(output.metrics),
            "ignored": self._fields.ignored,
        }

    def opening(self) -> bytes:
        """The first chunk, sent while there is nothing to see yet."""
        return self._chunk([_choice(0, {"role": "assistant", "content": ""})])

    async def chunks(self, output: OmniRequestOutput) -> list[bytes]:
        """The chunks after the first: one for each choice, one for its end, and the usage where it is asked for."""
        choices = list(enumerate(await self._choices(output)))
        chunks = [
            self._chunk([_choice(index, {"role": "assistant", "content": "", "images": parts})])
            for index, parts in choices
        ]
        chunks += [self._chunk([_choice(index, {}, "stop")]) for index, _ in choices]
        options = self._fields.stream_options
        if options is not None and options.include_usage:
            chunks.append(self._chunk([], usage=_usage(output)))
        return chunks

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        body = {**self._common, "object": "chat.completion.chunk", "choices": choices, **more}
        return event_bytes(body, named=False)

    async def _choices(self, output: OmniRequestOutput) -> list[list[dict[str, Any]]]:
        """The pictures of each choice."""
        head = f"data:{MEDIA_TYPES[self._fields.output_format or 'png']};base64,"
        kept = kept_settings(output, self._settings)
        files = [await encode(picture, self._fields, kept) for picture in pictures_of(output)]
        parts = [{"type": "image_url", "image_url": {"url": head + as_base64(file)}} for file in files]
        return [parts] if self._one_choice else [[part] for part in parts]


async def _stream(events: Events, answer: _Answer) -> Chunks:
    yield answer.opening()
    async for event in events:
        if isinstance(event, RequestDone):
            for chunk in await answer.chunks(event.output):
                yield chunk
            yield _DONE
        elif isinstance(event, RequestFailed):
            raise event.error


def _as_generation(fields: ChatFields) -> GenerationFields:
    """The request's fields under their names in GenerationFields; ApiError 400 for two names of one thing."""
    if fields.num_outputs_per_prompt is not None and fields.n not in (None, 1):
        raise ApiError(400, "give n or num_outputs_per_prompt, not both", param="n", code="invalid_value")
    size = fields.size
    if fields.height is not None or fields.width is not None:
        if size is not None:
            raise ApiError(400, "give size, or height and width", param="size", code="invalid_value")
        if fields.height is None or fields.width is None:
            raise ApiError(400, "give both height and width", param="size", code="invalid_value")
        size = f"{fields.width}x{fields.height}"
    known = {name: getattr(fields, name) for name in GenerationFields.model_fields}
    return GenerationFields(**{**known, "n": fields.num_outputs_per_prompt or fields.n, "size": size})


def _choice(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}


def _usage(output: OmniRequestOutput) -> dict[str, int]:
    """OpenAI's usage of chats: tokens of the text as prompt, and of the pictures as completion."""
    text_tokens, picture_tokens = count_tokens(output.metrics, len(output.images))
    total = text_tokens + picture_tokens
    return {"prompt_tokens": text_tokens, "completion_tokens": picture_tokens, "total_tokens": total}
