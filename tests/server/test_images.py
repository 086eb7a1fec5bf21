from __future__ import annotations

import base64
import io
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni_sp import AsyncOmni, DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams, __version__
from omni_sp.errors import (
    CallFailedError,
    EngineClosedError,
    InvalidInputError,
    NonFiniteResultError,
    QueueFullError,
    RankFailedError,
    ShardingError,
)
from omni_sp.pipelines.metadata import read_settings
from tests.server.fakes import EDITS, INPAINTS, PICTURES, VIDEOS, FakeOmni, held
from tests.server.serving import Served, error_of, serving, until

GENERATIONS, EDITS_PATH = "/v1/images/generations", "/v1/images/edits"


def png(size: tuple[int, int] = (32, 16), color: Any = (10, 20, 30), mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)
    return file.getvalue()


def picture(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_pictures_come_as_they_were_asked_for() -> None:
    omni = FakeOmni()
    with serving(omni) as served:
        answer = served.post(
            GENERATIONS,
            {
                "prompt": "a cat", "n": 2, "size": "64x32", "seed": 7, "negative_prompt": "a dog",
                "num_inference_steps": 3, "guidance_scale": 2, "model": "omni-sp/shapes", "user": "somebody",
                "quality": "auto", "style": None, "background": "auto", "moderation": "low",
            },
        )  # fmt: skip
    assert answer.status_code == 200
    body = answer.json()
    drawn = [picture(entry["b64_json"]) for entry in body["data"]]
    assert [one.size for one in drawn] == [(64, 32)] * 2
    assert drawn[1].getpixel((0, 0)) == (8, 5, 200)
    assert (body["size"], body["output_format"], body["seed"]) == ("64x32", "png", 7)
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + body["usage"]["output_tokens"] == 7 + 48
    request = omni.requests[0]
    assert request.prompt.text == "a cat"
    assert request.arguments == {
        "prompt": "a cat", "negative_prompt": "a dog", "height": 32, "width": 64, "num_inference_steps": 3,
        "guidance_scale": 2.0, "num_images_per_prompt": 2, "output_type": "pil",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "quality"), [("png", None), ("jpeg", 30), ("webp", 0), ("jpeg", 0)])
def test_formats_and_compression(served: Served, kind: str, quality: int | None) -> None:
    body = {"prompt": "x", "output_format": kind, "output_compression": quality, "response_format": "url"}
    url = served.post(GENERATIONS, body).json()["data"][0]["url"]
    file = served.get(url)
    assert file.headers["content-type"] == f"image/{kind}"
    assert Image.open(io.BytesIO(file.content)).format == kind.upper()
    assert served.get(url.replace("file-", "file-0")).status_code == 404
    assert served.get("/v1/files/..%2F..%2Fetc%2Fpasswd/content").status_code == 404


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": "x" * 32_001}, "prompt", "32000"),
        ({"prompt": ["x"]}, "prompt", "string"),
        ({"prompt": "x", "sede": 1}, "sede", "did you mean seed?"),
        ({"prompt": "x", "seed": -2}, "seed", "greater than or equal to -1"),
        ({"prompt": "x", "seed": "one"}, "seed", "integer"),
        ({"prompt": "x", "seed": True}, "seed", "integer"),
        ({"prompt": "x", "seed": 2**63}, "seed", "less than"),
        ({"prompt": "x", "n": 0}, "n", "greater"),
        ({"prompt": "x", "n": 11}, "n", "up to 10"),
        ({"prompt": "x", "num_inference_steps": 10**9}, "num_inference_steps", "up to 200"),
        ({"prompt": "x", "size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"prompt": "x", "size": "0x16"}, "size", "WIDTHxHEIGHT"),
        ({"prompt": "x", "size": "65x64"}, "size", "multiple of 8"),
        ({"prompt": "x", "size": "99999x99999"}, "size", "16777216"),
        ({"prompt": "x", "guidance_scale": "high"}, "guidance_scale", "number"),
        ({"prompt": "x", "true_cfg_scale": 2.0}, "true_cfg_scale", "does not take"),
        ({"prompt": "x", "strength": 0.5}, "strength", "does not take"),
        ({"prompt": "x", "quality": "best"}, "quality", "'auto'"),
        ({"prompt": "x", "background": "transparent"}, "background", "auto or opaque"),
        ({"prompt": "x", "output_format": "gif"}, "output_format", "'png'"),
        ({"prompt": "x", "output_compression": 101}, "output_compression", "less than"),
        ({"prompt": "x", "partial_images": 1}, "partial_images", "stream=true"),
        ({"prompt": "x", "progress": True}, "progress", "stream=true"),
        ({"prompt": "x", "stream": True, "partial_images": 4}, "partial_images", "less than"),
        ({"prompt": "x", "stream": True, "response_format": "url"}, "response_format", "b64_json"),
    ],
)  # fmt: skip
def test_bad_fields_are_named(served: Served, body: dict[str, Any], param: str, words: str) -> None:
    answer = served.post(GENERATIONS, body)
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"[" * 5000]
)
def test_bodies_that_are_no_request(served: Served, body: bytes) -> None:
    answer = served.client.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"


