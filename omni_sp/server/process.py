"""``omni-sp serve``: its options, and the life of the process from its address to its drain."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from omni_sp.async_omni import AsyncOmni
from omni_sp.config import DiffusionParallelConfig
from omni_sp.engine.startup import StartupDisplay
from omni_sp.errors import ConfigError, EngineClosedError, InvalidInputError, OmniSPError
from omni_sp.pipelines.shapes import SHAPES_MODEL
from omni_sp.server.app import create_app
from omni_sp.server.settings import ServerSettings

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_FLUSH_S = 10
"""How long answers that are finished may take to reach their clients once the server ends."""
_POLL_S = 0.2
_MIB = 2**20
_DEFAULTS = ServerSettings()


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of ``serve``."""
    parser.set_defaults(run=serve, parser=parser)
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        default=SHAPES_MODEL,
        metavar="MODEL",
        help="hub id, folder of a diffusers pipeline, or %(default)s",
    )
    add("--served-model-name", action="append", default=[], metavar="NAME", help="what requests call it; repeatable")
    add("--host", default=_DEFAULTS.host, help="address to listen on (%(default)s: this machine only)")
    add("--port", type=int, default=_DEFAULTS.port, metavar="N", help="(%(default)s); 0 takes a free one")
    add("--ulysses-degree", "--usp", type=int, default=1, metavar="N", help="ranks that trade tokens for heads")
    add("--ring-degree", "--ring", type=int, default=1, metavar="N", help="ranks that keys and values travel around")
    add("--device", default="auto", help="auto (GPUs where there are any), cpu, cuda, or cuda:N for all ranks on one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="auto: bfloat16 on GPUs")
    add("--attention-backend", default="auto", metavar="NAME", help="attention kernel (%(default)s)")
    add("--rank-timeout", type=float, default=600.0, metavar="S", help="longest silence of working ranks")
    add("--startup-timeout", type=float, default=3600.0, metavar="S", help="the same while they load the model")
    add(
        "--warmup",
        action="append",
        default=[],
        metavar="HEIGHTxWIDTH",
        help="draw a step of this size before being ready; repeatable",
    )
    add("--api-key", action="append", default=[], metavar="KEY", help="let in who has one; repeatable")
    add("--api-key-file", type=Path, metavar="PATH", help="the same, one on each line, out of sight of ps")
    add("--allow-origin", action="append", default=[], metavar="ORIGIN", help="web pages that may call; repeatable")
    add("--data-dir", type=Path, metavar="PATH", help="keep videos, pictures and jobs here; else until it ends")
    add("--file-max-age", type=float, default=_DEFAULTS.file_max_age_s, metavar="S", help="keep them so long")
    add("--file-max-mib", type=int, default=_DEFAULTS.file_max_total_bytes // _MIB, metavar="N", help="keep so much")
    add("--max-queue-length", type=int, default=_DEFAULTS.max_queue_length, metavar="N", help="requests that wait")
    add("--max-batch-size", type=int, default=1, metavar="N", help="requests drawn together, at most (%(default)s)")
    add("--batch-wait-ms", type=float, default=0.0, metavar="MS", help="how long one may wait for others (%(default)g)")
    add("--max-pixels", type=int, default=_DEFAULTS.max_pixels, metavar="N", help="of a picture (%(default)s)")
    add("--max-steps", type=int, default=_DEFAULTS.max_steps, metavar="N", help="of a request (%(default)s)")
    add("--max-n", type=int, default=_DEFAULTS.max_n, metavar="N", help="results of a request (%(default)s)")
    add("--max-frames", type=int, default=_DEFAULTS.max_frames, metavar="N", help="of a video (%(default)s)")
    add("--max-body-mib", type=int, default=_DEFAULTS.max_body_bytes // _MIB, metavar="N", help="of a request")
    add("--allow-url-images", action="store_true", help="fetch pictures that chats name by http(s) URL")
    add("--drain-timeout", type=float, default=_DEFAULTS.drain_timeout_s, metavar="S", help="to finish, at the end")
    add("--debug", action="store_true", help="show the traceback of an error")


def serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit code: 0 after SIGTERM, 130 after Ctrl-C.

    Raises:
        ConfigError, ModelNotFoundError: nothing was started. OmniSPError: the engine did not start, or failed for good.
    """
    settings = _settings(options)
    omni = AsyncOmni(
        options.model,
        DiffusionParallelConfig(ulysses_degree=options.ulysses_degree, ring_degree=options.ring_degree),
        max_queue_length=settings.max_queue_length,
        max_batch_size=options.max_batch_size,
        batch_wait_ms=options.batch_wait_ms,
        warmup=[_height_width(size) for size in options.warmup],
        on_news=StartupDisplay().show,
        device=None if options.device == "auto" else options.device,
        dtype=None if options.dtype == "auto" else options.dtype,
        attention_backend=options.attention_backend,
        rank_timeout_s=options.rank_timeout,
        startup_timeout_s=options.startup_timeout,
    )
    if not omni.is_main:  # a process of torchrun above rank 0
        asyncio.run(omni.supervise_rank())
        return 0
    with listening(settings.host, settings.port) as listener:
        return asyncio.run(run_server(omni, settings, listener))


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens.

    Raises:
        ConfigError: the port is taken, or there is no such address here.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        # A name that is none has numbers of its own.
        why = error.strerror if isinstance(error, socket.gaierror) or not error.errno else os.strerror(error.errno)
        raise ConfigError(f"cannot listen on {host}, port {port}: {why}") from error
    with listener:
        yield listener


async def run_server(omni: AsyncOmni, settings: ServerSettings, listener: socket.socket) -> int:
    """Start the engine and serve on this socket until a signal, in the main thread. Returns the exit code.

    Raises:
        OmniSPError: the engine did not start, or failed for good.
    """
    return await ServerProcess(create_app(omni, settings), omni, settings, listener).run()


class ServerProcess:
    """One run of the server: listen, load, serve, drain."""

    def __init__(self, app: FastAPI, omni: AsyncOmni, settings: ServerSettings, listener: socket.socket) -> None:
        self._app, self._omni, self._settings, self._listener = app, omni, settings, listener
        self._server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                ws="none",
                timeout_graceful_shutdown=_FLUSH_S,
            )
        )
        self._signals: list[int] = []
        self._is_to_end = asyncio.Event()
        self._hurrying: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """As run_server()."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
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
        if len(self._signals) > 1 and self._hurrying is None:
            _print_status("again: ending at once")
            self._server.force_exit = True
            self._hurrying = asyncio.create_task(self._omni.close())
        self._is_to_end.set()

    async def _watch(self) -> None:
        """Tell what becomes of the engine.

        Raises:
            OmniSPError: it has failed for good; there is nothing left to serve.
        """
        while not self._server.started:
            await asyncio.sleep(0.01)
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        address = f"http://{host}:{self._listener.getsockname()[1]}"
        print(f"omni-sp: listening on {address} (a page to try it on; the API at {address}/v1)", flush=True)
        if not self._settings.api_keys and not _is_loopback(self._listener.getsockname()[0]):
            _print_status("note: whoever reaches this address may draw; --api-key KEY lets in only who has it")
        began = time.monotonic()
        await asyncio.shield(self._app.state.starting)
        if self._omni.status == "ready":
            info = self._omni.info
            took = time.monotonic() - began
            print(f"omni-sp: {self._settings.names[0]} is ready after {took:.1f} s: {info.layout}", flush=True)
        while self._omni.status != "failed":
            await asyncio.sleep(_POLL_S)
        raise EngineClosedError("the ranks failed, and did not start again")

    async def _drain(self) -> None:
        """New requests and waiting ones get 503 from now on; the running one may finish."""
        stats = self._omni.stats
        if stats.running:
            _print_status(
                f"finishing what runs, for up to {self._settings.drain_timeout_s:g} s; once more ends at once"
            )
        await self._omni.drain(self._settings.drain_timeout_s)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def _settings(options: argparse.Namespace) -> ServerSettings:
    keys = list(options.api_key)
    if options.api_key_file is not None:
        try:
            lines = options.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {options.api_key_file} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"--api-key-file {options.api_key_file} holds no key: anybody would be let in")
        keys += found
    return ServerSettings(
        model=str(options.model),
        served_model_names=tuple(options.served_model_name),
        host=options.host,
        port=options.port,
        api_keys=tuple(keys),
        allow_origins=tuple(options.allow_origin),
        data_dir=options.data_dir,
        max_body_bytes=options.max_body_mib * _MIB,
        max_pixels=options.max_pixels,
        max_steps=options.max_steps,
        max_n=options.max_n,
        max_frames=options.max_frames,
        max_queue_length=options.max_queue_length,
        drain_timeout_s=options.drain_timeout,
        allow_url_images=options.allow_url_images,
        file_max_age_s=options.file_max_age,
        file_max_total_bytes=options.file_max_mib * _MIB,
    )


def _height_width(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if sides is None:
        raise ConfigError(f"--warmup {text}: give HEIGHTxWIDTH in pixels, such as 1024x768")
    return int(sides[1]), int(sides[2])


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _print_status(news: str) -> None:
    print(f"omni-sp: {news}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m omni_sp.server``. Returns the exit code; an error is one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="omni-sp serve", description="Serve a diffusers pipeline over HTTP.", allow_abbrev=False
    )
    add_serve_options(parser)
    options: Any = parser.parse_args(arguments)
    try:
        return serve(options)
    except OmniSPError as error:
        if options.debug:
            raise
        _print_status(f"error: {' '.join(str(error).split())}")
        return BAD_INPUT if isinstance(error, InvalidInputError) else FAILED
