"""The front answers as one server of vLLM would: every format, in order, and vLLM's own errors."""

from __future__ import annotations

import base64
import json
import socket
from typing import Any

import numpy as np
import pytest
from openai import OpenAI

from omni_sp.server.settings import ServerSettings
from tests.engine.processes import becomes_true
from tests.server.embedding.fake_vllm.vllm.entrypoints.cli.main import DIMENSIONS, num_tokens, numbers
from tests.server.embedding.running import PATIENCE_S, Embedding, embedding_server


def texts(count: int) -> list[str]:
    return [f"text {index} " + "word " * (index % 40) for index in range(count)]


def expected(inputs: list[Any]) -> Any:
    return np.array([numbers(entry) for entry in inputs], dtype=np.float32)


def decoded(answer: Any, encoding_format: str, dtype: str = "float32", endianness: Any = "little") -> Any:
    """The embeddings of an answer, as vLLM's clients read them."""
    kind = np.dtype(dtype).newbyteorder(endianness)
    if encoding_format in ("bytes", "bytes_only"):
        return np.frombuffer(answer.content, kind).reshape(-1, DIMENSIONS).astype(np.float32)
    data = answer.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    assert {item["object"] for item in data} == {"embedding"}
    if encoding_format == "float":
        return np.array([item["embedding"] for item in data], dtype=np.float32)
    return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), kind) for item in data]).astype(np.float32)


@pytest.mark.parametrize("encoding_format", ["float", "base64", "bytes", "bytes_only"])
@pytest.mark.parametrize("count", [1, 2, 257])
def test_all_formats_keep_the_order_and_the_last_bit(embedding: Embedding, encoding_format: str, count: int) -> None:
    given = texts(count)
    answer = embedding.post(given, encoding_format=encoding_format, request_id="mine")
    assert answer.status_code == 200
    assert (decoded(answer, encoding_format) == expected(given)).all()
    tokens = sum(map(num_tokens, given))
    if encoding_format == "bytes_only":
        assert "metadata" not in answer.headers
        return
    about = answer.json() if encoding_format != "bytes" else json.loads(answer.headers["metadata"])
    assert about["id"] == "embd-mine"
    assert about["model"] == "fake"
    assert about["usage"]["prompt_tokens"] == about["usage"]["total_tokens"] == tokens
    if encoding_format == "bytes":
        ends = [(item["index"], item["start"], item["end"], item["shape"]) for item in about["data"]]
        assert ends == [(n, 32 * n, 32 * n + 32, [DIMENSIONS]) for n in range(count)]


@pytest.mark.parametrize("encoding_format", ["base64", "bytes", "bytes_only"])
@pytest.mark.parametrize(("dtype", "endianness"), [("float16", "little"), ("float32", "big")])
def test_replicas_make_the_dtype_and_the_order_of_bytes(
    embedding: Embedding, encoding_format: str, dtype: str, endianness: str
) -> None:
    given = texts(40)
    answer = embedding.post(given, encoding_format=encoding_format, embed_dtype=dtype, endianness=endianness)
    wanted = expected(given).astype(dtype).astype(np.float32)
    assert (decoded(answer, encoding_format, dtype, endianness) == wanted).all()


def test_plain_numbers_are_float32_whatever_else_is_asked(embedding: Embedding) -> None:
    answer = embedding.post(["a b"], embed_dtype="float16", endianness="big")
    assert (decoded(answer, "float") == expected(["a b"])).all()


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("one text", ["one text"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3], [4, 5, 6]], [[1, 2], [3], [4, 5, 6]]),
        (["", "😀", "Ünïcode"], ["", "😀", "Ünïcode"]),
    ],
)
def test_texts_and_ids(embedding: Embedding, given: Any, inputs: list[Any]) -> None:
    answer = embedding.post(given)
    assert (decoded(answer, "float") == expected(inputs)).all()
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(num_tokens, inputs))


