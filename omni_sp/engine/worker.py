"""A rank process: it loads the pipeline, joins the others, answers calls, and ends with the front that started it."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from omni_sp.engine.devices import set_threads
from omni_sp.engine.messages import Abort, Alive, Call, Loaded, Loading, Ping, RankSettings, Stop
from omni_sp.engine.ranks import LOOPBACK
from omni_sp.engine.ranks.addresses import address_towards
from omni_sp.engine.ranks.failures import as_message
from omni_sp.errors import SamplingParamsError
from omni_sp.pipelines.load import silence_downloads, silence_libraries, source_here

if TYPE_CHECKING:
    from omni_sp.engine.pipeline_runner import PipelineRunner

_FRONT_FIRST_S = 10.0
"""So much later than the front an exchange gives up: the front knows which rank is to blame."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIOCGIFADDR = 0x8915  # linux/sockios.h

Inbox = queue.SimpleQueue[Any]
Report = Callable[[Any], None]
Aborted = set[str]
Serve = Callable[[RankSettings, Inbox, Aborted, Report], None]


def rank_main(connection: Connection) -> None:
    """Run one rank until the front says Stop or is gone."""
    run_rank(connection, _serve)


def run_rank(connection: Connection, serve: Serve) -> None:
    """Be a rank process until the front is gone, or ``serve`` is done. It does not return.

    Args:
        connection: to the front, whose first message is the RankSettings.
        serve: takes these, the front's messages, the names of aborted calls, and what sends a message to the front.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front: it ends the ranks
    settings = pickle.loads(connection.recv_bytes())
    assert isinstance(settings, RankSettings)
    die_with_parent(settings.placement.parent_pid)
    inbox: Inbox = queue.SimpleQueue()
    aborted: Aborted = set()
    sending = threading.Lock()

    def report(message: Any) -> None:
        payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with sending:
            connection.send_bytes(payload)

    threading.Thread(target=_listen, args=(connection, inbox, aborted, report), daemon=True).start()

    try:
        serve(settings, inbox, aborted, report)
    except (BrokenPipeError, ConnectionResetError):
        _leave(1)
    except Exception as error:
        # The error is reported, not raised: the process stays until the front ends it, so that the other ranks see no
        # broken connection, and the front sees the cause before errors that only follow from it.
        report(as_message(error))
        inbox.get()
        _leave(1)
    _leave(0)


def _serve(settings: RankSettings, inbox: Inbox, aborted: Aborted, report: Report) -> None:
    """Load, join, and answer calls until Stop."""
    runner = _load(settings, report)
    report(Loaded())
    if isinstance(inbox.get(), Stop):
        return
    mesh = join_ranks(settings)
    report(runner.parallelize(mesh))
    on_progress = report if settings.rank == 0 else None
    while not isinstance(message := inbox.get(), Stop):
        answer: Any
        try:
            if isinstance(message, Exception):
                raise message
            assert isinstance(message, Call)
            if message.check:
                answer = runner.check(message)
            else:
                name = message.request_id
                done = runner.run(
                    message,
                    on_progress,
                    answers=settings.rank == 0,
                    is_aborted=lambda: name in aborted,  # noqa: B023  (it is called within this turn of the loop)
                )
                answer = done if settings.rank == 0 else replace(done, result=None)
        except Exception as error:
            answer = as_message(error)
        answer = replace(answer, exchanges=mesh.exchanges_so_far())
        # Before the answer: after it, an abort may already be of the next call.
        aborted.clear()
        report(answer)


def _load(settings: RankSettings, report: Report) -> PipelineRunner:
    """Import torch and diffusers and load the pipeline. Rank 0 alone warns people, and decodes in every call."""
    if settings.rank > 0:
        warnings.simplefilter("ignore")
        silence_downloads()  # all wait for the same one; one bar is enough
    from omni_sp.engine.pipeline_runner import PipelineRunner

    set_threads(settings.placement.num_threads)
    runner = PipelineRunner(
        replace(settings.options, source=source_here(settings.options.source)),
        settings.placement.device,
        rank=settings.rank,
        decodes=settings.rank == 0 or settings.options.config.vae_parallel is True,
        on_component=lambda part, done, total: report(Loading(part=part, done=done, total=total)),
    )
    if settings.rank > 0:
        silence_libraries()
    return runner


def join_ranks(settings: RankSettings) -> Any:
    """Form the process group over the front's store, and the mesh over it."""
    import torch.distributed as dist

    from omni_sp.mesh import ParallelMesh

    host, port = settings.store
    interface = _interface_towards(host, port)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    timeout = timedelta(seconds=settings.options.rank_timeout_s + _FRONT_FIRST_S)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=False, timeout=timeout
    )
    dist.init_process_group(
        settings.backend,
        store=store,
        rank=settings.rank,
        world_size=settings.options.config.world_size,
        timeout=timeout,
    )
    return ParallelMesh(settings.options.config)


def _interface_towards(host: str, port: int) -> str | None:
    """The network interface on which ranks meet: the one that leads to the front, or that has its address.

    What this machine's name resolves to need not be an address at which the others reach it. None where it is unknown.
    """
    if host == LOOPBACK:
        return "lo0" if sys.platform == "darwin" else "lo"
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, ValueError):
        own = address_towards(host, port)
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # it has no address
                    # struct ifreq: a name of 16 bytes, and a sockaddr_in, whose address comes after family and port
                    answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                    if socket.inet_ntoa(answer[20:24]) == own:
                        return name
    return None


def _listen(connection: Connection, inbox: Inbox, aborted: Aborted, report: Report) -> None:
    """Pass messages on; when the front is gone, end this process, whatever its main thread is doing."""
    while True:
        try:
            payload = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)
        try:
            message = pickle.loads(payload)
            if isinstance(message, Abort):
                aborted.add(message.request_id)  # heard in the middle of a call
            elif isinstance(message, Ping):
                report(Alive())
            else:
                inbox.put(message)
        except Exception as error:
            inbox.put(SamplingParamsError(f"an argument cannot be read in the rank processes: {error}"))


def die_with_parent(parent_pid: int) -> None:
    """Ask Linux to kill this process when its parent dies, also while something holds the interpreter."""
    if not parent_pid or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def _leave(exitcode: int) -> None:
    """End the process at once, without waiting for threads of torch and of the listener."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if exitcode == 0 and dist.is_initialized():
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exitcode)
