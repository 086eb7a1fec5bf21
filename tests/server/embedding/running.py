"""Embedding servers over replicas that stand in for vLLM: in a thread of the test's process, or as a program."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from omni_sp.llm.embedding.dispatch import Dispatcher
from omni_sp.llm.embedding.placement import placements
from omni_sp.llm.embedding.replicas import Replicas
from omni_sp.llm.embedding.settings import EmbeddingSettings
from omni_sp.server.embedding.front import create_embedding_app
from omni_sp.server.process import listening, uvicorn_config
from omni_sp.server.settings import ServerSettings
from tests.engine.processes import alive, becomes_true, descendants

PATIENCE_S = 60.0
FAKE_VLLM = Path(__file__).with_name("fake_vllm")
ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(FAKE_VLLM), str(ROOT)])}


class Embedding:
    """A running server: its address, a client, and what it is made of."""

    def __init__(self, port: int, replicas: Replicas, dispatcher: Dispatcher) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port, self.replicas, self.dispatcher = port, replicas, dispatcher
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False)

    def post(self, inputs: Any, **fields: Any) -> httpx2.Response:
        return self.client.post("/v1/embeddings", json={"input": inputs, **fields})

    def metrics(self) -> dict[str, float]:
        lines = self.client.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def processes(self, number: int) -> set[int]:
        """The processes of a replica: its guard, vLLM, and vLLM's own."""
        pid = self.replicas.all[number].pid
        assert pid is not None
        return {pid, *descendants(pid)}

    def is_ready(self) -> bool:
        return len(self.replicas.ready) == len(self.replicas.all)


@contextlib.contextmanager
def embedding_server(
    *, delays: dict[int, float] | None = None, settings: ServerSettings | None = None, **options: Any
) -> Iterator[Embedding]:
    """A server in a thread, whose replicas take so many seconds a text."""
    served = EmbeddingSettings(model=options.pop("model", "fake"), gpus=0, **options)
    settings = settings or ServerSettings(port=0, drain_timeout_s=5)
    environment = ENVIRONMENT | {"FAKE_VLLM_DELAYS": json.dumps({str(key): one for key, one in (delays or {}).items()})}
    replicas = Replicas(served, placements(served, [], environment, 2**30), environment)
    dispatcher = Dispatcher(replicas)
    server = uvicorn.Server(uvicorn_config(create_embedding_app(replicas, dispatcher, settings), settings))
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        running = Embedding(listener.getsockname()[1], replicas, dispatcher)
        try:
            assert becomes_true(lambda: replicas.status in ("failed", "closed") or running.is_ready(), PATIENCE_S)
            yield running
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            running.client.close()
        assert not thread.is_alive()
        sockets = os.fsencode(replicas.folder)
        assert becomes_true(lambda: not any(sockets in command_of(pid) for pid in descendants()), 10.0)
        assert not replicas.folder.exists()


@contextlib.contextmanager
def embedding_program(*words: str) -> Iterator[tuple[subprocess.Popen[str], str, set[int]]]:
    """``omni-sp serve-embeddings`` over two replicas: its process, its address and the processes below it."""
    program = subprocess.Popen(
        [sys.executable, "-m", "omni_sp", "serve-embeddings", "fake", "--gpus", "0", "--port", "0", *words],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    below: set[int] = set()
    try:
        assert program.stdout is not None
        listening_line = program.stdout.readline()
        address = re.search(r"http://[\d.:]+", listening_line)
        assert address is not None, listening_line + (program.stderr.read() if program.stderr else "")
        assert "is ready after" in program.stdout.readline()
        below = descendants(program.pid)
        yield program, address[0], below
    finally:
        program.kill()
        program.wait(10)
        for stream in (program.stdout, program.stderr):
            if stream is not None:
                stream.close()
        for one in below:
            if alive(one):
                os.kill(one, signal.SIGKILL)


def command_of(pid: int) -> bytes:
    """The command of a process, empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
