"""The page in a browser, over a server of this process: what its tests share."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omni_sp.async_omni import AsyncOmni
from tests.server.browser import Browser, Page, find_browser
from tests.server.serving import serving

READY = "!document.querySelector('#draw').disabled"
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
    return str(page.tell(f"document.querySelector({json.dumps(selector)}).textContent"))


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)
