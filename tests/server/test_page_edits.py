"""Pictures to start from on the page: chosen, pasted, dropped, taken from the gallery, and masks for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.server.browser import Browser
from tests.server.fakes import EDITS, INPAINTS, FakeOmni
from tests.server.pages import CARDS, READY, opened, served, started, text_of, wait_for_focus


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("browser")) as found:
        yield found


def test_edits_pictures(browser: Browser, tmp_path: Path) -> None:
    omni = FakeOmni(capabilities=EDITS)
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
        page.run(PASTE)
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


def test_pictures_are_dropped_anywhere_and_what_is_none_is_refused(browser: Browser) -> None:
    with served(FakeOmni(capabilities=EDITS), max_images=2) as url:
        page = opened(browser, url)
        assert page.run(DROP % "['one.png', 'image/png'], ['two.webp', 'image/webp'], ['no.txt', 'text/plain']") is True
        page.wait_for("document.querySelectorAll('#sources li').length === 2")
        assert "Only PNG" in text_of(page, "#problem")
        assert page.run(DROP % "['three.png', 'image/png']") is True
        page.type_in("#prompt", "all of them")
        page.click("#draw")
        assert text_of(page, "#problem") == "3 pictures are more than this server takes: 2."
        page.click("#sources button")
        page.click("#draw")
        assert "image" in page.wait_for("document.querySelector('#problem').textContent")  # they are no real pictures
        page.wait_for(READY)
        wait_for_focus(page, "image")
        page.close()
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        assert page.run(DROP % "['one.png', 'image/png']") is True  # the browser does not leave for it
        assert page.run("state.sources.length") == 0
        page.close()


# Tells whether the page keeps the browser from opening the files.
DROP = """(() => {
  const held = new DataTransfer();
  for (const [name, type] of [%s]) held.items.add(new File(["no matter"], name, {type}));
  const event = new DragEvent("drop", {dataTransfer: held, bubbles: true, cancelable: true});
  document.querySelector("#gallery").dispatchEvent(event);
  return event.defaultPrevented;
})()"""


def test_a_mask_is_painted(browser: Browser, tmp_path: Path) -> None:
    omni = FakeOmni(capabilities=INPAINTS)
    Image.new("RGB", (200, 100), (200, 0, 0)).save(tmp_path / "one.png")
    open_left = Image.new("RGBA", (200, 100), "white")
    open_left.paste((0, 0, 0, 0), (0, 0, 100, 100))
    open_left.save(tmp_path / "mask.png")
    open_left.resize((50, 50)).save(tmp_path / "small.png")
    with served(omni) as url:
        page = opened(browser, url)
        assert not page.run("document.querySelector('#mask').checkVisibility()")
        page.choose_files("#image", [tmp_path / "one.png"])
        page.wait_for("document.querySelector('#mask').checkVisibility()")
        page.type_in("#prompt", "a star here")
        page.click("#mask")
        page.wait_for("document.querySelector('#painter').open")
        page.click("#paint")  # a dot in the middle
        page.click("#paint-done")
        page.wait_for("!document.querySelector('#painter').open && document.querySelector('#sources .mask') !== null")
        page.click("#draw")
        page.wait_for(f"{CARDS} === 1")
        page.wait_for(READY)
        mask = omni.requests[0].arguments["mask_image"]
        assert mask.size == (200, 100)
        assert [mask.getpixel(place) for place in ((100, 50), (109, 50), (115, 50), (5, 5))] == [255, 255, 0, 0]
        # A file instead, once of another size.
        page.click("#mask")
        page.wait_for("document.querySelector('#painter').open")
        page.choose_files("#mask-file", [tmp_path / "small.png"])
        page.wait_for(
            "document.querySelector('#problem').textContent === 'The mask is 50 × 50, the picture 200 × 100 pixels.'"
        )
        wait_for_focus(page, "mask")
        page.click("#mask")
        page.wait_for("document.querySelector('#painter').open")
        page.choose_files("#mask-file", [tmp_path / "mask.png"])
        page.wait_for("painter.layer.getImageData(1, 1, 1, 1).data[3] === 255")
        page.click("#paint-done")
        page.wait_for("!document.querySelector('#painter').open")
        page.click("#draw")
        page.wait_for(f"{CARDS} === 2")
        page.wait_for(READY)
        mask = omni.requests[1].arguments["mask_image"]
        assert (mask.getpixel((20, 50)), mask.getpixel((180, 50))) == (255, 0)
        page.click("#mask-remove")
        page.click("#draw")
        page.wait_for(f"{CARDS} === 3")
        assert "mask_image" not in omni.requests[2].params.extra_args
        page.click("#items li:nth-child(2) button")
        assert "froma picture and a mask" in text_of(page, "#facts")
        page.click("#reuse")
        page.wait_for("state.mask !== null && document.querySelector('#sources .mask') !== null")
        assert page.complaints == []
        page.close()
