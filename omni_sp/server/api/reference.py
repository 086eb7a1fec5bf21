"""The API's description: ``/openapi.json`` with the errors that there are, and ``/docs``, the same as a page.

The page is plain HTML without a script: it works where nothing else can be reached, and nothing has to be kept fresh.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

from omni_sp.server.page import content_security_policy
from omni_sp.server.security import is_open

Schema = dict[str, Any]

_ERRORS = {
    400: "The request cannot be: the message says what is wrong, and what is right.",
    401: "No API key, or none that is known here.",
    403: "A web page of another origin may not call this server.",
    404: "There is no such thing here.",
    408: "The body stopped coming.",
    413: "The body is too large.",
    415: "Another content type is needed.",
    429: "Too many requests wait already.",
    500: "A rank process failed or ran out of memory; it is replaced.",
    501: "A package that writes videos is missing here.",
    503: "The model is being loaded, or the server is about to end.",
    507: "The job could not be written down.",
}
_LATER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
_HEADERS = {401: {"WWW-Authenticate": {"schema": {"type": "string"}}}, 429: _LATER, 503: _LATER}
_TEXT, _MAYBE = {"type": "string"}, {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "description": "What went wrong, as OpenAI's clients read it.",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _TEXT, "type": _TEXT, "param": _MAYBE, "code": _MAYBE},
        }
    },
}
_LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "maxLength": "of a length up to"}
_STYLE = """
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
body { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h2 { margin: 2.5rem 0 0; font-size: 1.1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; margin: .75rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8886; }
th { width: 14rem; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
"""


def add_reference(app: FastAPI, *, needs_key: bool) -> None:
    """Describe an application's routes, with the API key that ``needs_key`` below /v1, and add the route ``/docs``."""
    generated = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None:
            _complete(generated(), needs_key=needs_key)
        return generated()

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI has it for changed descriptions

    @app.get("/docs", include_in_schema=False, response_class=HTMLResponse)
    async def docs() -> Response:
        text = reference_page(app.openapi())
        return HTMLResponse(text, headers={"Content-Security-Policy": content_security_policy(text)})


def reference_page(schema: Schema) -> str:
    """Render an OpenAPI description as HTML."""
    info = schema["info"]
    lines = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(info['title'])}: API</title><style>{_STYLE}</style>",
        f"<h1>{_text(info['title'])}</h1><p>{_text(info.get('summary', ''))}. "
        'The same for programs: <a href="openapi.json">openapi.json</a>.</p>',
    ]
    for method, path, operation in _operations(schema):
        lines.append(f"<h2>{method.upper()} <code>{_text(path)}</code></h2><p>{_text(operation['summary'])}.</p>")
        fields = [_row(one["name"], one["schema"], schema, one["required"]) for one in operation.get("parameters", [])]
        for kind, body in operation.get("requestBody", {}).get("content", {}).items():
            inside = _resolved(body["schema"], schema)
            lines.append(f"<p><code>{_text(kind)}</code>: {_text(inside.get('description', ''))}</p>")
            needed = inside.get("required", [])
            fields += [_row(name, one, schema, name in needed) for name, one in inside["properties"].items()]
        # Bodies in two notations have the same fields.
        lines += ["<table>", *dict.fromkeys(fields), "</table><table>"]
        for status, answer in operation["responses"].items():
            kinds = ", ".join(f"<code>{_text(kind)}</code>" for kind in answer.get("content", {}))
            lines.append(f"<tr><th>{status}<td>{_text(answer['description'])}<td>{kinds}")
        lines.append("</table>")
    return "\n".join(lines)


def _complete(schema: Schema, *, needs_key: bool) -> None:
    """Add errors and keys to FastAPI's description; drop FastAPI's validation error, which is never answered."""
    components = schema.setdefault("components", {})
    known = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        known.pop(name, None)
    known["Error"] = _ERROR
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for method, path, operation in _operations(schema):
        answers = operation["responses"]
        answers.pop("422", None)
        is_guarded = path.startswith("/v1/") and not is_open(method, path)
        if is_guarded and needs_key:
            operation["security"] = [{"key": []}]
        for status in _statuses(path, operation, is_guarded=is_guarded):
            content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
            answer = {"description": _ERRORS[status], "content": content, "headers": _HEADERS.get(status, {})}
            answers.setdefault(str(status), answer)
        operation["responses"] = dict(sorted(answers.items()))


def _statuses(path: str, operation: Schema, *, is_guarded: bool) -> set[int]:
    """The errors that an operation may answer with."""
    found = {401, 403} if is_guarded else set()
    if "{" in path:
        found |= {404}
    if any(one["in"] == "query" for one in operation.get("parameters", [])):
        found |= {400}
    if "requestBody" in operation:
        found |= {400, 404, 408, 413, 429, 500, 503}
        found |= {415} if "multipart/form-data" in operation["requestBody"]["content"] else set()
        found |= {501, 507} if path == "/v1/videos" else set()
    return found


def _operations(schema: Schema) -> Iterator[tuple[str, str, Schema]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


# The page


def _row(name: str, one: Schema, schema: Schema, is_required: bool) -> str:
    default = one.get("default")
    more = ", required" if is_required else "" if default is None else f", otherwise {default}"
    more += f"; {one['description']}" if "description" in one else ""
    return f"<tr><th><code>{_text(name)}</code><td>{_text(_kind(one, schema) + more)}"


def _kind(one: Schema, schema: Schema) -> str:
    """A type, in words."""
    if "anyOf" in one:
        return " or ".join(_kind(part, schema) for part in one["anyOf"] if part.get("type") != "null")
    if "$ref" in one:
        return f"object of {', '.join(_resolved(one, schema)['properties'])}"
    if "enum" in one or "const" in one:
        return " | ".join(map(str, one.get("enum") or [one["const"]]))
    words = [f"{word} {one[limit]:g}" for limit, word in _LIMITS.items() if limit in one]
    words += [f"of {_kind(one['items'], schema)}"] if "items" in one else []
    return " ".join([one.get("type", "anything"), *words])


def _resolved(one: Schema, schema: Schema) -> Schema:
    """What a reference refers to."""
    found: Schema = schema["components"]["schemas"][one["$ref"].rpartition("/")[2]] if "$ref" in one else one
    return found


def _text(text: str) -> str:
    """Text as HTML; ``this`` as code."""
    return re.sub(r"``(.+?)``", r"<code>\1</code>", html.escape(text))
