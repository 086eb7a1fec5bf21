"""The page at ``/`` in a real browser, and what ``GET /v1/info`` tells it. A FakeOmni draws."""

from __future__ import annotations

import base64
import io
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import pytest
from PIL import Image

from omni_sp.async_omni import EngineStats
from omni_sp.errors import OmniSPError, RankFailedError, SamplingParamsError
from omni_sp.pipelines.metadata import save_options
from omni_sp.pipelines.shapes import SHAPES_PROMPTS
from omni_sp.server.page import page as the_page
from omni_sp.server.page import server_info
from omni_sp.server.settings import ServerSettings
from tests.server.browser import Browser
from tests.server.fakes import EDITS, INPAINTS, PICTURES, VIDEOS, FakeOmni, held
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
        info = fetch(url + "/v1/info")
    assert info["pipeline"] == "FakePicturePipeline"
    assert info["makes"] == "picture"
    assert not info["takes_image"]
    assert info["rings"] == [[0, 1], [2, 3]]
    assert info["parameters"]["width"] == {"default": 96, "multiple": 16, "minimum": 16}
    assert info["parameters"]["num_inference_steps"]["maximum"] == 50
    assert "num_frames" not in info["parameters"]
    assert "true_cfg_scale" not in info["parameters"]
    assert info["parameters"]["n"] == {"default": 1, "multiple": 1, "minimum": 1, "maximum": 10}
    assert "strength" not in info["parameters"]
    assert not info["takes_mask"]
    assert info["limits"]["images"] == 16
    assert info["steps_per_second"] is None


def test_info_of_a_model_that_fills_in() -> None:
    capabilities = replace(INPAINTS, parameters={**INPAINTS.parameters, "strength": 0.6})
    with served(FakeOmni(capabilities=capabilities)) as url:
        info = fetch(url + "/v1/info")
    assert info["takes_mask"]
    assert info["needs_image"]
    assert not info["takes_many_images"]
    assert info["parameters"]["strength"] == {"default": 0.6, "minimum": 0, "maximum": 1}


def test_info_of_a_video_model() -> None:
    with served(FakeOmni(capabilities=VIDEOS)) as url:
        info = fetch(url + "/v1/info")
    assert info["makes_videos"]
    assert info["takes_image"]
    assert not info["takes_many_images"]
    assert info["parameters"]["num_frames"]["multiple"] == 4
    assert info["parameters"]["fps"]["default"] > 0
    assert "n" not in info["parameters"]


def test_info_shows_how_fast_steps_are(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = EngineStats(steps=35, steps_done=30, denoise_s=10.0)
    monkeypatch.setattr(FakeOmni, "stats", property(lambda _self: stats))
    assert server_info(FakeOmni(), ServerSettings())["steps_per_second"] == 3.0


def test_the_policy_lets_nothing_in_from_outside() -> None:
    text, policy = the_page()
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
        assert page.run("document.querySelector('#rings').getAttribute('aria-label')").startswith("ulysses_degree 2")
        page.type_in("#prompt", "a red circle")
        page.type_in("#negative_prompt", "blue")
        page.type_in("#width", "128")
        page.type_in("#height", "64")
        page.type_in("#guidance_scale", "3.5")
        page.type_in("#seed", "11")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('Step 3 of 4')")
        page.wait_for("document.querySelector('#canvas img')?.naturalWidth > 0")
        assert page.run("document.querySelector('#progress').value") == 3
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
        assert page.run("document.querySelector('#prompt').value") == "a red circle"
        assert page.complaints == []
        assert all(address.startswith((url, "blob:", "data:image/svg")) for address in page.addresses), page.addresses
        page.close()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_dropped_picture_fills_the_form(browser: Browser, kind: str) -> None:
    settings = {
        "prompt": 'ein "Käse" {赤}', "negative_prompt": "a\\b", "seed": 7, "width": 64, "height": 32,
        "num_inference_steps": 3, "guidance_scale": 2.5, "num_outputs_per_prompt": 2, "version": "Omni-SP 1",
    }  # fmt: skip
    image, file = Image.effect_noise((64, 32), 80).convert("RGB"), io.BytesIO()
    image.save(file, kind, **save_options(kind, image, settings))
    bare = io.BytesIO()
    image.save(bare, kind)
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        page.type_in("#seed", "99")
        for one in (bare, file):
            data = base64.b64encode(one.getvalue()).decode()
            page.run(
                f"""(() => {{
                const bytes = Uint8Array.from(atob("{data}"), (letter) => letter.charCodeAt(0));
                const held = new DataTransfer();
                held.items.add(new File([bytes], "x", {{ type: "image/{kind.lower()}" }}));
                document.body.dispatchEvent(
                  new DragEvent("drop", {{ dataTransfer: held, bubbles: true, cancelable: true }}));
                }})()"""
            )
            if one is bare:
                time.sleep(0.2)
                assert page.run("document.querySelector('#seed').value") == "99"
        page.wait_for("document.querySelector('#seed').value === '7'")
        fields = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "n")
        values = [page.run(f"document.querySelector('#{name}').value") for name in fields]
        assert values == ['ein "Käse" {赤}', "a\\b", "64", "32", "3", "2.5", "2"]
        assert page.complaints == []
        page.close()


