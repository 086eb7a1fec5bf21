"""Engines side by side behind one queue: all draw, order and seeds stay, and what one loses the others draw."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from omni_sp import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams, ParallelMesh
from omni_sp.async_omni import AsyncOmni
from omni_sp.engine.devices import rank_devices
from omni_sp.engine.job_queue import Running
from omni_sp.engine.jobs import Job
from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.errors import ConfigError, EngineClosedError, RankFailedError
from omni_sp.events import RequestDone, RequestProgress

TWO = DiffusionParallelConfig(ulysses_degree=2, data_parallel_size=2)
PATIENCE_S = 120.0

pytestmark = pytest.mark.usefixtures("no_process_left")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the ranks of each replica run."""
    found = ["draws_in_steps", "draws_in_steps"]

    def launchers(_options: Any) -> list[SpawnLauncher]:
        return [SpawnLauncher("tests.engine.scripted", script, thread_stays=True) for script in found]

    monkeypatch.setattr("omni_sp.engine.launchers.local_launchers", launchers)
    return found


def bounded(program: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(program(), PATIENCE_S))


def replicated(**options: Any) -> AsyncOmni:
    return AsyncOmni("omni-sp/shapes", TWO, device="cpu", rank_timeout_s=30.0, **options)


def processes_of(omni: Any, replica: int) -> list[int]:
    engine = omni._dispatcher.replicas[replica].engine
    assert engine is not None
    return [process.pid for process in engine._group._processes._ranks]


