"""A server under load, and what the engine and HTTP cost over a bare loop that calls the pipeline.

python -m benchmarks.serving --ranks 2 --clients 1 2 4 8
python -m benchmarks.serving --ranks 2 --replicas 2         # one engine of 2 ranks, then two of one rank, under load

The bare loop runs on ranks of its own: the same pipeline, parallelized alike, called directly. It, AsyncOmni and the
server take turns with the same requests, in an order drawn anew for every round, one request at a time. Then as many
clients as asked for send requests at once, again in turns; beside requests a second stands the processor time of the
server's own process, which other work on the machine does not change. Last come many small requests, before and after
which the memory of all processes is read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.interleaved import add_output_options, report, write
from omni_sp import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.async_omni import AsyncOmni
from omni_sp.engine.startup import format_seconds
from omni_sp.events import RequestDone
from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines.shapes import SHAPES_MODEL
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.watcher import Watcher

PROMPT = "a red circle on a blue background"
START_S, ANSWER_S = 180.0, 600.0
BARE, ENGINE, SERVER = "bare loop", "AsyncOmni", "HTTP server"

_PIPE: Any = None


def bare_call(mesh: ParallelMesh, size: int, steps: int) -> tuple[float, float]:
    """On a rank: seconds of one call of the pipeline, and of one of its steps."""
    global _PIPE  # a rank keeps it from call to call
    import torch

    from omni_sp import parallelize
    from omni_sp.pipelines.load import load_pipeline, resolve_model

    if _PIPE is None:
        _PIPE = load_pipeline(resolve_model(SHAPES_MODEL), device="cpu")
        _PIPE.set_progress_bar_config(disable=True)
        parallelize(_PIPE, mesh)
    times: list[float] = []

    def note(_pipe: Any, _step: int, _timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        times.append(time.perf_counter())
        return kept

    began = time.perf_counter()
    _PIPE(
        PROMPT,
        height=size,
        width=size,
        num_inference_steps=steps,
        true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(1),
        callback_on_step_end=note,
        output_type="pil" if mesh.rank == 0 else "latent",  # as the engine has it
    )
    took = time.perf_counter() - began
    return took, (times[-1] - times[0]) / (len(times) - 1)


@contextlib.contextmanager
def running_server(ranks: int, size: int, replicas: int = 1) -> Iterator[tuple[str, int]]:
    """Address and process number of ``omni-sp serve``, ready: so many engines of so many ranks."""
    words = [sys.executable, "-m", "omni_sp.server", SHAPES_MODEL, "--device", "cpu", "--port", "0"]
    words += [
        "--ulysses-degree",
        str(ranks),
        "--data-parallel-size",
        str(replicas),
        "--warmup",
        f"{size}x{size}",
        "--max-queue-length",
        "64",
    ]
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process,
        contextlib.closing(Watcher(process, signal.SIGTERM)),
    ):
        try:
            assert process.stdout is not None
            address = next(word for word in process.stdout.readline().split() if word.startswith("http"))
            until = time.monotonic() + START_S
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                    if answer.status == 200:
                        break
                if time.monotonic() > until or process.poll() is not None:
                    raise RuntimeError("the server did not get ready")
                time.sleep(0.1)
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(60)


def http_request(address: str, size: int, steps: int, seed: int = 1) -> float:
    """Seconds of one request."""
    body = {"prompt": PROMPT, "size": f"{size}x{size}", "num_inference_steps": steps, "seed": seed}
    request = urllib.request.Request(
        f"{address}/v1/images/generations",
        json.dumps({**body, "true_cfg_scale": 1.0}).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        answer.read()
    return time.perf_counter() - began


async def engine_request(omni: AsyncOmni, size: int, steps: int) -> tuple[float, float]:
    """Seconds of one request, and of one of its steps as the front hears of them."""
    params = OmniDiffusionSamplingParams(height=size, width=size, num_inference_steps=steps, true_cfg_scale=1.0, seed=1)
    times: list[float] = []
    began = time.perf_counter()
    async for event in omni.generate(PROMPT, params):
        if getattr(event, "done", 0) > 0:
            times.append(time.perf_counter())
        if isinstance(event, RequestDone):
            return time.perf_counter() - began, (times[-1] - times[0]) / (len(times) - 1)
    raise RuntimeError("the request failed")


async def overhead(options: argparse.Namespace, omni: AsyncOmni, address: str) -> dict[str, dict[str, list[float]]]:
    """One request at a time, of each contender in turns."""
    pool = RankPool()
    size, steps = options.size, options.steps

    async def bare() -> tuple[float, float]:
        answers = await asyncio.to_thread(pool.run, bare_call, size, steps, ulysses=options.ranks, timeout=ANSWER_S)
        return max(answer[0] for answer in answers), answers[0][1]

    async def served() -> tuple[float, float]:
        return await asyncio.to_thread(http_request, address, size, steps), float("nan")

    contenders: dict[str, Callable[[], Awaitable[tuple[float, float]]]] = {
        BARE: bare,
        ENGINE: lambda: engine_request(omni, size, steps),
        SERVER: served,
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"request": [], "step": []} for name in contenders}
    try:
        for number in range(-1, options.rounds):
            for name in random.Random(number).sample(list(contenders), len(contenders)):
                request, step = await contenders[name]()
                if number >= 0:
                    seconds[name]["request"].append(request)
                    seconds[name]["step"].append(step)
    finally:
        pool.close()
    return seconds


def load(address: str, pid: int, options: argparse.Namespace, clients: int) -> dict[str, float]:
    """So many clients at once, each sending its next request when the last one is answered."""
    count = max(clients, options.requests)
    with ThreadPoolExecutor(clients) as pool:
        began, cpu_s = time.perf_counter(), cpu_seconds(pid)
        waits = list(pool.map(lambda seed: http_request(address, options.size, options.steps, seed), range(count)))
        took = time.perf_counter() - began
    return {
        "clients": clients,
        "requests_per_s": count / took,
        "front_cpu_ms": (cpu_seconds(pid) - cpu_s) / count * 1e3,
        "p50_s": statistics.median(waits),
        "p99_s": sorted(waits)[min(count - 1, round(0.99 * count))],
    }


def loads(address: str, pid: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Every number of clients in turns, and the medians: other work on the machine comes and goes."""
    rows: dict[int, list[dict[str, float]]] = {clients: [] for clients in options.clients}
    for number in range(options.load_rounds):
        for clients in random.Random(number).sample(options.clients, len(options.clients)):
            rows[clients].append(load(address, pid, options, clients))
    return [{name: statistics.median(row[name] for row in found) for name in found[0]} for found in rows.values()]


