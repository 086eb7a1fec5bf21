"""The page at ``/`` in a real browser, and what ``GET /v1/info`` tells it. A FakeOmni draws."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

from omni_sp.async_omni import EngineStats
from omni_sp.errors import OmniSPError, RankFailedError, SamplingParamsError
from omni_sp.server.page import content_security_policy, server_info
from omni_sp.server.settings import ServerSettings
from tests.server.browser import Browser
from tests.server.fakes import EDITS, VIDEOS, FakeOmni, held
from tests.server.pages import CARDS, FOCUS, READY, STEP, fetch, opened, served, started, text_of


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("browser")) as found:
        yield found


# What the server says of itself


def test_info_before_and_after_the_start() -> None:
    omni = FakeOmni()
    before = server_info(omni, ServerSettings(served_model_names=("qwen",)))
    assert before["status"] == "starting"
    assert before["model"] == "qwen"
    assert before["pipeline"] is None
    with served(omni, max_steps=50) as url:
        told = fetch(url + "/v1/info")
    assert told["pipeline"] == "FakePicturePipeline"
    assert told["makes"] == "picture"
    assert not told["takes_image"]
    assert told["rings"] == [[0, 1], [2, 3]]
    assert told["parameters"]["width"] == {"default": 96, "multiple": 16, "minimum": 16}
    assert told["parameters"]["num_inference_steps"]["maximum"] == 50
    assert "num_frames" not in told["parameters"]
    assert "true_cfg_scale" not in told["parameters"]
    assert told["steps_per_second"] is None


def test_info_of_a_video_model() -> None:
    with served(FakeOmni(facts=VIDEOS)) as url:
        told = fetch(url + "/v1/info")
    assert told["makes_videos"]
    assert told["takes_image"]
    assert not told["takes_many_images"]
    assert told["parameters"]["num_frames"]["multiple"] == 4
    assert told["parameters"]["fps"]["default"] > 0


def test_info_tells_how_fast_steps_are(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = EngineStats(steps=35, steps_done=30, denoise_s=10.0)
    monkeypatch.setattr(FakeOmni, "stats", property(lambda _self: stats))
    assert server_info(FakeOmni(), ServerSettings())["steps_per_second"] == 3.0


def test_the_policy_lets_nothing_in_from_outside() -> None:
    text = files("omni_sp.server").joinpath("page.html").read_text("utf-8")
    policy = content_security_policy(text)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "*" not in policy
    assert policy.count("'sha256-") == 2
    assert "innerHTML" not in text
    addresses = [part.split('"')[0].split("'")[0] for part in text.split("http")[1:]]
    assert addresses == ["://www.w3.org/2000/svg"]  # a name, which nobody fetches
    with served(FakeOmni()) as url, urllib.request.urlopen(url + "/", timeout=10) as answer:
        assert answer.headers["Content-Security-Policy"] == policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.read().decode() == text


# Pictures


def test_draws_a_picture_with_steps_and_previews(browser: Browser) -> None:
    omni = FakeOmni(hold_at=3)
    with served(omni) as url:
        page = opened(browser, url)
        assert "omni-sp/shapes" in text_of(page, "#model")
        assert page.tell("document.querySelector('#rings').getAttribute('aria-label')").startswith("ulysses_degree 2")
        page.type_in("#prompt", "a red circle")
        page.type_in("#negative_prompt", "blue")
        page.type_in("#width", "128")
        page.type_in("#height", "64")
        page.type_in("#guidance_scale", "3.5")
        page.type_in("#seed", "11")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('Step 3 of 4')")
        page.wait_for("document.querySelector('#canvas img')?.naturalWidth > 0")
        assert page.tell("document.querySelector('#progress').value") == 3
        page.wait_for("document.querySelector('#rings').className === 'busy'")
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 1")
        page.wait_for("document.querySelector('#canvas img')?.alt === 'a red circle'")
        assert page.wait_for("document.querySelector('#caption').textContent").startswith("128 × 64 · ")
        page.wait_for(READY)
        assert text_of(page, "#say").startswith("Done in ")
        params = omni.requests[0].params
        assert (params.width, params.height, params.guidance_scale, params.seed) == (128, 64, 3.5, 11)
        assert params.num_inference_steps is None
        assert params.negative_prompt == "blue"
        # Kept in the browser, with what was typed.
        page.go(url + "/")
        page.wait_for(f"{READY} && {CARDS} === 1")
        assert page.tell("document.querySelector('#prompt').value") == "a red circle"
        assert page.complaints == []
        assert all(address.startswith((url, "blob:", "data:image/svg")) for address in page.addresses), page.addresses
        page.close()


def test_a_seed_that_nobody_gave_is_drawn_here_and_told(browser: Browser) -> None:
    omni = FakeOmni()
    with served(omni) as url:
        page = opened(browser, url)
        for count in (1, 2):
            page.type_in("#prompt", "a star")
            page.click("#draw")
            page.wait_for(f"{CARDS} === {count}")
            page.wait_for(READY)
        seeds = [request.params.seed for request in omni.requests]
        assert None not in seeds
        assert len(set(seeds)) == 2
        assert f"seed {seeds[1]}" in page.wait_for("document.querySelector('#caption').textContent")
        assert page.complaints == []
        page.close()


def test_cancel_aborts_the_request(browser: Browser) -> None:
    omni = held()
    with served(omni) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a star")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('Step 1 of 4')")
        assert page.tell(FOCUS) == "cancel"
        page.press("Enter")
        page.wait_for(READY)
        assert text_of(page, "#canvas") == "Cancelled."
        assert page.tell(FOCUS) == "draw"
        until = time.monotonic() + 5
        while not omni.requests[0].is_over and time.monotonic() < until:
            time.sleep(0.02)
        assert omni.requests[0].outcome == "aborted"
        omni.go_on.set()
        page.click("#draw")
        page.wait_for(f"{CARDS} === 1")
        assert page.complaints == []
        page.close()


@pytest.mark.parametrize(
    ("error", "said", "focus"),
    [
        (RankFailedError("rank 1 ended by signal 9", rank=1), "rank 1 ended", "draw"),
        (SamplingParamsError("width=72: give a multiple of 16"), "width=72", "width"),
    ],
)
def test_errors_are_told_at_their_field(browser: Browser, error: OmniSPError, said: str, focus: str) -> None:
    with served(FakeOmni(errors=[error])) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a star")
        page.click("#draw")
        assert said in page.wait_for("document.querySelector('#problem').textContent")
        page.wait_for(READY)
        assert page.tell(FOCUS) == focus
        assert page.tell("document.querySelectorAll('[aria-invalid]').length") == (focus == "width")
        page.click("#draw")
        page.wait_for(f"{CARDS} === 1")
        assert text_of(page, "#problem") == ""
        page.close()


def test_what_the_server_would_refuse_is_not_sent(browser: Browser) -> None:
    omni = FakeOmni()
    with served(omni, max_pixels=10_000) as url:
        page = opened(browser, url)
        page.click("#draw")
        assert page.tell(FOCUS) == "prompt"  # required
        page.type_in("#prompt", "a star")
        page.type_in("#width", "100")
        page.click("#draw")
        assert page.tell("document.querySelector('#width').validity.stepMismatch")
        page.type_in("#width", "160")
        page.click("#draw")
        assert "10000" in text_of(page, "#problem")  # 160 × the default 64
        assert page.tell(FOCUS) == "width"
        assert omni.requests == []
        page.close()


def test_tells_how_many_come_first(browser: Browser) -> None:
    omni = held()
    with served(omni) as url:
        other = opened(browser, url)
        other.type_in("#prompt", "another's")
        other.click("#draw")
        other.wait_for(f"{STEP}.startsWith('Step 1 of 4')")
        page = opened(browser, url)
        page.type_in("#prompt", "a star")
        page.click("#draw")
        page.wait_for(f"{STEP} === 'Waiting: 1 request comes first'")
        page.wait_for("document.querySelector('#status').textContent === 'drawing, 1 waiting'")
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 1")
        for one in (other, page):
            one.close()


def test_edits_pictures(browser: Browser, tmp_path: Path) -> None:
    omni = FakeOmni(facts=EDITS)
    for place, side in enumerate((32, 48)):
        Image.new("RGB", (side, 16), (200, 0, 0)).save(tmp_path / f"{place}.png")
    with served(omni) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "make it blue")
        page.click("#draw")
        assert "starts from a picture" in text_of(page, "#problem")
        page.choose_files("#image", [tmp_path / "0.png", tmp_path / "1.png"])
        page.wait_for("document.querySelectorAll('#sources li').length === 2")
        page.click("#draw")
        page.wait_for(f"{CARDS} === 1")
        page.wait_for(READY)
        images = omni.requests[0].prompt.image
        assert [image.size for image in images] == [(32, 16), (48, 16)]
        page.click("#sources button")
        page.wait_for("document.querySelectorAll('#sources li').length === 1")
        page.tell(PASTE)
        page.wait_for("document.querySelectorAll('#sources li').length === 2")
        # What came out goes in again.
        page.click("#items button")
        page.click("#edit")
        page.type_in("#prompt", "make it green")
        assert text_of(page, "#draw") == "Edit"
        page.click("#draw")
        page.wait_for(f"{CARDS} === 2")
        assert omni.requests[1].prompt.image.size == (96, 64)
        assert page.complaints == []
        page.close()


PASTE = """(() => {
  const held = new DataTransfer();
  held.items.add(new File(["no matter"], "pasted.png", {type: "image/png"}));
  document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: held}));
})()"""


# Videos


def test_makes_a_video(browser: Browser) -> None:
    omni = FakeOmni(facts=VIDEOS, hold_at=2)
    with served(omni) as url:
        page = opened(browser, url)
        assert text_of(page, "#draw") == "Make the video"
        page.type_in("#prompt", "a cat walks")
        page.type_in("#num_frames", "5")
        page.type_in("#seed", "3")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('50 %')")
        page.go(url + "/")  # the server goes on, and a reload finds it again
        page.wait_for(f"{STEP}.startsWith('50 %')")
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 1")
        page.wait_for("document.querySelector('#canvas video')?.videoWidth === 96")
        assert text_of(page, "#caption").startswith("96 × 64 · ")
        assert (omni.requests[0].params.num_frames, omni.requests[0].params.seed) == (5, 3)
        assert len(omni.requests) == 1
        assert page.complaints == []
        page.close()


def test_cancel_stops_a_video(browser: Browser) -> None:
    omni = held(facts=VIDEOS)
    with served(omni) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a cat walks")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('25 %')")
        page.click("#cancel")
        page.wait_for(READY)
        until = time.monotonic() + 5
        while not omni.requests[0].is_over and time.monotonic() < until:
            time.sleep(0.02)
        assert omni.requests[0].outcome == "aborted"
        assert fetch(url + "/v1/videos")["data"] == []
        page.close()


# The server's states


def test_asks_for_a_key_and_keeps_it_for_the_tab(browser: Browser) -> None:
    omni = FakeOmni()
    with served(omni, api_keys=("secret",)) as url:
        page = opened(browser, url, is_ready=False)
        page.wait_for("!document.querySelector('#key-form').hidden")
        assert page.tell(FOCUS) == "key"
        page.type_in("#key", "wrong")
        page.press("Enter")
        page.wait_for("document.querySelector('#key-problem').textContent !== ''")
        page.type_in("#key", "secret")
        page.press("Enter")
        page.wait_for(READY)
        assert page.tell("document.querySelector('#key-form').hidden")
        page.go(url + "/")
        page.wait_for(READY)
        page.type_in("#prompt", "a star")
        page.click("#draw")
        page.wait_for(f"{CARDS} === 1")
        page.close()


def test_waits_while_the_model_loads_and_says_when_the_server_is_gone(browser: Browser) -> None:
    class Loading(FakeOmni):
        async def start(self) -> None:
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            await super().start()

    omni = Loading()
    with served(omni) as url:
        page = opened(browser, url, is_ready=False)
        page.wait_for("document.querySelector('#status').textContent === 'loading the model'")
        assert page.tell("document.querySelector('#draw').disabled")
        assert text_of(page, "#canvas") == "The model is loading."
        omni.go_on.set()
        page.wait_for(READY)
        assert text_of(page, "#status") == "ready"
    page.tell("refresh()")
    assert "does not answer" in text_of(page, "#status")
    assert page.tell("document.querySelector('#draw').disabled")
    page.close()


# The gallery


def test_gallery_gives_settings_back_and_forgets(browser: Browser) -> None:
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        for count, prompt in enumerate(("one", "two", "three"), start=1):
            page.type_in("#prompt", prompt)
            page.type_in("#seed", str(count))
            page.click("#draw")
            page.wait_for(f"{CARDS} === {count}")
            page.wait_for(READY)
        page.click("#items li:nth-child(2) button")
        assert text_of(page, "#viewer-title") == "two"
        page.wait_for("document.querySelector('#facts').textContent.startsWith('size96 × 64seed2')")
        assert "steps4guidance4" in text_of(page, "#facts")  # the model's own
        assert page.tell("document.querySelector('#download').download") == "two-2.png"
        page.press("ArrowRight")
        assert text_of(page, "#viewer-title") == "one"
        page.click("#delete")
        page.wait_for(f"{CARDS} === 2 && document.querySelector('#viewer-title').textContent === 'two'")
        page.click("#reuse")
        assert not page.tell("document.querySelector('#viewer').open")
        assert page.tell(FOCUS) == "prompt"
        assert (
            page.tell("['prompt', 'seed', 'width'].map((name) => document.getElementById(name).value).join()")
            == "two,2,"
        )
        page.click("#clear")
        assert page.tell(CARDS) == 2  # it asks first
        page.click("#clear")
        page.wait_for(f"{CARDS} === 0")
        page.go(url + "/")
        page.wait_for(READY)
        assert page.tell(CARDS) == 0
        assert page.complaints == []
        page.close()
