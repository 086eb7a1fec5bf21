"""/v1/videos over real sockets: OpenAI's own client, every refusal, pages, ranges, and a server that comes back."""

from __future__ import annotations

import base64
import io
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from openai import NotFoundError, OpenAI
from PIL import Image

from omni_sp import DiffusionParallelConfig
from omni_sp.async_omni import AsyncOmni
from omni_sp.errors import RankFailedError
from omni_sp.server.storage.job_store import JobStore, VideoJob
from omni_sp.testing import models
from tests.server.fakes import PICTURES, VIDEOS, FakeOmni, held
from tests.server.films import a_picture, film
from tests.server.serving import Served, error_of, serving, until

# OpenAI's client says that OpenAI has given this API up; it works on, and others serve it.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
MODEL = "tiny/video"
SMALL = {"prompt": "a cat", "size": "48x32", "num_frames": 5}


def client(served: Served) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=20.0)


def created(served: Served, **fields: Any) -> str:
    answer = served.post("/v1/videos", {**SMALL, **fields})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def state(served: Served, video_id: str) -> dict[str, Any]:
    answer = served.get(f"/v1/videos/{video_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def over(served: Served, video_id: str) -> dict[str, Any]:
    until(lambda: state(served, video_id)["status"] in ("completed", "failed"))
    return state(served, video_id)


# As OpenAI's client has it


def test_openais_client_makes_fetches_lists_and_deletes(tmp_path: Path) -> None:
    with serving(FakeOmni(capabilities=VIDEOS), model=MODEL) as served, client(served) as openai:
        video = openai.videos.create_and_poll(
            prompt="a cat",
            model=MODEL,
            seconds="4",
            size="544x960",  # type: ignore[arg-type]  # OpenAI's own model has four sizes
            extra_body={"num_inference_steps": 2},
        )
        assert (video.status, video.progress, video.error, video.object) == ("completed", 100, None, "video")
        assert (video.model, video.prompt, video.size) == (MODEL, "a cat", "544x960")
        assert video.seconds == "4.062"  # 65 frames: 1 + a multiple of 4, the nearest to 64
        assert video.completed_at is not None
        assert video.expires_at == pytest.approx(video.completed_at + 24 * 3600, abs=1)
        openai.videos.download_content(video.id).write_to_file(tmp_path / "video.mp4")
        rate, frames = film(tmp_path / "video.mp4")
        assert (rate, frames.shape) == (16.0, (65, 960, 544, 3))
        thumbnail = openai.videos.download_content(video.id, variant="thumbnail").read()
        with Image.open(io.BytesIO(thumbnail)) as picture:
            assert (picture.format, picture.size) == ("WEBP", (290, 512))
        assert [one.id for one in openai.videos.list()] == [video.id]
        assert openai.videos.delete(video.id).deleted is True
        with pytest.raises(NotFoundError, match="there is no video"):
            openai.videos.retrieve(video.id)


def test_a_picture_comes_as_a_file_or_as_a_data_url() -> None:
    omni = FakeOmni(capabilities=VIDEOS)
    url = f"data:image/png;base64,{base64.b64encode(a_picture((7, 8, 9))).decode()}"
    with serving(omni, model=MODEL) as served, client(served) as openai:
        file = ("cat.png", a_picture((7, 8, 9)), "image/png")
        ids = [openai.videos.create(prompt="a cat", input_reference=file).id]
        form = {**SMALL, "input_reference[image_url]": url}
        ids.append(served.client.post("/v1/videos", data=form).json()["id"])
        for reference in (url, {"image_url": url}):
            ids.append(created(served, input_reference=reference))
        assert [over(served, video_id)["status"] for video_id in ids] == ["completed"] * 4
    assert [request.prompt.image.getpixel((0, 0)) for request in omni.requests] == [(7, 8, 9)] * 4


# What a request says


@pytest.mark.parametrize("as_form", [True, False])
def test_every_field_reaches_the_pipeline(as_form: bool) -> None:
    fields = {
        "prompt": "ein Hütchen 🎩", "negative_prompt": "rain", "size": "64x32", "num_frames": 9, "fps": 7.5,
        "num_inference_steps": 3, "guidance_scale": 2.5, "seed": 2**63 - 1, "model": MODEL, "user": "somebody",
    }  # fmt: skip
    omni = FakeOmni(capabilities=VIDEOS)
    with serving(omni, model=MODEL) as served:
        answer = served.client.post("/v1/videos", **({"data": fields} if as_form else {"json": fields}))  # type: ignore[arg-type]
        assert answer.status_code == 200, answer.text
        assert answer.headers["openai-poll-after-ms"] == "500"
        done = over(served, answer.json()["id"])
        assert (done["seed"], done["num_frames"], done["fps"], done["seconds"]) == (2**63 - 1, 9, 7.5, "1.2")
    (request,) = omni.requests
    assert request.prompt.text == fields["prompt"]
    params = request.params
    assert (params.width, params.height, params.num_frames, params.fps) == (64, 32, 9, 7.5)
    assert (params.num_inference_steps, params.guidance_scale, params.negative_prompt) == (3, 2.5, "rain")


def test_what_is_left_out_is_the_models_and_a_seed_is_drawn() -> None:
    omni = FakeOmni(capabilities=VIDEOS)
    with serving(omni, model=MODEL) as served:
        first, second = (served.post("/v1/videos", {"prompt": "a cat", "size": size}).json() for size in ("auto", None))
        assert (first["size"], first["seconds"]) == ("96x64", "0.562")  # 9 frames, 16 a second
        assert first["seed"] != second["seed"]
        assert over(served, first["id"])["size"] == "96x64"
    assert omni.requests[0].params.seed == first["seed"]


def test_seconds_become_the_nearest_number_of_frames() -> None:
    omni = held(capabilities=VIDEOS)
    cases: list[tuple[Any, float, int]] = [(0.01, 16, 1), ("0.5", 16, 9), (1, 30, 29), (2.0, 10, 21), ("4", 24, 97)]
    with serving(omni, model=MODEL, drain_timeout_s=0.1) as served:
        for seconds, fps, _ in cases:
            created(served, seconds=seconds, fps=fps, num_frames=None)
    assert [request.params.num_frames for request in omni.requests] == [num_frames for *_, num_frames in cases]


REFUSED: list[tuple[dict[str, Any], str, int]] = [
    ({"prompt": None}, "prompt", 400),
    ({"prompt": ""}, "prompt", 400),
    ({"prompt": 5}, "prompt", 400),
    ({"prompt": "x" * 40_000}, "prompt", 400),
    ({"size": "1x"}, "size", 400),
    ({"size": "0x32"}, "size", 400),
    ({"size": "99999x99999"}, "size", 400),
    ({"size": "47x32"}, "size", 400),  # the pipeline's own rule
    ({"seconds": 0, "num_frames": None}, "seconds", 400),
    ({"seconds": "long", "num_frames": None}, "seconds", 400),
    ({"seconds": "nan", "num_frames": None}, "seconds", 400),
    ({"seconds": True, "num_frames": None}, "seconds", 400),
    ({"seconds": 3000, "num_frames": None}, "seconds", 400),
    ({"seconds": 1}, "num_frames", 400),
    ({"num_frames": 6}, "num_frames", 400),
    ({"num_frames": 0}, "num_frames", 400),
    ({"num_frames": 5.5}, "num_frames", 400),
    ({"num_frames": 100_001}, "num_frames", 400),
    ({"fps": 0}, "fps", 400),
    ({"num_inference_steps": 10_000}, "num_inference_steps", 400),
    ({"guidance_scale": "much"}, "guidance_scale", 400),
    ({"true_cfg_scale": 2.0}, "true_cfg_scale", 400),
    ({"seed": -2}, "seed", 400),
    ({"seed": 2**63}, "seed", 400),
    ({"model": "sora-2"}, "model", 404),
    ({"numframes": 5}, "numframes", 400),
    ({"n": 2}, "n", 400),
    ({"input_reference": "https://example.org/cat.png"}, "input_reference", 400),
    ({"input_reference": {"file_id": "file-1"}}, "input_reference", 400),
    ({"input_reference": 5}, "input_reference", 400),
    ({"input_reference": "data:image/png;base64,!"}, "input_reference", 400),
    ({"input_reference": "data:image/png;base64,AAAA"}, "input_reference", 400),
]


def test_what_cannot_be_is_refused_with_its_field() -> None:
    omni = FakeOmni(capabilities=VIDEOS)
    with serving(omni, model=MODEL, max_frames=1025) as served:
        for fields, param, status in REFUSED:
            answer = served.post("/v1/videos", {**SMALL, **fields})
            assert answer.status_code == status, (fields, answer.text)
            assert error_of(answer)["param"] == param, (fields, answer.text)
        assert "did you mean num_frames?" in error_of(served.post("/v1/videos", {**SMALL, "num_frame": 5}))["message"]
        assert served.get("/v1/videos").json()["data"] == []
    assert omni.requests == []


def test_size_frames_and_steps_have_a_bound_together() -> None:
    omni = FakeOmni(capabilities=VIDEOS)
    with serving(omni, model=MODEL, max_video_pixel_steps=48 * 32 * 5 * 4) as served:
        assert served.post("/v1/videos", SMALL).status_code == 200  # with the pipeline's own 4 steps
        # Each of them is far below its own limit; what is left out is the pipeline's own.
        for more in ({"num_inference_steps": 5}, {"num_frames": 9}, {"size": "64x32"}, {"num_frames": None}):
            error = error_of(answer := served.post("/v1/videos", {**SMALL, **more}))
            assert (answer.status_code, error["param"]) == (400, "size"), more
            assert "is more than 30720" in error["message"]
        assert served.post("/v1/videos", {**SMALL, "num_inference_steps": 2, "num_frames": 9}).status_code == 200
    with serving(FakeOmni(capabilities=VIDEOS), model=MODEL) as served:
        largest = {"size": "4096x4096", "num_frames": 1025, "num_inference_steps": 200}
        assert served.post("/v1/videos", {"prompt": "x", **largest}).status_code == 400


def test_bodies_that_are_none_are_refused() -> None:
    large = io.BytesIO()
    Image.new("RGB", (300, 300)).save(large, "PNG")
    with serving(FakeOmni(capabilities=VIDEOS), model=MODEL, max_pixels=50_000) as served:
        post = served.client.post
        for body in (b"", b"{", b"[]", b"\xff", b'"text"', b"[" * 100_000):
            answer = post("/v1/videos", content=body, headers={"content-type": "application/json"})
            assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")
        assert post("/v1/videos", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
        assert post("/v1/videos", content=b"x").status_code == 415
        broken = {"content-type": "multipart/form-data; boundary=x"}
        assert post("/v1/videos", content=b"no parts", headers=broken).status_code == 400
        for file in (b"", b"no picture", a_picture()[:-30], large.getvalue()):
            answer = post("/v1/videos", data=SMALL, files={"input_reference": ("a.png", file)})
            assert (answer.status_code, error_of(answer)["param"]) == (400, "input_reference"), answer.text
        several = [("input_reference", ("a.png", a_picture())), ("input_reference", ("b.png", a_picture()))]
        assert post("/v1/videos", data=SMALL, files=several).status_code == 400
        answer = post("/v1/videos", data=SMALL, files={"mask": ("a.png", a_picture())})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "mask")
        answer = post("/v1/videos", data={"seed": ["1", "2"], **SMALL})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "seed")
        assert served.get("/v1/videos").json()["data"] == []


