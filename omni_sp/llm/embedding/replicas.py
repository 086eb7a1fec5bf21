"""The replicas of an embedding server: each an unpatched ``vllm serve``, which is started, watched and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_sp.errors import ConfigError, EngineClosedError, EngineError
from omni_sp.llm.embedding import guard
from omni_sp.llm.embedding.connections import Address, Answer, ConnectionLostError, Connections
from omni_sp.llm.embedding.placement import Placement, command
from omni_sp.llm.embedding.settings import EmbeddingSettings

PATH = "/v1/embeddings"
STARTING, READY, FAILED, CLOSED = "starting", "ready", "failed", "closed"
_POLL_S = 0.2
_HEALTH_EVERY_S, _HEALTH_TIMEOUT_S, _SILENT_S = 5.0, 20.0, 90.0
_MOST_FAILED_STARTS = 3
_LEAVE_S, _DIE_S = 15.0, 5.0
_LONGEST_SOCKET_PATH = 100
_KEPT_LINES = 60
_LOG = logging.getLogger(__name__)
_REASON = re.compile(r"\b(\w*(?:Error|Exception|error): .+)")
_SERIOUS = re.compile(r"\b(?:ERROR|CRITICAL)\b")


class Replica:
    """One server of vLLM.

    Attributes:
        number: which of the replicas it is.
        status: "starting" (also anew), "ready", "failed" (it did not start several times) or "closed".
        tokens: under way there, by estimate.
        inputs: texts under way there.
        generation: how often it has become ready: what is lost with one process is not lost with the next.
        parts: requests that it has answered.
        answered_inputs: texts in these.
        lost: requests that were lost with it.
        dimensions: numbers of an embedding.
        usage: how it counts tokens, of a first text: versions of vLLM have other fields beside the counts.
        error: why it does not start.
    """

    def __init__(
        self,
        number: int,
        settings: EmbeddingSettings,
        placement: Placement,
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.number, self.status = number, STARTING
        self.tokens = self.inputs = self.generation = self.parts = self.answered_inputs = self.lost = 0
        self.dimensions, self.usage = 0, dict[str, Any]()
        self.error: EngineError | None = None
        self._settings, self._placement = settings, placement
        self._environment = {**environment, **placement.environment}
        self._path = folder / f"{number}.sock"
        self._connections = Connections(Address(path=str(self._path)))
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._suspected = asyncio.Event()
        self.pid: int | None = None

    @property
    def restarts(self) -> int:
        """How often it has become ready again."""
        return max(0, self.generation - 1)

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str], *, inputs: int, tokens: int, timeout_s: float
    ) -> Answer:
        """Send it a request, which counts as under way meanwhile; raises what Connections.exchange() raises."""
        self.inputs += inputs
        self.tokens += tokens
        try:
            answer = await self._connections.exchange("POST", path, body, headers=headers, timeout_s=timeout_s)
        finally:
            self.inputs -= inputs
            self.tokens -= tokens
        self.parts += 1
        self.answered_inputs += inputs
        return answer

    async def get(self, path: str, timeout_s: float) -> Answer:
        """Ask it for something; raises what Connections.exchange() raises."""
        return await self._connections.exchange("GET", path, timeout_s=timeout_s)

    async def is_healthy(self) -> bool:
        """Does it say that it works? Where not, its watcher looks after it at once."""
        with contextlib.suppress(OSError, TimeoutError):
            if (await self.get("/health", _HEALTH_TIMEOUT_S)).status == 200:
                return True
        self._suspected.set()
        return False

    async def run(self, turn: asyncio.Lock | None) -> None:
        """Start it, and start it again whenever it ends; return when it does not start.

        Args:
            turn: held during a start: replicas that share a GPU measure its free memory, one after another.
        """
        failures = 0
        while True:
            self.status = STARTING
            try:
                async with turn or contextlib.nullcontext():
                    await self._start()
            except EngineError as error:
                failures += 1
                await self.end(patience_s=0.0)
                if self.generation == 0 or failures == _MOST_FAILED_STARTS:
                    self.error = error
                    self.status = FAILED
                    return
                _LOG.error("replica %d: %s; once more in %d s", self.number, error, 2**failures)
                await asyncio.sleep(2**failures)
                continue
            failures = 0
            self.generation += 1
            self.status = READY
            reason = await self._watch()
            self.status = STARTING
            _LOG.warning("replica %d %s: it is started again", self.number, reason)
            await self.end(patience_s=0.0)

    async def end(self, patience_s: float) -> None:
        """End its processes: SIGTERM and ``patience_s`` to obey it, then SIGKILL. Idempotent."""
        self._connections.close()
        process = self._process
        if process is None:
            return
        try:
            if patience_s and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await _wait_for_exit(process, patience_s)
        finally:  # also where this wait is cancelled
            self._kill(process)
            self._process = self.pid = None
        await _wait_for_exit(process, _DIE_S)
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=_DIE_S)
        self._path.unlink(missing_ok=True)

    def kill(self) -> None:
        """End its processes at once, without waiting for that."""
        if self._process is not None:
            self._kill(self._process)

    def _kill(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the guard's group: vLLM's own processes outlive their parent
        if process.stdin is not None:
            process.stdin.close()

    async def _start(self) -> None:
        """Start the processes and wait until they embed a text. EngineError where they do not."""
        until = time.monotonic() + self._settings.startup_timeout_s
        self._path.unlink(missing_ok=True)
        self._lines.clear()
        self._suspected.clear()
        words = command(self._settings, self._placement, str(self._path))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", guard.__file__, str(self._path.parent), *words,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            env=self._environment, start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid
        self._reading = asyncio.create_task(self._read_log(self._process))
        while True:
            if self._process.returncode is not None:
                await asyncio.wait({self._reading}, timeout=_DIE_S)
                raise EngineError(f"replica {self.number} did not start: {self._reason()}")
            if time.monotonic() > until:
                raise EngineError(f"replica {self.number} did not start within {self._settings.startup_timeout_s:g} s")
            with contextlib.suppress(OSError, TimeoutError):
                if (await self.get("/health", _HEALTH_TIMEOUT_S)).status == 200:
                    break
            await asyncio.sleep(_POLL_S)
        await self._try_out(max(1.0, until - time.monotonic()))

    async def _try_out(self, timeout_s: float) -> None:
        """Embed a text. What vLLM serves with ``--runner pooling`` need not be an embedding model."""
        body = json.dumps({"input": "a", "encoding_format": "float"}).encode()
        try:
            answer = await self._connections.exchange("POST", PATH, body, headers=JSON, timeout_s=timeout_s)
        except (ConnectionLostError, TimeoutError) as error:
            raise EngineError(f"replica {self.number} did not embed a first text: {error}") from error
        if answer.status != 200:
            reason = f"vLLM answers {answer.status}, {answer.error_message}"
            raise EngineError(f"{self._settings.model} gives no embeddings: {reason}")
        try:
            found = json.loads(answer.body)
            self.usage, self.dimensions = dict(found["usage"]), len(found["data"][0]["embedding"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EngineError(f"replica {self.number} embeds in a form that is not known here: {error!r}") from error

    async def _watch(self) -> str:
        """Return why it is to be started again: its process ended, it is not well, or it does not answer."""
        assert self._process is not None, "it is started"
        heard_at = looked_at = time.monotonic()
        while True:
            await asyncio.sleep(_POLL_S)
            if self._process.returncode is not None:
                return f"ended with exit code {self._process.returncode}"
            if not self._suspected.is_set() and time.monotonic() - looked_at < _HEALTH_EVERY_S:
                continue
            self._suspected.clear()
            looked_at = time.monotonic()
            try:
                answer = await self.get("/health", _HEALTH_TIMEOUT_S)
            except (OSError, TimeoutError):
                if time.monotonic() - heard_at > _SILENT_S:
                    return f"did not answer for {_SILENT_S:g} s"
                continue
            if answer.status != 200:
                return f"answers {answer.status} to /health"
            heard_at = time.monotonic()

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        """Keep the last lines of vLLM's log, and pass on those that matter; lower ones at the level debug."""
        assert process.stdout is not None
        rest = b""
        while data := await process.stdout.read(2**16):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[-(2**16) :]
            for line in lines:
                text = line.decode("utf-8", "replace").rstrip()[:2000]
                self._lines.append(text)
                level = logging.WARNING if self.status == READY and _SERIOUS.search(text) else logging.DEBUG
                _LOG.log(level, "replica %d: %s", self.number, text)

    def _reason(self) -> str:
        """Why it has ended, by the last lines that it wrote."""
        for line in reversed(self._lines):
            match = _REASON.search(line)
            # vLLM's last error only says that there was an earlier one.
            if match is not None and "See root cause above" not in line:
                return match[1]
        return next((line for line in reversed(self._lines) if line.strip()), "it wrote nothing")


