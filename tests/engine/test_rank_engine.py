"""The front's part: whatever its ranks do, it ends with an answer or the right error, and leaves no process."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from omni_sp import DiffusionParallelConfig
from omni_sp.engine.engine import Engine
from omni_sp.engine.messages import Call, EngineOptions, Progress
from omni_sp.engine.ranks.failures import as_message
from omni_sp.engine.ranks.remote import RemoteRanks
from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.engine.startup import Startup
from omni_sp.errors import (
    CallFailedError,
    EngineClosedError,
    RankFailedError,
    SamplingParamsError,
    UnsupportedModelError,
)
from omni_sp.pipelines.load import ModelSource
from tests.engine.processes import alive, becomes_true, descendants, said_by_forked_copy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_process_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT))
    before = descendants()
    yield
    gc.collect()
    assert becomes_true(lambda: descendants() <= before, 5.0)


def start(script: str, *, silence_s: float = 60.0) -> Engine:
    options = EngineOptions(
        source=ModelSource(name="scripted", location=""),
        config=DiffusionParallelConfig(ulysses_degree=2),
        device="cpu",
        dtype=None,
        attention_backend="auto",
        attention_strategy="omni_sp",
        replay=True,
        compile=False,
        cuda_graphs=False,
        rank_timeout_s=silence_s,
        startup_timeout_s=30.0,
    )
    group = RemoteRanks(options, SpawnLauncher("tests.engine.scripted", script))
    return Engine(group, Startup(lambda news: None))


def call(**arguments: object) -> Call:
    return Call(request_id="request-0", arguments=arguments, seeds=(0,))


def test_answers_calls_and_reports_steps() -> None:
    engine = start("obeys")
    steps: list[tuple[int, int]] = []
    for number in range(3):
        done = engine.run(call(number=number), lambda news: steps.append((news.done, news.total)))
        assert done.result is not None
        assert done.result.images == [{"number": number}]
    assert steps == [(0, 2), (1, 2), (2, 2)] * 3
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError, match=r"close\(\) was called"):
        engine.run(call(), None)


def test_a_rank_that_raises_ends_the_call_with_its_traceback() -> None:
    engine = start("raises_on_rank_1")
    began = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 of 2 raised RuntimeError: boom") as caught:
        engine.run(call(), None)
    assert time.monotonic() - began < 5.0
    assert caught.value.rank == 1
    assert caught.value.rank_traceback == "Traceback of RuntimeError"
    assert "Traceback of RuntimeError" in str(caught.value.__cause__)
    with pytest.raises(EngineClosedError, match="boom"):
        engine.run(call(), None)


def test_the_cause_is_reported_not_its_echo() -> None:
    engine = start("echoes_before_the_cause")
    with pytest.raises(RankFailedError, match="rank 1 of 2 raised KeyError: the cause"):
        engine.run(call(), None)


def test_a_refusal_by_all_ranks_leaves_the_engine_open() -> None:
    engine = start("refuses_on_demand")
    with pytest.raises(SamplingParamsError, match=r"^not this$"):
        engine.run(call(refuse="all"), None)
    assert engine.run(call(number=1), None).result is not None
    engine.close()


def test_a_refusal_by_one_rank_is_a_failure() -> None:
    engine = start("refuses_on_demand")
    with pytest.raises(RankFailedError, match="rank 0 of 2 raised SamplingParamsError: not this"):
        engine.run(call(refuse="rank 0"), None)
    engine.close()


ALIKE = {"place": "a.py:1", "exchanges": (0, 7, 7)}


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (ALIKE, ALIKE, "all 2 ranks raised IndexError: out of range; the model stays loaded"),
        (ALIKE, ALIKE | {"message": "0 of 3"}, "all 2 ranks raised IndexError: out of range; the model stays loaded"),
        (ALIKE, ALIKE | {"place": "b.py:2"}, "all 2 ranks raised IndexError: out of range; the model stays loaded"),
        (ALIKE | {"exchanges": (0, 0, 0)}, None, "rank 0 of 2 raised IndexError: out of range; the model stays loaded"),
        (ALIKE, None, "rank 0 of 2 raised IndexError: out of range"),
        # Two groups of guidance make other exchanges within themselves; one group tells of the other's error.
        (
            ALIKE,
            ALIKE | {"exchanges": (1, 8, 7)},
            "all 2 ranks raised IndexError: out of range; the model stays loaded",
        ),
        (
            ALIKE | {"follows": True, "kind": "ShardingError", "message": "rank 1 raised", "place": "b.py:2"},
            ALIKE | {"exchanges": (1, 8, 7)},
            "rank 1 of 2 raised IndexError: out of range; the model stays loaded",
        ),
        (ALIKE, ALIKE | {"exchanges": (1, 7, 8)}, "rank 0 of 2 raised IndexError: out of range"),
        (ALIKE, ALIKE | {"exchanges": (0, 8, 7)}, "rank 0 of 2 raised IndexError: out of range"),
        (ALIKE, ALIKE | {"kind": "KeyError"}, "rank 0 of 2 raised IndexError: out of range"),
        (ALIKE, ALIKE | {"place": "b.py:2", "message": "0"}, "rank 0 of 2 raised IndexError: out of range"),
        (ALIKE | {"is_device_error": True}, ALIKE | {"is_device_error": True}, r"rank \d of 2 raised IndexError"),
        (ALIKE | {"is_peer_loss": True}, ALIKE | {"is_peer_loss": True}, "rank 0 of 2 raised IndexError: out of range"),
    ],
)
def test_ranks_that_are_in_step_after_an_error_go_on(first: object, second: object, told: str) -> None:
    engine = start("fails_on_demand")
    goes_on = told.endswith("the model stays loaded")
    with pytest.raises(CallFailedError if goes_on else RankFailedError) as caught:
        engine.run(call(fail=(first, second)), None)
    assert re.match(told, str(caught.value))
    assert isinstance(caught.value, CallFailedError) == goes_on == engine.is_open
    if goes_on:
        assert caught.value.rank_traceback == "Traceback of IndexError"
        assert engine.run(call(), None).result is not None
    engine.close()


@pytest.mark.parametrize(
    ("error", "is_device_error", "is_out_of_memory"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True, False),
        (type("AcceleratorError", (RuntimeError,), {})("unspecified launch failure"), True, False),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB"), False, True),
        (RuntimeError("shape '[3]' is invalid"), False, False),
    ],
)
def test_which_errors_leave_a_device_unusable(error: Exception, is_device_error: bool, is_out_of_memory: bool) -> None:
    failure = as_message(error)
    assert (failure.is_device_error, failure.is_out_of_memory) == (is_device_error, is_out_of_memory)


def test_what_cannot_be_pickled_is_refused_and_nothing_is_lost() -> None:
    engine = start("obeys")
    with pytest.raises(SamplingParamsError, match="cannot be sent"):
        engine.run(call(number=lambda: 1), None)
    assert engine.run(call(number=2), None).result is not None
    engine.close()


def test_a_killed_rank_is_named_within_seconds() -> None:
    engine = start("is_killed_on_rank_1")
    began = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 of 2 was killed by signal 9") as caught:
        engine.run(call(), None)
    assert time.monotonic() - began < 5.0
    assert caught.value.rank_traceback == ""


def test_a_rank_killed_between_calls_is_noticed_at_the_next() -> None:
    before = descendants()
    engine = start("obeys")
    victim = min(descendants() - before)
    subprocess.run(["kill", "-9", str(victim)], check=True)
    with pytest.raises(RankFailedError, match="rank 0 of 2 was killed by signal 9"):
        engine.run(call(), None)


def test_a_rank_that_ends_between_calls_can_be_looked_for() -> None:
    before = descendants()
    engine = start("obeys")
    engine.require_alive()
    assert engine.run(call(), None).result is not None
    victim = min(descendants() - before)
    subprocess.run(["kill", "-9", str(victim)], check=True)
    assert becomes_true(lambda: not alive(victim), 5.0)
    with pytest.raises(RankFailedError, match="rank 0 of 2 was killed by signal 9"):
        engine.require_alive()
    assert (engine.is_open, engine.can_start_again) == (False, True)
    engine.close()
    assert not engine.can_start_again


def test_silence_is_bounded() -> None:
    engine = start("falls_silent", silence_s=1.0)
    with pytest.raises(RankFailedError, match="no word from rank 0, 1 for 1 s"):
        engine.run(call(), None)


def test_ranks_that_obey_nothing_are_killed() -> None:
    engine = start("is_stubborn")
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 15.0


def test_a_model_that_the_ranks_refuse_is_refused_in_its_own_class() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^no plan for Nothing$"):
        start("refuses_the_model")


def test_a_rank_that_dies_loading_ends_the_start() -> None:
    with pytest.raises(RankFailedError, match="rank 1 of 2 ended with exit code 3"):
        start("dies_loading")


def test_an_abandoned_engine_ends_its_ranks() -> None:
    before = descendants()
    engine = start("obeys")
    assert len(descendants() - before) == 2
    del engine
    gc.collect()
    assert descendants() == before


def test_an_error_in_the_callers_progress_ends_the_ranks() -> None:
    engine = start("obeys")

    def interrupt(_news: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(call(), interrupt)
    with pytest.raises(EngineClosedError, match="KeyboardInterrupt"):
        engine.run(call(), None)


def test_a_forked_copy_is_refused_and_harms_nothing() -> None:
    engine = start("obeys")
    for act in (lambda: engine.run(call(), None), engine.require_alive, engine.new_seed):
        said = said_by_forked_copy(act)
        assert said.startswith(
            f"EngineClosedError: this Omni belongs to process {os.getpid()}, and this is a forked copy"
        )
    assert said_by_forked_copy(engine.close) == ""
    assert engine.run(call(number=1), None).result is not None
    engine.close()


def test_close_from_another_thread_ends_a_call() -> None:
    engine = start("falls_silent")
    threading.Timer(0.5, engine.close).start()
    with pytest.raises(EngineClosedError, match="closed during a call"):
        engine.run(call(), None)


@pytest.mark.usefixtures("new_programs")
def test_ranks_watch_the_process_only_from_its_main_thread() -> None:
    launcher = SpawnLauncher()
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(launcher.parent_pid()))
    thread.start()
    thread.join()
    assert seen == [0]
    assert launcher.parent_pid() > 0


def test_a_front_that_ends_without_a_word_leaves_no_rank(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time\n"
        "from tests.engine.test_rank_engine import start\n"
        "from tests.engine.processes import descendants\n"
        "engine = start('obeys')\n"
        "print(*descendants(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    front = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    ranks = [int(word) for word in front.stdout.split()]
    assert front.returncode == -9
    assert len(ranks) == 2
    assert becomes_true(lambda: not any(alive(rank) for rank in ranks), 5.0)