def test_a_model_that_makes_pictures_says_so() -> None:
    with serving(FakeOmni(capabilities=PICTURES), model="tiny/picture") as served:
        error = error_of(answer := served.post("/v1/videos", SMALL))
        assert (answer.status_code, error["code"]) == (400, "unsupported_model")
        assert "makes pictures and no videos: use /v1/images/generations" in error["message"]
        assert served.get("/v1/videos").json()["data"] == []


def test_a_server_without_a_video_writer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_sp.pipelines.export._PACKAGES", {"no_such_module": "imageio-ffmpeg"})
    with serving(FakeOmni(capabilities=VIDEOS), model=MODEL) as served:
        answer = served.post("/v1/videos", SMALL)
        assert answer.status_code == 501
        assert "pip install '.[video]'" in error_of(answer)["message"]


def test_a_server_that_is_not_ready_or_full_says_when_to_come_again() -> None:
    with serving(FakeOmni(capabilities=VIDEOS, start_s=30.0), model=MODEL, ready=False, drain_timeout_s=0.1) as served:
        answer = served.post("/v1/videos", SMALL)
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    with serving(held(capabilities=VIDEOS, max_queue_length=1), model=MODEL, drain_timeout_s=0.1) as served:
        kept = [created(served) for _ in range(2)]
        answer = served.post("/v1/videos", SMALL)
        assert (answer.status_code, "retry-after" in answer.headers) == (429, True)
        assert [one["id"] for one in served.get("/v1/videos").json()["data"]] == kept[::-1]


