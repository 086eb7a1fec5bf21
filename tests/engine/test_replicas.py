"""Engines side by side behind one queue: all draw, order and seeds stay, and what one loses the others draw."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from omni_sp import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams, ParallelMesh
from omni_sp.async_omni import AsyncOmni
from omni_sp.engine.devices import rank_devices
from omni_sp.engine.job_queue import Running
from omni_sp.engine.jobs import Job
from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.errors import ConfigError, RankFailedError
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


def processes_of(omni: AsyncOmni, replica: int) -> list[int]:
    engine = omni._dispatcher.replicas[replica].engine
    assert engine is not None
    return [process.pid for process in engine._group._processes._ranks]  # type: ignore[attr-defined]


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


def test_where_no_queue_is_there_are_no_replicas() -> None:
    for refused in (
        lambda: Omni("omni-sp/shapes", DiffusionParallelConfig(data_parallel_size=2)),
        lambda: ParallelMesh(DiffusionParallelConfig(data_parallel_size=2)),
    ):
        with pytest.raises(ConfigError, match="data_parallel_size=2: AsyncOmni"):
            refused()
    with pytest.raises(ConfigError, match="data_parallel_size=0"):
        DiffusionParallelConfig(data_parallel_size=0)
    with pytest.raises(ConfigError, match="launcher starts the ranks of one engine"):
        replicated(launcher=SpawnLauncher())
