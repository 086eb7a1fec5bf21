"""Many requests at once: their order, their aborts, and that no failure of the ranks takes the others along."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import omni_sp.attention.kernels.optional
import omni_sp.engine.dispatcher
import omni_sp.engine.replica
from omni_sp import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.async_omni import AsyncOmni
from omni_sp.engine.jobs import Job
from omni_sp.engine.messages import Call
from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.errors import (
    ConfigError,
    EngineClosedError,
    OmniSPError,
    QueueFullError,
    RankFailedError,
    RequestAbortedError,
    SamplingParamsError,
)
from omni_sp.events import RequestDone, RequestEvent, RequestFailed, RequestProgress, RequestQueued
from tests.engine.processes import alive, becomes_true, said_by_forked_copy

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0


pytestmark = pytest.mark.usefixtures("no_process_left")


def scripted(script: str = "draws_in_steps", **options: Any) -> AsyncOmni:
    options = {"device": "cpu", "rank_timeout_s": 30.0, **options}
    launcher = SpawnLauncher("tests.engine.scripted", script, thread_stays=True)
    return AsyncOmni("omni-sp/shapes", DiffusionParallelConfig(ulysses_degree=2), launcher=launcher, **options)


def bounded(program: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine; every wait in it is bounded by this one."""
    asyncio.run(asyncio.wait_for(program(), PATIENCE_S))


async def draw(
    omni: AsyncOmni, name: str, on_event: Callable[[RequestEvent], None] | None = None, priority: int = 0, **extra: Any
) -> list[RequestEvent]:
    """All events of one request."""
    events = []
    params = OmniDiffusionSamplingParams(extra_args=extra)
    async for event in omni.generate(name, params, request_id=name, priority=priority):
        events.append(event)
        if on_event is not None:
            on_event(event)
    return events


def error_of(events: list[RequestEvent]) -> OmniSPError:
    assert isinstance(events[-1], RequestFailed)
    return events[-1].error


def is_done(events: list[RequestEvent]) -> bool:
    return isinstance(events[-1], RequestDone) and events[-1].output.prompt == events[-1].request_id


def test_a_request_is_told_step_by_step() -> None:
    async def program() -> None:
        async with scripted() as omni:
            assert omni.status == "ready"
            events = await draw(omni, "a", steps=3)
            assert [type(event) for event in events] == [RequestQueued, *[RequestProgress] * 3, RequestDone]
            assert [(e.done, e.total) for e in events if isinstance(e, RequestProgress)] == [(0, 3), (1, 3), (2, 3)]
            assert is_done(events)
            stats = omni.stats
            assert (stats.done, stats.failed, stats.steps, stats.queued, stats.running) == (1, 0, 2, 0, 0)
            assert list(stats.start_s) == ["imports", "weights", "joining"]
        assert omni.status == "closed"
        with pytest.raises(EngineClosedError):
            await draw(omni, "b")

    bounded(program)


def test_seeds_and_a_scheduler_reach_the_ranks_and_callbacks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    submit = omni_sp.engine.dispatcher.Dispatcher.submit

    def note(self: Any, job: Any) -> None:
        calls.append(job.call)
        submit(self, job)

    monkeypatch.setattr(omni_sp.engine.dispatcher.Dispatcher, "submit", note)

    async def program() -> None:
        async with scripted() as omni:
            chosen = ("UniPCMultistepScheduler", {"solver_order": 1})
            params = OmniDiffusionSamplingParams(seed=[3, 4], scheduler=chosen)
            last = [event async for event in omni.generate("a", params)][-1]
            assert isinstance(last, RequestDone)
            assert (last.output.metrics["seed"], len(last.output.images)) == ([3, 4], 2)
            assert (calls[0].seeds, calls[0].scheduler) == ((3, 4), chosen)
            for name in ("callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback", "anything"):
                value: Any = print if name == "anything" else ["latents"]
                with pytest.raises(
                    SamplingParamsError, match=f"takes no {name}: .* RequestProgress .* abort"
                ) as caught:
                    await draw(omni, "b", **{name: value})
                assert caught.value.param == name
            assert len(calls) == 1

    bounded(program)


def test_priority_comes_before_arrival() -> None:
    async def program() -> None:
        order: list[str] = []
        positions: dict[str, list[int]] = {}

        def note(event: RequestEvent) -> None:
            if isinstance(event, RequestQueued):
                positions.setdefault(event.request_id, []).append(event.position)
            if isinstance(event, RequestDone):
                order.append(event.request_id)

        async with scripted() as omni:
            first = asyncio.create_task(draw(omni, "first", note, steps=20))
            await asyncio.sleep(0.1)
            waiting = [("a", 0), ("b", 0), ("urgent", 5), ("late", -1), ("c", 0)]
            tasks = [asyncio.create_task(draw(omni, name, note, priority)) for name, priority in waiting]
            await asyncio.gather(first, *tasks)
        assert order == ["first", "urgent", "a", "b", "c", "late"]
        assert positions["b"] == [2, 3, 2, 1, 0][: len(positions["b"])]

    bounded(program)