def test_forty_requests_outlive_a_killed_replica_in_order_and_with_their_seeds(
    scripts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    class Noted(Running):
        def __init__(self, jobs: list[Job], *rest: Any) -> None:  # under the queue's lock
            taken.extend(int(job.call.request_id) for job in jobs)
            super().__init__(jobs, *rest)

    monkeypatch.setattr("omni_sp.engine.job_queue.Running", Noted)
    was_killed: list[int] = []

    async def program() -> None:
        news: list[str] = []
        async with replicated(on_news=news.append) as omni:

            async def draw(number: int) -> Any:
                params = OmniDiffusionSamplingParams(seed=1000 + number, extra_args={"steps": 3})
                last = None
                async for last in omni.generate(f"prompt {number}", params, request_id=str(number)):
                    if isinstance(last, RequestProgress) and number == 10 and not was_killed:
                        was_killed.append(number)
                        os.kill(processes_of(omni, 0)[1], signal.SIGKILL)
                return last

            outputs = await asyncio.gather(*(draw(number) for number in range(40)))
            assert all(isinstance(output, RequestDone) for output in outputs), outputs
            for number, output in enumerate(outputs):
                assert output.output.images[0]["prompt"] == f"prompt {number}"
                assert output.output.metrics["seed"] == 1000 + number
            assert (omni.stats.done, omni.stats.failed) == (40, 0)
            assert omni.replicas[1].calls > 0
            assert sum(replica.calls for replica in omni.replicas) == 40
            assert omni.stats.restarts == omni.replicas[0].restarts == 1
            assert omni.replicas[1].restarts == 0
            assert any(line.startswith("replica 0: the ranks start again") for line in news)

    bounded(program)
    assert list(dict.fromkeys(taken)) == list(range(40))
    assert len(taken) <= 41  # one was drawn by the replica that died, and waited again


def test_one_replica_that_never_comes_back_leaves_the_other(
    scripts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("omni_sp.engine.replica.RESTART_AFTER_S", (0.0, 0.0))
    scripts[0] = "starts_once"

    async def program() -> None:
        async with replicated() as omni:
            (tmp_path / "omni-sp-started").touch()
            os.kill(processes_of(omni, 0)[0], signal.SIGKILL)
            while omni.replicas[0].status != "failed":
                assert omni.status == "ready"
                await asyncio.sleep(0.05)
            events = [event async for event in omni.generate("a")]
            assert isinstance(events[-1], RequestDone)
            assert [replica.status for replica in omni.replicas] == ["failed", "ready"]

    bounded(program)


def test_a_replica_that_does_not_start_ends_the_start(scripts: list[str]) -> None:
    scripts[1] = "dies_loading"

    async def program() -> None:
        omni = replicated()
        with pytest.raises(RankFailedError):
            await omni.start()
        assert omni.status == "failed"
        await omni.close()

    bounded(program)


def test_an_abort_reaches_the_replica_that_runs_it(scripts: list[str]) -> None:
    async def program() -> None:
        async with replicated() as omni:

            async def draw(name: str) -> str:
                params = OmniDiffusionSamplingParams(extra_args={"steps": 500 if name == "long" else 3})
                async for event in omni.generate(name, params, request_id=name):
                    if name == "long" and isinstance(event, RequestProgress):
                        await omni.abort("long")
                return type(event).__name__

            ends = await asyncio.gather(draw("long"), draw("b"), draw("c"))
            assert list(ends) == ["RequestFailed", "RequestDone", "RequestDone"]

    bounded(program)


def test_replicas_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert rank_devices("cuda", TWO, 0) == ["cuda:0", "cuda:1"]
    assert rank_devices("cuda", TWO, 1) == ["cuda:2", "cuda:3"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"data_parallel_size 2 × ulysses_degree 2 .* need 4 GPUs"):
        rank_devices("cuda", TWO, 0)


def test_more_ranks_than_there_is_memory_for_are_never_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_sp.engine.devices.memory_bytes", lambda: 12 * 10**9)
    assert len(rank_devices("cpu", DiffusionParallelConfig(ulysses_degree=40))) == 40
    given: tuple[dict[str, Any], ...] = (
        {"ulysses_degree": 41},
        {"ring_degree": 999, "cfg_parallel_size": 2},
        {"data_parallel_size": 99},
    )
    for degrees in given:
        with pytest.raises(ConfigError, match=r"ranks? are more processes than .* which is 40 without any weights"):
            rank_devices("cpu", DiffusionParallelConfig(**degrees))
    monkeypatch.setattr("omni_sp.engine.devices.memory_bytes", lambda: 10**9)
    assert len(rank_devices("cpu", DiffusionParallelConfig(ulysses_degree=4, ring_degree=2))) == 8
    with pytest.raises(ConfigError, match="more than 65536 are never started"):
        DiffusionParallelConfig(data_parallel_size=10**9)


def opened(**options: Any) -> Omni:
    return Omni("omni-sp/shapes", TWO, device="cpu", rank_timeout_s=30.0, show_progress=False, **options)


def drawn(outputs: list[Any]) -> list[tuple[str, int]]:
    return [(output.images[0]["prompt"], output.metrics["seed"]) for output in outputs]


def test_omni_spreads_prompts_over_replicas_in_order_and_with_their_seeds(scripts: list[str]) -> None:
    prompts = [f"prompt {number}" for number in range(12)]
    params = OmniDiffusionSamplingParams(seed=7, extra_args={"steps": 3})
    with opened() as drawing:
        dispatcher = drawing._engine._dispatcher  # type: ignore[union-attr]
        assert drawn(drawing.generate(prompts, params)) == [(prompt, 7) for prompt in prompts]
        assert all(replica.calls for replica in dispatcher.replica_stats)
        seeds = {seed for _, seed in drawn(drawing.generate(prompts, OmniDiffusionSamplingParams()))}
        assert len(seeds) == len(prompts)
        outputs = drawing.generate_each(prompts, params)
        assert drawn([next(outputs)]) == [("prompt 0", 7)]
        outputs.close()  # type: ignore[attr-defined]
        assert drawn(drawing.generate("another", params)) == [("another", 7)]
        while dispatcher.stats.running:
            time.sleep(0.01)
        stats = dispatcher.stats
        assert stats.done + stats.aborted == 2 * len(prompts) + len(prompts) + 1
        assert stats.aborted >= 1
    with pytest.raises(EngineClosedError, match="make a new one"):
        drawing.generate("a")


def test_what_a_replica_of_omni_loses_the_other_draws(scripts: list[str]) -> None:
    params = OmniDiffusionSamplingParams(seed=7, extra_args={"steps": 3})
    with opened() as drawing:
        outputs = drawing.generate_each([f"prompt {number}" for number in range(12)], params)
        found = [next(outputs)]
        os.kill(processes_of(drawing._engine, 0)[1], signal.SIGKILL)
        assert drawn([*found, *outputs]) == [(f"prompt {number}", 7) for number in range(12)]


def test_ctrl_c_ends_all_prompts_of_a_call(scripts: list[str]) -> None:
    long = OmniDiffusionSamplingParams(extra_args={"steps": 5000})
    with opened() as drawing:
        dispatcher = drawing._engine._dispatcher  # type: ignore[union-attr]

        def interrupt() -> None:
            while dispatcher.stats.steps < 4:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            drawing.generate(["a", "b", "c"], long)
        thread.join(PATIENCE_S)
        assert len(drawing.generate(["d", "e"], OmniDiffusionSamplingParams(extra_args={"steps": 2}))) == 2
        assert dispatcher.stats.aborted == 3
        assert dispatcher.stats.restarts == 0


def test_omni_with_a_replica_that_does_not_start(scripts: list[str]) -> None:
    scripts[1] = "dies_loading"
    with pytest.raises(RankFailedError):
        opened()


def test_where_the_ranks_of_one_engine_are_there_are_no_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="data_parallel_size=2: here are the ranks of one engine"):
        ParallelMesh(DiffusionParallelConfig(data_parallel_size=2))
    with pytest.raises(ConfigError, match="data_parallel_size=0"):
        DiffusionParallelConfig(data_parallel_size=0)
    with pytest.raises(ConfigError, match="launcher starts the ranks of one engine"):
        replicated(launcher=SpawnLauncher())
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="data_parallel_size=2: here are the ranks of one engine"):
        Omni("omni-sp/shapes", DiffusionParallelConfig(data_parallel_size=2))