# How far it is


def test_progress_is_shown_as_it_is() -> None:
    omni = held(capabilities=VIDEOS)
    with serving(omni, model=MODEL) as served:
        running, waiting = created(served, num_inference_steps=8), created(served)
        until(lambda: state(served, running)["progress"] == 12)  # 1 of 8 steps
        assert state(served, running)["status"] == "in_progress"
        assert (state(served, waiting)["status"], state(served, waiting)["progress"]) == ("queued", 0)
        for video_id in (running, waiting):
            answer = served.get(f"/v1/videos/{video_id}/content")
            assert (answer.status_code, error_of(answer)["code"]) == (400, "video_not_ready")
        omni.go_on.set()
        assert [over(served, video_id)["progress"] for video_id in (running, waiting)] == [100, 100]
        assert "openai-poll-after-ms" not in served.get(f"/v1/videos/{running}").headers


def test_a_failed_video_says_why() -> None:
    failure = RankFailedError("rank 1 was killed", rank=1)
    with serving(FakeOmni(capabilities=VIDEOS, errors=[failure]), model=MODEL) as served:
        failed = over(served, created(served))
        assert failed["status"] == "failed"
        assert failed["error"]["code"] == "rank_failed"
        assert "rank 1 was killed" in failed["error"]["message"]
        answer = served.get(f"/v1/videos/{failed['id']}/content")
        assert (answer.status_code, error_of(answer)["code"]) == (400, "video_failed")
        assert over(served, created(served))["status"] == "completed"


