"""Ctrl-C during a call of several ranks: they leave it together, and the model stays loaded."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType


class DeferredInterrupt:
    """While the block lasts, the first Ctrl-C is noted, and a second one raises KeyboardInterrupt at once.

    An exception in the middle of a message from a rank would lose that message, and ranks that are left alone in a call
    wait for each other. So the call is asked to end, and the block ends with KeyboardInterrupt. It does nothing outside
    the main thread, nor where somebody else handles Ctrl-C.

    Args:
        shown: say on stderr what happens.
    """

    def __init__(self, shown: bool = False) -> None:
        self._shown = shown
        self._is_noted = self._is_installed = False

    def __call__(self) -> bool:
        """True from the first Ctrl-C on."""
        if self._is_noted and self._shown:
            self._shown = False
            print("omni-sp: leaving at the next step; Ctrl-C once more ends the ranks", file=sys.stderr, flush=True)
        return self._is_noted

    def __enter__(self) -> DeferredInterrupt:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._is_installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._is_noted and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_noted:
            raise KeyboardInterrupt
        self._is_noted = True
