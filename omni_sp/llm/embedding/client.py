"""Clients for the embedding server, or any ``vllm serve`` of an embedding model: texts in, one NumPy array out."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from omni_sp.errors import ConfigError, EngineClosedError, EngineError, InvalidInputError, QueueFullError
from omni_sp.llm.embedding.connections import Address, Answer, BlockingConnection, ConnectionLostError, Connections
from omni_sp.validation import require_int, require_number

_PATH = "/v1/embeddings"
_DTYPES = {"float32": np.float32, "float16": np.float16}
_ERRORS: dict[int, type[EngineError]] = {429: QueueFullError, 503: EngineClosedError}


class _Requests:
    """What the two clients share: requests as bytes, and answers as arrays."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8091",
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        batch_size: int = 2048,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._address = Address.of_url(url)
        self._model, self._context = model, ssl_context
        self._timeout_s = require_number("timeout_s", timeout_s, above=0, error=ConfigError)
        self._batch_size = require_int("batch_size", batch_size, minimum=1, error=ConfigError)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable():
                raise ConfigError("the API key holds characters that an HTTP header cannot carry")
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._prepare()

    def _prepare(self) -> None:
        """Make what the connections are kept in."""
        raise NotImplementedError

    def _bodies(self, texts: Sequence[Any], dimensions: int | None, dtype: str) -> Iterator[tuple[int, bytes]]:
        """The number of texts and the body of each request."""
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
            raise InvalidInputError(f"texts is a {type(texts).__name__}: give a list of texts")
        if not texts:
            raise InvalidInputError("texts is empty: give at least one text")
        if dtype not in _DTYPES:
            raise InvalidInputError(f"dtype={dtype!r}: give one of {', '.join(_DTYPES)}")
        more: dict[str, Any] = {"encoding_format": "bytes_only", "embed_dtype": dtype, "endianness": "native"}
        more |= {} if self._model is None else {"model": self._model}
        more |= {} if dimensions is None else {"dimensions": dimensions}
        for start in range(0, len(texts), self._batch_size):
            batch = list(texts[start : start + self._batch_size])
            yield len(batch), json.dumps({"input": batch, **more}).encode()


def _array(answer: Answer, count: int, dtype: str) -> np.ndarray[Any, Any]:
    """The embeddings in an answer, (count, dimensions); raises for an error."""
    if answer.status != 200:
        error = _ERRORS.get(answer.status, InvalidInputError if answer.status < 500 else EngineError)
        raise error(f"the server answers {answer.status}: {answer.error_message}")
    numbers = np.frombuffer(answer.body, dtype=_DTYPES[dtype])
    if not numbers.size or numbers.size % count:
        raise EngineError(f"the server sent {len(answer.body)} bytes, which are not {count} embeddings in {dtype}")
    return numbers.reshape(count, -1)


class EmbeddingClient(_Requests):
    """Embeds texts through a server, whose answers it takes as plain bytes.

    It may be used by several threads at once.

    Args:
        url: of the server, without a path.
        model: which model is asked for; None for the one that is served.
        api_key: where the server wants one.
        timeout_s: seconds that one request may take.
        batch_size: texts of one request; more are sent one request after another.
        ssl_context: for https with a certificate that the system does not trust.

    Raises:
        ConfigError: an argument that cannot be.
    """

    @override
    def _prepare(self) -> None:
        self._idle: list[BlockingConnection] = []

    def embed(
        self, texts: Sequence[str] | Sequence[Sequence[int]], *, dimensions: int | None = None, dtype: str = "float32"
    ) -> np.ndarray[Any, Any]:
        """Embed texts.

        Args:
            texts: at least one; or lists of token ids.
            dimensions: numbers of an embedding, of models that allow fewer than all (Matryoshka).
            dtype: "float32" or "float16".

        Returns:
            The embeddings in the texts' order, (texts, dimensions).

        Raises:
            InvalidInputError: the texts or an argument are wrong, here or by the server's judgement.
            QueueFullError: the server has too much under way.
            EngineClosedError: the server does not embed yet, or no longer.
            EngineError: the server failed or cannot be reached.
        """
        found = []
        for count, body in self._bodies(texts, dimensions, dtype):
            try:  # another thread may have taken the last one
                connection = self._idle.pop()
            except IndexError:
                connection = BlockingConnection(self._address, self._context)
            try:
                answer = connection.exchange("POST", _PATH, body, headers=self._headers, timeout_s=self._timeout_s)
            except (ConnectionLostError, TimeoutError) as error:
                raise EngineError(f"no answer from the server: {error}") from error
            self._idle.append(connection)
            found.append(_array(answer, count, dtype))
        return np.concatenate(found)

    def close(self) -> None:
        """Close the connections that are not in use. The next call opens another."""
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> EmbeddingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncEmbeddingClient(_Requests):
    """The same for programs with asyncio. Any number of calls may be under way at once.

    It takes what EmbeddingClient takes, and belongs to one event loop.
    """

    @override
    def _prepare(self) -> None:
        self._connections = Connections(self._address, self._context)

    async def embed(
        self, texts: Sequence[str] | Sequence[Sequence[int]], *, dimensions: int | None = None, dtype: str = "float32"
    ) -> np.ndarray[Any, Any]:
        """Embed texts, as EmbeddingClient.embed() does. A cancelled call ends on the server too."""
        found = []
        for count, body in self._bodies(texts, dimensions, dtype):
            try:
                answer = await self._connections.exchange(
                    "POST", _PATH, body, headers=self._headers, timeout_s=self._timeout_s
                )
            except (ConnectionLostError, TimeoutError) as error:
                raise EngineError(f"no answer from the server: {error}") from error
            found.append(_array(answer, count, dtype))
        return np.concatenate(found)

    async def close(self) -> None:
        """Close the connections."""
        self._connections.close()

    async def __aenter__(self) -> AsyncEmbeddingClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
