"""The page in a browser, over a server of this process: what its tests share.

``python -m tests.server.pages FILE.png`` takes the picture of it that the README shows.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from omni_sp import DiffusionParallelConfig
from omni_sp.async_omni import AsyncOmni
from tests.server.browser import Browser, Page, find_browser
from tests.server.fakes import FakeOmni
from tests.server.serving import serving

READY = "!document.querySelector('#draw').disabled && !state.works.length"
"""The page can draw, and nothing is under way."""
STEP = "document.querySelector('#step').textContent"
CARDS = "document.querySelectorAll('#items li').length"
FOCUS = "document.activeElement.id || document.activeElement.tagName"


@contextlib.contextmanager
def served(omni: AsyncOmni, **options: Any) -> Iterator[str]:
    """The whole application on a free port, in a thread, perhaps not ready yet; gives its address."""
    with serving(omni, ready=False, drain_timeout_s=1.0, **options) as running:
        yield running.url


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """A browser for the tests of a module; without one they are skipped."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium to try the page in: apt install chromium, or name one in OMNI_SP_TEST_BROWSER")
    with Browser(program, folder) as found:
        yield found


def opened(browser: Browser, url: str, *, is_ready: bool = True, **look: Any) -> Page:
    page = browser.page(url + "/", **look)
    if is_ready:
        page.wait_for(READY)
    return page


def text_of(page: Page, selector: str) -> str:
    return str(page.run(f"document.querySelector({json.dumps(selector)}).textContent"))


def wait_for_focus(page: Page, name: str) -> None:
    """Wait until the element of this id, or of this tag where it has none, has the focus."""
    page.wait_for(f"({FOCUS}) === {json.dumps(name)}")


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(0.01)


def ended(omni: FakeOmni, place: int = 0) -> str:
    """What became of a request, once it is over."""
    until(lambda: len(omni.requests) > place and omni.requests[place].is_over)
    return omni.requests[place].outcome


class Relay:
    """A line between the browser and a server, for a ``with`` block: it can be cut, and laid to another server.

    Attributes:
        url: the address for the browser.
        target: the server's address; None while the connection is cut.
    """

    def __init__(self, target: str) -> None:
        self.target: str | None = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._swallowed: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5.0)

    def cut(self) -> None:
        """Break what is connected, and let nothing in until there is a target again."""
        self.target = None
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def swallow(self) -> None:
        """Let nothing more through on what is connected, without a word of it."""
        self._swallowed = list(self._ends)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.target is None:
                    near.close()
                    continue
                address = urlsplit(self.target)
                far = socket.create_connection((address.hostname, address.port))
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    thread = threading.Thread(target=self._pump, args=(source, sink), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if source not in self._swallowed:
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()


def take_picture(path: Path) -> None:
    """The page with the demo model over four ranks, as the README shows it."""
    small = ["a small yellow square on a white background", "a large green star on a black background"]
    small += ["a red circle on a blue background", "a blue star on a white background"]
    omni = AsyncOmni("omni-sp/shapes", DiffusionParallelConfig(ulysses_degree=2, ring_degree=2), device="cpu")
    with tempfile.TemporaryDirectory() as folder, started(Path(folder)) as browser, served(omni) as url:
        page = opened(browser, url, is_ready=False, width=1280, height=800, is_dark=True)
        page.wait_for(READY, timeout_s=120)
        page.type_in("#seed", "11")

        def draw(prompt: str, num_cards: int) -> None:
            page.type_in("#prompt", prompt)
            page.run("document.querySelector('#form').requestSubmit()")
            page.wait_for(f"{CARDS} === {num_cards}", timeout_s=120)
            page.wait_for(READY)

        for count, prompt in enumerate(small, start=1):
            draw(prompt, count)
        page.type_in("#n", "2")
        draw("a purple triangle on a yellow background", len(small) + 2)
        page.run("refresh()")
        page.run("document.activeElement.blur()")
        page.wait_for("[...document.images].every((picture) => picture.complete)")
        page.screenshot(path)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]))