def test_a_body_without_its_type_is_answered_so(served: Served) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        answer = served.client.post(GENERATIONS, content=b'{"prompt": "x"}', headers={"content-type": kind})
        assert answer.status_code == 400
        assert "content-type application/json" in error_of(answer)["message"]


def test_many_at_once_are_all_answered() -> None:
    omni = FakeOmni(max_queue_length=20, step_s=0.001)
    with serving(omni) as served, ThreadPoolExecutor(40) as pool:
        bodies = [{"prompt": "x", "seed": seed, "stream": seed % 3 == 0} for seed in range(80)]
        answers = list(pool.map(lambda body: served.post(GENERATIONS, body), bodies))
        for body, answer in zip(bodies, answers, strict=True):
            assert answer.status_code in (200, 429)
            if answer.status_code == 200:
                assert f'"seed":{body["seed"]}' in answer.text
    outcomes = {request.outcome for request in omni.requests}
    assert outcomes == {"done"}
    assert len(omni.requests) == sum(answer.status_code == 200 for answer in answers)


def test_another_model_and_another_route_are_not_there(served: Served) -> None:
    answer = served.post(GENERATIONS, {"prompt": "x", "model": "dall-e-3"})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")
    assert served.get("/v1/models/dall-e-3").status_code == 404
    assert served.get("/v1/models/omni-sp/shapes").json()["id"] == "omni-sp/shapes"
    assert [one["id"] for one in served.get("/v1/models").json()["data"]] == ["omni-sp/shapes"]
    answer = served.get("/v2/anything")
    assert answer.status_code == 404
    assert "GET /v2/anything" in error_of(answer)["message"]
    assert served.get(GENERATIONS).status_code == 405


def test_a_video_model_says_where_to_go() -> None:
    with serving(FakeOmni(capabilities=VIDEOS)) as served:
        answer = served.post(GENERATIONS, {"prompt": "x"})
        assert answer.status_code == 400
        assert "/v1/videos" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RankFailedError("rank 1 died\nwith details", rank=1, rank_traceback="Traceback: secret"), 500, "rank_failed"),
        (CallFailedError("all 2 raised KeyError", rank=0, rank_traceback="Traceback: secret"), 500, "call_failed"),
        (EngineClosedError("AsyncOmni was closed"), 503, "unavailable"),
        (QueueFullError("full"), 429, "queue_full"),
        (ShardingError("ranks disagree"), 500, "engine_error"),
        (NonFiniteResultError("NaN, first in the latents", stage="the latents"), 422, "not_finite"),
    ],
)
def test_failures_have_their_status(error: Any, status: int, code: str) -> None:
    with serving(FakeOmni(errors=[error, error])) as served:
        answer = served.post(GENERATIONS, {"prompt": "x"})
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
        assert ("retry-after" in answer.headers) == (status in (429, 503))
        assert "secret" not in answer.text
        events = served.stream(GENERATIONS, {"prompt": "x", "stream": True})
        assert (events[-1]["type"], events[-1]["error"]["code"]) == ("error", code)
        assert served.post(GENERATIONS, {"prompt": "x"}).status_code == 200  # it goes on


