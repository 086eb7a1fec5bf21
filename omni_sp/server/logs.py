"""The server's log on stderr: a line for each request and each event, for people or as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

_LOG = logging.getLogger(__name__)
_MOST_CHARS = 4000
_QUIET_ROUTES = ("/health", "/metrics")
"""Routes that programs ask all the time: their lines are of level debug."""


def log_request(
    request_id: str, method: str, route: str, status: int | None, seconds: float, notes: Mapping[str, Any]
) -> None:
    """Write the line of one request.

    Args:
        request_id: of RequestIds, which lets no other characters through than those of a name.
        route: a pattern, never a path that the client made up.
        status: None where nobody was left to be answered.
        seconds: until the last byte of the answer.
        notes: ``queue_s``, the seconds until its first step, and ``steps``, how many were done, where it was drawn.
    """
    fields: dict[str, Any] = {
        "request_id": request_id, "method": method, "route": route, "status": status, "seconds": round(seconds, 4),
    }  # fmt: skip
    words = f"{request_id} {method} {route} {status or 'left'} in {seconds:.3f} s"
    if "queue_s" in notes:
        fields |= {"queue_s": round(notes["queue_s"], 4), "steps": notes["steps"]}
        words += f", waited {notes['queue_s']:.3f} s, {notes['steps']} steps"
    level = logging.DEBUG if route in _QUIET_ROUTES else logging.INFO
    _LOG.log(level, "%s", words, extra={"fields": fields})


@contextlib.contextmanager
def logging_to_stderr(level: str, kind: str) -> Iterator[None]:
    """Write what the server logs from this level on, and the warnings of all libraries, as lines of this kind."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    root, ours = logging.getLogger(), logging.getLogger("omni_sp")
    before = ours.level
    root.addHandler(handler)
    ours.setLevel(level.upper())
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(before)


class TextFormatter(logging.Formatter):
    """Lines for people. Whatever is logged begins no line of its own: further lines of a record are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """One record: a line, and a traceback below it."""
        when = _time(record).strftime("%Y-%m-%d %H:%M:%S")
        return _indented(f"omni-sp: {when} {record.levelname.lower()}: {_content(self, record)}")


class JsonFormatter(logging.Formatter):
    """A JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One record with its fields."""
        return json.dumps(
            {
                "time": _time(record).isoformat(timespec="milliseconds"),
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": _content(self, record),
                **getattr(record, "fields", {}),
            }
        )


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created).astimezone()


def _content(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The message, and the end of the traceback, of bounded length."""
    message = record.getMessage()[:_MOST_CHARS]
    trace = formatter.formatException(record.exc_info) if record.exc_info else ""
    return f"{message}\n{trace[-_MOST_CHARS:]}" if trace else message


def _indented(text: str) -> str:
    """Text without control characters; every line after the first is indented."""
    lines = ("".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in line)
             for line in text.split("\n"))  # fmt: skip
    return "\n    ".join(lines)
