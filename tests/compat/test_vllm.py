"""The real ``vllm`` command: with ``--omni`` it is ours, without it is vLLM's."""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from packaging.requirements import Requirement
from PIL import Image

from tests.compat.test_entry_points import IMPORTS
from tests.server.serving import PATIENCE_S, until
from tests.thorough import thorough_only

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)

VLLM = Path(sys.executable).with_name("vllm")
START_S = RUN_S = 240.0
REQUEST = {"prompt": "a red circle on a blue background", "seed": 11, "size": "256x256"}

# vLLM's command for every argument, one after the other; and as it would be if nobody had installed our door.
AS_IT_IS = """
import sys
from vllm.entrypoints.cli.main import main

for line in sys.argv[1:]:
    sys.argv = ["vllm", *line.split()]
    try:
        main()
    except SystemExit as end:
        print("exit code", end.code, flush=True)
"""
WITHOUT_OUR_DOOR = f"import sys; sys.modules['vllm_omni'] = None\n{AS_IT_IS}"

OMNI_BESIDE_VLLM = """
import sys
import vllm
from vllm import SamplingParams
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

with Omni("omni-sp/shapes", device="cpu") as omni:
    params = OmniDiffusionSamplingParams(seed=11, width=256, height=256)
    omni.generate("a red circle on a blue background", params)[0].images[0].save(sys.argv[1])
"""


@dataclass
class Started:
    process: subprocess.Popen[str]
    url: str
    client: httpx2.Client


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """``vllm serve --omni`` on two ranks, ready to draw, locked as vLLM's users do."""
    errors = tmp_path_factory.mktemp("vllm") / "stderr"
    options = "--omni --port 0 --usp 2 --device cpu --served-model-name circles shapes"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [VLLM, "serve", "omni-sp/shapes", *options.split()],
            stdout=subprocess.PIPE, stderr=file, text=True, env=os.environ | {"VLLM_API_KEY": "a-key"},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = (re.search(r"listening on (http://\S+)", line) for line in process.stdout)
        url = next((found[1] for found in lines if found), "")
        assert url, errors.read_text()
        with httpx2.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
            until(lambda: process.poll() is not None or client.get("/health").status_code == 200, START_S)
            assert process.poll() is None, errors.read_text()
            client.headers["Authorization"] = "Bearer a-key"
            yield Started(process, url, client)
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            child.kill()
        process.communicate()


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=RUN_S, check=False)


def test_serve_with_omni_draws(started: Started, tmp_path: Path) -> None:
    assert httpx2.get(f"{started.url}/v1/models", trust_env=False).status_code == 401
    assert [model["id"] for model in started.client.get("/v1/models").json()["data"]] == ["circles", "shapes"]
    answer = started.client.post("/v1/images/generations", json=REQUEST | {"model": "circles"})
    assert answer.status_code == 200, answer.text
    served = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).convert("RGB")
    done = run(sys.executable, "-c", OMNI_BESIDE_VLLM, tmp_path / "one.png")
    assert done.returncode == 0, done.stderr
    one = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"), dtype=int)
    assert one.shape == (256, 256, 3)
    assert one.std() > 20  # there is something to see
    assert np.abs(np.asarray(served, dtype=int) - one).max() <= 2


def test_sigterm_ends_it_with_all_its_processes(started: Started) -> None:
    processes = psutil.Process(started.process.pid).children(recursive=True)
    assert len(processes) == 3  # two ranks, and the one that they were forked from
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(PATIENCE_S) == 0
    until(lambda: not any(process.is_running() for process in processes))
    with socket.create_server(("127.0.0.1", int(started.url.rpartition(":")[2]))):
        pass  # its port is free again


@thorough_only
def test_help_with_omni_is_ours() -> None:
    done = run(VLLM, "serve", "--omni", "--help")
    assert done.returncode == 0, done.stderr
    assert "--ulysses-degree" in done.stdout
    assert "--gpu-memory-utilization" not in done.stdout


def test_bad_input_with_omni_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for line, words in (
            (f"serve omni-sp/shapes --omni --port {port}", f"port {port}: Address already in use"),
            ("serve no-such-model --omni", "unknown model 'no-such-model'"),
            ("serve omni-sp/shapes --omni --uvicorn-log-level info", "no option --uvicorn-log-level with --omni"),
        ):
            done = run(VLLM, *line.split())
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert words in done.stderr


def test_without_omni_it_is_vllm_to_the_byte() -> None:
    lines = ("--version", "serve --help", "serve m --usp 2")
    ours, theirs = (run(sys.executable, "-c", program, *lines) for program in (AS_IT_IS, WITHOUT_OUR_DOOR))
    assert ours.returncode == theirs.returncode == 0, ours.stderr
    assert ours.stdout == theirs.stdout
    assert re.findall("^exit code .*", ours.stdout, re.MULTILINE) == ["exit code 0", "exit code 0", "exit code 2"]
    assert ours.stdout.startswith(importlib.metadata.version("vllm"))
    assert "usage: vllm serve" in ours.stdout
    assert "unrecognized arguments: --usp 2" in ours.stderr
    assert "unrecognized arguments: --usp 2" in theirs.stderr


@thorough_only
def test_vllm_alone_has_no_door() -> None:
    done = run(sys.executable, "-c", WITHOUT_OUR_DOOR, "serve omni-sp/shapes --omni")
    assert "exit code 1" in done.stdout
    assert "--omni flag requires" in done.stdout + done.stderr


def test_the_imports_that_programs_use_beside_vllm() -> None:
    done = run(sys.executable, "-c", f"import vllm\nfrom vllm import LLM, SamplingParams\n{IMPORTS}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["omni-sp", "omni-sp-vllm-omni"])
def test_the_versions_here_are_some_that_we_ask_for(name: str) -> None:
    asked = [Requirement(line) for line in importlib.metadata.requires(name) or []]
    for extra in ("", "serve", "video"):
        for one in asked:
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                assert one.specifier.contains(importlib.metadata.version(one.name)), one