def test_what_nobody_foresaw_shows_nothing_of_the_inside() -> None:
    with serving(FakeOmni(errors=[ZeroDivisionError("secret"), ZeroDivisionError("secret")])) as served:  # type: ignore[list-item]
        answer = served.post(GENERATIONS, {"prompt": "x"})
        assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
        assert "secret" not in answer.text
        events = served.stream(GENERATIONS, {"prompt": "x", "stream": True})
        assert events[-1]["error"]["code"] == "internal_error"
        assert served.post(GENERATIONS, {"prompt": "x"}).status_code == 200


def test_a_full_queue_and_a_drain() -> None:
    omni = held(max_queue_length=1)
    with serving(omni) as served:
        lines = [open_request(served, {"prompt": "x"}) for _ in range(2)]
        until(lambda: len(omni.requests) == 2)
        full = served.post(GENERATIONS, {"prompt": "x"})
        assert (full.status_code, full.headers["retry-after"]) == (429, "5")
        streamed = served.post(GENERATIONS, {"prompt": "x", "stream": True})
        assert streamed.status_code == 429  # a status, and no stream that ends in an error
        omni.force_status = "draining"
        assert served.get("/health").status_code == 503
        assert served.post(GENERATIONS, {"prompt": "x"}).status_code == 503
        omni.force_status = None
        omni.go_on.set()
        for line in lines:
            assert b"200 OK" in line.recv(65536)
            line.close()


def test_a_stream_shows_steps_previews_and_the_result(served: Served) -> None:
    body = {"prompt": "x", "stream": True, "num_inference_steps": 6, "seed": 3}
    plain = served.stream(GENERATIONS, body)
    assert [event["type"] for event in plain] == ["image_generation.completed"]
    events = served.stream(GENERATIONS, {**body, "partial_images": 2, "progress": True, "output_format": "jpeg"})
    steps = [event["step"] for event in events if event["type"] == "image_generation.progress"]
    assert steps == [None, 0, 1, 2, 3, 4, 5, 6]
    partial = [event for event in events if event["type"] == "image_generation.partial_image"]
    assert [event["partial_image_index"] for event in partial] == [0, 1]
    assert picture(partial[0]["b64_json"]).format == "JPEG"
    # Spread evenly: after 2 and 4 of 6 steps.
    places = [events.index(event) - 1 for event in partial]
    assert [events[place]["step"] for place in (places[0], places[1])] == [2, 4]
    assert events[-1]["type"] == "image_generation.completed"
    assert events[-1]["size"] == "96x64"
    assert set(events[-1]["usage"]) >= {"input_tokens", "output_tokens", "total_tokens", "input_tokens_details"}
    assert not any("previews" in event for event in events)


def test_of_several_pictures_a_stream_shows_each(served: Served) -> None:
    body = {"prompt": "x", "stream": True, "num_inference_steps": 6, "n": 3, "partial_images": 2}
    quiet = served.stream(GENERATIONS, body)
    assert [event["type"].split(".")[1] for event in quiet] == ["partial_image"] * 2 + ["completed"] * 3
    events = served.stream(GENERATIONS, {**body, "progress": True, "output_format": "jpeg"})
    shown = [event for event in events if "previews" in event]
    assert [(event["type"], event["step"]) for event in shown] == [
        ("image_generation.progress", step) for step in (2, 4)
    ]
    partial = [event["b64_json"] for event in events if event["type"] == "image_generation.partial_image"]
    for event, first in zip(shown, partial, strict=True):
        assert [one["output_format"] for one in event["previews"]] == ["jpeg"] * 3
        assert event["previews"][0]["b64_json"] == first
        assert picture(event["previews"][2]["b64_json"]).size == (24, 16)