class Replicas:
    """All replicas of one server.

    Args:
        settings: what is served.
        placed: where each replica runs.
        environment: variables of each.

    Attributes:
        settings: what is served.
        folder: of their sockets, removed at the end.
        all: the replicas.
    """

    def __init__(
        self, settings: EmbeddingSettings, placed: Sequence[Placement], environment: Mapping[str, str] = os.environ
    ) -> None:
        self.settings = settings
        self.folder = _socket_folder()
        self.all = [
            Replica(number, settings, placement, self.folder, environment) for number, placement in enumerate(placed)
        ]
        self._turns = {placement.devices: asyncio.Lock() for placement in placed if placement.devices}
        self._placed = placed
        self._lives: list[asyncio.Task[None]] = []
        self._is_closed = False

    @property
    def status(self) -> str:
        """The best status of any replica: "ready" while one of them embeds."""
        found = {replica.status for replica in self.all}
        return CLOSED if self._is_closed else next(one for one in (READY, STARTING, FAILED) if one in found)

    @property
    def ready(self) -> list[Replica]:
        """The replicas that embed."""
        return [replica for replica in self.all if replica.status == READY]

    async def start(self) -> None:
        """Start all, and wait until they are ready.

        Raises:
            EngineError: one of them does not start. All are ended then.
        """
        for replica, placement in zip(self.all, self._placed, strict=True):
            turn = self._turns.get(placement.devices)
            self._lives.append(asyncio.create_task(replica.run(turn)))
        while len(self.ready) < len(self.all):
            failed = next((replica for replica in self.all if replica.error is not None), None)
            if failed is not None and failed.error is not None:
                await self.close(patience_s=0.0)
                raise failed.error
            await asyncio.sleep(_POLL_S)

    async def wait_for_other(self, lost: set[tuple[int, int]], seconds: float) -> Replica:
        """The ready replica with the fewest tokens under way that is none of (number, generation); waits for one.

        Raises:
            EngineClosedError: there is none in time.
        """
        until = time.monotonic() + seconds
        while True:
            others = [one for one in self.ready if (one.number, one.generation) not in lost]
            if others:
                return min(others, key=lambda replica: replica.tokens)
            if time.monotonic() > until or self.status in (CLOSED, FAILED):
                raise EngineClosedError("no replica is ready: their start failed, or takes longer than a request may")
            await asyncio.sleep(_POLL_S / 4)

    async def close(self, patience_s: float = _LEAVE_S) -> None:
        """End all replicas. Idempotent."""
        self._is_closed = True
        for life in self._lives:
            life.cancel()
        await asyncio.gather(*self._lives, return_exceptions=True)
        await asyncio.gather(*(replica.end(patience_s) for replica in self.all))
        for replica in self.all:
            replica.status = CLOSED
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """End all processes at once, without waiting for that, and start none again. Idempotent."""
        self._is_closed = True
        for life in self._lives:
            life.cancel()
        for replica in self.all:
            replica.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


JSON = {"Content-Type": "application/json"}


async def _wait_for_exit(process: asyncio.subprocess.Process, seconds: float) -> None:
    """Wait for the end of a process, so long at most.

    ``process.wait()`` of some versions of Python also waits for its pipes, which its children may hold.
    """
    until = time.monotonic() + seconds
    while process.returncode is None and time.monotonic() < until:
        await asyncio.sleep(_POLL_S / 4)


def _socket_folder() -> Path:
    """A new folder that only this user may enter, with a path short enough for sockets in it."""
    for parent in (None, "/tmp"):
        folder = Path(tempfile.mkdtemp(prefix="omni-sp-", dir=parent))
        if len(os.fsencode(folder)) + len("/255.sock") <= _LONGEST_SOCKET_PATH:
            return folder
        folder.rmdir()
    raise ConfigError(f"{tempfile.gettempdir()}: too long a path for sockets; set TMPDIR to a shorter one")
