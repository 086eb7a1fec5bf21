"""Uploads wait as their files: what is decoded when, where, and how much of it is in memory at once."""

from __future__ import annotations

import io
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from omni_sp.engine.messages import Call
from omni_sp.pipelines.images import EncodedImage, decode_image
from tests.server.fakes import EDITS, INPAINTS, PICTURES, VIDEOS, FakeOmni, held
from tests.server.serving import Served, error_of, serving, until
from tests.server.test_chat import CHAT, data_url, image, said, text
from tests.server.test_images import EDITS_PATH, png

LARGE = (1024, 1024)


class Decoded:
    """Every decoded picture: where it was decoded, and how many there are at once."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.alive = self.most = 0

    def decode(self, *args: Any, **kwargs: Any) -> Image.Image:
        picture = decode_image(*args, **kwargs)
        self.threads.append(threading.current_thread().name)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(picture, self._forget)
        return picture

    def _forget(self) -> None:
        self.alive -= 1


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decoded:
    watch = Decoded()
    monkeypatch.setattr("omni_sp.server.pictures.decode_image", watch.decode)
    monkeypatch.setattr("omni_sp.pipelines.images.decode_image", watch.decode)
    return watch


def edit(served: Served, *files: bytes, **more: Any) -> Any:
    parts = [("image[]", ("a.png", file)) for file in files]
    return served.client.post(EDITS_PATH, data={"prompt": "x", **more}, files=parts)


def test_waiting_requests_hold_their_files_alone(decoded: Decoded) -> None:
    file = png(LARGE)
    assert len(file) < 20_000
    omni = held(capabilities=EDITS)
    with serving(omni) as served, ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(edit, served, file, file) for _ in range(9)]
        chat = {"messages": said(text("x"), *[image(data_url(file))] * 2)}
        waiting += [pool.submit(served.post, CHAT, chat) for _ in range(3)]
        until(lambda: len(omni.requests) == 12)
        # One at a time, to see that it is a picture, and away from the event loop.
        assert len(decoded.threads) - 2 == 2 * 12
        assert {name.rpartition("_")[0] for name in decoded.threads if name.startswith("omni-sp")} == {
            "omni-sp-uploads"
        }
        for request in omni.requests[1:]:
            assert [one.data for one in request.prompt.image] == [file] * 2
        # Two are of the request that runs, and one was being looked at.
        assert decoded.most <= 3
        assert decoded.alive == 2
        omni.go_on.set()
        assert [answer.result().status_code for answer in waiting] == [200] * 12
    assert {request.prompt.image[0].size for request in omni.requests} == {LARGE}


@pytest.mark.parametrize(
    ("capabilities", "count", "words"),
    [(PICTURES, 1, "does not take image"), (INPAINTS, 2, "starts from one picture, and 2 are given")],
)
def test_what_the_pipeline_cannot_take_is_never_decoded(
    decoded: Decoded, capabilities: Any, count: int, words: str
) -> None:
    with serving(FakeOmni(capabilities=capabilities)) as served:
        chat = served.post(CHAT, {"messages": said(text("x"), *[image(data_url(png()))] * count)})
        for answer in (edit(served, *[png()] * count), chat):
            assert answer.status_code == 400
            assert words in error_of(answer)["message"]
    assert decoded.threads == []


def test_too_many_or_too_large_together_are_never_decoded(decoded: Decoded) -> None:
    sized = png((100, 100))
    with serving(FakeOmni(capabilities=EDITS), max_images=3, max_input_pixels=25_000) as served:
        assert edit(served, *[png()] * 4).status_code == 400
        for answer in (
            edit(served, *[sized] * 3),
            served.post(CHAT, {"messages": said(text("x"), *[image(data_url(sized))] * 3)}),
        ):
            assert answer.status_code == 400
            assert "30000 pixels in all pictures of a request are more than 25000" in error_of(answer)["message"]
        assert decoded.threads == []
        assert edit(served, sized, sized).status_code == 200
    with serving(FakeOmni(capabilities=VIDEOS), max_input_pixels=9_999) as served:
        answer = served.client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": sized})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "input_reference")


def test_a_damaged_file_is_refused_before_it_waits() -> None:
    noise = Image.effect_noise((64, 64), 80)
    file = io.BytesIO()
    noise.save(file, "PNG")
    omni = held(capabilities=EDITS)
    with serving(omni) as served:
        for data, words in ((file.getvalue()[:-500], "cut off"), (b"GIF89a", "PNG, JPEG or WebP")):
            answer = edit(served, png(), data)
            assert (answer.status_code, error_of(answer)["param"]) == (400, "image")
            assert words in error_of(answer)["message"]
            chat = served.post(CHAT, {"messages": said(text("x"), image(data_url(data)))})
            assert (chat.status_code, error_of(chat)["param"]) == (400, "messages")
        omni.go_on.set()
    assert omni.requests == []


def test_a_call_brings_ranks_the_picture() -> None:
    file = png((3, 2), (10, 20, 30, 0), "RGBA")
    arguments = {"image": [EncodedImage(file, mode="RGB")], "mask_image": EncodedImage(file, is_mask=True)}
    call = Call(request_id="a", arguments=arguments, seeds=(1,))
    assert "\\x" not in repr(call)
    received = pickle.loads(pickle.dumps(call))
    (picture,), mask = received.arguments["image"], received.arguments["mask_image"]
    assert (picture.mode, picture.getpixel((0, 0))) == ("RGB", (10, 20, 30))
    assert (mask.mode, mask.getpixel((0, 0))) == ("L", 255)