def test_an_abort_harms_no_other() -> None:
    async def program() -> None:
        async with scripted() as omni:
            running = asyncio.create_task(draw(omni, "running", steps=500))
            waiting = asyncio.create_task(draw(omni, "waiting"))
            last = asyncio.create_task(draw(omni, "last"))
            await asyncio.sleep(0.3)
            assert await omni.abort("waiting")
            assert isinstance(error_of(await waiting), RequestAbortedError)
            assert await omni.abort("running")
            assert isinstance(error_of(await running), RequestAbortedError)
            assert is_done(await last)
            assert not await omni.abort("running")
            assert not await omni.abort("nobody")
            assert omni.stats.aborted == 2
            assert omni.stats.restarts == 0

    bounded(program)


def test_leaving_the_iteration_aborts() -> None:
    async def program() -> None:
        async with scripted() as omni:
            events = omni.generate("left", OmniDiffusionSamplingParams(extra_args={"steps": 500}))
            async for event in events:
                if isinstance(event, RequestProgress) and event.done == 2:
                    break
            await events.aclose()  # type: ignore[attr-defined]
            assert is_done(await draw(omni, "next"))
            assert omni.stats.aborted == 1

    bounded(program)


def test_a_death_is_tried_once_more_and_the_queue_survives(tmp_path: Path) -> None:
    async def program() -> None:
        async with scripted() as omni:
            once = str(tmp_path / "died")
            unlucky = asyncio.create_task(draw(omni, "unlucky", do="die", once=once))
            waiting = asyncio.create_task(draw(omni, "waiting"))
            events = await unlucky
            assert is_done(events)
            assert [e.done for e in events if isinstance(e, RequestProgress)].count(0) == 2
            assert is_done(await waiting)
            assert omni.stats.restarts == 1
            deadly = await draw(omni, "deadly", do="die")
            assert isinstance(error_of(deadly), RankFailedError)
            assert "killed by signal 9" in str(error_of(deadly))
            assert omni.stats.restarts >= 2
            assert is_done(await draw(omni, "after"))
            assert omni.status == "ready"

    bounded(program)


def test_a_rank_that_dies_while_nothing_runs_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omni_sp.engine.replica, "RESTART_AFTER_S", (0.0, 0.3))

    async def program() -> None:
        news: list[str] = []
        async with scripted(on_news=news.append) as omni:
            for attempt in (1, 2):
                pids = ranks_of(omni)
                os.kill(pids[1], signal.SIGKILL)
                states = set()
                while omni.stats.restarts < attempt or omni.status != "ready":
                    states.add(omni.status)
                    await asyncio.sleep(0.01)
                assert states == {"ready", "restarting"}
                assert not any(alive(pid) for pid in pids)
            told = [line for line in news if line.startswith("the ranks start again: rank 1 of 2 was killed by signal")]
            assert len(told) == 2
            assert is_done(await draw(omni, "after"))
            assert omni.stats.failed == 0

    bounded(program)


def test_news_that_nobody_reads_stop_nothing() -> None:
    def tell(_news: str) -> None:
        raise BrokenPipeError("nobody reads stderr any more")

    async def program() -> None:
        async with scripted(on_news=tell) as omni:
            os.kill(ranks_of(omni)[1], signal.SIGKILL)
            while omni.stats.restarts < 1 or omni.status != "ready":
                await asyncio.sleep(0.01)
            assert is_done(await draw(omni, "after"))

    bounded(program)


def test_a_warning_that_is_an_error_is_raised_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(*_: Any, **__: Any) -> None:
        raise UserWarning("72 x 72 pixels became 64 x 64")

    async def program() -> None:
        async with scripted() as omni:
            with monkeypatch.context() as patched:
                patched.setattr("omni_sp.async_omni.output_of", warned)
                with pytest.raises(UserWarning, match="became"):
                    await draw(omni, "warned")
            assert is_done(await draw(omni, "after"))

    bounded(program)


def test_a_thread_that_fails_leaves_no_request_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a bug of ours")

    async def program() -> None:
        async with scripted() as omni:
            monkeypatch.setattr(omni._dispatcher.queue, "finish", broken)
            running, waiting = await asyncio.gather(draw(omni, "running"), draw(omni, "waiting"))
            assert "ValueError: a bug of ours" in str(error_of(running))
            assert "ValueError: a bug of ours" in str(error_of(waiting))
            assert omni.status == "failed"

    bounded(program)


