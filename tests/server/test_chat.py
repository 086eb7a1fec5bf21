from __future__ import annotations

import base64
import contextlib
import http.server
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from omni_sp.errors import RankFailedError
from omni_sp.server import fetch
from tests.server.fakes import EDITS, FakeOmni
from tests.server.serving import Served, error_of, serving
from tests.server.test_images import picture, png

CHAT = "/v1/chat/completions"


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def said(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts) if len(parts) != 1 or not isinstance(parts[0], str) else parts[0]}]


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: Any) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_the_answer_is_a_picture() -> None:
    omni = FakeOmni()
    history = [
        {"role": "system", "content": "You draw."},
        {"role": "user", "content": "a dog", "name": "Ada"},
        {"role": "assistant", "content": "", "images": [image("data:whatever")]},
        *said("a cat"),
    ]
    with serving(omni) as served:
        answer = served.post(
            CHAT,
            {"messages": history, "model": "omni-sp/shapes", "seed": 4, "height": 32, "width": 48, "temperature": 1},
        )
    assert answer.status_code == 200, answer.text
    body = answer.json()
    message = body["choices"][0]["message"]
    assert (body["object"], message["role"], body["choices"][0]["finish_reason"]) == (
        "chat.completion", "assistant", "stop",
    )  # fmt: skip
    assert message["content"] == message["images"]
    url = message["images"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    assert picture(url.partition(",")[2]).size == (48, 32)
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 24, "total_tokens": 31}
    assert (omni.requests[0].prompt.text, omni.requests[0].params.seed) == ("a cat", 4)


def test_choices_and_pictures_in_one(served: Served) -> None:
    body = {"messages": said("x"), "size": "16x16"}
    several = served.post(CHAT, {**body, "n": 2}).json()["choices"]
    assert [(choice["index"], len(choice["message"]["images"])) for choice in several] == [(0, 1), (1, 1)]
    one = served.post(CHAT, {**body, "num_outputs_per_prompt": 2}).json()["choices"]
    assert [(choice["index"], len(choice["message"]["images"])) for choice in one] == [(0, 2)]


def test_a_streamed_answer_comes_in_chunks() -> None:
    with serving(FakeOmni(errors=[None, RankFailedError("rank 0 died", rank=0)])) as served:
        body = {"messages": said("x"), "stream": True, "stream_options": {"include_usage": True}}
        chunks = served.stream(CHAT, body)
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in chunks}) == 1
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[1]["images"][0]["type"] == "image_url"
        assert deltas[2] == {}
        assert chunks[-1]["usage"]["total_tokens"] == 31
        failed = served.stream(CHAT, body)
        assert failed[-1]["error"]["code"] == "rank_failed"
        whole = served.client.post(CHAT, json={"messages": said("x"), "stream": True})
        assert whole.text.endswith("data: [DONE]\n\n")


def test_pictures_of_the_last_message_are_edited() -> None:
    omni = FakeOmni(capabilities=EDITS)
    with serving(omni) as served:
        answer = served.post(
            CHAT, {"messages": said(text("make it"), image(data_url(png())), text("snow"), image(data_url(png())))}
        )
        assert answer.status_code == 200, answer.text
    assert omni.requests[0].prompt.text == "make it\nsnow"
    assert len(omni.requests[0].prompt.image) == 2


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": ["x"]}, "messages.0", "dictionary"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "user"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "string or a list"),
        ({"messages": said(text(""))}, "messages[0].content", "no text"),
        ({"messages": said(text(3))}, "messages[0].content", "text and image_url"),
        ({"messages": said({"type": "input_audio"})}, "messages[0].content", "input_audio"),
        ({"messages": said(text("x"), image(None))}, "messages[0].content", "no url"),
        ({"messages": said(text("x"), image("https://example.org/a.png"))}, "messages", "fetches no URLs"),
        ({"messages": said(text("x"), image("file:///etc/passwd"))}, "messages", "data:image/png"),
        ({"messages": said(text("x"), image("data:image/png,x"))}, "messages", "base64"),
        ({"messages": said(text("x"), image("data:image/png;base64,!!"))}, "messages", "base64"),
        ({"messages": said("x" * 32_001)}, "messages[0].content", "32000"),
        ({"messages": said("x"), "audio": {}}, "audio", "unknown field"),
        ({"messages": said("x"), "modalities": ["audio"]}, "modalities.0", "'text'"),
        ({"messages": said("x"), "n": 2, "num_outputs_per_prompt": 2}, "n", "not both"),
        ({"messages": said("x"), "size": "16x16", "height": 16, "width": 16}, "size", "height and width"),
        ({"messages": said("x"), "height": 16}, "size", "both"),
        ({"messages": said("x"), "height": 99999, "width": 99999}, "size", "16777216"),
        ({"messages": said("x"), "num_outputs_per_prompt": 99}, "n", "up to 10"),
        ({"messages": said("x"), "stream_options": {"include_usages": True}}, "include_usages", "include_usage?"),
    ],
)
def test_bad_chats_are_named(served: Served, body: dict[str, Any], param: str, words: str) -> None:
    answer = served.post(CHAT, body)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert error["param"] == param
    assert words in error["message"]


# Pictures by URL


class _Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = {
            "/a.png?x=1": (200, png()),
            "/moved": (302, b""),
            "/large": (200, b"x" * 3000),
            "/trickle": (200, b"x" * 2**20),
        }.get(self.path, (404, b""))
        self.send_response(status)
        self.send_header("Location", "/a.png?x=1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/trickle":
            with contextlib.suppress(ConnectionError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.01)
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class calls it so
        pass


@pytest.fixture
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_urls_are_fetched_where_that_is_allowed(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    omni = FakeOmni(capabilities=EDITS)

    def ask(served: Served, url: str) -> tuple[int, str]:
        answer = served.post(CHAT, {"messages": said(text("x"), image(url))})
        return answer.status_code, answer.text

    with serving(omni, allow_url_images=True, max_body_bytes=2000) as served:
        for private in (site, site.replace("127.0.0.1", "localhost"), "http://[::1]:9", "http://169.254.169.254"):
            status, words = ask(served, f"{private}/a.png?x=1")
            assert status == 400
            assert "public address" in words, words
        for broken in ("http://", "https://[", "http://host:port/"):
            assert ask(served, broken)[0] == 400
        monkeypatch.setattr(fetch, "is_public", lambda _address: True)
        assert ask(served, f"{site}/a.png?x=1")[0] == 200
        assert "status 302" in ask(served, f"{site}/moved")[1]
        assert "status 404" in ask(served, f"{site}/none")[1]
        assert "larger than 2000" in ask(served, f"{site}/large")[1]
        monkeypatch.setattr(fetch, "_LONGEST_S", 0.1)
        assert "longer than 0.1 s" in ask(served, f"{site}/trickle")[1]
    assert omni.requests[0].prompt.image.size == (32, 16)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False), ("192.168.0.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False), ("::1", False),
        ("fe80::1%eth0", False), ("fd00::1", False), ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert fetch.is_public(address) is public


def test_jpeg_answers(served: Served) -> None:
    body = {"messages": said("x"), "output_format": "jpeg", "output_compression": 20}
    url = served.post(CHAT, body).json()["choices"][0]["message"]["images"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).format == "JPEG"
