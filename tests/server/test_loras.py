"""The LoRA adapters of a server: listed, named in requests of every kind, and refused where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.server.fakes import EDITS, PICTURES, VIDEOS, FakeOmni
from tests.server.serving import Served, error_of, serving, until
from tests.server.test_images import GENERATIONS, png

ADAPTERS = ("style", "light")


@pytest.fixture
def omni() -> FakeOmni:
    return FakeOmni(capabilities=replace(PICTURES, adapters=ADAPTERS))


@pytest.fixture
def served(omni: FakeOmni) -> Iterator[Served]:
    with serving(omni) as served:
        yield served


def test_they_are_listed(served: Served) -> None:
    listed = served.get("/v1/loras").json()
    assert listed == {"object": "list", "data": [{"id": name, "object": "lora"} for name in ADAPTERS]}
    with serving(FakeOmni()) as without:
        assert without.get("/v1/loras").json()["data"] == []


@pytest.mark.parametrize(
    ("lora", "adapters"),
    [
        (None, ()),
        ([], ()),
        ("style", (("style", 1.0),)),
        ({"name": "style", "scale": 0.5}, (("style", 0.5),)),
        ([{"name": "style", "scale": "-0.5"}, "light"], (("light", 1.0), ("style", -0.5))),
    ],
)
def test_a_request_names_them(omni: FakeOmni, served: Served, lora: Any, adapters: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for path, body in ((GENERATIONS, {"prompt": "x"}), ("/v1/chat/completions", chat)):
        for more in ({"lora": lora}, {"extra_body": {"lora": lora}}):
            assert served.post(path, body | more).status_code == 200
    assert [request.params.adapters for request in omni.requests] == [adapters] * 4


@pytest.mark.parametrize(
    ("lora", "param"),
    [
        ("stile", "lora"),
        ({"name": "style", "scale": 1e400}, "lora"),
        ({"name": "style", "weight": 1.0}, "lora"),
        ({"scale": 1.0}, "lora"),
        (["style", "style"], "lora"),
        ("[", "lora"),
        (7, "lora"),
    ],
)
def test_what_names_none_is_refused(omni: FakeOmni, served: Served, lora: Any, param: str) -> None:
    body = json.dumps({"prompt": "x", "lora": lora}).replace("Infinity", "1e400")
    answer = served.client.post(GENERATIONS, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert error_of(answer)["param"].startswith(param) or "weight" in error_of(answer)["param"]
    assert not omni.requests


def test_a_form_names_them_as_json() -> None:
    omni = FakeOmni(capabilities=replace(EDITS, adapters=ADAPTERS))
    files = {"image": ("a.png", png(), "image/png")}
    with serving(omni) as served:
        for text in ("style", '[{"name": "style", "scale": 1}]', '{"name": "style"}'):
            answer = served.client.post("/v1/images/edits", data={"prompt": "x", "lora": text}, files=files)
            assert answer.status_code == 200, answer.text
    assert [request.params.adapters for request in omni.requests] == [(("style", 1.0),)] * 3


def test_a_video_job_keeps_them() -> None:
    omni = FakeOmni(capabilities=replace(VIDEOS, adapters=ADAPTERS))
    with serving(omni) as served:
        refused = served.post("/v1/videos", {"prompt": "x", "lora": "other"})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "lora")
        made = served.post("/v1/videos", {"prompt": "x", "lora": {"name": "light", "scale": 0.25}})
        assert made.status_code == 200
        until(lambda: omni.requests)
    assert omni.requests[0].params.adapters == (("light", 0.25),)
