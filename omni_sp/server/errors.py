"""Every error of the server in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from omni_sp.errors import (
    CallFailedError,
    EngineClosedError,
    InvalidInputError,
    NonFiniteResultError,
    OmniSPError,
    QueueFullError,
    RankFailedError,
    RequestAbortedError,
    SamplingParamsError,
    shortened,
)
from omni_sp.validation import shown, suggestion

CLIENT_CLOSED = 499
"""Nobody waits for the answer any more (nginx's number for it)."""
RETRY_AFTER_S = 5
_LOG = logging.getLogger(__name__)
# What FastAPI says of bytes that are no text, or nested too deep.
_UNREADABLE = "There was an error parsing the body"
_LONGEST_MESSAGE, _LONGEST_PARAM = 2000, 200
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# Our names -> the names that requests have for them.
_PARAMS = {"height": "size", "width": "size", "num_outputs_per_prompt": "n"}


class ApiError(HTTPException):
    """An error that a client gets as its answer.

    Args:
        param: the field of the request that is to blame.
        code: for programs.
        kind: OpenAI's error type; by default the one that belongs to the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message, param = shortened(message, _LONGEST_MESSAGE), param and shortened(param, _LONGEST_PARAM)
        super().__init__(status, message, dict(headers or {}))
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or _KINDS.get(status) or ("server_error" if status >= 500 else "invalid_request_error")

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def to_api_error(error: BaseException) -> ApiError:
    """Any error as the client should see it; an unforeseen one shows nothing of the server's inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidInputError):
        param = error.param if isinstance(error, SamplingParamsError) else None
        return ApiError(400, str(error), param=_PARAMS.get(param or "", param), code="invalid_value")
    if isinstance(error, NonFiniteResultError):  # asked again, it would come out the same
        return ApiError(422, str(error), code="not_finite")
    later = {"Retry-After": str(RETRY_AFTER_S)}
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers=later)
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), code="unavailable", kind="service_unavailable_error", headers=later)
    if isinstance(error, RequestAbortedError):
        return ApiError(CLIENT_CLOSED, str(error), code="aborted", kind="request_aborted_error")
    if isinstance(error, RankFailedError):
        # Its traceback belongs in the server's log, not into the answer.
        _LOG.error("rank %d failed: %s\n%s", error.rank, error, error.rank_traceback)
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        if error.kind == "out_of_memory":
            way_out = "ask for a smaller size, fewer frames or a smaller n"
            return ApiError(500, f"out of memory: {way_out} ({what})", code="out_of_memory")
        if isinstance(error, CallFailedError):
            return ApiError(500, f"the pipeline failed on this request: {what}", code="call_failed")
        return ApiError(500, f"a rank process failed while it drew this: {what}", code="rank_failed")
    if isinstance(error, OmniSPError):
        _LOG.error("%s: %s", type(error).__name__, error)
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, (RequestValidationError, ValidationError)):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    _LOG.error("unforeseen", exc_info=error)
    # Starlette raises it again, and uvicorn closes the connection: without the header, a client would send its next
    # request into that.
    headers = {"Connection": "close"}
    return ApiError(500, "something in the server broke; its log says what", code="internal_error", headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception of the application in OpenAI's shape."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404 and error.detail == "Not Found":
            error = ApiError(404, f"there is no route {request.method} {request.url.path}", code="unknown_url")
        elif isinstance(error, HTTPException) and error.detail == _UNREADABLE:
            error = unreadable_json(error.__cause__)
        return to_api_error(error).response()

    for kind in (HTTPException, RequestValidationError, ValidationError, OmniSPError, Exception):
        app.add_exception_handler(kind, answer)


def refusal(param: str, reason: str, *, code: str = "invalid_value") -> ApiError:
    """The error for a field whose value cannot be: status 400, and a message that begins with the field's name."""
    return ApiError(400, f"{param}: {reason}", param=param, code=code)


def unreadable_json(reason: BaseException | None) -> ApiError:
    """The error for a body that Python's parser of JSON refuses: 400."""
    what = "the body cannot be read: send a JSON object in UTF-8"
    if isinstance(reason, ValueError) and "integer string conversion" in str(reason):
        what = "the body holds a whole number of thousands of digits, which no field takes"
    elif isinstance(reason, json.JSONDecodeError):
        what = f"the body is no JSON: {reason}"
    return ApiError(400, what, code="invalid_json")


def unknown_field(name: str, known: Iterable[str]) -> ApiError:
    """The error for a field that no request of this kind has; it suggests the nearest known one."""
    hint = suggestion(name, sorted(known))
    return ApiError(400, f"unknown field {shown(name)}; {hint}", param=name, code="unknown_parameter")


def _of_validation(error: RequestValidationError | ValidationError) -> ApiError:
    """The first of pydantic's errors, with its field."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    field = ".".join(location) or None
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is no JSON: " + _reason(first), code="invalid_json")
    if first["type"] in ("model_attributes_type", "model_type", "dict_type") and not location:
        return ApiError(
            400, "the body is no JSON object: send one, with content-type application/json", code="invalid_json"
        )
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {shown(field)}", param=field, code="unknown_parameter")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{field or 'the body'}: {_reason(first)}", param=field, code=code)


def _reason(detail: Any) -> str:
    text = str(detail["msg"])
    cause = (detail.get("ctx") or {}).get("error")
    if isinstance(cause, str):
        return cause
    return text.removeprefix("Value error, ")