def test_waiting_streams_report_their_place_and_stay_alive() -> None:
    omni = held()
    with serving(omni, keep_alive_s=0.05) as served:
        first = open_request(served, {"prompt": "x"})
        until(lambda: len(omni.requests) == 1)
        second = open_request(served, {"prompt": "y", "stream": True, "progress": True})
        seen = b""
        while b": still here" not in seen:
            seen += second.recv(65536)
        assert b'"position":1' in seen
        omni.go_on.set()
        while b"image_generation.completed" not in seen:
            seen += second.recv(65536)
        assert b'"position":0' in seen
        first.close()
        second.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_aborts(stream: bool) -> None:
    omni = held()
    with serving(omni) as served:
        running = open_request(served, {"prompt": "x", "stream": stream})
        until(lambda: omni.requests and omni.requests[0].outcome == "running")
        waiting = open_request(served, {"prompt": "y", "stream": stream})
        until(lambda: len(omni.requests) == 2)
        waiting.close()
        until(lambda: omni.requests[1].outcome == "aborted")
        assert omni.requests[0].outcome == "running"
        running.close()
        until(lambda: omni.requests[0].outcome == "aborted")
        omni.go_on.set()
        assert served.post(GENERATIONS, {"prompt": "z"}).status_code == 200


def open_request(served: Served, body: dict[str, Any]) -> socket.socket:
    """A request on a connection of its own, whose answer nobody reads yet."""
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    data = json.dumps(body).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_dropped_tokens_are_reported() -> None:
    note = (
        "the prompt is longer than the model reads: tokenizer dropped 7 tokens, tokenizer_2 dropped 1 token at its end"
    )
    with serving(FakeOmni(dropped={"tokenizer": 7, "tokenizer_2": 1})) as served:
        for answer in (
            served.post(GENERATIONS, {"prompt": "x"}).json(),
            served.stream(GENERATIONS, {"prompt": "x", "stream": True})[-1],
        ):
            assert answer["metrics"]["dropped_tokens"] == {"tokenizer": 7, "tokenizer_2": 1}
            assert answer["note"] == note
        chat = served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}).json()
        assert (chat["dropped_tokens"], chat["note"]) == ({"tokenizer": 7, "tokenizer_2": 1}, note)
    with serving(FakeOmni()) as served:
        answer = served.post(GENERATIONS, {"prompt": "x"}).json()
        assert (answer["metrics"]["dropped_tokens"], answer["note"]) == ({}, None)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_files_keep_what_they_were_drawn_with(kind: str) -> None:
    body = {"prompt": "ein Käse, 日本", "negative_prompt": "x", "seed": 7, "size": "64x32", "output_format": kind}
    wanted = {
        "prompt": "ein Käse, 日本", "negative_prompt": "x", "seed": 7, "width": 64, "height": 32,
        "num_inference_steps": 4, "guidance_scale": 4.0, "model": "model-folder", "layout": "4 ranks",
        "version": f"Omni-SP {__version__}",
    }  # fmt: skip
    chat = {"messages": [{"role": "user", "content": "a cat"}], "output_format": kind}
    with serving(FakeOmni(), model="/secret/model-folder") as served:
        files = [served.post(GENERATIONS, body).json()["data"][0]["b64_json"]]
        files.append(served.stream(GENERATIONS, {**body, "stream": True})[-1]["b64_json"])
        for file in files:
            assert read_settings(io.BytesIO(base64.b64decode(file))) == wanted
        url = served.post("/v1/chat/completions", chat).json()["choices"][0]["message"]["images"][0]["image_url"]["url"]
        assert read_settings(io.BytesIO(base64.b64decode(url.partition(",")[2])))["prompt"] == "a cat"
    with serving(FakeOmni(), metadata=False) as served:
        bare = served.post(GENERATIONS, body).json()["data"][0]["b64_json"]
        with pytest.raises(InvalidInputError, match="keeps nothing about how it was drawn"):
            read_settings(io.BytesIO(base64.b64decode(bare)))
    assert picture(bare).tobytes() == picture(files[0]).tobytes()


# Edits


