"""The process of ``omni-sp serve``, from its address to its drain."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from typing import Protocol, TextIO

import uvicorn
from fastapi import FastAPI

from omni_sp.async_omni import AsyncOmni
from omni_sp.command_line import FAILED, INTERRUPTED
from omni_sp.errors import ConfigError, EngineClosedError, EngineError
from omni_sp.server.app import create_app
from omni_sp.server.connections import http_protocol
from omni_sp.server.logs import logging_to_stderr
from omni_sp.server.settings import ServerSettings

_FLUSH_S = 10
"""Seconds that finished answers may take to reach their clients once the server ends."""
_POLL_S = 0.2
_LOG = logging.getLogger(__name__)


class Service(Protocol):
    """What a server serves, as its process sees it.

    Attributes:
        usage: what is found at the server's address; ``{}`` stands for the address.
        deeds: what whoever reaches the address may do there.
    """

    usage: str
    deeds: str

    @property
    def status(self) -> str:
        """Say "ready", "failed" once it will not be ready again, or anything else."""

    @property
    def running(self) -> int:
        """Requests that are being answered."""

    @property
    def summary(self) -> str:
        """What is ready, in a few words."""

    @property
    def failure(self) -> EngineError:
        """The error with which the server ends once it has failed."""

    async def drain(self, timeout_s: float) -> None:
        """Take on nothing new, and let what is running finish, for so many seconds."""

    async def close(self) -> None:
        """End at once."""


class OmniService:
    """A pipeline as a Service."""

    usage, deeds = "a page to try it on; the API at {}/v1", "draw"

    def __init__(self, omni: AsyncOmni) -> None:
        self._omni = omni
        self.drain, self.close = omni.drain, omni.close

    @property
    def status(self) -> str:
        """The engine's."""
        return self._omni.status

    @property
    def running(self) -> int:
        """Requests that are being drawn."""
        return self._omni.stats.running

    @property
    def summary(self) -> str:
        """The layout of the ranks."""
        return self._omni.info.layout

    @property
    def failure(self) -> EngineError:
        """The error with which the server ends."""
        return EngineClosedError("the ranks failed, and did not start again")


def serve(omni: AsyncOmni, settings: ServerSettings) -> int:
    """Serve until a signal; ``omni`` is not started yet.

    Returns:
        The exit code: 0 after SIGTERM or SIGHUP, and in the other processes of torchrun; 130 after Ctrl-C; 1 where
        uvicorn ended by itself.
    """
    if not omni.is_main:  # a process of torchrun above rank 0
        asyncio.run(omni.supervise_rank())
        return 0
    require_certificate(settings)
    with (
        listening(settings.host, settings.port) as listener,
        logging_to_stderr(settings.log_level, settings.log_format),
    ):
        return asyncio.run(run_server(omni, settings, listener))


def require_certificate(settings: ServerSettings) -> None:
    """Refuse (ConfigError) a certificate that cannot be served: before the model is loaded for it."""
    if settings.ssl_certfile is None:
        return
    try:
        # A key with a password would be asked for on the terminal, each time.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, lambda: "")
    except (OSError, ValueError) as error:
        names = " and ".join(str(path) for path in (settings.ssl_certfile, settings.ssl_keyfile) if path is not None)
        raise ConfigError(f"{names}: no certificate with its key, in PEM and without a password: {error}") from error


def log_news(news: str) -> None:
    """Log what a start is doing."""
    _LOG.info("%s", news)


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens until the end of the block; port 0 takes a free one. ConfigError where it cannot listen."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        # An unknown host name has error numbers of its own.
        why = error.strerror if isinstance(error, socket.gaierror) or not error.errno else os.strerror(error.errno)
        raise ConfigError(f"cannot listen on {host}, port {port}: {why}") from error
    with listener:
        yield listener


async def run_server(omni: AsyncOmni, settings: ServerSettings, listener: socket.socket) -> int:
    """Start the engine and serve until a signal, in the main thread. Returns the exit code."""
    return await ServerProcess(create_app(omni, settings), OmniService(omni), settings, listener).run()


def uvicorn_config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=http_protocol(settings.header_timeout_s, settings.answer_timeout_s),
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        proxy_headers=False,  # ours come after the guard: see Forwarded
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=_FLUSH_S,
    )


class ServerProcess:
    """One run of the server: listen, load, serve, drain."""

    def __init__(self, app: FastAPI, service: Service, settings: ServerSettings, listener: socket.socket) -> None:
        self._app, self._service, self._settings, self._listener = app, service, settings, listener
        self._server = _Server(uvicorn_config(app, settings))
        self._signals: list[int] = []
        self._is_to_end = asyncio.Event()
        self._hurrying: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve until a signal or the engine's end. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
                loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        watching = asyncio.create_task(self._watch())
        ending = asyncio.create_task(self._is_to_end.wait())
        try:
            await asyncio.wait({serving, watching, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await self._drain()
                self._server.should_exit = True
            await serving
        finally:
            for task in (watching, ending):
                if not task.done():
                    task.cancel()
            results = await asyncio.gather(watching, ending, return_exceptions=True)
        if self._signals:
            return INTERRUPTED if self._signals[0] == signal.SIGINT else 0
        if isinstance(results[0], Exception):
            raise results[0]
        return FAILED

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        # A terminal that is closed may say so twice.
        if len(self._signals) > 1 and number != signal.SIGHUP and self._hurrying is None:
            self._say("again: ending at once")
            self._server.force_exit = True
            self._hurrying = asyncio.create_task(self._service.close())
        self._is_to_end.set()

    async def _watch(self) -> None:
        """Print when the server listens and when the engine is ready; raise when the engine has failed for good."""
        while not self._server.started:
            await asyncio.sleep(0.01)
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        scheme = "http" if self._settings.ssl_certfile is None else "https"
        address = f"{scheme}://{host}:{self._listener.getsockname()[1]}"
        self._say(f"listening on {address} ({self._service.usage.format(address)})", sys.stdout)
        if not self._settings.api_keys and not _is_loopback(self._listener.getsockname()[0]):
            deeds = self._service.deeds
            self._say(f"note: whoever reaches this address may {deeds}; --api-key KEY lets in only who has it")
        began = time.monotonic()
        await asyncio.shield(self._app.state.starting)
        if self._service.status == "ready":
            took = time.monotonic() - began
            self._say(f"{self._settings.names[0]} is ready after {took:.1f} s: {self._service.summary}", sys.stdout)
        while self._service.status != "failed":
            await asyncio.sleep(_POLL_S)
        raise self._service.failure

    async def _drain(self) -> None:
        """Let the running request finish; new and waiting ones get 503."""
        running = self._service.running
        requests = f"{running} request" if running == 1 else f"{running} requests"
        seconds = f"{self._settings.drain_timeout_s:g} s"
        self._say(f"stopping: {requests} may finish, for up to {seconds}; a second signal ends at once")
        await self._service.drain(self._settings.drain_timeout_s)

    def _say(self, message: str, stream: TextIO | None = None) -> None:
        """Print a line for people, on stderr by default; where the log is for programs, it goes there."""
        if self._settings.log_format == "json":
            _LOG.info("%s", message)
        else:
            with contextlib.suppress(OSError):  # the terminal is gone
                print(f"omni-sp: {message}", file=stream or sys.stderr, flush=True)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals as they are."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the application too where uvicorn would leave it: cancelled, it would log a traceback."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
