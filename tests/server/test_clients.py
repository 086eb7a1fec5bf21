"""Known programs' requests are drawn as they come; what has no effect is named in the answer, and never refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from tests.server.client_bodies import BODIES, CHAT, EDITS, GENERATIONS, Body
from tests.server.fakes import EDITS as EDITING
from tests.server.fakes import VIDEOS, FakeOmni
from tests.server.serving import Served, error_of, serving
from tests.server.test_images import png

NAMES = ("omni-sp/shapes", "gpt-image-1", "dall-e-2", "dall-e-3")


@pytest.fixture(scope="module")
def both() -> Iterator[dict[str, Served]]:
    """A server that draws, and one that edits, under the names that programs have in them."""
    with (
        serving(FakeOmni(), served_model_names=NAMES) as drawing,
        serving(FakeOmni(capabilities=EDITING), served_model_names=NAMES) as editing,
    ):
        yield {"draws": drawing, "edits": editing}


@pytest.mark.parametrize("body", BODIES, ids=str)
def test_what_programs_send_is_drawn(both: dict[str, Served], body: Body) -> None:
    served = both["edits" if body.files else "draws"]
    url, headers = body.path + body.query, dict(body.headers)
    if body.streamed:
        chunks = served.stream(url, body.fields)
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        sources = [part["image_url"]["url"] for delta in deltas for part in delta.get("images", [])]
    elif body.form:
        parts = [(name, ("a.png", png(), "image/png")) for name in body.files]
        answer = served.client.post(url, data=dict(body.fields), files=parts, headers=headers)
        sources = sources_of(answer, body.answer)
    else:
        sources = sources_of(served.post(url, dict(body.fields), headers=headers), body.answer)
    assert sources
    for source in sources:
        data = base64.b64decode(source.partition(",")[2]) if source.startswith("data:") else served.get(source).content
        assert Image.open(io.BytesIO(data)).size[0] > 0


def sources_of(answer: Any, kind: str) -> list[str]:
    """Where the pictures of an answer are: URLs, of http or of data."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if kind == "chat":
        return [part["image_url"]["url"] for choice in body["choices"] for part in choice["message"]["images"]]
    head = "" if kind == "url" else "data:image/png;base64,"
    return [head + entry[kind] for entry in body["data"]]


VALUES: list[tuple[str, Any]] = [
    *(("quality", value) for value in ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")),
    *(("style", value) for value in ("vivid", "natural", "auto")),
    *(("complexity", value) for value in ("low", "medium", "high")),
    *(("background", value) for value in ("auto", "opaque")),
    *(("moderation", value) for value in ("auto", "low")),
    ("user", "somebody"), ("safety_identifier", "somebody"), ("output_compression", 40), ("output_compression", "40"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_values_without_effect_are_drawn_and_named(both: dict[str, Served], name: str, value: Any) -> None:
    plain = both["draws"].post(GENERATIONS, {"prompt": "x", "seed": 3}).json()
    answer = both["draws"].post(GENERATIONS, {"prompt": "x", "seed": 3, name: value})
    assert answer.status_code == 200, answer.text
    assert (plain["ignored"], answer.json()["ignored"]) == ([], [name])
    assert answer.json()["data"] == plain["data"]
    form = {"prompt": "x", "seed": "3", name: str(value)}
    edited = both["edits"].client.post(EDITS, data=form, files={"image": png()})
    assert (edited.status_code, edited.json()["ignored"]) == (200, [name])
    events = both["draws"].stream(GENERATIONS, {"prompt": "x", "stream": True, name: value})
    assert events[-1]["ignored"] == [name]


def test_of_a_lossy_format_the_compression_has_an_effect(both: dict[str, Served]) -> None:
    answer = both["draws"].post(GENERATIONS, {"prompt": "x", "output_format": "jpeg", "output_compression": "40"})
    assert answer.json()["ignored"] == []


def test_chats_name_what_they_leave_out(both: dict[str, Served]) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": "hot", "tools": [], "max_tokens": "64"}
    assert both["draws"].post(CHAT, body).json()["ignored"] == ["temperature", "max_tokens", "tools"]
    for more, param in (
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ):
        answer = both["draws"].post(CHAT, {**body, **more})
        assert (answer.status_code, error_of(answer)["param"]) == (400, param)


def test_what_cannot_be_had_is_refused_in_words(both: dict[str, Served]) -> None:
    for answer in (
        both["draws"].post(GENERATIONS, {"prompt": "x", "background": "transparent"}),
        both["edits"].client.post(EDITS, data={"prompt": "x", "background": "transparent"}, files={"image": png()}),
    ):
        assert (answer.status_code, error_of(answer)["param"]) == (400, "background")
        assert "drawn opaque" in error_of(answer)["message"]
    twice = both["draws"].post(GENERATIONS, {"prompt": "x", "seed": 1, "extra_body": {"seed": 2}})
    assert (twice.status_code, error_of(twice)["param"]) == (400, "seed")
    unknown = both["draws"].post(GENERATIONS, {"prompt": "x", "extra_body": {"sede": 2}})
    assert "did you mean seed?" in error_of(unknown)["message"]


@pytest.mark.parametrize("seed", [-1, "-1", None])
def test_a_seed_may_be_any(seed: Any) -> None:
    omni = FakeOmni()
    with serving(omni) as served:
        assert served.post(GENERATIONS, {"prompt": "x", "seed": seed}).status_code == 200
        chat = {"messages": [{"role": "user", "content": "x"}], "seed": seed}
        assert served.post(CHAT, chat).status_code == 200
    assert [request.params.seed for request in omni.requests] == [None, None]
    omni = FakeOmni(capabilities=VIDEOS)
    with serving(omni) as served:
        answer = served.post("/v1/videos", {"prompt": "x", "num_frames": "5", "fps": "7.5", "seed": seed})
        assert answer.status_code == 200, answer.text
        assert answer.json()["seed"] >= 0
        assert answer.json()["fps"] == 7.5


def test_numbers_may_come_as_text() -> None:
    omni = FakeOmni()
    fields = {"n": "2", "num_inference_steps": "3", "guidance_scale": "7.5", "seed": "9223372036854775807"}
    with serving(omni) as served:
        assert served.post(GENERATIONS, {"prompt": "x", **fields}).status_code == 200
        whole = {"n": 2.0, "num_inference_steps": 3.0, "guidance_scale": 7.5, "seed": 1e3}
        assert served.post(GENERATIONS, {"prompt": "x", **whole}).status_code == 200
        chat = {"messages": [{"role": "user", "content": "x"}], **fields, "height": "32", "width": "48"}
        assert served.post(CHAT, chat).status_code == 200
        for name, value in (("n", "2.5"), ("n", "two"), ("n", ""), ("n", "1_0"), ("seed", "9" * 40), ("n", True)):
            answer = served.post(GENERATIONS, {"prompt": "x", name: value})
            assert (answer.status_code, error_of(answer)["param"]) == (400, name), (name, value)
    got = [(one.params.num_outputs_per_prompt, one.params.num_inference_steps) for one in omni.requests]
    assert got == [(2, 3)] * 3
    assert [one.params.guidance_scale for one in omni.requests] == [7.5] * 3
    assert [one.params.seed for one in omni.requests] == [2**63 - 1, 1000, 2**63 - 1]