def test_a_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: JobStore, job: VideoJob, picture: bytes | None) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with serving(FakeOmni(capabilities=VIDEOS), model=MODEL) as served:
        with monkeypatch.context() as patch:
            patch.setattr(JobStore, "add", full)
            answer = served.post("/v1/videos", SMALL)
        assert (answer.status_code, error_of(answer)["code"]) == (507, "storage_failed")
        assert over(served, created(served))["status"] == "completed"


# Fetching, listing, removing


def test_content_is_fetched_whole_and_in_ranges() -> None:
    with serving(FakeOmni(capabilities=VIDEOS), model=MODEL) as served:
        path = f"/v1/videos/{over(served, created(served))['id']}/content"
        whole = served.get(path)
        assert whole.headers["content-type"] == "video/mp4"
        assert whole.content[4:8] == b"ftyp"
        part = served.get(path, headers={"Range": "bytes=4-7"})
        assert (part.status_code, part.content) == (206, b"ftyp")
        assert served.get(path, headers={"Range": "bytes=99999999-"}).status_code == 416
        for variant, status in (("thumbnail", 200), ("audio", 404), ("spritesheet", 400), ("../x", 400)):
            assert served.get(path, params={"variant": variant}).status_code == status


def test_a_video_that_made_room_for_others_says_so() -> None:
    with serving(FakeOmni(capabilities=VIDEOS), model=MODEL, file_max_total_bytes=2000) as served:
        old, new = (over(served, created(served))["id"] for _ in range(2))
        answer = served.get(f"/v1/videos/{old}/content")
        assert answer.status_code == 404
        assert "no longer kept" in error_of(answer)["message"]
        assert served.get(f"/v1/videos/{new}/content").status_code == 200
        assert served.client.delete(f"/v1/videos/{old}").json()["deleted"] is True


def test_videos_are_listed_page_by_page() -> None:
    with serving(held(capabilities=VIDEOS), model=MODEL, drain_timeout_s=0.1) as served, client(served) as openai:
        ids = [created(served) for _ in range(5)]
        assert [one.id for one in openai.videos.list(limit=2)] == ids[::-1]  # it asks for page after page
        assert [one.id for one in openai.videos.list(limit=2, order="asc")] == ids
        page = served.get("/v1/videos", params={"limit": 2, "order": "asc"}).json()
        assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[0], ids[1], True)
        for query in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}, {"after": "video_0"}):
            answer = served.get("/v1/videos", params=query)
            assert (answer.status_code, error_of(answer)["param"]) == (400, next(iter(query)))


