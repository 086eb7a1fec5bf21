"""The API does what it says of itself, whatever it is sent; and ``/docs`` says it without help from elsewhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.core.result import Ok

from omni_sp.pipelines.capabilities import PipelineCapabilities
from tests.server.fakes import EDITS, PICTURES, VIDEOS, FakeOmni
from tests.server.serving import Served, serving
from tests.server.test_images import png
from tests.thorough import THOROUGH

_HIDDEN = {"GET /", "GET /docs", "GET /openapi.json"}
"""Routes that the API's description leaves out."""
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance,
]  # fmt: skip
FEW = settings(
    max_examples=100 if THOROUGH else 12,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
# What the fakes can do. Words at random never name the model, and numbers at random are no size of it.
POSSIBLE = {
    "model": "omni-sp/shapes", "size": "32x16", "height": 16, "width": 32, "num_inference_steps": 2, "n": 1,
    "num_outputs_per_prompt": 1, "num_frames": 5, "seconds": 1, "prompt": "a cat", "fps": "8", "seed": "3",
    "guidance_scale": 2.5,
}  # fmt: skip
NOT_TAKEN = ("mask", "true_cfg_scale", "strength", "input_reference", "lora")


def within_reach(body: Any) -> Any:
    """The same request, of a kind that comes as far as being drawn; what else it leaves out stays out."""
    if not isinstance(body, dict):
        return body
    body = {name: POSSIBLE.get(name, value) for name, value in body.items() if name not in NOT_TAKEN}
    if "num_frames" in body:
        body.pop("seconds", None)  # another name of it
    if "image" in body:
        body["image"] = [png()]
    if isinstance(body.get("messages"), list):
        body["messages"] = [*body["messages"], {"role": "user", "content": "a cat"}]
    else:
        body.setdefault("prompt", "a cat")
    return body


def answers(served: Served, mode: GenerationMode) -> dict[str, Counter[int]]:
    """Try every operation; how often each answered with which status."""
    text = served.get("/openapi.json").text
    if mode is GenerationMode.NEGATIVE:  # schemathesis cannot judge the files that it makes
        text = text.replace('"format":"binary",', "").replace(',"format":"binary"', "")
    schema = schemathesis.openapi.from_dict(json.loads(text))
    schema.config.update(base_url=served.url)
    found = list(schema.get_all_operations())
    operations = [one.ok() for one in found if isinstance(one, Ok)]
    assert len(operations) == len(found), "a part of the description cannot be read"
    # What has neither body nor query gives nothing to get wrong.
    return {
        operation.label: tried(operation, mode)
        for operation in operations
        if mode is GenerationMode.POSITIVE or operation.body or operation.query
    }


def tried(operation: Any, mode: GenerationMode) -> Counter[int]:
    seen: Counter[int] = Counter()

    @FEW
    @seed(1)
    @given(operation.as_strategy(generation_mode=mode))
    def stands(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body = within_reach(case.body)
        answer = case.call()
        seen[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS + [negative_data_rejection] * (mode is GenerationMode.NEGATIVE))

    stands()
    return seen


@pytest.mark.parametrize(
    ("capabilities", "routes"),
    [
        (PICTURES, ["POST /v1/images/generations", "POST /v1/chat/completions"]),
        (EDITS, ["POST /v1/images/edits"]),
        (VIDEOS, ["POST /v1/videos"]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_requests_as_described_are_answered_as_described(capabilities: PipelineCapabilities, routes: list[str]) -> None:
    with serving(FakeOmni(capabilities=capabilities)) as served:
        seen = answers(served, GenerationMode.POSITIVE)
    assert all(seen[route][200] for route in routes), "none was drawn: this proves nothing"


def test_requests_otherwise_than_described_are_refused() -> None:
    with serving(FakeOmni(capabilities=VIDEOS)) as served:
        seen = answers(served, GenerationMode.NEGATIVE)
    assert all(seen[route][400] for route in ("POST /v1/videos", "POST /v1/images/edits", "GET /v1/videos"))


def test_the_description_names_the_errors_and_the_key() -> None:
    with serving(FakeOmni(), api_keys=("a-key",)) as served:
        schema = served.get("/openapi.json").json()
    for path in ("/v1/images/generations", "/v1/images/edits", "/v1/chat/completions", "/v1/videos"):
        operation = schema["paths"][path]["post"]
        assert operation["security"] == [{"key": []}]
        for status in ("400", "401", "404", "413", "429", "503"):
            content = operation["responses"][status]["content"]
            assert content == {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        assert "422" not in operation["responses"]
    assert "security" not in schema["paths"]["/v1/files/{file_id}/content"]["get"]
    assert "security" not in schema["paths"]["/health"]["get"]


class Seen(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "action", "data", "srcset")]


def test_the_page_of_the_description_needs_nothing_from_elsewhere(served: Served) -> None:
    answer = served.get("/docs")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    page = Seen(answer.text)
    assert page.addresses == ["openapi.json"]
    assert not page.tags & {"script", "link", "img", "iframe", "object", "form"}
    assert "@import" not in answer.text
    assert "url(" not in answer.text
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    for path in served.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in answer.text
    for words in (
        "num_inference_steps",
        "png | jpeg | webp",
        "integer from 0 to 3",
        "text/event-stream",
        "auto | low | medium | high | xhigh | max | standard | hd; changes nothing here",
    ):
        assert words in answer.text
    assert served.get("/redoc").status_code == 404


def test_a_body_that_is_no_text_is_answered_so(served: Served) -> None:
    answer = served.client.post(
        "/v1/images/generations", content=b'{"prompt": "\xff"}', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


def test_the_page_about_the_server_lists_every_route() -> None:
    page = (Path(__file__).parents[2] / "docs/server.md").read_text(encoding="utf-8")
    table = page.partition("## What answers")[2].partition("```")[0]
    with serving(FakeOmni()) as served:
        paths = served.get("/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert set(re.findall(r"`([A-Z]+ /[^`]*)`", table)) == routes | _HIDDEN
