"""An engine answers calls of one pipeline, one after the other, wherever its ranks are."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

from omni_sp.engine.messages import Call, Done, EngineOptions, OnProgress, Ready, new_seed
from omni_sp.engine.ranks import Launcher, RankGroup
from omni_sp.engine.ranks.remote import RemoteRanks
from omni_sp.engine.ranks.torchrun import inside_distributed_program
from omni_sp.engine.startup import WARM_UP, OnNews, Startup, warm_up_errors_named
from omni_sp.errors import EngineClosedError

_STOP_S = 5.0
logger = logging.getLogger(__name__)


class Engine:
    """A pipeline on a group of ranks: started by the constructor, closed by a failure, by close(), or when abandoned.

    Args:
        start: the clock of its start. Who opens the engine may add a warm-up, and says when the start is finished.
        is_cancelled: asked now and then, while it starts, whether to give up.

    Raises:
        InvalidInputError: the ranks refuse the model.
        RankFailedError: a rank raised, died or fell silent while starting.
        EngineClosedError: the start was cancelled.
    """

    def __init__(self, group: RankGroup, start: Startup, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        self._group = group
        self._owner = os.getpid()
        self._closed: str | None = None
        self._has_failed = False
        self._lock = threading.Lock()
        self.start = start
        # An abandoned engine, and the end of the interpreter, end the ranks too.
        self._finalizer = weakref.finalize(self, group.end)
        try:
            self._ready = group.start(self.start, is_cancelled)
        except BaseException as error:
            self._shut_down(f"it did not start: {error}")
            raise

    @property
    def ready(self) -> Ready:
        """What is loaded, and where."""
        return replace(self._ready, start_s=dict(self.start.seconds))

    @property
    def is_main(self) -> bool:
        """True in the one process that shows progress to people."""
        return self._group.is_main

    @property
    def is_open(self) -> bool:
        """False once it was closed, or a failure closed it."""
        return self._closed is None

    @property
    def can_start_again(self) -> bool:
        """True after a failure that closed it, where a new engine can take its place."""
        return self._has_failed and self._group.can_start_again

    def require_alive(self) -> None:
        """Between two calls, look whether the ranks are still there.

        Raises:
            RankFailedError: one of them has ended. The engine is closed then.
        """
        require_owner(self._owner)
        with self._lock:
            if self._closed is None:
                try:
                    self._group.require_alive()
                except BaseException as error:
                    self._shut_down(f"between two calls, {error}")
                    raise

    def new_seed(self) -> int:
        """A seed at random, the same on every rank of the program."""
        self._require_open()
        return self._group.broadcast(new_seed())

    def run(self, call: Call, on_progress: OnProgress | None, is_aborted: Callable[[], bool] = lambda: False) -> Done:
        """Run one call on all ranks.

        Args:
            is_aborted: asked now and then, whether to abort() it.

        Raises:
            InvalidInputError: the pipeline refused the call on every rank alike; the engine goes on.
            RequestAbortedError: the call was aborted; the engine goes on.
            CallFailedError: the ranks raised something else alike; the engine goes on.
            ShardingError: the ranks of the program around make different calls.
            RankFailedError: a rank raised by itself, died, or fell silent. The engine is closed.
            EngineClosedError: it had been closed before, or was closed meanwhile.
        """
        require_owner(self._owner)
        with self._lock:
            self._require_open()
            try:
                return self._group.run(call, on_progress, is_aborted)
            except BaseException as error:
                if self._closed is not None:  # close() in another thread
                    raise EngineClosedError(f"the engine was closed during a call: {self._closed}") from error
                if not self._group.survives(error):
                    self._shut_down(f"an earlier call failed: {str(error) or type(error).__name__}")
                raise

    def abort(self, request_id: str) -> None:
        """Have the ranks leave a call before its next step, from any thread; run() then raises."""
        self._group.abort(request_id)

    def warm_up(self, calls: Sequence[Call]) -> None:
        """Run calls that nobody waits for, as a part of the start.

        Raises:
            InvalidInputError: as run() raises it; the message names the call.
            RankFailedError: as run() raises it; the message names the call.
        """
        for number, call in enumerate(calls):
            text = f"warming up: {call.request_id}, {number + 1} of {len(calls)}"
            self.start.report(WARM_UP, text, number, len(calls))
            with warm_up_errors_named(call.request_id):
                self.run(call, None)

    def close(self) -> None:
        """End the ranks and give memory back. Idempotent."""
        self._has_failed = False  # whatever came before, nobody wants another one
        if self._closed is None:
            self._closed = "close() was called"
            self._finalizer.detach()
            # Ranks in the middle of a call would not hear that they are to stop; its caller gets EngineClosedError.
            self._group.end(0.0 if self._lock.locked() else _STOP_S)

    def _require_open(self) -> None:
        require_owner(self._owner)
        if self._closed is not None:
            raise EngineClosedError(f"this Omni is closed: {self._closed}; make a new one")

    def _shut_down(self, reason: str) -> None:
        """End the ranks at once: they may stand anywhere."""
        if self._closed is None:
            self._closed, self._has_failed = reason, True
        self._finalizer.detach()
        try:
            self._group.end()
        except Exception:  # the caller learns of the failure that led here
            logger.exception("ending the ranks failed")


def require_owner(pid: int) -> None:
    """Refuse to work in a forked copy of the process that started the ranks: both would read the same pipes.

    Raises:
        EngineClosedError: this is not the process of this number.
    """
    if os.getpid() != pid:
        raise EngineClosedError(
            f"this Omni belongs to process {pid}, and this is a forked copy of it, process {os.getpid()}: make an Omni "
            'in the process that uses it, and start processes with multiprocessing.get_context("spawn")'
        )


def open_engine(options: EngineOptions, on_news: OnNews, launcher: Launcher | None = None) -> Engine:
    """Start processes with the launcher, which ends with the engine; without one, do as the surroundings say.

    Join the ranks of the program around; else run one rank in this process; else start processes on this machine.
    """
    joined, start = inside_distributed_program(), Startup(on_news)
    if launcher is not None or (options.config.world_size > 1 and not joined):
        return Engine(RemoteRanks(options, launcher, owns_launcher=True), start)
    # It imports diffusers, which a front of other processes never needs.
    from omni_sp.engine.ranks.local import LocalRank

    return Engine(LocalRank(options, joined=joined), start)