def test_removing_stops_what_runs() -> None:
    omni = held(capabilities=VIDEOS)
    with serving(omni, model=MODEL) as served:
        running, waiting = created(served), created(served)
        until(lambda: state(served, running)["status"] == "in_progress")
        for video_id in (waiting, running):
            answer = served.client.delete(f"/v1/videos/{video_id}")
            assert answer.json() == {"id": video_id, "object": "video.deleted", "deleted": True}
        assert [request.outcome for request in omni.requests] == ["aborted", "aborted"]
        for method in ("GET", "DELETE"):
            answer = served.client.request(method, f"/v1/videos/{running}")
            assert (answer.status_code, error_of(answer)["code"]) == (404, "video_not_found")
        assert served.get("/v1/videos/..%2F..%2Fetc%2Fpasswd/content").status_code == 404


def test_keys_are_asked_for_here_too() -> None:
    with serving(FakeOmni(capabilities=VIDEOS), model=MODEL, api_keys=("secret",)) as served:
        for method, path in (("POST", ""), ("GET", ""), ("GET", "/video_1"), ("GET", "/video_1/content")):
            assert served.client.request(method, f"/v1/videos{path}").status_code == 401
        answer = served.get("/v1/videos", headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200


# A server that ends and comes back


def test_videos_outlive_the_server(tmp_path: Path) -> None:
    omni = held(capabilities=VIDEOS)
    with serving(omni, model=MODEL, data_dir=tmp_path, drain_timeout_s=0.1) as served:
        omni.go_on.set()
        done = over(served, created(served))
        content = served.get(f"/v1/videos/{done['id']}/content").content
        omni.go_on.clear()
        running, waiting = created(served, seed=5), created(served)
        until(lambda: state(served, running)["status"] == "in_progress")
    omni = FakeOmni(capabilities=VIDEOS)
    with serving(omni, model=MODEL, data_dir=tmp_path) as served:
        assert state(served, done["id"]) == done
        assert served.get(f"/v1/videos/{done['id']}/content").content == content
        assert [over(served, video_id)["status"] for video_id in (running, waiting)] == ["completed"] * 2
        assert omni.requests[0].params.seed == 5
    with serving(FakeOmni(capabilities=PICTURES), model="tiny/picture", data_dir=tmp_path) as served:
        assert len(served.get("/v1/videos").json()["data"]) == 3  # still to be fetched from a server of pictures


def test_what_runs_at_the_end_is_finished(tmp_path: Path) -> None:
    with serving(
        FakeOmni(capabilities=VIDEOS, step_s=0.1), model=MODEL, data_dir=tmp_path, drain_timeout_s=10.0
    ) as served:
        running, waiting = created(served), created(served)
        until(lambda: state(served, running)["status"] == "in_progress")
    with serving(FakeOmni(capabilities=VIDEOS, start_s=0.3), model=MODEL, data_dir=tmp_path, ready=False) as served:
        assert [state(served, video_id)["status"] for video_id in (running, waiting)] == ["completed", "queued"]
        assert over(served, waiting)["status"] == "completed"


# The real thing


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "wan"
    models.save_wan(folder)
    return folder


def test_two_ranks_make_a_video_and_stop_when_it_is_removed(wan: Path, tmp_path: Path) -> None:
    omni = AsyncOmni(wan, DiffusionParallelConfig(ulysses_degree=2), device="cpu")
    with serving(omni, model="tiny/wan", ready=False, data_dir=tmp_path / "data") as served, client(served) as openai:
        until(lambda: served.get("/health").status_code == 200, 60.0)
        more = {"num_frames": 9, "num_inference_steps": 2, "seed": 7}
        first, again = (
            openai.videos.create_and_poll(prompt="a cat walks", size="80x48", extra_body=more)  # type: ignore[arg-type]
            for _ in range(2)
        )
        contents = [openai.videos.download_content(video.id).read() for video in (first, again)]
        assert contents[0] == contents[1]  # the same seed
        (tmp_path / "video.mp4").write_bytes(contents[0])
        _, frames = film(tmp_path / "video.mp4")
        assert frames.shape == (9, 48, 80, 3)
        assert frames.std() > 1  # no single colour
        long = created(served, size="160x96", num_frames=33, num_inference_steps=150)
        until(lambda: state(served, long)["status"] == "in_progress")
        served.client.delete(f"/v1/videos/{long}")
        after = over(served, created(served, num_inference_steps=1))
        assert after["status"] == "completed"
        assert omni.stats.aborted == 1
