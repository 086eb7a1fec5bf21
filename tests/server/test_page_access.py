"""The page for everybody: by keyboard, on a phone, by its names; and once with the real thing behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omni_sp import DiffusionParallelConfig
from omni_sp.async_omni import AsyncOmni
from omni_sp.errors import SamplingParamsError
from tests.server.browser import Browser, BrowserError
from tests.server.fakes import INPAINTS, VIDEOS, FakeOmni, held
from tests.server.pages import CARDS, READY, STEP, ended, fetch, opened, served, started, text_of, wait_for_focus


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("browser")) as found:
        yield found


def test_works_where_the_browser_stores_nothing(browser: Browser) -> None:
    with served(FakeOmni()) as url:
        page = browser.page("about:blank#")
        names = "'indexedDB', 'localStorage', 'sessionStorage'"
        refuse = (
            f"for (const name of [{names}]) Object.defineProperty(window, name, {{get() {{ throw new Error(); }}}});"
        )
        page.send("Page.addScriptToEvaluateOnNewDocument", source=refuse)
        page.go(url + "/")
        page.wait_for(READY)
        page.type_in("#prompt", "a star")
        page.click("#draw")
        page.wait_for(f"{CARDS} === 1")
        assert "keeps nothing" in text_of(page, "#gallery-hint")
        page.click("#items button")
        page.click("#delete")
        page.wait_for(f"{CARDS} === 0")
        assert page.complaints == []
        page.close()


def test_works_by_keyboard_alone(browser: Browser) -> None:
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        page.press("Tab")
        assert page.run("document.activeElement.className").endswith("skip")
        page.press("Enter")
        wait_for_focus(page, "prompt")
        page.send("Input.insertText", text="a star")
        page.press("Enter", "Control")
        page.wait_for(f"{CARDS} === 1")
        page.wait_for(READY)
        for _ in range(20):
            page.press("Tab")
            if page.run("document.activeElement.closest('#items') !== null"):
                break
        page.press("Enter")
        assert page.run("document.querySelector('#viewer').open")
        page.press("Escape")
        assert not page.run("document.querySelector('#viewer').open")
        assert page.run("document.activeElement.closest('#items') !== null")
        page.press("Enter", "Control")  # wherever the focus is
        page.wait_for(f"{CARDS} === 2")
        page.close()


def test_escape_cancels_and_the_focus_stays(browser: Browser) -> None:
    omni = held()
    with served(omni) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a star")
        page.press("Enter", "Control")
        page.wait_for(f"{STEP}.startsWith('Step 1 of 4')")
        wait_for_focus(page, "prompt")
        page.press("Escape")
        page.wait_for(READY)
        assert text_of(page, "#say") == "Cancelled."
        wait_for_focus(page, "prompt")
        assert ended(omni) == "aborted"
        page.close()


def test_a_mask_is_painted_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    omni = FakeOmni(capabilities=INPAINTS)
    Image.new("RGB", (100, 50)).save(tmp_path / "one.png")
    with served(omni) as url:
        page = opened(browser, url)
        page.choose_files("#image", [tmp_path / "one.png"])
        page.wait_for("document.querySelector('#mask').checkVisibility()")
        page.run("document.querySelector('#mask').focus()")
        page.press("Enter")
        page.wait_for("document.querySelector('#painter').open")
        wait_for_focus(page, "paint")
        page.press("ArrowLeft")
        page.press("ArrowLeft")
        page.press(" ")
        page.press("Escape")
        page.wait_for("!document.querySelector('#painter').open")
        assert page.run("state.mask === null")  # left without Done
        page.press("Enter")
        page.wait_for("document.querySelector('#painter').open")
        for _ in range(4):  # a brush is two steps wide
            page.press("ArrowLeft")
        page.press(" ")
        page.run("document.querySelector('#paint-done').focus()")
        page.press("Enter")
        page.wait_for("state.mask !== null && !document.querySelector('#painter').open")
        wait_for_focus(page, "mask")
        page.type_in("#prompt", "a star")
        page.press("Enter", "Control")
        page.wait_for(f"{CARDS} === 1")
        mask = omni.requests[0].arguments["mask_image"]
        assert (mask.getpixel((26, 25)), mask.getpixel((50, 25))) == (255, 0)
        page.close()


def test_nothing_moves_for_who_wants_that(browser: Browser) -> None:
    omni = FakeOmni(hold_at=0)  # before any preview, when empty places wait for pictures
    with served(omni) as url:
        page = opened(browser, url, is_still=True)
        page.type_in("#prompt", "two stars")
        page.type_in("#n", "2")
        page.press("Enter", "Control")
        page.wait_for("document.querySelectorAll('#canvas .blank').length === 2")
        # What a browser itself moves, a bar without an end, is none of the page's.
        moving = "document.getAnimations().filter((it) => it.effect.pseudoElement === null).length"
        assert page.run(moving) == 0
        page.look(width=1280, height=900)
        assert page.run(moving) > 0  # it can tell
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 2")
        page.close()


def test_something_moves_before_the_first_preview(browser: Browser) -> None:
    omni = FakeOmni(hold_at=0)
    with served(omni) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a star")
        page.click("#draw")
        page.wait_for("document.querySelector('#canvas .blank') !== null")
        for element in ("#canvas .blank", "#progress:indeterminate"):
            assert page.run(f"document.querySelector('{element}').getAnimations()[0].playState") == "running"
        omni.go_on.set()
        page.wait_for(f"{CARDS} === 1")
        page.close()


@pytest.mark.parametrize("look", [{}, {"width": 320, "height": 640, "is_phone": True}], ids=["wide", "phone"])
def test_nothing_jumps_when_a_request_is_cancelled(browser: Browser, look: dict[str, Any]) -> None:
    places = """(() => [scrollY, ...["draw", "canvas", "gallery"].map((id) => $(id).getBoundingClientRect().top)])()"""
    omni = held()
    with served(omni) as url:
        page = opened(browser, url, **look)
        page.type_in("#prompt", "a star")
        page.click("#draw")
        page.wait_for("document.querySelector('#canvas img.rough')?.naturalWidth > 0")
        page.run("document.querySelector('#cancel').scrollIntoView({block: 'center', behavior: 'instant'})")
        before = page.run(places)
        page.run("document.querySelector('#cancel').focus({preventScroll: true})")
        page.press("Enter")
        page.wait_for(READY)
        assert page.run(places) == before
        page.close()


def test_a_touch_screen_has_no_hints_of_keys(browser: Browser) -> None:
    hints = "[...document.querySelectorAll('kbd')].filter((it) => it.checkVisibility()).length"
    with served(FakeOmni(capabilities=INPAINTS)) as url:
        for is_phone, count in ((True, 0), (False, 3)):
            page = opened(browser, url, width=700, height=900, is_phone=is_phone)
            assert page.run(hints) == count
            assert ("paste" in page.run("document.querySelector('#image-hint').textContent")) == (not is_phone)
            page.run("document.querySelector('#painter').showModal()")
            assert page.run(hints) == (0 if is_phone else count + 1)
            page.close()


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_fits_a_phone_and_can_be_read(browser: Browser, is_dark: bool, tmp_path: Path) -> None:
    Image.new("RGB", (32, 16)).save(tmp_path / "one.png")
    omni = FakeOmni(capabilities=INPAINTS, errors=[SamplingParamsError("width=72: give a multiple of 16")])
    with served(omni) as url:
        page = opened(browser, url, width=320, height=640, is_phone=True, is_dark=is_dark)

        def look() -> None:
            assert page.run("document.documentElement.scrollWidth") == 320
            assert page.run(TOO_SMALL) == []
            assert page.run(TOO_FAINT) == []

        page.type_in("#prompt", "a-very-long-word-that-nothing-breaks-" * 5)
        page.choose_files("#image", [tmp_path / "one.png"])
        page.click("#draw")
        page.wait_for("document.querySelector('#problem').textContent")
        page.wait_for(READY)
        look()
        page.click("#draw")
        page.wait_for(f"{CARDS} === 1")
        page.wait_for(READY)
        look()
        page.run("document.querySelector('#mask').click()")
        page.wait_for("document.querySelector('#painter').open")
        look()
        page.press("Escape")
        page.run("document.querySelector('#items button').click()")
        look()
        page.run("document.querySelector('#facts').style.color = '#777'")
        assert page.run(TOO_FAINT) != []  # it can tell
        page.close()


def test_everything_has_a_name(browser: Browser) -> None:
    with served(FakeOmni(capabilities=VIDEOS)) as url:
        page = opened(browser, url)
        page.send("Accessibility.enable")
        nodes = page.send("Accessibility.getFullAXTree")["nodes"]
        roles = {}
        for node in nodes:
            properties = {entry["name"]: entry["value"].get("value") for entry in node.get("properties", [])}
            if properties.get("focusable") and not node["ignored"] and node["role"]["value"] != "RootWebArea":
                roles[node["nodeId"]] = (node["role"]["value"], node.get("name", {}).get("value", ""))
        assert len(roles) > 10
        assert all(name for _, name in roles.values()), roles
        # A placeholder would do for a name, and is none.
        fields = "[...document.querySelectorAll('input:not([type=hidden]), textarea')]"
        assert page.run(f"{fields}.filter((it) => !it.labels.length && !it.ariaLabel).map((it) => it.id)") == []
        page.close()


def test_a_click_that_cannot_land_is_an_error(browser: Browser) -> None:
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        with pytest.raises(BrowserError, match="cannot be clicked"):
            page.click("#cancel")
        page.close()


# Visible controls that a finger would miss: less than 32 CSS pixels high or wide.
TOO_SMALL = """[...document.querySelectorAll("button, input:not([type=checkbox]), textarea, .button, .check")]
  .map((it) => [it.id || it.textContent, it.getBoundingClientRect()])
  .filter(([, box]) => box.width > 1 && (box.width < 32 || box.height < 32)).map(([name]) => name)"""
# Visible text with less contrast to what lies behind it than WCAG's 4.5; disabled controls are left out.
TOO_FAINT = """(() => {
  const parts = (color) => (color.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const light = (color) => parts(color).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (it) => {
    for (; it; it = it.parentElement) {
      const color = getComputedStyle(it).backgroundColor;
      if ((parts(color)[3] ?? 1) > .5) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  for (const it of document.body.querySelectorAll("*")) {
    const says = [...it.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!says || it.closest(":disabled, script, noscript, .unseen") || !it.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(it).color), light(behind(it))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) faint.push(`${it.tagName} ${it.id} ${it.textContent.slice(0, 30)}`);
  }
  return faint;
})()"""


# The real thing


def test_draws_with_the_demo_model_on_two_ranks(browser: Browser) -> None:
    omni = AsyncOmni("omni-sp/shapes", DiffusionParallelConfig(ulysses_degree=2), device="cpu")
    with served(omni) as url:
        page = opened(browser, url, is_ready=False)
        page.wait_for(READY, timeout_s=60)
        info = fetch(url + "/v1/info")
        assert (info["rings"], info["ranks"], info["makes"]) == ([[0, 1]], 2, "picture")
        assert info["parameters"]["width"]["default"] == 256
        assert info["parameters"]["true_cfg_scale"]["default"] == 2.0
        page.type_in("#prompt", "a red circle on a blue background")
        page.type_in("#seed", "11")
        page.type_in("#num_inference_steps", "6")
        page.click("#draw")
        page.wait_for("document.querySelector('#canvas img.rough')?.naturalWidth > 0", timeout_s=30)
        page.wait_for(f"{CARDS} === 1", timeout_s=30)
        page.wait_for("document.querySelector('#canvas img:not(.rough)')?.naturalWidth === 256")
        assert page.complaints == []
        page.close()
