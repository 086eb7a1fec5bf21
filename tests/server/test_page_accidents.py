"""What people do by accident on the page: clicks too many, keys held, tabs too many, files that are gone or odd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from tests.server.browser import Browser, Page
from tests.server.fakes import EDITS, INPAINTS, FakeOmni, held
from tests.server.pages import CARDS, READY, STEP, Relay, ended, opened, served, started, text_of, until, wait_for_focus
from tests.server.test_page_edits import PASTE

PROMPTS = "state.items.map((item) => item.settings.prompt).join()"
SHOWN = "document.querySelector('#viewer-title').textContent"
IS_OPEN = "document.querySelector('#viewer').open"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("browser")) as found:
        yield found


def draw(page: Page, *prompts: str) -> None:
    """Draw each, one after the other."""
    for prompt in prompts:
        count = page.run(CARDS) + 1
        page.type_in("#prompt", prompt)
        page.click("#draw")
        page.wait_for(f"{CARDS} === {count} && {READY}")


def test_the_viewer_acts_on_what_it_shows(browser: Browser) -> None:
    omni = FakeOmni()
    with served(omni) as url:
        page = opened(browser, url)
        draw(page, "one", "two", "three")
        omni._hold_at = 1
        page.type_in("#prompt", "new")
        page.click("#draw")
        page.click("#items li:nth-child(1) button")
        assert page.run(SHOWN) == "three"
        assert page.run("document.querySelector('#newer').disabled")
        omni.go_on.set()  # it ends behind the viewer, and comes before what is shown
        page.wait_for(f"{CARDS} === 4")
        assert not page.run("document.querySelector('#newer').disabled")
        page.click("#delete")
        assert page.run(PROMPTS) == "new,two,one"
        assert page.run(SHOWN) == "two"
        page.click("#reuse")
        assert page.run("document.querySelector('#prompt').value") == "two"
        # What comes back has its place among what came later.
        draw(page, "latest")
        page.click("#undo")
        page.wait_for(f"{CARDS} === 5")
        assert page.run(PROMPTS) == "latest,new,three,two,one"
        page.go(url + "/")
        page.wait_for(f"{READY} && {CARDS} === 5")
        assert page.run(PROMPTS) == "latest,new,three,two,one"
        # The stage shows what is deleted, and no longer opens it.
        draw(page, "last")
        page.click("#canvas button")
        page.click("#delete")
        page.click("#close")
        assert page.run("document.querySelector('#canvas').firstChild.tagName") == "IMG"
        assert page.complaints == []
        page.close()


def test_a_click_too_many_and_a_held_key_delete_no_more_than_one(browser: Browser) -> None:
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        draw(page, "one", "two", "three", "four")
        page.click("#items li:nth-child(2) button", times=2)
        assert page.run(f"{IS_OPEN} && {SHOWN}") == "three"  # the second click has not shut it
        page.click("#delete", times=3)
        assert page.run(PROMPTS) == "four,two,one"
        page.press("Enter", repeats=5)
        page.wait_for(f"{CARDS} === 2")
        assert page.run(PROMPTS) == "four,one"
        page.click("#delete")
        page.run("(() => { for (let n = 0; n < 5; n++) document.querySelector('#delete').click(); })()")
        page.wait_for(f"{CARDS} === 0 && !{IS_OPEN}")
        wait_for_focus(page, "gallery-title")
        page.run("document.querySelector('#undo').click(); document.querySelector('#undo').click()")
        page.wait_for(f"{CARDS} === 1")
        draw(page, "two", "three")
        page.click("#clear")
        page.run("document.querySelector('#clear').focus()")
        page.press("Enter", repeats=5)
        page.run("document.querySelector('#clear').click()")
        page.wait_for(f"{CARDS} === 0")
        page.click("#undo", times=2)
        page.wait_for(f"{CARDS} === 3")
        assert page.complaints == []
        page.close()


def test_one_wish_is_one_drawing(browser: Browser) -> None:
    omni = held()
    with served(omni) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a star")
        page.click("#draw", times=3)
        until(lambda: len(omni.requests) == 1)
        page.wait_for("state.works.every((work) => work.is_heard)")
        page.run("document.querySelector('#seed').focus()")
        page.press("Enter", repeats=8)
        page.wait_for("state.works.length === 2 && state.works.every((work) => work.is_heard)")
        page.run("document.querySelector('#prompt').focus()")
        page.press("Enter", "Control", repeats=8)
        page.wait_for("state.works.length === 3 && state.works.every((work) => work.is_heard)")
        assert page.run("document.querySelector('#prompt').value") == "a star"
        # One Escape closes the viewer or ends one drawing, not both, however long it is held.
        page.run("document.activeElement.blur()")
        page.press("Escape", repeats=5)
        assert ended(omni, 2) == "aborted"
        page.wait_for("state.works.length === 2")
        omni.go_on.set()
        page.wait_for(READY)
        assert [request.outcome for request in omni.requests] == ["done", "done", "aborted"]
        assert page.complaints == []
        page.close()


def test_drawings_of_all_tabs_share_four_streams_and_keep_their_order(browser: Browser) -> None:
    omni = held()
    with served(omni) as url:
        page = opened(browser, url)
        other = opened(browser, url, beside=page)

        def ask(one: Page, *prompts: str) -> None:
            for prompt in prompts:
                one.type_in("#prompt", prompt)
                one.run("document.querySelector('#form').requestSubmit()")
                one.wait_for("state.works.every((work) => work.is_heard)")

        ask(page, "a", "b", "c")
        ask(other, "d", "e", "f", "g")
        assert other.run("document.querySelectorAll('#others li').length") == 3
        assert len(omni.requests) == 4
        assert text_of(other, "#step") == "Waiting for your pictures before it"
        other.run("refresh()")  # there is a connection left for it
        other.wait_for("document.querySelector('#status').textContent === 'drawing, 3 waiting'")
        omni.go_on.set()
        for one, count in ((page, 3), (other, 4)):
            one.wait_for(f"{READY} && {CARDS} === {count}", timeout_s=30)
        assert [request.prompt.text for request in omni.requests] == ["a", "b", "c", "d", "e", "f", "g"]
        assert page.complaints == other.complaints == []
        page.close()


def test_the_focus_stays_on_what_is_under_way_while_another_ends(browser: Browser) -> None:
    omni = held()
    with served(omni) as url:
        page = opened(browser, url)
        for prompt in ("one", "two", "three"):
            page.type_in("#prompt", prompt)
            page.run("document.querySelector('#form').requestSubmit()")
            page.wait_for("state.works.every((work) => work.is_heard)")
        page.run("document.querySelector('#others li:nth-child(2) button').focus()")
        page.run("state.works[0].abort.abort()")
        page.wait_for("document.querySelectorAll('#others li').length === 1")
        assert page.run("document.activeElement.textContent").startswith("two")
        omni.go_on.set()
        page.wait_for(READY)
        # And on the button that cannot be pressed for a while.
        page.run("document.querySelector('#draw').focus()")
        omni.force_status = "restarting"
        page.wait_for("document.querySelector('#draw').disabled")
        omni.force_status = None
        page.wait_for(READY)
        wait_for_focus(page, "draw")
        page.close()


def test_only_a_click_beside_the_viewer_closes_it(browser: Browser) -> None:
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        draw(page, "a long prompt that somebody selects")
        page.click("#items button")
        left, top, right = page.run(
            "(({left, top, right}) => [left, top, right])(document.querySelector('#viewer').getBoundingClientRect())"
        )
        page.click_at(left + 4, top + 40)  # its edge
        assert page.run(IS_OPEN)
        for kind, x in (("mousePressed", left + 60), ("mouseMoved", right + 20), ("mouseReleased", right + 20)):
            page.send("Input.dispatchMouseEvent", type=kind, x=x, y=top + 40, button="left", clickCount=1)
        assert page.run(IS_OPEN)
        page.click_at(right + 20, top + 40)
        page.wait_for(f"!{IS_OPEN}")
        page.close()


@pytest.mark.parametrize(("width", "height"), [(427, 300), (320, 256), (568, 320)])
def test_the_viewer_shows_the_picture_in_a_small_window_too(browser: Browser, width: int, height: int) -> None:
    with served(FakeOmni()) as url:
        page = opened(browser, url, width=width, height=height)
        draw(page, "small")
        page.click("#items button")
        page.wait_for("document.querySelector('#large img').naturalWidth === 96")
        shown = page.run(
            "(({width, height}) => [width, height])(document.querySelector('#large img').getBoundingClientRect())"
        )
        assert shown == [96, 64]
        page.close()


def test_a_key_that_no_header_carries_is_refused_in_words(browser: Browser) -> None:
    with served(FakeOmni(), api_keys=("secret",)) as url:
        page = opened(browser, url, is_ready=False)
        page.wait_for("document.querySelector('#key').checkVisibility()")
        page.type_in("#key", "🔑")
        page.press("Enter")
        assert text_of(page, "#key-problem") == "No key has such letters."
        page.run("sessionStorage.setItem('omni-sp-key', JSON.stringify('🔑'))")  # as earlier pages kept it
        page.go(url + "/")
        page.wait_for("document.querySelector('#key').checkVisibility()")
        page.type_in("#key", "secret")
        page.press("Enter")
        page.wait_for(READY)
        page.close()


def test_a_server_that_says_nothing_is_not_called_ready(browser: Browser) -> None:
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        page.run(
            """(() => {
            AbortSignal.timeout = ((made) => () => made.call(AbortSignal, 50))(AbortSignal.timeout);
            window.heard = window.fetch;
            window.fetch = (_, { signal }) => new Promise((_, refuse) => {
              signal.onabort = () => refuse(signal.reason); });
            })()"""
        )
        page.wait_for("document.querySelector('#status').textContent === 'The server does not answer.'")
        page.run("window.fetch = window.heard")
        page.wait_for(READY)
        assert text_of(page, "#say") == "ready"
        assert page.complaints == []
        page.close()


def test_a_stream_that_falls_silent_is_asked_for_again(browser: Browser) -> None:
    omni = FakeOmni(hold_at=1)
    with served(omni, keep_alive_s=0.5) as url, Relay(url) as relay:
        page = opened(browser, relay.url)
        page.type_in("#prompt", "a star")
        page.type_in("#seed", "5")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('Step 1 of 4')")
        relay.swallow()
        until(lambda: len(omni.requests) == 2)
        omni.go_on.set()
        page.wait_for(f"{READY} && {CARDS} === 1")
        assert [request.params.seed for request in omni.requests] == [5, 5]
        assert page.complaints == []
        page.close()


def test_a_chosen_file_that_is_gone_is_named(browser: Browser, tmp_path: Path) -> None:
    omni = FakeOmni(capabilities=EDITS)
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (32, 16), (200, 0, 0)).save(tmp_path / name)
    with served(omni) as url:
        page = opened(browser, url)
        page.choose_files("#image", [tmp_path / "1.png", tmp_path / "2.png", tmp_path / "3.png"])
        page.wait_for("document.querySelectorAll('#sources li').length === 3")
        page.click("#sources button", times=2)  # the next one comes to lie under the pointer
        assert page.run("document.querySelectorAll('#sources li').length") == 2
        (tmp_path / "2.png").unlink()
        page.type_in("#prompt", "make it blue")
        page.click("#draw")
        page.wait_for(
            "document.querySelector('#problem').textContent"
            " === 'A chosen picture can no longer be read: choose it again.'"
        )
        assert not omni.requests
        page.close()


def test_a_picture_that_is_pasted_while_its_mask_is_painted_waits(browser: Browser, tmp_path: Path) -> None:
    for name, size in (("one.png", (96, 64)), ("other.png", (32, 16))):
        Image.new("RGB", size, (200, 0, 0)).save(tmp_path / name)
    with served(FakeOmni(capabilities=INPAINTS)) as url:
        page = opened(browser, url)
        page.choose_files("#image", [tmp_path / "one.png"])
        page.click("#mask")
        page.wait_for("document.querySelector('#painter').open")
        page.run(PASTE)
        page.click("#paint")
        page.click("#paint-done")
        page.wait_for("document.querySelector('#sources .mask') !== null")
        assert page.run("state.sources[0].name") == "one.png"
        # A mask of another picture is none.
        page.run("state.mask = new File(['no picture'], 'mask.png')")
        page.click("#mask")
        page.wait_for("document.querySelector('#painter').open && state.mask === null")
        assert page.complaints == []
        page.close()


def test_files_that_hold_odd_settings_fill_nothing(browser: Browser, tmp_path: Path) -> None:
    image, texts = Image.new("RGB", (8, 8)), PngImagePlugin.PngInfo()
    texts.add_itxt("version", "Omni-SP 1")
    texts.add_itxt("prompt", "x" * 2**20)
    image.save(tmp_path / "long.png", pnginfo=texts)
    image.save(tmp_path / "endless.jpg")
    with (tmp_path / "endless.jpg").open("ab") as file:
        file.write(b'ASCII\0\0\0{"' + b"a" * 2**23)
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "mine")
        # A hidden field gives the page files of this machine.
        page.run("document.body.append(make('input', { type: 'file', id: 'probe' }))")
        for name in ("endless.jpg", "long.png"):
            page.choose_files("#probe", [tmp_path / name])
            page.run("fillFrom(document.querySelector('#probe').files[0])")
            assert "x" * 99 not in page.run("document.querySelector('#prompt').value")
            if name == "endless.jpg":
                assert text_of(page, "#problem") == "This file has no settings of a picture that was drawn here."
                assert page.run("document.querySelector('#prompt').value") == "mine"
        assert page.complaints == []
        page.close()


def test_what_else_lies_in_the_store_is_left_out(browser: Browser) -> None:
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        draw(page, "one")
        page.run("inStore('readwrite', (store) => store.put({ odd: 1 }))")
        page.run("inStore('readwrite', (store) => store.put({ blob: 'x', settings: null }))")
        page.go(url + "/")
        page.wait_for(f"{READY} && {CARDS} === 1")
        assert page.complaints == []
        page.close()


def test_the_larger_side_of_a_size_that_is_too_large_is_named(browser: Browser) -> None:
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "x" * 40_000)
        page.type_in("#width", "64")
        page.type_in("#height", "999999984")
        page.click("#draw")
        wait_for_focus(page, "height")
        page.type_in("#height", "64")
        page.click("#draw")
        assert "characters" in page.wait_for("document.querySelector('#problem').textContent")
        wait_for_focus(page, "prompt")
        page.close()
