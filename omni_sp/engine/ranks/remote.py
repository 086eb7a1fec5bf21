"""Ranks that are processes of their own: calls go to all of them, and their answers come back or fail together."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from typing_extensions import override

from omni_sp.engine.messages import (
    Abort,
    Alive,
    Call,
    Done,
    EngineOptions,
    Failed,
    Join,
    Loaded,
    Loading,
    OnProgress,
    Ping,
    Progress,
    RankExited,
    Ready,
)
from omni_sp.engine.ranks import Launcher, RankGroup
from omni_sp.engine.ranks.failures import raise_for, wait_after_failure_s
from omni_sp.engine.ranks.fork import local_launcher
from omni_sp.engine.ranks.processes import RankProcesses
from omni_sp.engine.startup import IMPORTS, JOINING, WEIGHTS, Startup, reading_text
from omni_sp.errors import (
    CallFailedError,
    EngineClosedError,
    InvalidInputError,
    RankFailedError,
    RequestAbortedError,
    SamplingParamsError,
)

_POLL_S = 0.5  # how soon it is noticed that a start is to be given up
_PING_S = 2.0  # for the answer to a Ping


class RemoteRanks(RankGroup):
    """A RankGroup of processes. Without a launcher, it has one of its own, on this machine.

    Args:
        options: of the engine.
        launcher: starts the processes.
        owns_launcher: the launcher is closed when the ranks end.

    Idle ranks wait for their pipe, never inside an exchange. Every wait for them has a bound, and a process that ends
    is noticed at once.
    """

    is_main = True

    def __init__(
        self, options: EngineOptions, launcher: Launcher | None = None, *, owns_launcher: bool = False
    ) -> None:
        self._options = options
        self._owns_launcher = owns_launcher or launcher is None
        self._launcher = launcher or local_launcher(options.source)
        self._processes: RankProcesses | None = None

    @override
    def start(self, startup: Startup, is_cancelled: Callable[[], bool]) -> Ready:
        # Loading, then joining, each in lockstep, so that no rank waits in the rendezvous for a slow loader.
        startup.report(IMPORTS, f"starting {self._options.config.world_size} ranks")

        def raise_if_cancelled() -> None:
            if is_cancelled():
                raise EngineClosedError("it was closed")

        def on_wait(waited_for: str) -> None:
            startup.report(IMPORTS, waited_for)
            raise_if_cancelled()

        self._processes = RankProcesses(self._options, self._launcher, on_wait)

        def on_loading(states: Mapping[int, Loading | None]) -> None:
            _report_loading(startup, states, self._size)

        silence = self._options.startup_timeout_s
        self._collect(Loaded, silence, on_loading=on_loading, on_wait=raise_if_cancelled)
        self._send(Join())
        startup.report(JOINING, "joining the ranks")
        ready: Ready = self._collect(Ready, silence, on_wait=raise_if_cancelled)[0]
        return ready

    @override
    def run(self, call: Call, on_progress: OnProgress | None, is_aborted: Callable[[], bool]) -> Done:
        try:
            payload = pickle.dumps(call, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise SamplingParamsError(f"an argument cannot be sent to the rank processes: {error}") from error
        assert self._processes is not None, "start() comes before run()"
        self._processes.send(payload)
        has_sent_abort = False

        def abort_once() -> None:
            nonlocal has_sent_abort
            if not has_sent_abort and is_aborted():
                has_sent_abort = True
                self.abort(call.request_id)

        answers = self._collect(Done, self._options.rank_timeout_s, on_progress=on_progress, on_wait=abort_once)
        done: Done = answers[0]
        worst = {stage: max(answer.errors[stage] for answer in answers.values()) for stage in done.errors}
        return replace(done, errors=worst)

    @override
    def abort(self, request_id: str) -> None:
        self._send(Abort(request_id=request_id))

    @override
    def require_alive(self) -> None:
        assert self._processes is not None, "start() comes first"
        heard = dict(self._processes.listen(time.monotonic()))
        failures = {rank: message for rank, message in heard.items() if isinstance(message, (Failed, RankExited))}
        if failures:
            raise_for(failures, self._size)

    @override
    def broadcast(self, number: int) -> int:
        return number

    @property
    @override
    def can_start_again(self) -> bool:
        return True

    @override
    def survives(self, error: BaseException) -> bool:
        # raise_for() raises these only where the ranks are in step.
        return isinstance(error, (InvalidInputError, RequestAbortedError, CallFailedError))

    @override
    def end(self, patience_s: float = 0.0) -> None:
        if self._processes is not None:
            self._processes.end(patience_s)
        if self._owns_launcher:
            self._launcher.close()

    @property
    def _size(self) -> int:
        return self._options.config.world_size

    def _send(self, message: Any) -> None:
        if self._processes is not None:
            self._processes.send(pickle.dumps(message))

    def _collect(
        self,
        kind: type,
        silence_s: float,
        *,
        on_progress: OnProgress | None = None,
        on_loading: Callable[[Mapping[int, Loading | None]], None] | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> dict[int, Any]:
        """One answer of this kind from every rank, or the error that their failures amount to.

        ``on_wait`` is called twice a second at least.
        """
        assert self._processes is not None, "start() comes first"
        answers: dict[int, Any] = {}
        failures: dict[int, Failed | RankExited] = {}
        loading: dict[int, Loading | None] = {}
        until = time.monotonic() + silence_s
        while len(answers) + len(failures) < self._size:
            received = self._processes.listen(min(until, time.monotonic() + _POLL_S))
            on_wait()
            if not received and time.monotonic() < until:
                continue
            if not received:
                break
            for rank, message in received:
                if isinstance(message, (Failed, RankExited)):
                    failures.setdefault(rank, message)
                    until = min(until, time.monotonic() + wait_after_failure_s(message))
                    continue
                if not failures:
                    until = time.monotonic() + silence_s
                if isinstance(message, kind):
                    answers[rank] = message
                if on_loading is not None and isinstance(message, (Loading, Loaded)):
                    loading[rank] = message if isinstance(message, Loading) else None
                    on_loading(loading)
                elif isinstance(message, Progress) and on_progress is not None:
                    on_progress(message)
        if failures:
            done = answers if kind is Done else None
            raise_for(failures, self._size, independent=on_loading is not None, done=done)
        if len(answers) < self._size:
            raise self._silence_error(self._processes, {*range(self._size)} - set(answers), silence_s)
        return answers

    def _silence_error(self, processes: RankProcesses, silent: set[int], silence_s: float) -> RankFailedError:
        """The error for silent ranks: those that answer no Ping are to blame, the others wait for them."""
        processes.send(pickle.dumps(Ping()))
        lifeless, until = set(silent), time.monotonic() + _PING_S
        while lifeless and time.monotonic() < until:
            lifeless -= {rank for rank, message in processes.listen(until) if isinstance(message, Alive)}
        way_out = "raise the timeout if the work takes longer than that"
        if lifeless:
            way_out = f"it gives no sign of life, so that its process is stopped or stuck; otherwise {way_out}"
        blamed = sorted(lifeless or silent)
        return RankFailedError(
            f"no word from rank {', '.join(map(str, blamed))} for {silence_s:g} s: {way_out}",
            rank=blamed[0],
            kind="silent",
        )


def _report_loading(startup: Startup, states: Mapping[int, Loading | None], size: int) -> None:
    """Report how far the slowest rank is. A rank's state is None once it has loaded everything."""
    if len(states) < size:
        startup.report(IMPORTS, f"importing libraries: {len(states)} of {size} ranks have", len(states), size)
        return
    unfinished = [state for state in states.values() if state is not None]
    slowest = min(unfinished, key=lambda state: (state.done, state.part != ""), default=None)
    if slowest is None:
        startup.report(WEIGHTS, "all weights are read", 1, 1)
    else:
        text = reading_text(slowest.part, slowest.done, slowest.total)
        startup.report(WEIGHTS, text, slowest.done, slowest.total)