def test_a_seed_that_nobody_gave_is_drawn_here_and_shown(browser: Browser) -> None:
    omni = FakeOmni(dropped={"tokenizer": 7})
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
        caption = page.wait_for("document.querySelector('#caption').textContent")
        assert f"seed {seeds[1]}" in caption
        assert "tokenizer dropped 7 tokens" in caption
        assert page.complaints == []
        page.close()


def test_draws_several_pictures_at_once(browser: Browser) -> None:
    omni = held()
    with served(omni, max_n=4) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "four stars")
        assert page.run("document.querySelector('#n').title") == "at least 1, at most 4"
        page.type_in("#n", "5")
        page.click("#draw")
        assert text_of(page, "#problem") == "Pictures 5: give at most 4."
        wait_for_focus(page, "n")
        page.type_in("#n", "4")
        page.type_in("#seed", "7")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('Step 1 of 4')")
        page.wait_for("document.querySelectorAll('#canvas > img.rough').length === 4")  # each as it is so far
        assert page.run("document.querySelectorAll('#canvas .blank').length") == 0
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 4")
        assert omni.requests[0].params.num_outputs_per_prompt == 4
        assert page.wait_for("document.querySelector('#caption').textContent").endswith("seed 7 · 4 pictures")
        page.click("#canvas button:nth-child(2)")
        assert "picture2 of 4" in text_of(page, "#facts")
        assert page.run("document.querySelector('#download').download") == "four-stars-7-2.png"
        page.go(url + "/")
        page.wait_for(f"{CARDS} === 4")
        page.click("#items button")
        assert "picture1 of 4" in text_of(page, "#facts")  # in the order in which they came
        assert page.complaints == []
        page.close()


def test_shows_only_the_fields_that_the_pipeline_takes(browser: Browser) -> None:
    shown = """[...document.querySelectorAll("#form .field")].filter((it) => it.checkVisibility())
      .map((it) => it.querySelector("textarea, input, button").id).join()"""
    common = {"prompt": None, "num_inference_steps": 4, "num_images_per_prompt": 1}
    few = replace(PICTURES, parameters=common)
    both = replace(PICTURES, parameters={**common, "true_cfg_scale": 4.0, "guidance_scale": 1.0})
    for capabilities, names in (
        (few, "prompt,n,num_inference_steps"),
        (replace(both, ignores_guidance_scale=True), "prompt,n,num_inference_steps,true_cfg_scale"),
        (both, "prompt,n,num_inference_steps,true_cfg_scale,guidance_scale"),
    ):
        with served(FakeOmni(capabilities=capabilities)) as url:
            page = opened(browser, url)
            assert page.run(shown) == names
            page.close()
    with (
        served(FakeOmni(capabilities=few)) as url,
        served(FakeOmni(capabilities=EDITS)) as another,
        Relay(url) as relay,
    ):
        page = opened(browser, relay.url)
        relay.cut()
        relay.target = another  # the server began anew, with another model
        page.run("refresh()")
        page.wait_for(f"({shown}).includes('image')")
        page.close()