def print_loads(rows: list[dict[str, float]]) -> None:
    """A line for each number of clients."""
    print(f"\n{'clients':>8}{'requests/s':>12}{'front CPU ms':>14}{'p50 s':>9}{'p99 s':>9}")
    for row in rows:
        print(
            f"{row['clients']:8}{row['requests_per_s']:12.2f}{row['front_cpu_ms']:14.1f}{row['p50_s']:9.2f}"
            f"{row['p99_s']:9.2f}",
            flush=True,
        )


def replicas(options: argparse.Namespace) -> dict[str, Any]:
    """The load on one engine of all ranks, and on several that have a part of them each."""
    result = {}
    for count in (1, options.replicas):
        with running_server(options.ranks // count, options.size, count) as (address, pid):
            rows = loads(address, pid, options)
        print(f"\n{count} x {options.ranks // count} ranks", end="")
        print_loads(rows)
        result[f"{count} x {options.ranks // count}"] = rows
    return result


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, without its children."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> dict[str, float]:
    """Memory of a server's front and of all its ranks."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**20

    def of(one: int) -> float:
        return int(Path(f"/proc/{one}/statm").read_text().split()[1]) * page

    return {"front": of(pid), "ranks": sum(of(child.pid) for child in psutil.Process(pid).children())}


def paired(seconds: dict[str, dict[str, list[float]]], name: str, what: str) -> float:
    """Median over the rounds of its ratio to the bare loop in the same round."""
    pairs = zip(seconds[name][what], seconds[BARE][what], strict=True)
    return statistics.median(mine / bare for mine, bare in pairs)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, printed as it comes."""
    result: dict[str, Any] = {}
    config = DiffusionParallelConfig(ulysses_degree=options.ranks)
    warmup = [(options.size, options.size)]
    with running_server(options.ranks, options.size) as (address, pid):
        async with AsyncOmni(SHAPES_MODEL, config, device="cpu", warmup=warmup) as omni:
            result["start_s"] = omni.stats.start_s
            seconds = result["overhead"] = await overhead(options, omni, address)
        print(f"{'one at a time':16}{'request ms':>12}{'/ bare':>8}{'step ms':>10}{'/ bare':>8}")
        for name, found in seconds.items():
            line = f"{name:16}{statistics.median(found['request']) * 1e3:12.1f}{paired(seconds, name, 'request'):8.3f}"
            if name != SERVER:
                line += f"{statistics.median(found['step']) * 1e3:10.1f}{paired(seconds, name, 'step'):8.3f}"
            print(line, flush=True)
        result["load"] = await asyncio.to_thread(loads, address, pid, options)
        print_loads(result["load"])
        memory = [resident_mib(pid)]
        for seed in range(options.many):
            await asyncio.to_thread(http_request, address, 64, 2, seed)
            if (seed + 1) % max(1, options.many // 2) == 0:
                memory.append(resident_mib(pid))
        result["memory_mib"] = memory
        print(f"\nMiB before, half way through and after {options.many} requests: ", end="")
        print("; ".join(f"{name} {', '.join(f'{one[name]:.1f}' for one in memory)}" for name in memory[0]))
    print(f"start-up of AsyncOmni: {format_seconds(result['start_s'])}")
    return result


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", type=int, default=176, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=45)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--requests", type=int, default=16, help="of all clients together")
    parser.add_argument("--load-rounds", type=int, default=3)
    parser.add_argument("--replicas", type=int, help="compare one engine of all ranks with so many, and nothing else")
    parser.add_argument("--many", type=int, default=200, help="requests over which memory is watched")
    add_output_options(parser)
    options = parser.parse_args()
    if options.replicas:
        if options.replicas < 2 or options.ranks % options.replicas:
            parser.error(f"--replicas {options.replicas}: give 2 or more, a divisor of --ranks {options.ranks}")
        found = replicas(options)
        report(write(options.output, f"serving-replicas{options.replicas}", vars(options), found))
        return
    result = asyncio.run(measure(options))
    report(write(options.output, f"serving-ulysses{options.ranks}", vars(options), result))


if __name__ == "__main__":
    main()
