"""Videos in tests: jobs to ask for, the part of a server that makes them, and a look into finished films."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omni_sp.pipelines.images import EncodedImage
from omni_sp.server.storage.file_store import FileStore
from omni_sp.server.storage.job_store import VideoJob
from omni_sp.server.storage.video_jobs import VideoJobs
from tests.server.fakes import VIDEOS, FakeOmni

MODEL = "tiny/video"
NUMBERS = iter(range(1000))


def run(case: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(case, 30.0)

    asyncio.run(bounded())


def a_job(**changes: Any) -> VideoJob:
    params = {"num_frames": 5, "height": 32, "width": 48, "seed": 7}
    given = {"id": f"video_{next(NUMBERS)}", "model": MODEL, "created_at": time.time(), "prompt": "a cat", **changes}
    return VideoJob(params=params, **given)


def a_picture(colour: tuple[int, int, int] = (1, 2, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 16), colour).save(file, "PNG")
    return file.getvalue()


async def read_picture(data: bytes) -> EncodedImage:
    Image.open(io.BytesIO(data)).load()
    return EncodedImage(data)


def opened(folder: Path, **limits: Any) -> FileStore:
    return FileStore(folder, **{"max_age_s": 3600.0, "max_total_bytes": None, **limits})


@asynccontextmanager
async def serving(
    folder: Path, omni: FakeOmni | None = None, *, model: str = MODEL, patience_s: float = 0.0
) -> AsyncIterator[tuple[VideoJobs, FakeOmni]]:
    """A server's jobs, as long as the block lasts: what runs then may go on for ``patience_s``."""
    omni = omni or FakeOmni(capabilities=VIDEOS)
    with closing(opened(folder)) as files:
        jobs = VideoJobs(omni, files, model=model, max_age_s=3600.0, read_picture=read_picture)
        await omni.start()
        await jobs.start()
        try:
            yield jobs, omni
        finally:
            await jobs.close(patience_s)
            await omni.close()


async def until(condition: Callable[[], Any], timeout_s: float = 15.0) -> None:
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends, "it did not come about"
        await asyncio.sleep(0.005)


async def over(jobs: VideoJobs, job: VideoJob) -> VideoJob:
    await until(lambda: jobs.get(job.id).is_over)
    return jobs.get(job.id)


def film(path: Path) -> tuple[float, Any]:
    """Frames a second, and the frames."""
    import av

    with av.open(path) as container:
        (stream,) = container.streams.video
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return float(stream.average_rate or 0), frames


def on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "files").iterdir())