def test_little_is_said_aloud(browser: Browser) -> None:
    with served(FakeOmni(steps=40)) as url:
        page = opened(browser, url)
        page.run("""(() => { window.said = [];
          const note = () => said.push(document.querySelector("#say").textContent);
          new MutationObserver(note).observe(document.querySelector("#say"), {childList: true}); })()""")
        page.type_in("#prompt", "a star")
        page.click("#draw")
        page.wait_for("window.said.at(-1)?.startsWith('Done in ')")
        said = page.run("window.said")
        assert "Half of it is done." in said
        assert len(said) <= 4, said
        live = "[...document.querySelectorAll('[role=status], [role=alert], [aria-live]')].map((it) => it.id).join()"
        assert page.run(live) == "key-problem,problem,say"
        page.close()


def test_cancel_aborts_the_request(browser: Browser) -> None:
    omni = held()
    with served(omni) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a star")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('Step 1 of 4')")
        wait_for_focus(page, "draw")  # where it was: more can be asked for
        page.run("document.querySelector('#cancel').focus()")
        page.press("Enter")
        page.wait_for(READY)
        assert text_of(page, "#canvas") == "Cancelled."
        wait_for_focus(page, "draw")
        assert ended(omni) == "aborted"
        omni.go_on.set()
        page.click("#draw")
        page.wait_for(f"{CARDS} === 1")
        assert page.complaints == []
        page.close()


@pytest.mark.parametrize(
    ("error", "said", "focus"),
    [
        (RankFailedError("rank 1 ended by signal 9", rank=1), "rank 1 ended", "draw"),
        (SamplingParamsError("width=72: give a multiple of 16", "width"), "width=72", "width"),
        (
            SamplingParamsError("num_outputs_per_prompt=1: give 2", "num_outputs_per_prompt"),
            "num_outputs_per_prompt=1",
            "n",
        ),
        (SamplingParamsError("this model wants one", "negative_prompt"), "wants one", "negative_prompt"),
        (
            SamplingParamsError("max_sequence_length=4: too short", "max_sequence_length"),
            "too short",
            "draw",
        ),  # the form has no such field
    ],
)
def test_errors_are_shown_at_their_field(browser: Browser, error: OmniSPError, said: str, focus: str) -> None:
    with served(FakeOmni(errors=[error])) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a star")
        page.click("#draw")
        assert said in page.wait_for("document.querySelector('#problem').textContent")
        page.wait_for(READY)
        wait_for_focus(page, focus)
        assert page.run("document.querySelectorAll('[aria-invalid]').length") == (focus != "draw")
        if focus != "draw":
            field = f"document.querySelector('#{focus}')"
            assert page.run(f"{field}.ariaInvalid + {field}.getAttribute('aria-errormessage')") == "trueproblem"
            top, bottom = (f"{it}.getBoundingClientRect()" for it in ("document.querySelector('#problem')", field))
            assert 0 <= page.run(f"{top}.top - {bottom}.bottom") < 24
        page.click("#draw")
        page.wait_for(f"{CARDS} === 1")
        assert text_of(page, "#problem") == ""
        page.close()


