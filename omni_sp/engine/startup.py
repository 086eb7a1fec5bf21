"""The parts of an engine's start, how far each is, and how long each took."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from omni_sp.errors import OmniSPError

IMPORTS, WEIGHTS, JOINING, WARM_UP = "imports", "weights", "joining", "warm_up"
CAPTIONS = {IMPORTS: "processes and imports", WEIGHTS: "weights", JOINING: "joining", WARM_UP: "warm-up"}
"""The parts of a start, in their order, as people read them. A start without warm-up has no such part."""


class StartupMessage(str):
    """What a start is doing, in words for people: ``done`` of ``total`` of a part, one of CAPTIONS."""

    part: str
    done: int
    total: int

    def __new__(cls, text: str, part: str, done: int, total: int) -> StartupMessage:
        """A text that also says how far it is."""
        news = super().__new__(cls, text)
        news.part, news.done, news.total = part, done, total
        return news


OnNews = Callable[[str], None]


class Startup:
    """The clock of one start, which also reports what the start is doing.

    A part lasts until the slowest rank has finished it, so the parts follow each other and add up to the whole.

    Args:
        on_news: called whenever there is something new to report.

    Attributes:
        seconds: of every part that is over, by its name.
    """

    def __init__(self, on_news: OnNews) -> None:
        self._on_news = on_news
        self._since = time.perf_counter()
        self._last_text = ""
        self._part: str | None = IMPORTS
        self.seconds: dict[str, float] = {}

    def report(self, part: str, text: str, done: int = 0, total: int = 1) -> None:
        """Enter this part, which is ``done`` of ``total``, and report it; no text is reported twice in a row."""
        self._enter(part)
        if text != self._last_text:
            self._last_text = text
            self._on_news(StartupMessage(text, part, done, total))

    def mute(self) -> None:
        """Report nothing from now on: another rank does."""
        self._on_news = lambda news: None

    def finish(self) -> None:
        """Report that the start is over, and how long each part took. The second time, do nothing."""
        if self._part is not None:
            self._enter(None)
            self._on_news(f"ready in {format_seconds(self.seconds)}")

    def _enter(self, part: str | None) -> None:
        if part != self._part and self._part is not None:
            now = time.perf_counter()
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
            self._since, self._part = now, part


def reading_text(part: str, done: int, total: int) -> str:
    """Such as "reading text_encoder, 2 of 5"."""
    return f"reading {part}, {done + 1} of {total}" if part else f"reading the weights of {total} parts"


def format_seconds(seconds: Mapping[str, float]) -> str:
    """Such as "12.3 s: processes and imports 4.1, weights 5.0, joining 0.4, warm-up 2.8"."""
    parts = ", ".join(f"{CAPTIONS[part]} {took:.1f}" for part, took in seconds.items())
    return f"{sum(seconds.values()):.1f} s: {parts}"


@contextmanager
def warm_up_errors_named(name: str) -> Iterator[None]:
    """Let an error of ours name the warm-up that it comes from."""
    try:
        yield
    except OmniSPError as error:
        error.args = (f"the warm-up {name} failed: {error}", *error.args[1:])
        raise


class StartupDisplay:
    """Shows the news of starts on stderr: a bar where that is a terminal, else a line for each.

    Args:
        shown: False to show nothing at all.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown
        self._bar: Any = None

    def show(self, news: str) -> None:
        """Show a message. One that belongs to no part of a start removes the bar, and is a line."""
        if not self._shown:
            return
        if not isinstance(news, StartupMessage) or not is_terminal():
            self.close()
            print(f"omni-sp: {news}", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            form = "starting {percentage:3.0f}%|{bar:20}| {desc}"
            self._bar = tqdm(total=len(CAPTIONS), bar_format=form, leave=False, file=sys.stderr)
        self._bar.n = list(CAPTIONS).index(news.part) + news.done / max(news.total, 1)
        self._bar.set_description_str(news)

    def close(self) -> None:
        """Remove the bar, however the start ended."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def is_terminal() -> bool:
    """True where stderr is read by a person."""
    return sys.stderr is not None and sys.stderr.isatty()
