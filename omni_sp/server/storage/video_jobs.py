"""Videos as jobs: each waits in AsyncOmni's queue, becomes a file, and is resumed after a restart of the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from omni_sp.async_omni import AsyncOmni
from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.errors import EngineClosedError, QueueFullError, RankFailedError, RequestAbortedError
from omni_sp.events import RequestDone, RequestEvent, RequestFailed, RequestProgress
from omni_sp.outputs import OmniRequestOutput, dropped_tokens_note
from omni_sp.pipelines.arguments import Prompt
from omni_sp.pipelines.export import export_video
from omni_sp.pipelines.images import EncodedImage
from omni_sp.server.errors import to_api_error
from omni_sp.server.storage.file_store import FileStore
from omni_sp.server.storage.job_store import COMPLETED, FAILED, IN_PROGRESS, QUEUED, JobStore, VideoJob

_MAX_ATTEMPTS = 2
_ALMOST = 99
"""Progress in percent once all steps are done, while the video is decoded and written."""
_THUMBNAIL_PIXELS = 512
_SWEEP_EVERY_S = 60.0
_LOOK_EVERY_S = 0.2
_SEPARATE_SOUND, _NO_SOUND = "the sound is a file of its own, content?variant=audio", "the sound is left out"
_CLOSING = "the server is shutting down: try again later"
_log = logging.getLogger(__name__)


@dataclass
class _ActiveJob:
    """A job that this process works on; ``began``: its denoising has begun."""

    task: asyncio.Task[None]
    began: bool = False
    progress: int = 0


class VideoJobs:
    """Makes videos one after the other, and keeps their jobs.

    An accepted job is on disk. A job that waits when the process ends waits again when the next process starts on the
    same data folder; a job that was running starts once more, and fails when its process ends a second time. Use it
    from one event loop: ``start()``, and ``close()`` at the end.

    Args:
        model: the model that is served; jobs of another model are not run.
        max_age_s: seconds that a finished job is kept; None for ever.
        read_picture: turns the bytes of a file into the image of a Prompt, or raises.
    """

    def __init__(
        self,
        omni: AsyncOmni,
        files: FileStore,
        *,
        model: str,
        max_age_s: float | None,
        read_picture: Callable[[bytes], Awaitable[EncodedImage]],
    ) -> None:
        self._omni, self._files, self._model, self._max_age_s = omni, files, model, max_age_s
        self._read_picture = read_picture
        self._active: dict[str, _ActiveJob] = {}
        self._chores: list[asyncio.Task[None]] = []
        # Files are written one at a time, beside the event loop, and to the end.
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="omni-sp-video")
        self._is_open = True

    @property
    def _store(self) -> JobStore:
        return JobStore(self._files.database)  # which may be open only once the application starts

    # Start and end

    async def start(self) -> None:
        """Resume the jobs that an earlier process left, as soon as the model is ready."""
        left = [job for job in self._store.unfinished() if self._may_run_again(job)]
        for job in left:
            self._store.change(job.id, status=QUEUED, progress=0)
        self._chores = [asyncio.create_task(self._resume(left)), asyncio.create_task(self._sweep())]

    async def close(self, timeout_s: float) -> None:
        """Stop; the running job may finish within so many seconds. Waiting jobs stay on disk. Idempotent."""
        self._is_open = False
        for chore in self._chores:
            chore.cancel()
        waiting = [active.task for active in self._active.values() if not active.began]
        running = [active.task for active in self._active.values() if active.began]
        for task in waiting:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=timeout_s)
        for task in running:
            task.cancel()
        await asyncio.gather(*self._chores, *waiting, *running, return_exceptions=True)
        self._chores = []
        self._writer.shutdown(wait=False)

    # Jobs

    async def submit(self, job: VideoJob, picture: bytes | None) -> VideoJob:
        """Queue a job. When this returns, it will not be lost; when it raises, nothing is queued.

        Raises:
            SamplingParamsError: the pipeline cannot make it.
            ApiError: the picture cannot be read.
            QueueFullError: too many requests wait.
            EngineClosedError: the engine or the server ends, or the model is not loaded yet.
            sqlite3.Error: the job could not be written to disk.
        """
        if not self._is_open:
            raise EngineClosedError(_CLOSING)
        accepted = self._begin(job, picture, is_new=True)
        try:
            await accepted
        except asyncio.CancelledError:
            self._active[job.id].task.cancel()  # nobody would know its id
            raise
        return self.get(job.id)

    def get(self, job_id: str) -> VideoJob:
        """A job as it is now; KeyError where there is none of that id."""
        return self._as_it_is(self._store.get(job_id))

    def page(self, *, limit: int, after: str | None = None, ascending: bool = False) -> tuple[list[VideoJob], bool]:
        """One page of jobs by age, the newest first unless ``ascending``, and whether there are more after it."""
        jobs, has_more = self._store.page(limit=limit, after=after, ascending=ascending)
        return [self._as_it_is(job) for job in jobs], has_more

    async def delete(self, job_id: str) -> None:
        """Forget a job and its files; stop it where it waits or runs. KeyError where there is none of that id."""
        job = self._store.delete(job_id)
        active = self._active.get(job_id)
        if active is not None:
            active.task.cancel()
            await asyncio.wait([active.task])
        self._drop(job.files)

    def file(self, job: VideoJob, kind: str) -> tuple[Path, str]:
        """Where a finished job's "video", "thumbnail" or "audio" lies, and its type; KeyError where it is gone."""
        return self._files.path(job.files[kind])

    def _as_it_is(self, job: VideoJob) -> VideoJob:
        active = self._active.get(job.id)
        return job if active is None or job.is_over else replace(job, progress=active.progress)

    # Running a job

    def _begin(self, job: VideoJob, picture: bytes | None, *, is_new: bool) -> asyncio.Future[None]:
        """Work on a job. The future is done once it is queued and, if it is new, on disk; or it has the error."""
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._run_job(job, picture, accepted, is_new))
        self._active[job.id] = _ActiveJob(task)

        def over(_task: asyncio.Task[None]) -> None:
            self._active.pop(job.id, None)
            if not accepted.done():  # cancelled, perhaps before it could begin
                reason = RequestAbortedError("it was deleted") if self._is_open else EngineClosedError(_CLOSING)
                accepted.set_exception(reason)

        task.add_done_callback(over)
        return accepted

    async def _run_job(
        self, job: VideoJob, picture: bytes | None, accepted: asyncio.Future[None], is_new: bool
    ) -> None:
        """Run a job. An error goes to whoever submits the job until it is accepted, and into the job from then on."""
        try:
            await self._make(job, picture, accepted, is_new)
        except Exception as error:
            if not accepted.done():
                accepted.set_exception(error)
            elif self._is_interrupted(error):
                _log.info("%s waits for the next start of the server", job.id)
            else:
                self._fail(job.id, error)

    async def _make(self, job: VideoJob, picture: bytes | None, accepted: asyncio.Future[None], is_new: bool) -> None:
        image = None if picture is None else await self._read_picture(picture)
        prompt = Prompt(text=job.prompt, image=image)
        params = OmniDiffusionSamplingParams(**job.params)
        # Jobs that an earlier process left come before new ones.
        making = self._omni.generate(prompt, params, request_id=job.id, priority=0 if is_new else 1)
        output: OmniRequestOutput | None = None
        events = cast(AsyncGenerator[RequestEvent], making)
        async with contextlib.aclosing(events):  # leaving it early, for whatever reason, aborts the request
            async for event in events:
                if not accepted.done():
                    if is_new:
                        self._store.add(job, picture)
                    accepted.set_result(None)
                if isinstance(event, RequestProgress):
                    self._note_progress(job, event)
                elif isinstance(event, RequestFailed):
                    raise event.error
                elif isinstance(event, RequestDone):
                    output = event.output
        if output is None:
            raise RankFailedError("the request ended without a result", rank=0)
        self._active[job.id].began = True
        await asyncio.get_running_loop().run_in_executor(self._writer, self._finish, job, output)

    def _note_progress(self, job: VideoJob, event: RequestProgress) -> None:
        active = self._active[job.id]
        if not active.began:
            active.began = True
            self._store.change(job.id, status=IN_PROGRESS, attempts=job.attempts + 1)
        active.progress = min(_ALMOST, 100 * event.done // max(event.total, 1))

    def _finish(self, job: VideoJob, output: OmniRequestOutput) -> None:
        """Write the files, and complete the job. It runs in the writer's thread: a cancelled task does not stop it."""
        files: dict[str, str] = {}
        try:
            note = self._write(output, files)
            frames, fps = output.videos[0], output.metrics["fps"]
            self._store.change(
                job.id,
                status=COMPLETED,
                progress=100,
                files=files,
                note=note,
                size=f"{frames[0].width}x{frames[0].height}",
                seconds=len(frames) / fps,
                params={**job.params, "num_frames": len(frames), "fps": fps},
                **self._end_times(),
            )
        except BaseException as error:
            self._drop(files)
            if not isinstance(error, KeyError):  # deleted meanwhile
                raise

    def _write(self, output: OmniRequestOutput, files: dict[str, str]) -> str | None:
        """Write the files of a job, and put their ids into ``files``. Returns the note for people, or None.

        The video is last: where space is short, the store drops older files first, and the newest never.
        """
        if not output.videos:
            raise RankFailedError("the pipeline made no video", rank=0)
        frames, metrics = output.videos[0], output.metrics
        with self._files.scratch() as folder:
            thumbnail, video, audio = folder / "thumbnail.webp", folder / "video.mp4", folder / "audio.wav"
            small = frames[0].convert("RGB")
            small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
            small.save(thumbnail)
            sound, rate = (output.audios[0] if output.audios else None), metrics.get("sampling_rate")
            export = export_video(frames, video, metrics["fps"], sound=sound, sampling_rate=rate, sound_path=audio)
            if export.placement == "separate":
                files["audio"] = self._files.adopt(audio, suffix=".wav", media_type="audio/wav")
            files["thumbnail"] = self._files.adopt(thumbnail, suffix=".webp", media_type="image/webp")
            files["video"] = self._files.adopt(video, suffix=".mp4", media_type="video/mp4")
        notes = [dropped_tokens_note(metrics)]
        if export.reason is not None:
            notes.append(f"{_SEPARATE_SOUND if export.placement == 'separate' else _NO_SOUND}: {export.reason}")
        return "; ".join(filter(None, notes)) or None

    def _fail(self, job_id: str, error: Exception) -> None:
        self._mark_failed(job_id, *_error_fields(error))

    def _mark_failed(self, job_id: str, code: str, message: str) -> None:
        active = self._active.get(job_id)
        progress = 0 if active is None else active.progress
        how = {"status": FAILED, "progress": progress, "error_code": code, "error_message": message}
        try:
            self._store.change(job_id, **how, **self._end_times())
        except KeyError:
            pass  # deleted meanwhile
        except sqlite3.Error:
            _log.exception("%s has failed (%s), which could not be written down", job_id, message)

    def _end_times(self) -> dict[str, float | None]:
        now = time.time()
        return {"completed_at": now, "expires_at": None if self._max_age_s is None else now + self._max_age_s}

    def _drop(self, files: Mapping[str, str]) -> None:
        for file_id in files.values():
            with contextlib.suppress(KeyError):  # too old already
                self._files.delete(file_id)

    def _is_interrupted(self, error: Exception) -> bool:
        """True where the process ends and the next one may resume; False where the ranks have failed for good."""
        return isinstance(error, EngineClosedError) and self._omni.status != "failed"

    # After a restart, and regularly

    def _may_run_again(self, job: VideoJob) -> bool:
        if job.model != self._model:
            reason = f"the server was started again with another model: {self._model}"
            self._mark_failed(job.id, "model_changed", reason)
            return False
        if job.attempts >= _MAX_ATTEMPTS:
            reason = f"the server stopped {job.attempts} times while it made this video"
            self._mark_failed(job.id, "interrupted", reason)
            return False
        return True

    async def _resume(self, jobs: list[VideoJob]) -> None:
        """Queue jobs that are on disk already, the oldest first."""
        for job in jobs:
            while await self._is_ready():
                try:
                    await self._begin(self._store.get(job.id), self._store.picture(job.id), is_new=False)
                except QueueFullError:
                    await asyncio.sleep(_LOOK_EVERY_S)
                    continue
                except KeyError:
                    pass  # deleted while it waited
                except Exception as error:
                    if not self._is_interrupted(error):
                        self._fail(job.id, error)
                break

    async def _is_ready(self) -> bool:
        """Wait until the model is ready; False where it will not be, and jobs wait for the next process."""
        while self._omni.status in ("starting", "restarting"):
            await asyncio.sleep(_LOOK_EVERY_S)
        return self._omni.status == "ready"

    async def _sweep(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._store.forget_expired, time.time())
                await asyncio.to_thread(self._files.sweep)
            except Exception:
                _log.exception("old videos could not be removed")
            await asyncio.sleep(_SWEEP_EVERY_S)


def _error_fields(error: Exception) -> tuple[str, str]:
    """The code and the message of a failed job."""
    if isinstance(error, (OSError, sqlite3.Error)):
        _log.error("a video could not be written", exc_info=error)
        return "storage_failed", f"the video could not be written: {getattr(error, 'strerror', None) or error}"
    api_error = to_api_error(error)
    return api_error.code or "internal_error", api_error.message
