"""Replicas that die, fall ill, are slow or do not start: no request is lost with them, and no process is left."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.processes import alive, becomes_true
from tests.server.embedding.fake_vllm.vllm.entrypoints.cli.main import numbers
from tests.server.embedding.running import Embedding, embedding_server

_RESTART_S = 20.0


def is_right(running: Embedding, inputs: list[str]) -> bool:
    answer = running.post(inputs, encoding_format="float")
    return answer.status_code == 200 and [item["embedding"] for item in answer.json()["data"]] == [
        numbers(text) for text in inputs
    ]


def test_requests_of_a_killed_replica_are_retried_and_it_comes_back() -> None:
    inputs = [f"text {index} " + "word " * 30 for index in range(60)]
    with embedding_server(delays={0: 0.01, 1: 0.01}) as running, ThreadPoolExecutor(4) as pool:
        before = running.processes(0)
        assert len(before) == 3
        answers = [pool.submit(is_right, running, inputs) for _ in range(8)]
        assert becomes_true(lambda: running.replicas.all[0].inputs > 0, 10.0)
        for pid in before - {running.replicas.all[0].pid}:
            if b"vllm" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)  # the API's process alone, as the OOM killer might
        assert all(answer.result() for answer in answers)
        assert running.replicas.all[0].lost > 0
        assert becomes_true(lambda: running.is_ready() and running.replicas.all[0].restarts == 1, _RESTART_S)
        assert not any(map(alive, before)), "vLLM's own processes outlived it"
        assert is_right(running, inputs)
        before = running.processes(1)
        os.kill(running.replicas.all[1].pid or 0, signal.SIGKILL)  # the guard itself
        assert is_right(running, inputs)
        assert becomes_true(lambda: running.is_ready() and running.replicas.all[1].restarts == 1, _RESTART_S)
        assert not any(map(alive, before))


def test_a_request_that_kills_replicas_is_not_tried_for_ever(tmp_path: Path) -> None:
    with embedding_server() as running:

        def restarts() -> int:
            return sum(replica.restarts for replica in running.replicas.all)

        assert running.post([f"die once {tmp_path / 'died'}"]).status_code == 200
        assert becomes_true(lambda: restarts() == 1, _RESTART_S)
        refused = running.post(["die"])
        assert refused.status_code == 500
        assert "2 replicas ended" in refused.json()["error"]["message"]
        assert becomes_true(lambda: restarts() == 3, _RESTART_S)
        assert is_right(running, ["a"])


def test_an_ill_replica_is_restarted_and_its_request_retried() -> None:
    with embedding_server() as running:
        answers = [running.post(["fall ill"]).status_code]
        assert answers == [500]  # the second replica fell ill of it too
        assert becomes_true(lambda: all(one.restarts == 1 for one in running.replicas.all), _RESTART_S)
        assert becomes_true(running.is_ready, _RESTART_S)
        assert is_right(running, ["a"])


def test_while_no_replica_is_ready_requests_wait_or_are_refused() -> None:
    with embedding_server(replicas=1) as running:
        os.killpg(running.replicas.all[0].pid or 0, signal.SIGKILL)
        assert is_right(running, ["a"]) or running.post(["a"]).status_code == 503
        assert becomes_true(lambda: running.replicas.all[0].restarts == 1, _RESTART_S)
        assert is_right(running, ["a"])


@pytest.mark.parametrize(
    ("model", "message"),
    [("broken", "this model is broken"), ("no-embeddings", "does not support Embeddings API")],
)
def test_a_model_that_cannot_be_served_is_said_so(model: str, message: str) -> None:
    with embedding_server(model=model) as running:
        assert running.replicas.status in ("failed", "closed")
        assert message in str(next(one.error for one in running.replicas.all if one.error is not None))
        assert running.post(["a"]).status_code == 503
        assert running.client.get("/health").status_code == 503


def share_of_the_slow_one(policy: str) -> float:
    """Which part of 24 texts the second replica answers, which is slow, while four callers ask one after another."""
    with embedding_server(policy=policy, delays={1: 0.3}) as running, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(running.post, ["a few words"], encoding_format="bytes_only") for _ in range(24)]
        assert [answer.result().status_code for answer in answers] == [200] * 24
        return running.replicas.all[1].answered_inputs / 24


def test_least_loaded_spares_a_slow_replica_and_round_robin_does_not() -> None:
    assert share_of_the_slow_one("round-robin") == 0.5
    assert share_of_the_slow_one("least-loaded") <= 0.34
