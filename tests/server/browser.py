"""A headless Chromium for tests, driven over a pipe in its own protocol (CDP): no driver, no port, no package."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_ANSWER_S = 20.0
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--renderer-process-limit=1", "--force-color-profile=srgb", "--remote-debugging-pipe",
)  # fmt: skip
# Key -> (code, the number that Chromium wants with it, the text it types)
_KEYS = {
    "Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, ""), " ": ("Space", 32, " "),
    "ArrowLeft": ("ArrowLeft", 37, ""), "ArrowRight": ("ArrowRight", 39, ""),
}  # fmt: skip
_MODIFIERS = {"Control": 2, "Shift": 8}


def find_browser() -> str | None:
    """Where Chromium is; None where there is none. ``OMNI_SP_TEST_BROWSER`` names another."""
    named = os.environ.get("OMNI_SP_TEST_BROWSER")
    return named or next((found for name in _NAMES if (found := shutil.which(name)) is not None), None)


class BrowserError(AssertionError):
    """The browser did not do what was asked, or not in time."""


class Browser:
    """One Chromium with a profile of its own, for a ``with`` block; all its processes end with it.

    Args:
        program: see find_browser(). folder: an empty one, for the profile.
    """

    def __init__(self, program: str, folder: Path) -> None:
        to_read, its_write = os.pipe()
        its_read, to_write = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4: ours are moved there, from numbers that are out of the way.
        given = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (its_read, its_write)]
        moves = f"import os, sys; os.dup2({given[0]}, 3); os.dup2({given[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        self._log = (folder / "chromium.log").open("wb")
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "HOME": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", moves, program, *_OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            pass_fds=given, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True,
            env=environment,
        )  # fmt: skip
        for number in (its_read, its_write, *given):
            os.close(number)
        self._reads, self._writes = to_read, to_write
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._listeners: dict[str, Callable[[str, dict[str, Any]], None]] = {}
        self._number, self._lock = 0, threading.Lock()
        self._reader = threading.Thread(target=self._read, name="chromium-reader", daemon=True)
        self._reader.start()

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrowserError, OSError):
            self.send("Browser.close", timeout_s=5.0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(5.0)
        os.close(self._writes)
        self._reader.join(5.0)
        os.close(self._reads)
        self._log.close()

    def page(
        self,
        url: str,
        *,
        width: int = 1280,
        height: int = 900,
        is_phone: bool = False,
        is_dark: bool = False,
        is_still: bool = False,
        beside: Page | None = None,
    ) -> Page:
        """A new window at this address; sizes in CSS pixels.

        Its storage is its own, or that of the window ``beside`` it. ``is_still``: nothing moves.
        """
        context = beside.context if beside else self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, context)
        self._listeners[session] = page.hear
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            page.send(f"{domain}.enable")
        page.look(width=width, height=height, is_phone=is_phone, is_dark=is_dark, is_still=is_still)
        page.go(url)
        return page

    def send(
        self, method: str, session: str | None = None, timeout_s: float = _ANSWER_S, **params: Any
    ) -> dict[str, Any]:
        """One command and its answer.

        Raises:
            BrowserError: it was refused, or nothing came in time.
        """
        answer: queue.Queue[dict[str, Any]] = queue.Queue()
        with self._lock:
            self._number += 1
            number = self._number
            self._answers[number] = answer
            message: dict[str, Any] = {"id": number, "method": method, "params": params}
            if session is not None:
                message["sessionId"] = session
            data = json.dumps(message).encode() + b"\0"
            while data:
                data = data[os.write(self._writes, data) :]
        try:
            reply = answer.get(timeout=timeout_s)
        except queue.Empty:
            raise BrowserError(f"no answer to {method} within {timeout_s} s") from None
        if "error" in reply:
            raise BrowserError(f"{method}: {reply['error'].get('message')}")
        result: dict[str, Any] = reply["result"]
        return result

    def _read(self) -> None:
        rest = b""
        while chunk := os.read(self._reads, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for text in messages:
                message = json.loads(text)
                if (answer := self._answers.pop(message.get("id", 0), None)) is not None:
                    answer.put(message)
                elif (listener := self._listeners.get(message.get("sessionId", ""))) is not None:
                    listener(message["method"], message["params"])
        for answer in self._answers.values():
            answer.put({"error": {"message": "the browser has ended"}})


class Page:
    """One window. ``complaints`` gathers what its console says at the level of an error, and what was thrown."""

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self._browser, self._session, self.context = browser, session, context
        self.complaints: list[str] = []
        self.addresses: list[str] = []

    def hear(self, event: str, params: dict[str, Any]) -> None:
        """Called with every event of this window."""
        if event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.complaints.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"]))
        elif event == "Network.requestWillBeSent":
            self.addresses.append(params["request"]["url"])

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command for this window."""
        return self._browser.send(method, self._session, **params)

    def look(
        self, *, width: int, height: int, is_phone: bool = False, is_dark: bool = False, is_still: bool = False
    ) -> None:
        """Set the window's size in CSS pixels, and what the user prefers."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=is_phone,
            deviceScaleFactor=2 if is_phone else 1,
        )  # fmt: skip
        self.send("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if is_still else "no-preference"},
        ]
        self.send("Emulation.setEmulatedMedia", features=features)

    def go(self, url: str) -> None:
        """Open an address and wait until its script has run."""
        self.send("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited.

        Raises:
            BrowserError: it threw.
        """
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def wait_for(self, script: str, timeout_s: float = 15.0) -> Any:
        """Ask again and again until an expression is true, and give its value.

        Raises:
            BrowserError: it did not become true in time.
        """
        until = time.monotonic() + timeout_s
        while True:
            value = self.run(script)
            if value:
                return value
            if time.monotonic() > until:
                raise BrowserError(f"not within {timeout_s} s: {script}; the page complains of {self.complaints}")
            time.sleep(0.05)

    def click(self, selector: str, times: int = 1) -> None:
        """Scroll to an element until it stays, and press the mouse in its middle; nothing else may lie over it."""
        place = self.run(
            f"""(async () => {{ const it = document.querySelector({json.dumps(selector)});
            it.scrollIntoView({{block: "center", behavior: "instant"}}); let box = it.getBoundingClientRect();
            for (let last = null, looks = 0; last !== box.y && looks < 50; looks++) {{
              last = box.y; await new Promise((resume) => setTimeout(resume, 20)); box = it.getBoundingClientRect(); }}
            const x = box.x + box.width / 2, y = box.y + box.height / 2, top = document.elementFromPoint(x, y);
            return {{x, y, free: box.width > 0 && it.contains(top)}}; }})()"""
        )
        if not place["free"]:
            raise BrowserError(f"{selector} cannot be clicked: it is hidden, or something lies over it")
        for count in range(1, times + 1):
            self.click_at(place["x"], place["y"], count)

    def click_at(self, x: float, y: float, count: int = 1) -> None:
        """Press and release the mouse there; count: 2 for the second click of a double click, and so on."""
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)

    def type_in(self, selector: str, text: str) -> None:
        """Put the focus on a field and type over what it holds."""
        self.run(f"(() => {{ const it = document.querySelector({json.dumps(selector)}); it.focus(); it.select(); }})()")
        self.send("Input.insertText", text=text) if text else self.run("document.execCommand('delete')")

    def press(self, key: str, *modifiers: str, repeats: int = 0) -> None:
        """Press a key where the focus is: "Tab", "Enter", "Escape", …; modifiers: "Control", "Shift".

        ``repeats``: it is held, and sent as often again.
        """
        code, number, text = _KEYS[key]
        held = sum(_MODIFIERS[name] for name in modifiers)
        common: dict[str, Any] = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": held}
        typed = {"text": text} if text and not held else {}
        for count in range(1 + repeats):
            self.send("Input.dispatchKeyEvent", type="keyDown", autoRepeat=count > 0, **common, **typed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose_files(self, selector: str, paths: Sequence[Path]) -> None:
        """Give files to a file field."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a picture of the window (or of the whole page) as PNG."""
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        """Close the window and forget its storage."""
        self._browser.send("Target.disposeBrowserContext", browserContextId=self.context)
