"""Engines side by side for a program that waits for its calls, behind the queue that servers have."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Generator, Sequence

from omni_sp.engine.dispatcher import Dispatcher
from omni_sp.engine.job_queue import FAILED
from omni_sp.engine.jobs import Job
from omni_sp.engine.messages import Call, Done, EngineOptions, OnProgress, Ready, new_seed
from omni_sp.engine.ranks import Launcher
from omni_sp.engine.startup import OnNews
from omni_sp.errors import EngineClosedError, OmniSPError

_POLL_S = 0.1


class ReplicatedEngine:
    """What Engine is, with several engines: the one that is free runs the next call.

    Each starts its ranks again by itself, and a call whose ranks died is tried once more.

    Args:
        options: of each engine.
        launchers: start the ranks, one for each engine.
        on_news: called with what a start is doing.

    Raises:
        OmniSPError: an engine did not start, as Engine raises it.
    """

    is_main = True

    def __init__(self, options: EngineOptions, launchers: Sequence[Launcher], on_news: OnNews) -> None:
        self._closed, self._was_interrupted = False, False
        self._dispatcher = Dispatcher(
            options, launchers, warm_up=lambda _ready: (), max_queue_length=None, on_news=on_news
        )
        # Abandoned, and at the end of the interpreter, it ends its ranks too.
        self._finalizer = weakref.finalize(self, self._dispatcher.close)
        outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._dispatcher.start(outcome.put)
        try:
            error = outcome.get()
            if error is not None:
                raise error
        except BaseException:
            self.close()
            raise
        assert self._dispatcher.ready is not None, "a replica has started"
        self._ready = self._dispatcher.ready

    @property
    def ready(self) -> Ready:
        """What is loaded, and where: of the first engine, as of all."""
        return self._ready

    @property
    def can_start_again(self) -> bool:
        """True where no engine is left, and a new one can take their place."""
        return not self._closed and (self._was_interrupted or self._dispatcher.status == FAILED)

    def require_alive(self) -> None:
        """There is nothing to look for: each engine looks for lost ranks by itself."""

    def new_seed(self) -> int:
        """A seed at random."""
        return new_seed()

    def run(self, call: Call, on_progress: OnProgress | None, is_aborted: Callable[[], bool] = lambda: False) -> Done:
        """Run one call, as Engine.run()."""
        return next(self.run_each([call], on_progress, is_aborted))

    def run_each(
        self, calls: Sequence[Call], on_progress: OnProgress | None, is_aborted: Callable[[], bool] = lambda: False
    ) -> Generator[Done, None, None]:
        """Run calls, several at once, and give the result of each, in their order, as soon as it is there.

        Args:
            calls: with names of their own.
            on_progress: called at every step of every call, in other threads.
            is_aborted: asked now and then, while a result is awaited, whether to abort all of them.

        Raises:
            OmniSPError: what the next call in order ended with; the calls behind it are aborted.
            KeyboardInterrupt: all engines are closed.
        """
        if self._closed:
            raise EngineClosedError("this Omni is closed: close() was called; make a new one")
        ended: queue.SimpleQueue[tuple[int, Done | OmniSPError]] = queue.SimpleQueue()
        try:
            for number, call in enumerate(calls):
                self._dispatcher.submit(_job(call, on_progress, ended, number))
            results: dict[int, Done | OmniSPError] = {}
            for number in range(len(calls)):
                while number not in results:
                    try:
                        place, result = ended.get(timeout=_POLL_S)
                        results[place] = result
                    except queue.Empty:
                        if is_aborted():
                            self._abort(calls)
                result = results.pop(number)
                if not isinstance(result, Done):
                    raise result
                yield result
        except KeyboardInterrupt:
            self._was_interrupted = True
            self._dispatcher.close()
            raise
        finally:
            self._abort(calls)

    def close(self) -> None:
        """End the ranks of all engines. Idempotent."""
        self._closed = True
        self._finalizer.detach()
        self._dispatcher.close()

    def _abort(self, calls: Sequence[Call]) -> None:
        """Leave those that wait or run."""
        for call in calls:
            self._dispatcher.abort(call.request_id)


def _job(
    call: Call,
    on_progress: OnProgress | None,
    ended: queue.SimpleQueue[tuple[int, Done | OmniSPError]],
    number: int,
) -> Job:
    return Job(
        call=call,
        priority=0,
        on_position=lambda _position: None,
        on_progress=on_progress or (lambda _news: None),
        on_end=lambda result: ended.put((number, result)),
    )
