"""``omni-sp serve-embeddings`` as a program: it drains, says what is wrong in a line, and leaves no process."""

from __future__ import annotations

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx2
import psutil  # type: ignore[import-untyped]
import pytest

from omni_sp.cli import main
from omni_sp.llm import EmbeddingClient
from tests.engine.processes import alive, becomes_true
from tests.server.embedding.running import ENVIRONMENT, command_of, embedding_program
from tests.thorough import thorough_only


def test_sigterm_lets_requests_finish_and_ends_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "FAKE_VLLM_DELAYS", '{"0": 0.7, "1": 0.7}')
    with embedding_program("--max-model-len", "64", "--dtype=float32") as (program, url, below):
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx2.post, f"{url}/v1/embeddings", json={"input": ["a"]}, timeout=30)
            assert becomes_true(lambda: "omni_sp_inputs_running 1.0" in httpx2.get(f"{url}/metrics").text, 10.0)
            program.send_signal(signal.SIGTERM)
            assert asked.result().status_code == 200
        assert program.wait(20) == 0
        assert len(below) == 6
        assert becomes_true(lambda: not any(map(alive, below)), 10.0)


def test_a_killed_front_leaves_no_process() -> None:
    with embedding_program() as (program, _, below):
        sockets = {word for pid in below for word in command_of(pid).split(b"\0") if word.endswith(b".sock")}
        assert len(sockets) == 2
        assert all(map(os.path.exists, sockets))
        program.kill()
        assert becomes_true(lambda: not any(map(alive, below)), 10.0)
        assert not any(os.path.exists(os.path.dirname(path)) for path in sockets)


@thorough_only
def test_a_text_takes_a_tenth_of_a_millisecond_of_the_fronts_time_at_most() -> None:
    texts = [f"{number} a few words more" for number in range(257)]
    with embedding_program() as (program, url, _), EmbeddingClient(url) as client:
        client.embed(texts)
        before = sum(psutil.Process(program.pid).cpu_times()[:2])
        for _ in range(20):
            client.embed(texts)
        seconds = sum(psutil.Process(program.pid).cpu_times()[:2]) - before
    assert 0 < seconds <= 20 * len(texts) * 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fake", "--replcas", "3"], "did you mean --replicas?"),
        (["--dtype", "float32", "fake"], "give the model first"),
        (["fake", "--uds", "x"], "--uds is not passed on"),
        (["fake", "--sequence-parallel-size", "2"], "share the tokens of models that generate; give --replicas"),
        (["fake", "--replicas", "0"], "replicas=0: give 1 to 256"),
        (["fake", "--gpus", "3"], "--gpus 3: 2 are visible here"),
        (["fake", "-tp", "2", "--gpus", "1"], "cannot be shared by replicas of 2 each"),
        (["fake", "--gpus", "0", "--port", "{port}"], "cannot listen on 127.0.0.1, port {port}"),
    ],
)
def test_bad_options_are_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve-embeddings", *(word.format(port=port) for word in words)]) == 2
    assert message.format(port=port) in capsys.readouterr().err


def test_without_vllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["serve-embeddings", "fake"]) == 2
    assert "pip install '.[vllm,serve]'" in capsys.readouterr().err