def test_what_the_server_would_refuse_is_not_sent(browser: Browser) -> None:
    omni = FakeOmni()
    with served(omni, max_pixels=10_000) as url:
        page = opened(browser, url)
        page.click("#draw")
        wait_for_focus(page, "prompt")
        assert text_of(page, "#problem") == "Say what there is to be seen."
        page.type_in("#prompt", "a star")
        page.type_in("#width", "100")
        page.click("#draw")
        assert text_of(page, "#problem") == "Width 100: give a multiple of 16, such as 96 or 112."
        page.type_in("#prompt", "a star in the snow")
        assert text_of(page, "#problem") != ""  # it stays until the next attempt
        for width, words in (("8", "Width 8: give at least 16."), ("-", "Width: give a number.")):
            page.type_in("#width", width)
            page.press("Enter", "Control")
            assert text_of(page, "#problem") == words
            wait_for_focus(page, "width")
        page.type_in("#width", "160")
        page.click("#draw")
        assert "10000" in text_of(page, "#problem")  # 160 × the default 64
        wait_for_focus(page, "width")
        assert omni.requests == []
        page.close()


def test_shows_how_many_come_first(browser: Browser) -> None:
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


def test_more_is_asked_for_while_one_is_drawn(browser: Browser) -> None:
    omni = held()
    with served(omni) as url:
        page = opened(browser, url)
        for count, prompt in enumerate(("one", "two"), start=1):
            page.type_in("#prompt", prompt)
            page.click("#draw")
            until(lambda count=count: len(omni.requests) == count)  # type: ignore[misc]
            page.wait_for("state.works.every((work) => work.is_heard)")
        page.wait_for(f"{STEP} === 'Waiting: 1 request comes first'")
        page.wait_for("document.querySelector('#others').textContent.startsWith('oneStep 1 of 4')")
        for number in range(3, 7):  # four streams are open at a time; the others wait on the page
            page.type_in("#prompt", f"{number}")
            page.click("#draw")
            page.wait_for(f"state.works.length === {number} && state.works.every((work) => work.is_heard)")
        assert text_of(page, "#step") == "Waiting for your pictures before it"
        assert len(omni.requests) == 4
        page.press("Escape")
        page.wait_for("state.works.length === 5")
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 5")
        page.wait_for(READY)
        assert [request.prompt.text for request in omni.requests] == ["one", "two", "3", "4", "5"]
        assert page.complaints == []
        page.close()


def test_a_double_click_draws_once(browser: Browser) -> None:
    omni = held()
    with served(omni) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a star")
        page.run("(() => { for (let count = 0; count < 2; count++) document.querySelector('#draw').click(); })()")
        page.wait_for(f"{STEP}.startsWith('Step 1 of 4')")
        assert page.run("state.works.length") == 1
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 1")
        assert len(omni.requests) == 1
        page.close()


def test_the_demo_model_has_examples(browser: Browser) -> None:
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        page.click("#examples li:nth-child(2) button")
        assert page.run("document.querySelector('#prompt').value") == SHAPES_PROMPTS[1]
        wait_for_focus(page, "prompt")
        page.go(url + "/")
        page.wait_for(READY)
        assert page.run("document.querySelector('#prompt').value") == SHAPES_PROMPTS[1]  # kept as if typed
        page.close()
    with served(FakeOmni(), model="some/model") as url:
        page = opened(browser, url)
        assert not page.run("document.querySelector('#examples').checkVisibility()")
        page.close()


def test_adapters_are_chosen_with_their_scales(browser: Browser) -> None:
    omni = FakeOmni(capabilities=replace(PICTURES, adapters=("style", "light")))
    omni.go_on.set()
    with served(omni) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "four stars")
        page.type_in("#lora-style", "0.8")
        page.click("#draw")
        page.wait_for(f"{CARDS} === 1")
        assert omni.requests[0].params.adapters == (("style", 0.8),)
        page.click("#reset")
        assert page.run("document.querySelector('#lora-style').value") == ""
        page.click("#items button")
        assert "style=0.8" in text_of(page, "#facts")
        page.click("#reuse")
        assert page.run("document.querySelector('#lora-style').value") == "0.8"
        assert page.complaints == []
        page.close()
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        assert page.run("document.querySelector('[data-takes=lora]').hidden")
        page.close()
