"""Texts a second of the embedding server, and the processor time of its front, beside one server of vLLM.

    python -m benchmarks.embeddings                    # where vLLM is installed

A model of one layer with random weights serves, so that the way of a text counts and not the model. A server with one
replica and one with two take turns with that replica itself, which is a plain ``vllm serve``, on its own socket;
the order is drawn anew for every round. Processor time is that of all threads of a process, as Linux counts it: of the
front, and of the API processes of vLLM. Other work on the machine slows texts a second, and hardly that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

from benchmarks.interleaved import add_output_options, report, write
from omni_sp.llm.embedding.connections import Address, Connections
from omni_sp.testing.watcher import Watcher

FORMATS = "float", "base64", "bytes_only"
START_S, ANSWER_S = 400.0, 200.0
WORDS = ["a", "red", "circle", "on", "the", "blue", "background", "of", "small", "green", "and", "yellow", "stars"]


class Server(NamedTuple):
    """What takes part.

    Attributes:
        name: of a column.
        address: where it listens.
        front: the process of the front; None for vLLM alone.
        apis: the API processes of vLLM.
    """

    name: str
    address: Address
    front: int | None
    apis: list[int]


def save_model(folder: Path, width: int) -> None:
    """Save a Qwen2 of one layer with random weights, whose embeddings have so many numbers."""
    import transformers

    from omni_sp.testing.components import VOCABULARY_SIZE, tokenizer

    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY_SIZE, hidden_size=width, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=width // 64, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer(256).save_pretrained(folder)


@contextlib.contextmanager
def running(model: Path, replicas: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``omni-sp serve-embeddings`` on the CPU: its address and its process. It may not be ready yet."""
    words = [sys.executable, "-m", "omni_sp", "serve-embeddings", str(model), "--port", "0", "--gpus", "0"]
    words += ["--replicas", str(replicas), "--log-level", "error", "--enforce-eager", "--dtype", "float32"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process,
        contextlib.closing(Watcher(process, signal.SIGTERM)),
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield next(word for word in line.split() if word.startswith("http")), process
        finally:
            process.terminate()
            process.wait(60)


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    """Wait for the line that says so."""
    assert process.stdout is not None
    if "is ready" not in process.stdout.readline():
        raise RuntimeError("the server did not get ready")


def servers_of(name: str, url: str, process: subprocess.Popen[str]) -> tuple[Server, list[Address]]:
    """A front, and where its replicas listen."""
    apis, sockets = [], []
    for child in psutil.Process(process.pid).children(recursive=True):
        words = child.cmdline()
        if "--uds" in words and "guard.py" not in " ".join(words[:5]):
            apis.append(child.pid)
            sockets += [Address(path=after) for word, after in itertools.pairwise(words) if word == "--uds"]
    return Server(name, Address.of_url(url), process.pid, apis), sockets


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads that a process has."""
    found = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            found += int((task / "schedstat").read_text().split()[0])
    return found / 1e9


async def seconds_of(server: Server, body: bytes) -> float:
    """Seconds of one request, on a connection of its own."""
    connections = Connections(server.address)
    began = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    answer = await connections.exchange("POST", "/v1/embeddings", body, headers=headers, timeout_s=ANSWER_S)
    took = time.perf_counter() - began
    connections.close()
    if answer.status != 200:
        raise RuntimeError(f"{server.name} answers {answer.status}: {answer.body[:500]!r}")
    return took


def measure(servers: list[Server], texts: list[str], rounds: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each server and format: texts a second, and milliseconds of processor time a text."""
    turns = [(server, kind) for server in servers for kind in FORMATS]
    seconds: dict[tuple[str, str], list[float]] = {(server.name, kind): [] for server, kind in turns}
    front: dict[tuple[str, str], float] = dict.fromkeys(seconds, 0.0)
    apis = dict(front)
    for number in range(-1, rounds):
        for server, kind in random.Random(number).sample(turns, len(turns)):
            body = json.dumps({"input": texts, "encoding_format": kind}).encode()
            key = server.name, kind
            before = [cpu_seconds(pid) for pid in server.apis]
            front_before = 0.0 if server.front is None else cpu_seconds(server.front)
            took = asyncio.run(seconds_of(server, body))
            if number >= 0:  # the first round warms up
                seconds[key].append(took)
                apis[key] += sum(cpu_seconds(pid) for pid in server.apis) - sum(before)
                front[key] += 0.0 if server.front is None else cpu_seconds(server.front) - front_before
    count = len(texts)
    return {
        name: {
            kind: {
                "texts_a_second": [round(count / one, 1) for one in seconds[name, kind]],
                "median": count / statistics.median(seconds[name, kind]),
                "front_ms_a_text": front[name, kind] / (count * rounds) * 1e3,
                "api_ms_a_text": apis[name, kind] / (count * rounds) * 1e3,
            }
            for kind in FORMATS
        }
        for name in dict.fromkeys(server.name for server in servers)
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=256, help="texts of a request (default: 256)")
    parser.add_argument("--words", type=int, default=10, help="words of a text (default: 10)")
    parser.add_argument("--width", type=int, default=1024, help="numbers of an embedding (default: 1024)")
    parser.add_argument("--rounds", type=int, default=7, help="requests of each kind (default: 7)")
    add_output_options(parser)
    options = parser.parse_args()
    texts = [
        " ".join(WORDS[(7 * index + offset * (1 + index % 5)) % len(WORDS)] for offset in range(options.words))
        for index in range(options.texts)
    ]
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name), options.width)
        with running(Path(name), 1) as (first_url, first), running(Path(name), 2) as (second_url, second):
            wait_until_ready(first)
            wait_until_ready(second)
            one, sockets = servers_of("front, 1 replica", first_url, first)
            two, _ = servers_of("front, 2 replicas", second_url, second)
            found = measure([Server("vLLM alone", sockets[0], None, one.apis), one, two], texts, options.rounds)
    print(f"{'':20}{'format':12}{'texts/s':>10}{'front ms/text':>16}{'API ms/text':>14}")
    for server, kinds in found.items():
        for kind, figures in kinds.items():
            numbers = f"{figures['median']:>10.0f}{figures['front_ms_a_text']:>16.3f}{figures['api_ms_a_text']:>14.3f}"
            print(f"{server:20}{kind:12}{numbers}")
    chosen = {name: getattr(options, name) for name in ("texts", "words", "width", "rounds")}
    report(write(options.output, "embeddings", chosen, {"servers": found}))


if __name__ == "__main__":
    main()
