from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import socket
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from starlette.types import Message, Receive, Scope, Send

from omni_sp.errors import ConfigError, RankFailedError
from omni_sp.events import RequestFailed, RequestProgress, RequestQueued
from omni_sp.server.app import create_app
from omni_sp.server.errors import ApiError
from omni_sp.server.metrics import Metrics
from omni_sp.server.pictures import decode_picture, encode_picture
from omni_sp.server.security import BodyLimit
from omni_sp.server.settings import ServerSettings
from tests.server.fakes import EDITS, FakeOmni
from tests.server.serving import Served, error_of, serving, until
from tests.server.test_images import EDITS_PATH, GENERATIONS, png

KEYS = ("first-key", "second-key")


def test_keys_open_what_they_guard() -> None:
    with serving(FakeOmni(), api_keys=KEYS) as served:
        url = None
        for key in KEYS:
            headers = {"Authorization": f"Bearer {key}"}
            answer = served.post(GENERATIONS, {"prompt": "x", "response_format": "url"}, headers=headers)
            assert answer.status_code == 200
            url = answer.json()["data"][0]["url"]
        for wrong in ("Bearer first-ke", "Bearer first-key2", "Basic first-key", "first-key", "Bearer", "Bearer \xe9"):
            answer = served.post(GENERATIONS, {"prompt": "x"}, headers={"Authorization": wrong.encode("latin-1")})
            assert answer.status_code == 401, wrong
            assert error_of(answer)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in (
            "/v1/models",
            "/%76%31/models",
            "/v1//models",
            "/v1/info",
            "/v1/videos",
            "/v1/nothing",
            "/v1/files/x",
            "/v1",
        ):
            assert served.get(path).status_code == 401
        # Where nothing is drawn and nothing is shown, and what cannot be guessed.
        assert url is not None
        for path in ("/health", "/metrics", "/", "/docs", url):
            assert served.get(path).status_code == 200, path
        assert served.client.delete(url).status_code == 401


def test_other_peoples_web_pages_may_not_draw(served: Served) -> None:
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": served.url, "Sec-Fetch-Site": "cross-site"},
    ):
        answer = served.post(GENERATIONS, {"prompt": "x"}, headers=headers)
        assert (answer.status_code, error_of(answer)["code"]) == (403, "foreign_origin")
    for headers in (
        {"Origin": served.url},
        {"Origin": "https://behind.a.proxy", "Sec-Fetch-Site": "same-origin"},
        {},
    ):
        assert served.post(GENERATIONS, {"prompt": "x"}, headers=headers).status_code == 200
    assert (
        "access-control-allow-origin"
        not in served.get("/v1/models", headers={"Origin": "https://evil.example"}).headers
    )


def test_pages_that_point_their_own_name_here_may_not_draw(served: Served) -> None:
    for name in ("evil.example", "127.0.0.1.evil.example", "10.1.2.3", "[::1", ""):
        headers = {"Host": name, "Origin": f"http://{name}", "Sec-Fetch-Site": "same-origin"}
        for answer in (
            served.post(GENERATIONS, {"prompt": "x"}, headers=headers),
            served.get("/v1/info", headers=headers),
        ):
            assert answer.status_code == 403
            assert error_of(answer)["code"] == "foreign_host"
    for name in ("localhost:1234", "127.0.0.1", "[::1]:80", "omni.localhost"):
        assert served.get("/v1/info", headers={"Host": name}).status_code == 200
    with serving(FakeOmni(), host="0.0.0.0", max_steps=3) as wide:
        assert wide.get("/v1/info", headers={"Host": "gpu-box"}).status_code == 200
    with serving(FakeOmni(), allow_origins=("https://behind.a.proxy",)) as named:
        assert named.get("/v1/info", headers={"Host": "behind.a.proxy"}).status_code == 200