def test_openais_client_works_unchanged(embedding: Embedding) -> None:
    given = texts(20)
    with OpenAI(base_url=f"{embedding.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        made = client.embeddings.create(model="fake", input=given)  # which asks for base64
        assert (np.array([item.embedding for item in made.data], dtype=np.float32) == expected(given)).all()
        assert made.usage.prompt_tokens == sum(map(num_tokens, given))
        assert [model.id for model in client.models.list()] == ["fake"]


def test_a_request_is_split_over_the_replicas(embedding: Embedding) -> None:
    name = 'omni_sp_replica_answered_inputs_total{{replica="{}"}}'.format
    before = embedding.metrics()
    assert embedding.post(["word " * 40] * 100).status_code == 200
    after = embedding.metrics()
    assert [after[name(number)] - before[name(number)] for number in range(2)] == [50, 50]
    assert after["omni_sp_inputs_running"] == 0
    assert after["process_cpu_seconds_total"] > 0


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"input": []}', 400, "cannot embed []"),
        (b'{"input": null}', 400, "cannot embed None"),
        (b"{}", 400, "cannot embed None"),
        (b'{"input": ["a", 3]}', 400, "validation errors"),
        (b'{"input": ["a"], "encoding_format": "x"}', 400, "encoding_format 'x'"),
        (b'{"input": ["a"], "model": "other"}', 404, "does not exist"),
        (b"{half", 400, "json_invalid"),
        (b"\xff\xfe", 400, "json_invalid"),
        (b'{"input": ' + b"[" * 100_000, 400, "cannot be read"),
        (json.dumps({"input": ["a"] * 300 + ["refuse"]}).encode(), 400, "this text is refused"),
    ],
)
def test_errors_of_vllm_are_passed_on(embedding: Embedding, body: bytes, status: int, message: str) -> None:
    answer = embedding.client.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_numbers_that_json_cannot_carry(embedding: Embedding) -> None:
    assert embedding.post(["a", "nan"]).json()["error"]["code"] == "not_finite"
    assert np.isnan(decoded(embedding.post(["a", "nan"], encoding_format="base64"), "base64")[1]).all()


def test_unknown_routes_and_methods(embedding: Embedding) -> None:
    assert embedding.client.get("/v1/embeddings").status_code == 405
    assert embedding.client.get("/v1/other").json()["error"]["code"] == "unknown_url"
    assert embedding.client.get("/health").json() == {"status": "ready", "replicas": ["ready", "ready"]}


def test_too_much_is_refused_and_a_client_that_leaves_ends_its_request() -> None:
    with embedding_server(replicas=1, max_inputs=10) as running:
        over = running.post(["a"] * 11)
        assert over.status_code == 400
        assert "at most 10" in over.json()["error"]["message"]
        body = json.dumps({"input": ["hang"] * 8}).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", running.port), 10) as leaving:
            leaving.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            assert becomes_true(lambda: running.dispatcher.inputs == 8, 10.0)
            busy = running.post(["a"] * 3)
            assert busy.status_code == 429
            assert busy.headers["retry-after"]
            assert running.post(["a"] * 2).status_code == 200
        assert becomes_true(lambda: running.dispatcher.inputs == 0, 10.0)
        assert running.post(["a"] * 10).status_code == 200
        assert running.replicas.all[0].restarts == 0


def test_clients_that_leave_at_once_leave_nothing_under_way(embedding: Embedding) -> None:
    """Some of them while the front connects to a replica, which before Python 3.12 could swallow the cancellation."""
    body = json.dumps({"input": ["hang"] * 5}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", embedding.port), 10) as leaving:
            leaving.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    assert embedding.post(["a"]).status_code == 200  # behind all of them
    assert becomes_true(lambda: embedding.dispatcher.requests == 0, 10.0)
    assert sum(replica.tokens for replica in embedding.replicas.all) == 0


def test_a_client_that_leaves_amid_its_body(embedding: Embedding, caplog: pytest.LogCaptureFixture) -> None:
    name = 'omni_sp_http_requests_total{method="POST",route="/v1/embeddings",status="499"}'
    before = embedding.metrics().get(name, 0)
    with socket.create_connection(("127.0.0.1", embedding.port), 10) as leaving:
        leaving.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{")
    assert becomes_true(lambda: embedding.metrics().get(name, 0) == before + 1, 10.0)
    assert "unforeseen" not in caplog.text


def test_keys_and_bodies_are_guarded_as_on_every_server() -> None:
    settings = ServerSettings(port=0, api_keys=("secret",), max_body_bytes=2000, body_timeout_s=0.3)
    with embedding_server(replicas=1, settings=settings) as running:
        assert running.post(["a"]).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        post = running.client.post
        assert post("/v1/embeddings", json={"input": "a"}, headers=headers).status_code == 200
        assert post("/v1/embeddings", json={"input": "a" * 3000}, headers=headers).status_code == 413
        with socket.create_connection(("127.0.0.1", running.port), 10) as slow:
            head = (
                "POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\nAuthorization: Bearer secret"
            )
            slow.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{{".encode())
            slow.settimeout(10)
            assert b" 408 " in slow.recv(1000)


def test_a_request_that_takes_too_long() -> None:
    with embedding_server(replicas=1, request_timeout_s=0.3) as running:
        answer = running.post(["hang"])
        assert answer.status_code == 504
        assert "--request-timeout" in answer.json()["error"]["message"]
        assert running.post(["a"]).status_code == 200
