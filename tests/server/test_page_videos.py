"""Videos on the page: jobs of the server that are looked at, and that outlive the page. A FakeOmni makes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from omni_sp.errors import RankFailedError, SamplingParamsError
from tests.server.browser import Browser
from tests.server.fakes import VIDEOS, FakeOmni, held
from tests.server.pages import (
    CARDS,
    READY,
    STEP,
    Relay,
    ended,
    fetch,
    opened,
    served,
    started,
    text_of,
    until,
    wait_for_focus,
)

IDLE = "document.querySelector('#running').hidden"
OTHERS = "document.querySelectorAll('#others li').length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("browser")) as found:
        yield found


def test_makes_a_video_that_outlives_the_page(browser: Browser) -> None:
    omni = FakeOmni(capabilities=VIDEOS, hold_at=2)
    with served(omni) as url:
        page = opened(browser, url)
        assert text_of(page, "#draw") == "Make the video"
        assert text_of(page, "#length").startswith("0.56 s of video. Frames: 1 + a multiple of 4")
        page.type_in("#prompt", "a cat walks")
        page.type_in("#num_frames", "5")
        page.type_in("#fps", "10")
        page.type_in("#seed", "3")
        assert text_of(page, "#length").startswith("0.50 s of video")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('50 %')")
        assert page.run("document.title").startswith("50 % · ")
        page.go(url + "/")  # the server goes on, and a reload finds it again
        page.wait_for(f"{STEP}.startsWith('50 %')")
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 1")
        page.wait_for("document.querySelector('#canvas video')?.videoWidth === 96")
        assert text_of(page, "#caption").startswith("96 × 64 · ")
        params = omni.requests[0].params
        assert (params.num_frames, params.fps, params.seed) == (5, 10.0, 3)
        assert len(omni.requests) == 1
        page.click("#items button")
        page.wait_for("document.querySelector('#facts').textContent.startsWith('size96 × 64')")
        assert "frames5frames a second10seed3" in text_of(page, "#facts")
        assert page.run("document.querySelector('#download').download") == "a-cat-walks-3.mp4"
        assert page.run("document.querySelector('#large video').controls")
        page.go(url + "/")
        page.wait_for(f"{READY} && {CARDS} === 1")
        assert page.run(IDLE)  # it is not taken up again
        assert page.complaints == []
        page.close()


def test_several_wait_and_each_can_be_looked_at(browser: Browser) -> None:
    omni = FakeOmni(capabilities=VIDEOS, hold_at=2)
    with served(omni) as url:
        page = opened(browser, url)
        for count, prompt in enumerate(("a cat walks", "a dog runs"), start=1):
            page.type_in("#prompt", prompt)
            page.press("Enter", "Control")
            until(lambda count=count: len(omni.requests) == count)  # type: ignore[misc]
            page.wait_for("state.works.every((work) => work.id)")
        page.wait_for(f"{STEP} === 'Waiting: other requests come first'")
        page.wait_for("document.querySelector('#others').textContent.startsWith('a cat walks50 %')")
        wait_for_focus(page, "prompt")  # where it was
        page.click("#others button")
        wait_for_focus(page, "cancel")
        assert text_of(page, "#step").startswith("50 %")
        assert text_of(page, "#others b") == "a dog runs"
        page.go(url + "/")
        page.wait_for(f"{OTHERS} === 1 && !{IDLE}")
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 2")
        page.wait_for(f"{OTHERS} === 0 && {IDLE}")
        assert page.complaints == []
        page.close()


def test_a_video_begins_with_a_picture(browser: Browser, tmp_path: Path) -> None:
    omni = held(capabilities=VIDEOS)
    for name, side in (("one", 32), ("two", 48)):
        Image.new("RGB", (side, 16), (200, 0, 0)).save(tmp_path / f"{name}.png")
    with served(omni) as url:
        page = opened(browser, url)
        assert not page.run("document.querySelector('#image').multiple")
        assert page.run("document.querySelector('#n').closest('[hidden]') !== null")  # a job makes one
        page.type_in("#prompt", "it wakes up")
        for name in ("one", "two"):
            page.choose_files("#image", [tmp_path / f"{name}.png"])
        page.wait_for("document.querySelectorAll('#sources li').length === 1")
        page.click("#draw")
        page.wait_for("document.querySelector('#canvas img.rough')?.naturalWidth === 48")
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 1")
        assert omni.requests[0].prompt.image.size == (48, 16)
        page.click("#items button")
        assert "froma picture" in text_of(page, "#facts")
        page.click("#reuse")
        page.wait_for("document.querySelectorAll('#sources li').length === 1")
        assert page.complaints == []
        page.close()


def test_cancel_stops_a_video(browser: Browser) -> None:
    omni = held(capabilities=VIDEOS)
    with served(omni) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a cat walks")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('25 %')")
        page.press("Escape")
        page.wait_for(IDLE)
        assert text_of(page, "#canvas") == "Cancelled."
        assert ended(omni) == "aborted"
        until(lambda: fetch(url + "/v1/videos")["data"] == [])
        page.go(url + "/")
        page.wait_for(READY)
        assert page.run(IDLE)
        page.close()


def test_what_went_wrong_is_reported(browser: Browser) -> None:
    errors = [RankFailedError("rank 1 ended by signal 9", rank=1), SamplingParamsError("seed=1: not this one")]
    with served(FakeOmni(capabilities=VIDEOS, errors=errors), max_frames=9) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a cat walks")
        page.click("#draw")
        assert "rank 1 ended" in page.wait_for("document.querySelector('#problem').textContent")
        page.wait_for(IDLE)
        page.run("document.querySelector('#num_frames').removeAttribute('max')")
        page.type_in("#num_frames", "13")
        page.click("#draw")
        page.wait_for("document.querySelector('#problem').textContent === '13 frames: this server allows up to 9'")
        wait_for_focus(page, "num_frames")
        assert page.run("document.querySelector('#num_frames').closest('.field').nextElementSibling.id") == "problem"
        page.close()


def test_a_lost_connection_is_reported_and_the_video_goes_on(browser: Browser) -> None:
    omni = held(capabilities=VIDEOS)
    with served(omni) as url, Relay(url) as relay:
        page = opened(browser, relay.url)
        page.type_in("#prompt", "a cat walks")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('25 %')")
        relay.cut()
        page.wait_for(f"{STEP} === 'The server does not answer. This goes on when it does.'")
        page.wait_for("document.querySelector('#status').dataset.is === 'silent'")
        omni.go_on.set()
        relay.target = url
        page.wait_for(f"{CARDS} === 1")
        page.wait_for("document.querySelector('#status').dataset.is === 'ready'")
        assert len(omni.requests) == 1
        page.close()


def test_a_server_that_no_longer_knows_a_video_ends_the_waiting(browser: Browser) -> None:
    with (
        served(held(capabilities=VIDEOS)) as url,
        served(FakeOmni(capabilities=VIDEOS)) as another,
        Relay(url) as relay,
    ):
        page = opened(browser, relay.url)
        page.type_in("#prompt", "a cat walks")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('25 %')")
        relay.cut()
        relay.target = another
        assert "no longer knows" in page.wait_for("document.querySelector('#problem').textContent")
        page.wait_for(IDLE)
        page.go(relay.url + "/")
        page.wait_for(READY)
        assert page.run(IDLE)
        page.close()


def test_a_video_waits_for_the_key_that_the_server_wants_meanwhile(browser: Browser) -> None:
    omni = held(capabilities=VIDEOS)
    with served(omni, api_keys=("secret",)) as url:
        page = opened(browser, url, is_ready=False)
        page.wait_for("!document.querySelector('#key-form').hidden")
        page.type_in("#key", "secret")
        page.press("Enter")
        page.wait_for(READY)
        page.type_in("#prompt", "a cat walks")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('25 %')")
        page.run("state.key = 'another'")
        page.wait_for(f"{STEP} === 'Waiting for the API key'")
        page.type_in("#key", "secret")
        page.press("Enter")
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 1")
        page.close()