def test_an_edit_takes_pictures_as_the_pipeline_wants_them() -> None:
    omni = FakeOmni(capabilities=EDITS)
    with serving(omni) as served:
        one = served.client.post(
            EDITS_PATH, data={"prompt": "x", "n": "2", "seed": "5", "guidance_scale": "1.5"}, files={"image": png()}
        )
        assert one.status_code == 200, one.text
        assert len(one.json()["data"]) == 2
        several = [("image[]", png(mode="RGBA", color=(1, 2, 3, 4))), ("image[]", png(kind="WEBP"))]
        two = served.client.post(EDITS_PATH, data={"prompt": "y", "stream": "true"}, files=several)
        assert two.status_code == 200, two.text
        assert "event: image_edit.completed" in two.text
    assert omni.requests[0].prompt.image.getpixel((0, 0)) == (10, 20, 30)
    assert (omni.requests[0].params.seed, omni.requests[0].params.guidance_scale) == (5, 1.5)
    assert [image.mode for image in omni.requests[1].arguments["image"]] == ["RGB", "RGB"]


def test_a_mask_is_refused_or_turned_into_the_pipelines_own() -> None:
    mask = Image.new("RGBA", (32, 16), (0, 0, 0, 255))
    mask.putpixel((3, 4), (0, 0, 0, 0))
    file = io.BytesIO()
    mask.save(file, "PNG")
    parts = {"image": png(), "mask": file.getvalue()}
    with serving(FakeOmni(capabilities=EDITS)) as served:
        answer = served.client.post(EDITS_PATH, data={"prompt": "x"}, files=parts)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "mask")
    omni = FakeOmni(capabilities=INPAINTS)
    with serving(omni) as served:
        assert served.client.post(EDITS_PATH, data={"prompt": "x"}, files=parts).status_code == 200
        for bad in (png(), png((8, 8), (0, 0, 0, 0), "RGBA")):
            answer = served.client.post(EDITS_PATH, data={"prompt": "x"}, files={**parts, "mask": bad})
            assert (answer.status_code, error_of(answer)["param"]) == (400, "mask")
    turned = omni.requests[0].arguments["mask_image"]
    assert (turned.mode, turned.getpixel((3, 4)), turned.getpixel((0, 0))) == ("L", 255, 0)


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"prompt": "x"}, {"other": png()}, "other"),
        ({"prompt": "x", "sede": "1"}, {"image": png()}, "sede"),
        ({"prompt": "x", "seed": "one"}, {"image": png()}, "seed"),
        ({"n": "1"}, {"image": png()}, "prompt"),
        ({"prompt": "x", "image": "text"}, {"mask": png()}, "image"),
        ({"prompt": "x"}, {"mask": png()}, "image"),
        ({"prompt": "x"}, [("image", png())] * 17, "image"),
        ({"prompt": ["x", "y"]}, {"image": png()}, "prompt"),
    ],
)
def test_bad_forms_are_named(editor: Served, fields: Any, files: Any, param: str) -> None:
    answer = editor.client.post(EDITS_PATH, data=fields, files=files)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert editor.client.post(EDITS_PATH, data=fields).status_code == 415


def test_a_pipeline_without_pictures_says_so(served: Served) -> None:
    answer = served.client.post(EDITS_PATH, data={"prompt": "x"}, files={"image": png()})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "image")
    assert PICTURES.name in error_of(answer)["message"]


def test_four_ranks_with_all_axes_at_once_answer_what_one_draws() -> None:
    """The real thing: guidance and tokens shared, VAE and weights sharded, the encoder on one rank of each group."""
    config = DiffusionParallelConfig(cfg_parallel_size=2, ulysses_degree=2, vae_parallel=True, shard_weights=True)
    asked = {"width": 80, "height": 64, "num_inference_steps": 3, "seed": 7}
    with Omni("omni-sp/shapes", device="cpu") as omni:
        alone = omni.generate("a red circle", OmniDiffusionSamplingParams(**asked))[0].images[0]  # type: ignore[arg-type]
    with serving(AsyncOmni("omni-sp/shapes", config, device="cpu"), ready=False) as served:
        until(lambda: served.get("/health").status_code == 200, 60.0)
        body = {"prompt": "a red circle", "size": "80x64", "seed": 7, "num_inference_steps": 3}
        answers = [served.post(GENERATIONS, body).json()["data"][0]["b64_json"] for _ in range(2)]
    assert answers[0] == answers[1]  # the shapes are new, and then known
    drawn, wanted = (np.asarray(one.convert("RGB"), dtype=int) for one in (picture(answers[0]), alone))
    assert np.abs(drawn - wanted).max() <= 2
    assert drawn.std() > 1
