"""The process of ``omni-sp serve-embeddings``."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket

import psutil  # type: ignore[import-untyped]

from omni_sp.errors import ConfigError, EngineClosedError, EngineError
from omni_sp.llm.embedding.dispatch import Dispatcher
from omni_sp.llm.embedding.placement import placements, visible_gpus
from omni_sp.llm.embedding.replicas import Replicas
from omni_sp.llm.embedding.settings import EmbeddingSettings
from omni_sp.server.embedding.front import create_embedding_app
from omni_sp.server.logs import logging_to_stderr
from omni_sp.server.process import ServerProcess, listening, require_certificate
from omni_sp.server.settings import ServerSettings


class EmbeddingService:
    """Replicas behind a front, as a Service of a server's process."""

    usage, deeds = "the API at {}/v1", "use the model"

    def __init__(self, replicas: Replicas, dispatcher: Dispatcher) -> None:
        self._replicas, self._dispatcher = replicas, dispatcher
        self.drain = dispatcher.drain

    @property
    def status(self) -> str:
        """The best status of any replica."""
        return self._replicas.status

    @property
    def running(self) -> int:
        """Requests under way."""
        return self._dispatcher.requests

    @property
    def summary(self) -> str:
        """How many replicas, and what they give."""
        count, dimensions = len(self._replicas.all), self._replicas.all[0].dimensions
        return f"{count} replica{'s' * (count != 1)}, embeddings of {dimensions} numbers"

    @property
    def failure(self) -> EngineError:
        """The error with which the server ends."""
        reason = next((str(replica.error) for replica in self._replicas.all if replica.error is not None), "closed")
        return EngineClosedError(f"no replica is left: {reason}")

    async def close(self) -> None:
        """End all processes at once."""
        self._replicas.kill()


def serve_embeddings(embedding: EmbeddingSettings, settings: ServerSettings) -> int:
    """Serve until a signal.

    Returns:
        The exit code: 0 after SIGTERM or SIGHUP; 130 after Ctrl-C.

    Raises:
        ConfigError: vLLM is not installed, an option cannot be, or the address is in use.
        EngineError: a replica does not start, or all have failed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here: pip install '.[vllm,serve]'")
    require_certificate(settings)
    free_bytes = psutil.virtual_memory().available
    gpus = [] if embedding.gpus == 0 else visible_gpus(os.environ)
    placed = placements(embedding, gpus, os.environ, free_bytes)
    with (
        listening(settings.host, settings.port) as listener,
        logging_to_stderr(settings.log_level, settings.log_format),
    ):
        replicas = Replicas(embedding, placed)
        try:
            return asyncio.run(_run(replicas, settings, listener))
        finally:
            replicas.kill()


async def _run(replicas: Replicas, settings: ServerSettings, listener: socket.socket) -> int:
    dispatcher = Dispatcher(replicas)
    app = create_embedding_app(replicas, dispatcher, settings)
    return await ServerProcess(app, EmbeddingService(replicas, dispatcher), settings, listener).run()
