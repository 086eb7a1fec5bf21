"""Ranks that follow a script instead of running a model: they start at once, and fail in every way on demand.

Each function is what one kind of rank runs on its end of the pipe. All say that they have loaded and are ready, unless
the failure comes before.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from omni_sp.engine.batching import BATCH, ROUNDING, SMALLEST, call_for
from omni_sp.engine.messages import Abort, Call, Done, Failed, Join, Loaded, Progress, RankSettings, Ready, Stop
from omni_sp.engine.worker import die_with_parent
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.pipelines.results import CallResult

FOREVER_S = 600.0
BATCHES_ARE_EXACT = {BATCH: 0.0, ROUNDING: 0.0, SMALLEST: 1e-5}


def obeys(front: Connection) -> None:
    """Answers every call with its arguments."""
    rank = _start(front)
    for call in _calls(front):
        _answer(front, rank, call)


def raises_on_rank_1(front: Connection) -> None:
    """Rank 1 raises in a call; the others wait for it, as in an exchange."""
    rank = _start(front)
    for _ in _calls(front):
        if rank == 1:
            _tell(front, _failed("RuntimeError", "boom"))
        time.sleep(FOREVER_S)


def echoes_before_the_cause(front: Connection) -> None:
    """Rank 0 loses its connection to rank 1 at once; rank 1's own error is told a little later."""
    rank = _start(front)
    for _ in _calls(front):
        if rank == 1:
            time.sleep(0.3)
            _tell(front, _failed("KeyError", "the cause"))
        else:
            _tell(front, _failed("RuntimeError", "Connection closed by peer", is_peer_loss=True))
        time.sleep(FOREVER_S)


def refuses_on_demand(front: Connection) -> None:
    """All ranks refuse the calls that say so; with {"refuse": "rank 0"} only rank 0 does."""
    rank = _start(front)
    for call in _calls(front):
        who = call.arguments.get("refuse")
        if who == "all" or (who == "rank 0" and rank == 0):
            _tell(front, _failed("SamplingParamsError", "not this", is_shared=True))
        else:
            _answer(front, rank, call)


def fails_on_demand(front: Connection) -> None:
    """Each rank raises what the call's ``fail`` has for it, fields of a Failed; None answers the call."""
    rank = _start(front)
    for call in _calls(front):
        fail = call.arguments.get("fail", (None, None))[rank]
        if fail is None:
            _answer(front, rank, call)
        else:
            _tell(front, replace(_failed("IndexError", "out of range"), **fail))


def is_killed_on_rank_1(front: Connection) -> None:
    """Rank 1 is killed in a call, as by the kernel when memory runs out."""
    rank = _start(front)
    for _ in _calls(front):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(FOREVER_S)


def falls_silent(front: Connection) -> None:
    """Rank 0 tells one step and no more."""
    rank = _start(front)
    for _ in _calls(front):
        if rank == 0:
            _tell(front, Progress(done=1, total=9))
        time.sleep(FOREVER_S)


def draws_in_steps(front: Connection) -> None:
    """Makes ``steps`` steps, agrees on aborts between them, and does what ``do`` says after the first one.

    A prompt "overflow" makes the result of its call not finite. "die", "raise" and "hang", also as prompts, happen on
    rank 1; with ``once``, a file's name, only where that file is not there yet. "raise on all" is an error that
    all ranks raise alike.
    """
    settings = _join(front)
    rank, store = settings.rank, TCPStore(*settings.store, is_master=False, wait_for_workers=False)
    for number, call in enumerate(_calls(front)):
        if call.check == "batch":
            answer = Done(request_id=call.request_id, result=None, tokens={}, errors=BATCHES_ARE_EXACT)
            _tell(front, answer)
            continue
        steps = call.arguments.get("steps", 2)
        for done in range(steps):
            if rank == 0:
                _tell(front, Progress(done=done, total=steps))
            time.sleep(0.02)
            if done == 1 and call.arguments.get("do") == "raise on all":
                _tell(front, _failed("RuntimeError", "boom"))
                break
            if done == 1:
                _mishap(front, rank, call.arguments)
            step = f"{number}, {done}"
            if rank == 0:
                is_aborted = front.poll() and _receive(front) == Abort(request_id=call.request_id)
                store.set(step, str(is_aborted))
            if store.get(step) == b"True":
                _tell(front, _failed("RequestAbortedError", "aborted", is_shared=True))
                break
        else:
            pictures = [dict(call_for(call, index).arguments) for index in range(len(call.seeds))]
            not_finite = "a stage" if any(picture.get("prompt") == "overflow" for picture in pictures) else None
            result = CallResult(images=pictures, videos=[], timings={}, not_finite=not_finite) if rank == 0 else None
            _tell(front, Done(request_id=call.request_id, result=result, tokens={}))


