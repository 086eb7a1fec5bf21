"""The end of a process, and the next one: no video job is lost, and none runs twice for nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

from omni_sp.server.storage.job_store import COMPLETED, FAILED, IN_PROGRESS, QUEUED, JobStore, VideoJob
from omni_sp.server.storage.video_jobs import VideoJobs
from tests.server.fakes import VIDEOS, held
from tests.server.films import MODEL, a_job, a_picture, opened, over, read_picture, run, serving, until


def test_a_running_job_may_finish_and_waiting_ones_wait_on_disk(tmp_path: Path) -> None:
    async def first_process() -> list[VideoJob]:
        async with serving(tmp_path, held(capabilities=VIDEOS), patience_s=20.0) as (jobs, omni):
            queued = [await jobs.submit(a_job(), a_picture()) for _ in range(3)]
            await until(lambda: jobs.get(queued[0].id).progress == 25)
            asyncio.get_running_loop().call_later(0.2, omni.go_on.set)
        return queued

    async def case() -> None:
        queued = await first_process()
        with closing(opened(tmp_path)) as files:
            found = [JobStore(files.database).get(job.id) for job in queued]
            assert [job.status for job in found] == [COMPLETED, QUEUED, QUEUED]
        async with serving(tmp_path) as (jobs, omni):
            for job in queued:
                done = await over(jobs, job)
                assert (done.status, done.attempts) == (COMPLETED, 1)
                assert jobs.file(done, "video")[0].is_file()
            assert [request.id for request in omni.requests] == [job.id for job in queued[1:]]
            assert all(request.prompt.image is not None for request in omni.requests)

    run(case())


def test_an_interrupted_job_is_begun_once_more_with_the_same_seed(tmp_path: Path) -> None:
    async def case() -> None:
        async with serving(tmp_path, held(capabilities=VIDEOS)) as (jobs, _):
            job = await jobs.submit(a_job(), None)
            await until(lambda: jobs.get(job.id).progress == 25)
        async with serving(tmp_path, held(capabilities=VIDEOS)) as (jobs, omni):
            await until(lambda: jobs.get(job.id).progress == 25)
            assert (jobs.get(job.id).status, jobs.get(job.id).attempts) == (IN_PROGRESS, 2)
            assert omni.requests[0].params.seed == 7
        async with serving(tmp_path) as (jobs, omni):
            failed = await over(jobs, job)
            assert (failed.status, failed.error_code) == (FAILED, "interrupted")
            assert "2 times" in str(failed.error_message)
            assert omni.requests == []

    run(case())


def test_jobs_of_an_earlier_process_come_first_and_wait_for_the_model(tmp_path: Path) -> None:
    async def case() -> None:
        async with serving(tmp_path, held(capabilities=VIDEOS)) as (jobs, _):
            old = [await jobs.submit(a_job(), None) for _ in range(3)]
            await until(lambda: jobs.get(old[0].id).status == IN_PROGRESS)
        omni = held(capabilities=VIDEOS, max_queue_length=1)  # the old ones do not even fit
        with closing(opened(tmp_path)) as files:
            jobs = VideoJobs(omni, files, model=MODEL, max_age_s=None, read_picture=read_picture)
            await jobs.start()
            await asyncio.sleep(0.3)
            assert omni.requests == []  # it has not started
            assert [jobs.get(job.id).status for job in old] == [QUEUED] * 3
            await omni.start()
            await until(lambda: len(omni.requests) == 2)
            await jobs.delete(old[2].id)  # the one that waits for a place
            omni.go_on.set()
            assert [(await over(jobs, job)).status for job in old[:2]] == [COMPLETED] * 2
            assert (await over(jobs, await jobs.submit(a_job(), None))).expires_at is None
            assert [request.id for request in omni.requests][:2] == [job.id for job in old[:2]]
            assert [request.priority for request in omni.requests] == [1, 1, 0]
            await jobs.close(0.0)
            await jobs.close(0.0)

    run(case())


def test_jobs_of_another_model_are_not_run(tmp_path: Path) -> None:
    async def case() -> None:
        async with serving(tmp_path, held(capabilities=VIDEOS)) as (jobs, _):
            job = await jobs.submit(a_job(), None)
        async with serving(tmp_path, model="other/model") as (jobs, omni):
            failed = jobs.get(job.id)
            assert (failed.status, failed.error_code) == (FAILED, "model_changed")
            assert "other/model" in str(failed.error_message)
            assert omni.requests == []

    run(case())


def test_a_drained_omni_leaves_jobs_for_the_next_start_and_a_broken_one_fails_them(tmp_path: Path) -> None:
    async def case() -> None:
        async with serving(tmp_path, held(capabilities=VIDEOS)) as (jobs, omni):
            running, waiting = [await jobs.submit(a_job(), None) for _ in range(2)]
            await until(lambda: jobs.get(running.id).progress == 25)
            await omni.drain(0.05)
            await until(lambda: not jobs._active)
            assert [jobs.get(job.id).status for job in (running, waiting)] == [IN_PROGRESS, QUEUED]
        async with serving(tmp_path, held(capabilities=VIDEOS)) as (jobs, omni):
            await until(lambda: len(omni.requests) == 2)
            omni.force_status = "failed"
            await omni.close()  # as the real one does when its ranks do not start again
            for job in (running, waiting):
                failed = await over(jobs, job)
                assert (failed.status, failed.error_code) == (FAILED, "unavailable")

    run(case())


SERVER = """
import asyncio, json, sys
from pathlib import Path
from omni_sp.server.storage.file_store import FileStore
from omni_sp.server.storage.video_jobs import VideoJobs
from tests.server.films import MODEL, a_job, a_picture, read_picture
from tests.server.fakes import VIDEOS, held

async def main():
    omni, files = held(capabilities=VIDEOS), FileStore(Path(sys.argv[1]), max_age_s=3600.0, max_total_bytes=None)
    jobs = VideoJobs(omni, files, model=MODEL, max_age_s=3600.0, read_picture=read_picture)
    await omni.start()
    await jobs.start()
    ids = [(await jobs.submit(a_job(id=f"killed_{number}"), a_picture())).id for number in range(2)]
    while jobs.get(ids[0]).progress != 25:
        await asyncio.sleep(0.01)
    print(json.dumps(ids), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )  # fmt: skip
    watchdog = threading.Timer(60, server.kill)
    watchdog.start()
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
    finally:
        server.send_signal(signal.SIGKILL)
        server.communicate(timeout=30)
        watchdog.cancel()
    running, waiting = json.loads(line)

    async def case() -> None:
        async with serving(tmp_path) as (jobs, omni):
            for job_id, attempts in ((running, 2), (waiting, 1)):
                await until(lambda job_id=job_id: jobs.get(job_id).is_over)  # type: ignore[misc]
                done = jobs.get(job_id)
                assert (done.status, done.attempts) == (COMPLETED, attempts)
            assert all(request.prompt.image is not None for request in omni.requests)

    run(case())
