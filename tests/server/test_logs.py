"""The log: a line for each request, which no client can forge, for people or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from omni_sp.errors import RankFailedError
from omni_sp.server.logs import JsonFormatter, TextFormatter, logging_to_stderr
from tests.server.fakes import FakeOmni, held
from tests.server.serving import serving, until
from tests.server.test_images import GENERATIONS, open_request

LOGGER = "omni_sp.server.logs"


def fields_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.name == LOGGER]


def test_every_request_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "omni_sp")
    failing = [None, None, RankFailedError("rank 1 died", rank=1), ZeroDivisionError("x")]
    with serving(FakeOmni(errors=failing)) as served:  # type: ignore[arg-type]
        served.post(GENERATIONS, {"prompt": "x", "num_inference_steps": 3}, headers={"X-Request-ID": "mine-1"})
        served.stream(GENERATIONS, {"prompt": "x", "num_inference_steps": 5, "stream": True})
        for _ in range(2):
            served.post(GENERATIONS, {"prompt": "x"})
        served.post(GENERATIONS, {"prompt": ""})
        served.get("/not/there%0Aforged", headers={"X-Request-ID": "a b"})
        served.client.request("INVENT", "/v1/models")
        served.get("/health")  # programs ask for it all the time: a line of level debug
        until(lambda: len(fields_of(caplog)) >= 7)
    lines = fields_of(caplog)
    got = [(one["method"], one["route"], one["status"], one.get("steps")) for one in lines]
    assert got == [
        ("POST", GENERATIONS, 200, 3), ("POST", GENERATIONS, 200, 5), ("POST", GENERATIONS, 500, 1),
        ("POST", GENERATIONS, 500, 1), ("POST", GENERATIONS, 400, None), ("GET", "other", 404, None),
        ("other", "/v1/models", 405, None),
    ]  # fmt: skip
    assert lines[0]["request_id"] == "mine-1"
    assert all(one["request_id"].startswith("req-") for one in lines[1:])
    assert all(one["seconds"] >= one.get("queue_s", 0) >= 0 for one in lines)
    assert "mine-1 POST /v1/images/generations 200 in " in caplog.text
    assert ", 3 steps" in caplog.text
    assert "forged" not in caplog.text


def test_a_client_that_leaves_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "omni_sp")
    omni = held()
    with serving(omni) as served:
        first, second = (open_request(served, {"prompt": "x"}) for _ in range(2))
        until(lambda: len(omni.requests) == 2)
        for connection in (second, first):
            connection.close()
        until(lambda: len(fields_of(caplog)) == 2)
    assert sorted((one["status"], one.get("steps")) for one in fields_of(caplog) if "steps" in one) == [(499, 1)]


def record(message: str, *, error: BaseException | None = None, **fields: Any) -> logging.LogRecord:
    trace = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord("omni_sp.server", logging.ERROR, "file", 1, "%s", (message,), trace)
    if fields:
        made.fields = fields
    return made


def test_what_is_logged_begins_no_line_of_its_own() -> None:
    forged = "x\nomni-sp: forged\r\x1b[2Jomni-sp: forged"
    text = TextFormatter().format(record(forged, error=ValueError("y\nomni-sp: forged")))
    assert [line[:4] for line in text.split("\n")].count("omni") == 1
    assert "\x1b" not in text
    assert "\r" not in text
    assert "ValueError" in text
    line = JsonFormatter().format(record(forged, request_id="a", error=ValueError("y")))
    assert "\n" not in line
    assert json.loads(line)["request_id"] == "a"
    assert json.loads(line)["level"] == "error"
    for formatter in (TextFormatter(), JsonFormatter()):
        assert len(formatter.format(record("x" * 100_000, error=ValueError("y" * 100_000)))) < 10_000


@pytest.mark.parametrize(("level", "seen"), [("debug", 3), ("info", 2), ("warning", 1)])
def test_levels(level: str, seen: int, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr(level, "json"):
        ours = logging.getLogger("omni_sp.server")
        for log in (ours.debug, ours.info, ours.warning):
            log("a line")
        sys.stderr.flush()
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["a line"] * seen
    logging.getLogger("omni_sp.server").error("after it")
    assert not [one for one in logging.getLogger().handlers if isinstance(one.formatter, JsonFormatter)]
