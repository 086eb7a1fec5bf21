"""Video jobs: what is answered for is made or says why, and nothing of a deleted one stays."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni_sp.errors import (
    EngineClosedError,
    QueueFullError,
    RankFailedError,
    RequestAbortedError,
    SamplingParamsError,
)
from omni_sp.outputs import OmniRequestOutput
from omni_sp.pipelines.export import write_video
from omni_sp.server.storage.job_store import COMPLETED, FAILED, IN_PROGRESS, JobStore, VideoJob
from tests.server.fakes import VIDEOS, FakeOmni, FakeRequest, held
from tests.server.films import MODEL, a_job, a_picture, film, on_disk, opened, over, run, serving, until

# The store


def test_jobs_are_remembered(tmp_path: Path) -> None:
    job = a_job()
    with closing(opened(tmp_path)) as files:
        store = JobStore(files.database)
        store.add(job, b"picture")
        assert store.get(job.id) == job
        changed = store.change(job.id, status=IN_PROGRESS, progress=40)
        assert (changed.status, changed.progress, changed.params) == (IN_PROGRESS, 40, job.params)
    with closing(opened(tmp_path)) as files:
        store = JobStore(files.database)
        assert store.get(job.id) == changed
        assert store.picture(job.id) == b"picture"
        store.change(job.id, status=COMPLETED, files={"video": "file-1"})
        assert store.picture(job.id) is None  # needed no more
        assert store.delete(job.id).files == {"video": "file-1"}
        for use in (store.get, store.delete, store.change):
            with pytest.raises(KeyError):
                use(job.id)


def test_jobs_are_listed_page_by_page(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as files:
        store = JobStore(files.database)
        assert store.page(limit=5) == ([], False)
        made = [a_job(created_at=5.0) for _ in range(5)]  # in one second, and still in order
        ids = [job.id for job in made]
        for job in made:
            store.add(job, None)
        for ascending, expected in ((True, ids), (False, ids[::-1])):
            found: list[str] = []
            while len(found) < 5:
                page, has_more = store.page(limit=2, after=found[-1] if found else None, ascending=ascending)
                found += [job.id for job in page]
                assert has_more == (len(found) < 5)
            assert found == expected
        assert store.page(limit=5)[1] is False
        with pytest.raises(KeyError):
            store.page(limit=5, after="video_unknown")


def test_expired_jobs_are_forgotten(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as files:
        store = JobStore(files.database)
        young, old, waiting = a_job(expires_at=20.0, status=COMPLETED), a_job(expires_at=10.0, status=FAILED), a_job()
        for job in (young, old, waiting):
            store.add(job, None)
        store.forget_expired(15.0)
        assert {job.id for job in store.page(limit=5)[0]} == {young.id, waiting.id}
        assert [job.id for job in store.unfinished()] == [waiting.id]


# A job's way


def test_a_job_becomes_a_film(tmp_path: Path) -> None:
    async def case() -> None:
        async with serving(tmp_path, held(capabilities=VIDEOS)) as (jobs, omni):
            job = await jobs.submit(a_job(), None)
            await until(lambda: jobs.get(job.id).status == IN_PROGRESS)
            await until(lambda: jobs.get(job.id).progress == 25)  # one of four steps
            omni.go_on.set()
            done = await over(jobs, job)
            assert (done.status, done.progress, done.error_code) == (COMPLETED, 100, None)
            assert (done.size, done.seconds, done.attempts) == ("48x32", 5 / 16, 1)
            assert done.completed_at is not None
            assert done.expires_at == pytest.approx(done.completed_at + 3600)
            path, media_type = jobs.file(done, "video")
            rate, frames = film(path)
            assert (media_type, rate, frames.shape) == ("video/mp4", 16.0, (5, 32, 48, 3))
            assert abs(frames.astype(int).mean((0, 1, 2)) - (7, len("a cat"), 200)).max() < 6
            thumbnail, media_type = jobs.file(done, "thumbnail")
            assert media_type == "image/webp"
            with Image.open(thumbnail) as picture:
                assert picture.size == (48, 32)
            assert len(on_disk(tmp_path)) == 2
            await jobs.delete(job.id)
            assert on_disk(tmp_path) == []
            with pytest.raises(KeyError):
                jobs.get(job.id)

    run(case())


def test_jobs_run_one_after_the_other(tmp_path: Path) -> None:
    async def case() -> None:
        async with serving(tmp_path) as (jobs, omni):
            queued = [await jobs.submit(a_job(), None) for _ in range(4)]
            done = [await over(jobs, job) for job in queued]
            assert [job.status for job in done] == [COMPLETED] * 4
            assert [request.id for request in omni.requests] == [job.id for job in queued]
            assert len({job.files["video"] for job in done}) == 4

    run(case())


def test_a_picture_to_start_from_reaches_the_pipeline(tmp_path: Path) -> None:
    async def case() -> None:
        async with serving(tmp_path) as (jobs, omni):
            await over(jobs, await jobs.submit(a_job(), a_picture((9, 8, 7))))
            assert omni.requests[0].prompt.image.getpixel((0, 0)) == (9, 8, 7)

    run(case())


def test_what_is_refused_leaves_no_job(tmp_path: Path) -> None:
    async def case() -> None:
        async with serving(tmp_path, held(capabilities=VIDEOS, max_queue_length=1)) as (jobs, omni):
            for changes, error in (({"num_frames": 6}, "num_frames"), ({"true_cfg_scale": 3.0}, "true_cfg_scale")):
                with pytest.raises(SamplingParamsError, match=error):
                    await jobs.submit(VideoJob(id="x", model=MODEL, created_at=0, prompt="", params=changes), None)
            with pytest.raises(OSError, match="cannot identify"):
                await jobs.submit(a_job(), b"no picture")
            kept = [await jobs.submit(a_job(), None) for _ in range(2)]
            with pytest.raises(QueueFullError):
                await jobs.submit(a_job(), None)
            assert {job.id for job in jobs.page(limit=9)[0]} == {job.id for job in kept}
            omni.go_on.set()
            assert [(await over(jobs, job)).status for job in kept] == [COMPLETED] * 2
        with pytest.raises(EngineClosedError):
            await jobs.submit(a_job(), None)

    run(case())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RankFailedError("rank 1 died\nsecret path", rank=1, rank_traceback="Traceback"), "rank_failed", "rank 1 died"),
        (SamplingParamsError("seed: no"), "invalid_value", "seed: no"),
        (RequestAbortedError("stopped"), "aborted", "stopped"),
    ],
)
def test_a_failure_is_reported_by_the_job(tmp_path: Path, error: Any, code: str, message: str) -> None:
    async def case() -> None:
        async with serving(tmp_path, FakeOmni(capabilities=VIDEOS, errors=[error])) as (jobs, _):
            failed = await over(jobs, await jobs.submit(a_job(), a_picture()))
            assert (failed.status, failed.error_code, failed.progress) == (FAILED, code, 25)
            assert message in str(failed.error_message)
            assert "secret" not in str(failed.error_message)
            assert failed.expires_at is not None
            assert (await over(jobs, await jobs.submit(a_job(), None))).status == COMPLETED

    run(case())


def test_a_full_disk_fails_the_job_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(frames: Any, path: Path, fps: float) -> None:
        path.write_bytes(b"half a film")
        raise OSError(28, "No space left on device")

    async def case() -> None:
        async with serving(tmp_path) as (jobs, _):
            with monkeypatch.context() as patch:
                patch.setattr("omni_sp.pipelines.export.write_video", full)
                failed = await over(jobs, await jobs.submit(a_job(), None))
            assert (failed.status, failed.error_code) == (FAILED, "storage_failed")
            assert "No space left" in str(failed.error_message)
            assert on_disk(tmp_path) == []
            assert (await over(jobs, await jobs.submit(a_job(), None))).status == COMPLETED

    run(case())


def test_a_job_that_cannot_be_written_down_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: JobStore, job: VideoJob, picture: bytes | None) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async def case() -> None:
        async with serving(tmp_path, held(capabilities=VIDEOS)) as (jobs, omni):
            with monkeypatch.context() as patch:
                patch.setattr(JobStore, "add", full)
                with pytest.raises(sqlite3.OperationalError, match="full"):
                    await jobs.submit(a_job(), None)
            assert [request.outcome for request in omni.requests] == ["aborted"]

    run(case())


class Sounding(FakeOmni):
    """Its videos have sound: ``channels`` of them."""

    channels = 1

    def _fake_output(self, request: FakeRequest) -> OmniRequestOutput:
        output = super()._fake_output(request)
        output.audios = [np.zeros((self.channels, 8000), np.float32)]
        output.metrics["sampling_rate"] = 16000
        return output


def test_a_sound_is_in_the_film_or_beside_it(tmp_path: Path) -> None:
    import av

    async def case() -> None:
        omni = Sounding(capabilities=VIDEOS)
        async with serving(tmp_path, omni) as (jobs, _):
            inside = await over(jobs, await jobs.submit(a_job(), None))
            with av.open(jobs.file(inside, "video")[0]) as container:
                assert len(container.streams.audio) == 1
            assert inside.note is None
            omni.channels = 3
            beside = await over(jobs, await jobs.submit(a_job(), None))
            path, media_type = jobs.file(beside, "audio")
            assert (path.read_bytes()[:4], media_type) == (b"RIFF", "audio/wav")
            assert "variant=audio" in str(beside.note)

    run(case())


# Deleting


def test_deleting_stops_what_runs_and_what_waits(tmp_path: Path) -> None:
    async def case() -> None:
        async with serving(tmp_path, held(capabilities=VIDEOS)) as (jobs, omni):
            first, second, third = [await jobs.submit(a_job(), None) for _ in range(3)]
            await until(lambda: jobs.get(first.id).progress == 25)
            await jobs.delete(second.id)
            await jobs.delete(first.id)
            assert [request.outcome for request in omni.requests[:2]] == ["aborted", "aborted"]
            assert [job.id for job in jobs.page(limit=9)[0]] == [third.id]
            omni.go_on.set()
            assert (await over(jobs, third)).status == COMPLETED
            with pytest.raises(KeyError):
                await jobs.delete(first.id)

    run(case())


def test_deleting_while_the_file_is_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes, go_on = threading.Event(), threading.Event()
    real = write_video

    def slowly(frames: Any, path: Path, fps: float) -> None:
        writes.set()
        assert go_on.wait(20)
        real(frames, path, fps)

    async def case() -> None:
        monkeypatch.setattr("omni_sp.pipelines.export.write_video", slowly)
        async with serving(tmp_path) as (jobs, _):
            job = await jobs.submit(a_job(), None)
            await until(writes.is_set)
            assert (jobs.get(job.id).status, jobs.get(job.id).progress) == (IN_PROGRESS, 99)  # not done yet
            await jobs.delete(job.id)
            go_on.set()
            other = await over(jobs, await jobs.submit(a_job(), None))
            assert other.status == COMPLETED
            assert len(on_disk(tmp_path)) == len(other.files)

    run(case())