def starts_once(front: Connection) -> None:
    """Draws in steps, and after a file named omni-sp-started is there, refuses to start."""
    started = Path("omni-sp-started")
    if started.exists():
        sys.exit(3)
    draws_in_steps(front)


def _mishap(front: Connection, rank: int, arguments: Mapping[str, Any]) -> None:
    prompts = arguments["prompt"] if isinstance(arguments["prompt"], list) else [arguments["prompt"]]
    asked = next((prompt for prompt in prompts if prompt in ("die", "raise", "hang")), None)
    what, once = arguments.get("do", asked), arguments.get("once")
    if what is None or (once is not None and Path(once).exists()):
        return
    if rank == 1:
        if once is not None:
            Path(once).touch()
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            _tell(front, _failed("RuntimeError", "boom"))
    time.sleep(FOREVER_S)


def is_stubborn(front: Connection) -> None:
    """Hears neither Stop nor SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _start(front)
    time.sleep(FOREVER_S)


def refuses_the_model(front: Connection) -> None:
    """Every rank finds, while loading, that no plan covers the transformer."""
    _receive(front)
    _tell(front, _failed("UnsupportedModelError", "no plan for Nothing", is_shared=True))
    time.sleep(FOREVER_S)


def dies_loading(front: Connection) -> None:
    """Rank 1 ends while loading."""
    settings = _receive(front)
    if settings.rank == 1:
        sys.exit(3)
    time.sleep(FOREVER_S)


def _start(front: Connection) -> int:
    """Load and join; returns the rank."""
    return _join(front).rank


def _join(front: Connection) -> RankSettings:
    settings = _receive(front)
    assert isinstance(settings, RankSettings)
    die_with_parent(settings.placement.parent_pid)
    _tell(front, Loaded())
    assert isinstance(_receive(front), Join)
    capabilities = PipelineCapabilities(
        name="ScriptedPipeline",
        parameters={"prompt": None, "generator": None},
        takes_anything=True,
        takes_generators=True,
    )
    _tell(
        front,
        Ready(
            rank=settings.rank,
            ranks=2,
            layout="scripted",
            capabilities=capabilities,
            device="cpu",
            dtype="float32",
            load_s=0.0,
        ),
    )
    return settings


def _calls(front: Connection) -> Any:
    """Calls until Stop, or until the front is gone."""
    while True:
        try:
            message = _receive(front)
        except EOFError:
            return
        if isinstance(message, Stop):
            return
        if isinstance(message, Abort):
            continue  # of a call that is over
        assert isinstance(message, Call)
        yield message


def _answer(front: Connection, rank: int, call: Call) -> None:
    if rank == 0:
        for done in range(3):
            _tell(front, Progress(done=done, total=2))
    result = CallResult(images=[dict(call.arguments)], videos=[], timings={}) if rank == 0 else None
    _tell(front, Done(request_id=call.request_id, result=result, tokens={}))


def _failed(kind: str, message: str, *, is_shared: bool = False, is_peer_loss: bool = False) -> Failed:
    return Failed(
        kind=kind,
        message=message,
        traceback=f"Traceback of {kind}",
        is_shared=is_shared,
        is_peer_loss=is_peer_loss,
    )


def _tell(front: Connection, message: Any) -> None:
    front.send_bytes(pickle.dumps(message))


def _receive(front: Connection) -> Any:
    return pickle.loads(front.recv_bytes())