def test_an_error_of_all_ranks_fails_its_request_and_keeps_them() -> None:
    async def program() -> None:
        async with scripted() as omni:
            pids = ranks_of(omni)
            error = error_of(await draw(omni, "failing", do="raise on all"))
            assert str(error) == "all 2 ranks raised RuntimeError: boom; the model stays loaded"
            assert is_done(await draw(omni, "after"))
            assert ranks_of(omni) == pids
            assert omni.stats.restarts == 0

    bounded(program)


def test_a_rank_that_raises_fails_its_request_alone() -> None:
    async def program() -> None:
        async with scripted() as omni:
            failing = asyncio.create_task(draw(omni, "failing", do="raise"))
            waiting = asyncio.create_task(draw(omni, "waiting"))
            error = error_of(await failing)
            assert isinstance(error, RankFailedError)
            assert error.rank == 1
            assert error.rank_traceback == "Traceback of RuntimeError"
            assert is_done(await waiting)

    bounded(program)


def test_a_rank_that_hangs_is_noticed() -> None:
    async def program() -> None:
        async with scripted(rank_timeout_s=0.7) as omni:
            error = error_of(await draw(omni, "hanging", do="hang"))
            assert "no word from rank 0, 1 for 0.7 s" in str(error)
            assert is_done(await draw(omni, "after"))

    bounded(program)


def test_ranks_that_never_start_again_fail_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omni_sp.engine.replica, "RESTART_AFTER_S", (0.0, 0.1))

    async def program() -> None:
        omni = scripted("starts_once")
        await omni.start()
        Path("omni-sp-started").touch()
        deadly = asyncio.create_task(draw(omni, "deadly", do="die"))
        waiting = asyncio.create_task(draw(omni, "waiting"))
        for events in (await deadly, await waiting):
            assert isinstance(error_of(events), EngineClosedError)
            assert "exit code 3" in str(error_of(events))
        assert omni.status == "failed"
        with pytest.raises(EngineClosedError, match="AsyncOmni is failed"):
            await draw(omni, "after")
        await omni.close()
        assert omni.status == "failed"

    bounded(program)


def test_draining_lets_the_running_one_finish() -> None:
    async def program() -> None:
        omni = scripted()
        await omni.start()
        running = asyncio.create_task(draw(omni, "running", steps=20))
        waiting = asyncio.create_task(draw(omni, "waiting"))
        await asyncio.sleep(0.2)
        draining = asyncio.create_task(omni.drain(20.0))
        await asyncio.sleep(0.05)
        assert omni.status == "draining"
        with pytest.raises(EngineClosedError):
            await draw(omni, "new")
        assert isinstance(error_of(await waiting), EngineClosedError)
        assert is_done(await running)
        await draining
        assert omni.status == "closed"

    bounded(program)


def test_draining_is_bounded_and_so_is_closing() -> None:
    async def program() -> None:
        for drains in (True, False):
            omni = scripted()
            await omni.start()
            running = asyncio.create_task(draw(omni, "running", steps=1000))
            await asyncio.sleep(0.2)
            await (omni.drain(0.2) if drains else omni.close())
            assert isinstance(error_of(await running), EngineClosedError)

    bounded(program)


def test_what_is_refused_before_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean device"):
        scripted(devise="cpu")
    with pytest.raises(ConfigError, match=r"no attention kernel is called 'flsh'; choose from auto, tune, cpu_flash, "):
        AsyncOmni("no/such-model", attention_backend="flsh")  # before anybody looks for the model
    monkeypatch.setattr(omni_sp.attention.kernels.optional, "find_spec", lambda _package: None)
    for name, told in (
        ("flash_attn_4", "needs flash_attn.cute, which is not installed: pip install flash-attn-4"),
        ("sage_lossy", "needs sageattention, which is not installed: install SageAttention 2"),
    ):
        with pytest.raises(ConfigError, match=f"attention kernel '{name}' {told}"):
            AsyncOmni("no/such-model", attention_backend=name)

    async def program() -> None:
        async with scripted(max_queue_length=1) as omni:
            running = asyncio.create_task(draw(omni, "running", steps=200))
            await asyncio.sleep(0.1)
            waiting = asyncio.create_task(draw(omni, "waiting"))
            await asyncio.sleep(0.1)
            with pytest.raises(QueueFullError, match="1 requests wait already"):
                await draw(omni, "third")
            assert await omni.abort("waiting")
            with pytest.raises(SamplingParamsError, match="in use"):
                await draw(omni, "running")
            with pytest.raises(SamplingParamsError, match="give a string"):
                async for _ in omni.generate(7):  # type: ignore[arg-type]
                    pass
            # What the queue could not compare or look up would end it for all.
            for place in ({"priority": "high"}, {"priority": float("nan")}, {"request_id": 7}, {"request_id": ["a"]}):
                with pytest.raises(SamplingParamsError, match=next(iter(place))):
                    async for _ in omni.generate("a", **place):
                        pass
            assert not await omni.abort(["running"])  # type: ignore[arg-type]
            await omni.abort("running")
            await asyncio.gather(running, waiting)

    bounded(program)


