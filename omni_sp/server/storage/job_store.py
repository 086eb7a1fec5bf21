"""Jobs that outlive the request that made them, and the process too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from omni_sp.server.storage.database import Database

QUEUED, IN_PROGRESS, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """A request for a video, and its state. Times are seconds since 1970.

    Attributes:
        params: the sampling parameters, named as in OmniDiffusionSamplingParams.
        progress: percent of the denoising steps; 100 only when all is done.
        attempts: how often the job has been started, by this server process and those before it.
        completed_at: when the job was over, also by failure.
        expires_at: when the job is forgotten; None for never.
        seconds: how long the video lasts; None as long as only the pipeline knows.
        size: "WIDTHxHEIGHT" in pixels; None as long as only the pipeline knows.
        files: "video", "thumbnail" or "audio" -> the id of the file.
        note: what a person should know of a finished video.
    """

    id: str
    model: str
    created_at: float
    prompt: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    status: str = QUEUED
    progress: int = 0
    attempts: int = 0
    completed_at: float | None = None
    expires_at: float | None = None
    seconds: float | None = None
    size: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    error_code: str | None = None
    error_message: str | None = None
    note: str | None = None

    @property
    def is_over(self) -> bool:
        """True once nothing will change any more."""
        return self.status in (COMPLETED, FAILED)


class JobStore:
    """The jobs of a data folder. May be used from several threads; each call is all or nothing."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, job: VideoJob, picture: bytes | None) -> None:
        """Keep a new job, and the file of the picture that it starts from until it is over."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO jobs (id, status, expires_at, document, picture) VALUES (?, ?, ?, ?, ?)",
                (job.id, job.status, job.expires_at, json.dumps(asdict(job)), picture),
            )

    def get(self, job_id: str) -> VideoJob:
        """A job as it is now; KeyError where there is none of that id."""
        found = self._database.rows("SELECT document FROM jobs WHERE id = ?", (job_id,))
        if not found:
            raise KeyError(job_id)
        return _job(found[0][0])

    def picture(self, job_id: str) -> bytes | None:
        """The file of the picture that a job starts from; None where there is none."""
        found = self._database.rows("SELECT picture FROM jobs WHERE id = ?", (job_id,))
        return bytes(found[0][0]) if found and isinstance(found[0][0], bytes) else None

    def change(self, job_id: str, **changes: Any) -> VideoJob:
        """Change some attributes of a job, and return it; KeyError where there is none of that id, or no longer."""
        with self._database.transaction() as connection:
            found = connection.execute("SELECT document FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if found is None:
                raise KeyError(job_id)
            job = replace(_job(found[0]), **changes)
            connection.execute(
                "UPDATE jobs SET status = ?, expires_at = ?, document = ?, picture = CASE WHEN ? THEN NULL ELSE "
                "picture END WHERE id = ?",
                (job.status, job.expires_at, json.dumps(asdict(job)), job.is_over, job_id),
            )
        return job

    def delete(self, job_id: str) -> VideoJob:
        """Forget a job, and return what it was; KeyError where there is none of that id."""
        with self._database.transaction() as connection:
            job = self.get(job_id)
            connection.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        return job

    def page(self, *, limit: int, after: str | None = None, ascending: bool = False) -> tuple[list[VideoJob], bool]:
        """List jobs by age, page by page: the jobs after the one of id ``after``, and whether there are more of them.

        Raises:
            KeyError: there is no job ``after``.
        """
        order, beyond = ("ASC", ">") if ascending else ("DESC", "<")
        where, values = "", []
        if after is not None:
            found = self._database.rows("SELECT number FROM jobs WHERE id = ?", (after,))
            if not found:
                raise KeyError(after)
            where, values = f"WHERE number {beyond} ?", [found[0][0]]
        query = f"SELECT document FROM jobs {where} ORDER BY number {order} LIMIT ?"
        rows = self._database.rows(query, (*values, limit + 1))
        return [_job(document) for (document,) in rows[:limit]], len(rows) > limit

    def unfinished(self) -> list[VideoJob]:
        """Jobs that are not over, the oldest first."""
        query = "SELECT document FROM jobs WHERE status IN (?, ?) ORDER BY number"
        return [_job(document) for (document,) in self._database.rows(query, (QUEUED, IN_PROGRESS))]

    def forget_expired(self, now: float) -> None:
        """Forget the jobs that expire before ``now``, in seconds since 1970. The file store removes their files."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM jobs WHERE expires_at <= ?", (now,))


def _job(document: object) -> VideoJob:
    return VideoJob(**json.loads(str(document)))
