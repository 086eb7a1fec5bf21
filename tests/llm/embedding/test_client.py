"""The clients give one array in the texts' order, and errors that say what was wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from omni_sp import ConfigError, EngineError, InvalidInputError
from omni_sp.llm import AsyncEmbeddingClient, EmbeddingClient
from tests.server.embedding.fake_vllm.vllm.entrypoints.cli.main import DIMENSIONS, numbers
from tests.server.embedding.running import Embedding, embedding_server


@pytest.fixture(scope="module")
def embedding() -> Iterator[Embedding]:
    with embedding_server() as running:
        yield running


TEXTS = [f"text {index}" for index in range(100)]
EXPECTED = np.array([numbers(text) for text in TEXTS], dtype=np.float32)


def test_texts_of_several_requests_come_back_in_order(embedding: Embedding) -> None:
    with EmbeddingClient(embedding.url, batch_size=30) as client:
        found = client.embed(TEXTS)
        assert found.dtype == np.float32
        assert (found == EXPECTED).all()
        assert (client.embed(TEXTS[:2], dtype="float16") == EXPECTED[:2].astype(np.float16)).all()
        assert client.embed([[1, 2], [3]]).shape == (2, DIMENSIONS)
        with ThreadPoolExecutor(4) as pool:
            assert all((one == EXPECTED).all() for one in pool.map(client.embed, [TEXTS] * 8))


def test_many_calls_of_an_asyncio_program(embedding: Embedding) -> None:
    async def run() -> list[Any]:
        async with AsyncEmbeddingClient(embedding.url, model="fake", batch_size=64) as client:
            return list(await asyncio.gather(*(client.embed(TEXTS) for _ in range(8))))

    assert all((one == EXPECTED).all() for one in asyncio.run(run()))


def test_errors(embedding: Embedding) -> None:
    with EmbeddingClient(embedding.url) as client:
        for texts, message in (([], "at least one"), ("text", "give a list"), (["refuse"], "answers 400: this text")):
            with pytest.raises(InvalidInputError, match=message):
                client.embed(texts)
        with pytest.raises(InvalidInputError, match="dtype='int8'"):
            client.embed(["a"], dtype="int8")
    with EmbeddingClient(embedding.url, model="other") as client, pytest.raises(InvalidInputError, match="answers 404"):
        client.embed(["a"])
    with pytest.raises(EngineError, match="cannot connect"):
        EmbeddingClient("http://127.0.0.1:9").embed(["a"])
    for options in ({"timeout_s": 0}, {"batch_size": 0}, {"api_key": "ü"}, {"url": "host"}):
        with pytest.raises(ConfigError):
            EmbeddingClient(**options)
