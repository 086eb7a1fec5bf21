"""Ranks under torchrun: each is supervised by one of its processes, started again there, and none is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.engine.processes import becomes_true
from tests.thorough import thorough_only

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0

SERVING = """
import asyncio, json, os
from pathlib import Path

from omni_sp import AsyncOmni, DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.events import RequestDone, RequestProgress

ASKED = OmniDiffusionSamplingParams(width=80, height=64, num_inference_steps=4, seed=1)


async def draw(omni, name):
    async for event in omni.generate("a red circle", ASKED, request_id=name):
        if isinstance(event, RequestProgress) and event.done == 2:
            Path(f"{name}-draws").touch()
    assert isinstance(event, RequestDone), event
    return event.output.images[0].tobytes()


async def main():
    omni = AsyncOmni("omni-sp/shapes", DiffusionParallelConfig(ulysses_degree=2), device="cpu")
    if not omni.is_main:
        await omni.supervise_rank()
        return
    async with omni:
        assert os.environ["RANK"] == "0"
        before = await draw(omni, "first")
        Path("ready").touch()
        while not Path("go-on").exists():
            await asyncio.sleep(0.05)
        after = await draw(omni, "second")
        Path("told.json").write_text(json.dumps([before == after, omni.stats.restarts]))
    Path("over").touch()


asyncio.run(main())
"""


@contextlib.contextmanager
def torchrun(folder: Path, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A job of two processes; afterwards none of it is there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, **options) as job:
        everybody: set[psutil.Process] = set()
        try:
            yield job
            everybody = set(descendants(job.pid))
        finally:
            everybody |= set(descendants(job.pid))
            job.terminate()
            job.wait(PATIENCE_S)
    gone = becomes_true(lambda: not any(map(psutil.Process.is_running, everybody)), 10.0)
    for process in everybody:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert gone


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def supervised_rank(pid: int, rank: int) -> psutil.Process:
    """The process of a rank of this job; others of the job may end while it is looked for."""
    for process in descendants(pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie too
            if process.cmdline()[-1:] == [f"omni_sp-rank-{rank}"]:
                return process
    raise AssertionError(f"no process of rank {rank} among the descendants of {pid}")


def wait_for(path: Path, job: subprocess.Popen[str]) -> None:
    assert becomes_true(lambda: path.exists() or job.poll() is not None, PATIENCE_S)
    assert path.exists()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(SERVING)
    return tmp_path


def test_a_supervised_rank_that_is_killed_comes_back_and_all_end_with_the_program(program: Path) -> None:
    with torchrun(program, "program.py") as job:
        wait_for(program / "ready", job)
        (program / "go-on").touch()
        wait_for(program / "second-draws", job)
        supervised_rank(job.pid, 1).kill()
        assert job.wait(PATIENCE_S) == 0
    assert json.loads((program / "told.json").read_text()) == [True, 1]
    assert (program / "over").exists()


@thorough_only
def test_a_killed_front_leaves_no_rank(program: Path) -> None:
    with torchrun(program, "program.py", stderr=subprocess.DEVNULL) as job:
        wait_for(program / "ready", job)
        everybody = descendants(job.pid)
        assert len(everybody) == 4
        front = supervised_rank(job.pid, 0).parent()
        assert front is not None
        front.kill()
        assert becomes_true(lambda: not any(map(psutil.Process.is_running, everybody)), 60.0)
        assert job.wait(PATIENCE_S) != 0


def test_a_job_of_another_size_is_refused(program: Path) -> None:
    source = (program / "program.py").read_text()
    (program / "program.py").write_text(source.replace("ulysses_degree=2", "ulysses_degree=2, data_parallel_size=2"))
    with torchrun(program, "program.py", stderr=subprocess.PIPE) as job:
        _, told = job.communicate(timeout=PATIENCE_S)
    assert "data_parallel_size 2 × ulysses_degree 2 × ring_degree 1 = 4 ranks, " in told
    assert "but torchrun started 2 processes: the product of the degrees must be their number" in told


@thorough_only
def test_replicas_have_a_process_for_each_of_their_ranks(program: Path) -> None:
    source = (program / "program.py").read_text()
    begin = source.index("        before = await")
    replicated = """\
        drawn = await asyncio.gather(*(draw(omni, str(number)) for number in range(6)))
        Path("told.json").write_text(json.dumps([len(set(drawn)), [one.calls > 0 for one in omni.replicas]]))
"""
    source = source[:begin] + replicated + source[source.index('    Path("over")') :]
    (program / "program.py").write_text(source.replace("ulysses_degree=2", "data_parallel_size=2"))
    with torchrun(program, "program.py") as job:
        assert job.wait(PATIENCE_S) == 0
    assert json.loads((program / "told.json").read_text()) == [1, [True, True]]


@thorough_only
def test_the_server_runs_under_torchrun_too(tmp_path: Path) -> None:
    arguments = ("-m", "omni_sp.server", "--usp", "2", "--device", "cpu", "--port", "0")
    with torchrun(tmp_path, *arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as job:
        assert job.stdout is not None
        address = re.search(r"http://\S+", job.stdout.readline())
        assert address is not None
        assert "is ready after" in job.stdout.readline()
        body = {"prompt": "a star", "size": "64x64", "num_inference_steps": 2}
        request = urllib.request.Request(
            f"{address[0]}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["data"][0]["b64_json"]
        job.send_signal(signal.SIGTERM)
        job.wait(PATIENCE_S)