def test_pages_that_are_allowed_may_draw() -> None:
    with serving(FakeOmni(), allow_origins=("https://good.example",), api_keys=("k",)) as served:
        ask = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
        preflight = served.client.options(
            GENERATIONS, headers={**ask, "Access-Control-Request-Headers": "authorization"}
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://good.example"
        headers = {"Origin": "https://good.example", "Authorization": "Bearer k", "Sec-Fetch-Site": "cross-site"}
        assert served.post(GENERATIONS, {"prompt": "x"}, headers=headers).status_code == 200


def test_large_bodies_end_early() -> None:
    with serving(FakeOmni(capabilities=EDITS), max_body_bytes=10_000) as served:
        answer = served.post(GENERATIONS, {"prompt": "x" * 10_000})
        assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")

        def chunks() -> Iterator[bytes]:
            yield b'{"prompt": "'
            for _ in range(100):
                yield b"x" * 1000

        for path, kind in ((GENERATIONS, "application/json"), (EDITS_PATH, "multipart/form-data; boundary=b")):
            answer = served.client.post(path, content=chunks(), headers={"content-type": kind})
            assert answer.status_code in (400, 413)  # a form's parser may see that it is none before it is too large
        assert served.client.post(
            GENERATIONS, content=chunks(), headers={"content-type": "application/json"}
        ).status_code == 413  # fmt: skip


def test_slow_bodies_end() -> None:
    with serving(FakeOmni(), body_timeout_s=0.2) as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as slow:
            head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 99\r\n\r\n".encode() + b"{")
            assert slow.recv(65536).startswith(b"HTTP/1.1 408")
        assert served.get("/health").status_code == 200


def test_a_cancellation_that_comes_with_a_part_of_the_body_is_not_lost() -> None:
    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        await receive()
        await asyncio.sleep(20)

    async def cancelled() -> bool:
        part: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        async def receive() -> Message:
            return await part

        async def send(_message: Message) -> None:
            raise AssertionError("nobody answers")

        limit = BodyLimit(app, max_bytes=100, timeout_s=20)
        request = asyncio.create_task(limit({"type": "http", "headers": []}, receive, send))
        await asyncio.sleep(0.01)
        part.set_result({"type": "http.request", "body": b"x", "more_body": True})
        await asyncio.sleep(0)  # whoever received it is done, and the request has not gone on yet
        request.cancel()
        await asyncio.wait({request}, timeout=5)
        was_cancelled = request.cancelled()
        request.cancel()
        return was_cancelled

    assert asyncio.run(cancelled())


def test_request_ids(served: Served) -> None:
    assert served.get("/health", headers={"X-Request-ID": "my-1"}).headers["x-request-id"] == "my-1"
    for bad in ("x" * 200, "a b", "<script>"):
        named = served.get("/nothing", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert re.fullmatch(r"req-[0-9a-f]{24}", named)


def test_health_and_metrics() -> None:
    loaded = threading.Event()
    omni = FakeOmni(start_on=loaded)
    with serving(omni, ready=False) as served:
        early = served.get("/health")
        assert (early.status_code, early.json()["status"]) == (503, "starting")
        answer = served.post(GENERATIONS, {"prompt": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "being loaded" in error_of(answer)["message"]
        loaded.set()
        served.wait_until_ready()
        assert served.post(GENERATIONS, {"prompt": "x", "num_inference_steps": 3}).status_code == 200
        served.post(GENERATIONS, {"prompt": "x"}, headers={"x": "y"})
        served.get("/some/path/nobody/knows")
        omni.restarts, omni.force_status = 2, "restarting"
        assert served.get("/health").json() == {"status": "restarting"}
        assert served.client.head("/health").status_code == 503
        lines = served.get("/metrics").text.splitlines()
    for line in (
        "omni_sp_requests_waiting 0.0", "omni_sp_requests_running 0.0", 'omni_sp_requests_total{outcome="done"} 2.0',
        "omni_sp_steps_total 7.0", "omni_sp_restarts_total 2.0", "omni_sp_ready 0.0", "omni_sp_queue_seconds_count 2.0",
        'omni_sp_stage_seconds_count{stage="denoise"} 2.0', "omni_sp_step_seconds_sum 0.2",
        'omni_sp_outputs_total{kind="picture"} 2.0',
        'omni_sp_http_requests_total{method="GET",route="other",status="404"} 1.0',
        'omni_sp_http_requests_total{method="POST",route="/v1/images/generations",status="200"} 2.0',
    ):  # fmt: skip
        assert line in lines, line
    memory = next(line for line in lines if line.startswith('omni_sp_resident_memory_bytes{process="server"}'))
    assert float(memory.split()[1]) > 1e6


def test_a_request_waits_once_until_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart queues it again, which is no second wait; whoever leaves without an event is forgotten in the end."""
    monkeypatch.setattr("omni_sp.server.metrics._MOST_UNDER_WAY", 2)
    metrics = Metrics(FakeOmni())
    for name in ("left-1", "left-2", "drawn"):
        metrics.on_event(RequestQueued(request_id=name, position=0))
    for name in ("left-1", "drawn"):
        metrics.on_event(RequestProgress(request_id=name, done=0, total=2))
    metrics.on_event(RequestQueued(request_id="drawn", position=0))
    metrics.on_event(RequestProgress(request_id="drawn", done=0, total=2))
    metrics.on_event(RequestFailed(request_id="drawn", error=RankFailedError("no memory", rank=0)))
    assert "omni_sp_queue_seconds_count 1.0" in metrics.page().decode().splitlines()


def test_an_engine_that_does_not_start_is_reported() -> None:
    omni = FakeOmni(start_error=RankFailedError("no memory", rank=0))
    with serving(omni, ready=False) as served:
        until(lambda: served.get("/health").json()["status"] == "failed")
        assert served.get("/health").status_code == 503
        assert served.post(GENERATIONS, {"prompt": "x"}).status_code == 503


def test_a_temporary_folder_goes_with_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving(FakeOmni()) as served:
        assert served.post(GENERATIONS, {"prompt": "x", "response_format": "url"}).status_code == 200
        assert os.listdir(tmp_path)
    assert not os.listdir(tmp_path)


def test_an_application_that_never_starts_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    create_app(FakeOmni(), ServerSettings())
    assert not os.listdir(tmp_path)


# Uploaded pictures


def refused(data: bytes, max_pixels: int = 10_000) -> str:
    with pytest.raises(ApiError) as caught:
        decode_picture(data, param="image", max_pixels=max_pixels)
    assert (caught.value.status, caught.value.param) == (400, "image")
    return caught.value.message


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes that call themselves a large picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(101, 100), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_large_pictures_are_never_decoded(size: tuple[int, int]) -> None:
    assert "most here" in refused(png_claiming(*size))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_pictures_are_refused(kind: str) -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    file = io.BytesIO()
    noise.save(file, kind)
    whole = file.getvalue()
    assert decode_picture(whole, param="image", max_pixels=4096).size == (64, 64)
    for end in (0, 3, 12, 40, len(whole) // 2):
        refused(whole[:end])
    for place in range(0, len(whole), 97):
        broken = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        with contextlib.suppress(ApiError):  # nothing else may come of it
            decode_picture(broken, param="image", max_pixels=10_000)


def test_other_formats_and_animations_are_refused() -> None:
    for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO", "PDF"):
        assert "no PNG, JPEG or WebP" in refused(png(kind=kind))
    for kind in ("PNG", "WEBP"):
        file = io.BytesIO()
        frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 99)]
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        assert "animated" in refused(file.getvalue())
    assert "no PNG" in refused(b"<svg xmlns='http://www.w3.org/2000/svg'/>")


def test_pictures_stand_upright_and_keep_transparency() -> None:
    turned = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif)
    assert decode_picture(file.getvalue(), param="image", max_pixels=200).size == (10, 20)
    assert decode_picture(png(mode="RGBA", color=(0, 0, 0, 9)), param="image", max_pixels=1000).mode == "RGBA"
    assert decode_picture(png(mode="L", color=9), param="image", max_pixels=1000).mode == "RGB"


def test_transparent_results_become_white_in_jpeg() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert Image.open(io.BytesIO(encode_picture(clear, "jpeg"))).getpixel((0, 0)) == (255, 255, 255)
    assert Image.open(io.BytesIO(encode_picture(clear, "webp"))).mode == "RGBA"
    assert Image.open(io.BytesIO(encode_picture(clear, "png"))).mode == "RGBA"


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 0}, {"max_pixels": True}, {"drain_timeout_s": -1.0}, {"port": 70_000}, {"api_keys": ("",)},
        {"api_keys": ("a b",)}, {"max_queue_length": -1}, {"file_max_age_s": float("inf")},
        {"allow_origins": ("example.org",)}, {"allow_origins": ("https://example.org/",)},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ServerSettings(**options)  # type: ignore[arg-type]