def test_a_forked_copy_is_refused() -> None:
    async def program() -> None:
        async with scripted() as omni:
            job = Job(
                call=Call(request_id="copy", arguments={}, seeds=(0,)),
                priority=0,
                on_position=lambda _position: None,
                on_progress=lambda _news: None,
                on_end=lambda _result: None,
            )
            said = said_by_forked_copy(lambda: omni._dispatcher.submit(job))
            assert said.startswith("EngineClosedError: this Omni belongs to process")
            assert is_done(await draw(omni, "after"))

    bounded(program)


def test_a_start_that_fails_is_told() -> None:
    async def program() -> None:
        with pytest.raises(RankFailedError, match="exit code 3"):
            async with scripted("dies_loading"):
                pass

    bounded(program)


@pytest.mark.parametrize("degrees", [{"ring_degree": 2}, {"cfg_parallel_size": 2}], ids=lambda given: next(iter(given)))
def test_the_real_thing(tmp_path: Path, degrees: dict[str, Any]) -> None:
    """Two ranks of the demo model: the same picture as ever, an abort at a step, a rank killed, and the same again.

    Both decode the picture together, and rank 0 alone the previews.
    """

    async def pictures(omni: AsyncOmni, name: str, steps: int = 3, act: Any = None) -> list[RequestEvent]:
        events: list[RequestEvent] = []
        params = OmniDiffusionSamplingParams(
            width=64, height=64, num_inference_steps=steps, seed=3, num_outputs_per_prompt=2
        )
        async for event in omni.generate("a red circle", params, request_id=name, previews=True):
            events.append(event)
            if act is not None and isinstance(event, RequestProgress) and event.done == 2:
                act()
                act = None
        return events

    async def program() -> None:
        config = DiffusionParallelConfig(**degrees, vae_parallel=True)
        async with AsyncOmni("omni-sp/shapes", config, device="cpu", warmup=[(64, 64)]) as omni:
            before = await pictures(omni, "a")
            assert isinstance(before[-1], RequestDone)
            assert before[-1].output.metrics["vae_ranks"] == 2
            shown = [event for event in before if isinstance(event, RequestProgress) and event.preview]
            assert shown
            for event in shown:
                assert [picture.size for picture in event.previews] == [(64, 64)] * 2
                assert event.preview is event.previews[0]
                assert event.previews[0].tobytes() != event.previews[1].tobytes()
            loop = asyncio.get_running_loop()
            aborted = await pictures(omni, "b", 40, lambda: loop.create_task(omni.abort("b")))
            assert isinstance(error_of(aborted), RequestAbortedError)
            assert omni.stats.restarts == 0
            pids = ranks_of(omni)
            survivor = await pictures(omni, "c", 6, lambda: os.kill(pids[1], signal.SIGKILL))
            assert isinstance(survivor[-1], RequestDone)
            again = await pictures(omni, "d")
            assert isinstance(again[-1], RequestDone)
            assert again[-1].output.images[0].tobytes() == before[-1].output.images[0].tobytes()
            assert omni.stats.restarts == 1
        assert not any(alive(pid) for pid in pids)

    bounded(program)


SERVING = """
import asyncio

from omni_sp import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.async_omni import AsyncOmni
from omni_sp.engine.ranks.spawn import SpawnLauncher
from tests.engine.processes import descendants


async def main():
    launcher = SpawnLauncher("tests.engine.scripted", "draws_in_steps", thread_stays=True)
    config = DiffusionParallelConfig(ulysses_degree=2)
    async with AsyncOmni("omni-sp/shapes", config, device="cpu", launcher=launcher) as omni:
        print(*descendants(), flush=True)
        async for _ in omni.generate("a", OmniDiffusionSamplingParams(extra_args={"steps": 100_000})):
            pass


asyncio.run(main())
"""


def test_a_killed_front_leaves_no_rank_not_even_a_stopped_one(tmp_path: Path) -> None:
    program = tmp_path / "serving.py"
    program.write_text(SERVING)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(program)], env=environment, stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout is not None
        ranks = [int(pid) for pid in front.stdout.readline().split()]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGSTOP)
        front.kill()
        front.wait(10)
    assert becomes_true(lambda: not any(alive(pid) for pid in ranks), 5.0)


def ranks_of(omni: AsyncOmni) -> list[int]:
    """Process numbers of the ranks."""
    engine = omni._dispatcher.replicas[0].engine
    assert engine is not None
    return [process.pid for process in engine._group._processes._ranks]  # type: ignore[attr-defined]
