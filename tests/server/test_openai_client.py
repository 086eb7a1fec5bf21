"""OpenAI's own client, as it comes, against a real server: the demo model on two rank processes."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil  # type: ignore[import-untyped]
import pytest
from PIL import Image

from omni_sp import Omni, OmniDiffusionSamplingParams
from omni_sp.errors import RankFailedError
from tests.pipelines.test_adapters import save_lora
from tests.server.fakes import EDITS, FakeOmni
from tests.server.serving import PATIENCE_S, Served, serving, until
from tests.server.test_images import png

MODEL = "omni-sp/shapes"
START_S = 120.0


@dataclass
class Real:
    process: subprocess.Popen[str]
    lora: dict[str, str]
    served: Served
    errors: Path


def client_for(url: str, key: str = "a-key") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60.0)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    errors = tmp_path_factory.mktemp("server") / "stderr"
    lora_path = str(save_lora(errors.parent / "style", seed=0))
    adapter = f"style={lora_path}"
    command = [sys.executable, "-m", "omni_sp.server", MODEL, "--usp", "2", "--port", "0", "--device", "cpu"]
    with errors.open("w") as file:
        process = subprocess.Popen(
            [*command, "--api-key", "a-key", "--warmup", "64x64", "--vae-parallel", "on", "--lora", adapter],
            stdout=subprocess.PIPE, stderr=file, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = re.search(r"listening on http://127\.0\.0\.1:(\d+)", line)
        assert port is not None, line + errors.read_text()
        served = Served(int(port[1]))
        assert served.get("/health").status_code == 503
        until(lambda: process.poll() is not None or served.get("/health").status_code == 200, START_S)
        assert process.poll() is None, errors.read_text()
        yield Real(process, {"style": lora_path}, served, errors)
        served.client.close()
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(PATIENCE_S * 2)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def client(real: Real) -> Iterator[openai.OpenAI]:
    with client_for(real.served.url) as client:
        yield client


def picture(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_a_picture(client: openai.OpenAI) -> None:
    extra = {"seed": 11, "num_inference_steps": 6}
    result = client.images.generate(model=MODEL, prompt="a red circle", size="256x256", n=1, extra_body=extra)
    assert result.data is not None
    drawn = picture(result.data[0].b64_json)
    assert (drawn.size, drawn.mode, result.size) == ((256, 256), "RGB", "256x256")
    assert result.usage is not None
    assert result.usage.output_tokens == 256
    again = client.images.generate(model=MODEL, prompt="a red circle", size="256x256", extra_body=extra)
    assert again.data is not None
    # The files say what each request asked for, and differ in that.
    assert picture(again.data[0].b64_json).tobytes() == drawn.tobytes()
    params = OmniDiffusionSamplingParams(height=256, width=256, seed=11, num_inference_steps=6)
    with Omni(MODEL, device="cpu") as one_process:
        (alone,) = one_process.generate("a red circle", params)[0].images
    assert np.abs(np.asarray(drawn, dtype=np.int16) - np.asarray(alone, dtype=np.int16)).max() <= 2
    # A patch of it is red, which noise is not.
    red, green, blue = np.asarray(drawn, dtype=np.int16).reshape(-1, 3).T
    assert ((red > 150) & (green < 100) & (blue < 100)).sum() > 500


def test_adapters_come_and_go(client: openai.OpenAI, real: Real) -> None:
    def drawn(**lora: Any) -> Any:
        extra = {"seed": 11, "num_inference_steps": 2, **lora}
        result = client.images.generate(model=MODEL, prompt="a red circle", size="128x96", extra_body=extra)
        assert result.data is not None
        return np.asarray(picture(result.data[0].b64_json), dtype=np.int16)

    plain, style, again = drawn(), drawn(lora=[{"name": "style", "scale": 2.0}]), drawn()
    assert np.array_equal(plain, again)
    params = OmniDiffusionSamplingParams(height=96, width=128, seed=11, num_inference_steps=2, lora=("style", 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Omni(MODEL, device="cpu", lora=real.lora) as one_process:
            (alone,) = one_process.generate("a red circle", params)[0].images
    assert np.abs(style - np.asarray(alone, dtype=np.int16)).max() <= 2
    assert np.abs(style - plain).max() > 20
    with pytest.raises(openai.BadRequestError, match="no LoRA adapter 'other'"):
        drawn(lora="other")
    assert real.served.get("/v1/loras", headers={"Authorization": "Bearer a-key"}).json()["data"][0]["id"] == "style"


def test_a_stream_with_previews(client: openai.OpenAI) -> None:
    events = client.images.generate(
        model=MODEL, prompt="a red circle", size="128x128", stream=True, partial_images=2,
        extra_body={"num_inference_steps": 6},
    )  # fmt: skip
    with events:
        got = list(events)
    kinds = [event.type for event in got]
    assert kinds[-1] == "image_generation.completed"
    assert set(kinds[:-1]) == {"image_generation.partial_image"}
    assert [event.partial_image_index for event in got if event.type == "image_generation.partial_image"] == [0, 1]
    assert picture(got[-1].b64_json).size == (128, 128)


def test_a_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a blue square"}]
    extra = {"num_inference_steps": 2, "height": 128, "width": 128}
    answer: Any = client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra)
    url = answer.choices[0].message.images[0]["image_url"]["url"]
    assert picture(url.partition(",")[2]).size == (128, 128)
    with client.chat.completions.create(model=MODEL, messages=messages, stream=True, extra_body=extra) as stream:
        chunks: list[Any] = list(stream)
    images = [image for chunk in chunks for image in getattr(chunk.choices[0].delta, "images", None) or []]
    assert len(images) == 1
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_errors_are_the_clients_own(client: openai.OpenAI, real: Real) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(model=MODEL, prompt="x", size="100x100")
    assert refused.value.param == "size"
    with pytest.raises(openai.BadRequestError, match="does not take image"):
        client.images.edit(model=MODEL, prompt="x", image=png())
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.images.generate(model="dall-e-3", prompt="x")
    with client_for(real.served.url, "another") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_leaving_a_stream_aborts(client: openai.OpenAI, real: Real) -> None:
    events: Any = client.images.generate(
        model=MODEL, prompt="x", stream=True, extra_body={"num_inference_steps": 200, "progress": True}
    )
    for event in events:
        if getattr(event, "step", None):
            break
    events.close()
    until(lambda: count(real, 'omni_sp_requests_total{outcome="aborted"}') == 1)
    client.images.generate(model=MODEL, prompt="x", size="64x64", extra_body={"num_inference_steps": 1})


def count(real: Real, name: str) -> float:
    lines = real.served.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


def test_sigterm_finishes_what_runs_and_refuses_the_rest(client: openai.OpenAI, real: Real) -> None:
    outcomes: dict[str, Any] = {}

    def ask(name: str) -> None:
        try:
            extra = {"num_inference_steps": 60}
            outcomes[name] = client.images.generate(model=MODEL, prompt="x", size="128x128", extra_body=extra)
        except openai.APIError as error:
            outcomes[name] = error

    threads = []
    for name, gauge in (("running", "omni_sp_requests_running"), ("waiting", "omni_sp_requests_waiting")):
        threads.append(threading.Thread(target=ask, args=(name,)))
        threads[-1].start()
        until(lambda gauge=gauge: count(real, gauge) == 1)  # type: ignore[misc]
    ranks = psutil.Process(real.process.pid).children(recursive=True)
    assert len(ranks) >= 2
    real.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert outcomes["running"].data[0].b64_json
    assert outcomes["waiting"].status_code == 503
    assert outcomes["waiting"].response.headers["retry-after"] == "5"
    assert real.process.wait(PATIENCE_S) == 0
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    assert "Traceback" not in real.errors.read_text()


def test_edits_and_a_failing_stream() -> None:
    omni = FakeOmni(capabilities=EDITS)
    with serving(omni) as served, client_for(served.url) as client:
        edited = client.images.edit(image=[png(), ("b.webp", png(kind="WEBP"))], prompt="x", n=2, size="64x32")
        assert edited.data is not None
        assert [picture(one.b64_json).size for one in edited.data] == [(64, 32)] * 2
        assert len(omni.requests[0].prompt.image) == 2
        with client.images.edit(image=png(), prompt="x", stream=True, partial_images=1) as events:
            assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
        kept = client.images.edit(image=png(), prompt="x", response_format="url").data
        assert kept is not None
        assert str(kept[0].url).startswith(f"{served.url}/v1/files/file-")
    omni = FakeOmni(errors=[RankFailedError("rank 1 died", rank=1)])
    with (
        serving(omni) as served,
        client_for(served.url) as client,
        pytest.raises(openai.APIError, match="rank 1 died"),
    ):
        list(client.images.generate(prompt="x", stream=True))
