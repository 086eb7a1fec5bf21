"""Ranks on a Ray cluster of two nodes on this machine: exact, and back after what goes wrong; nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from omni_sp import (
    AsyncOmni,
    ConfigError,
    DiffusionParallelConfig,
    ModelNotFoundError,
    Omni,
    OmniDiffusionSamplingParams,
)
from omni_sp.engine.ranks import ray as ray_ranks
from omni_sp.events import RequestDone, RequestProgress
from omni_sp.pipelines.shapes import shapes_folder
from tests.engine.processes import becomes_true
from tests.thorough import thorough_only

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240.0
PARAMS = OmniDiffusionSamplingParams(width=80, height=64, num_inference_steps=4, seed=1)
TWO = DiffusionParallelConfig(ulysses_degree=2)
RING = DiffusionParallelConfig(ring_degree=2)
FOUR = DiffusionParallelConfig(ulysses_degree=2, ring_degree=2)

pytestmark = [
    thorough_only,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install '.[ray]'"),
    # Ray's own, and not ours to mend.
    pytest.mark.filterwarnings("default"),
]


class Nodes:
    """A cluster of a head without CPUs, and of nodes that are added and removed."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.nodes: list[Any] = []

    def add(self, num_cpus: int = 2) -> Any:
        self.nodes.append(self.cluster.add_node(num_cpus=num_cpus, object_store_memory=80 * 2**20))
        self.cluster.wait_for_nodes()
        return self.nodes[-1]

    def remove(self, node: Any) -> None:
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def holds(self, number: int) -> None:
        """Have so many nodes."""
        while len(self.nodes) > number:
            self.remove(self.nodes[-1])
        while len(self.nodes) < number:
            self.add()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("RAY_health_check_failure_threshold", "3")
        patch.setenv("RAY_health_check_period_ms", "1000")
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        made = Cluster(initialize_head=True, head_node_args=head)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        ray.shutdown()
        made.shutdown()
    assert becomes_true(lambda: not actors(), 20.0)


@pytest.fixture
def nodes(cluster: Any) -> Iterator[Nodes]:
    """Two nodes of two CPUs; afterwards no actor, no placement group and no rank is on them."""
    found = _NODES.setdefault(cluster.address, Nodes(cluster))
    found.holds(2)
    yield found
    assert becomes_true(lambda: not ranks(), 20.0)
    assert becomes_true(lambda: not actors(), 20.0)
    assert becomes_true(lambda: not groups(), 20.0)


_NODES: dict[str, Nodes] = {}


@pytest.fixture(scope="module")
def picture() -> np.ndarray[Any, Any]:
    """What one process draws."""
    with Omni("omni-sp/shapes", device="cpu") as omni:
        return pixels(omni.generate("a red circle", PARAMS)[0])


def pixels(output: Any) -> np.ndarray[Any, Any]:
    return np.asarray(output.images[0]).astype(int)


def assert_alike(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> None:
    assert np.abs(one - other).max() <= 2


def ranks() -> list[psutil.Process]:
    """The processes of ranks that an actor of Ray has started, in their order."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            name = re.fullmatch(r"omni_sp-rank-(\d+)", (process.cmdline() or [""])[-1])
            if name is not None and process.parent() is not None and "RankAgent" in process.parent().name():
                found[int(name[1])] = process
    return [found[rank] for rank in sorted(found)]


def actors() -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "RankAgent" in process.name():
                found.append(process.pid)
    return found


def groups() -> list[Any]:
    import ray

    if not ray.is_initialized():
        return []
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def raylets() -> list[int]:
    """The raylet above each rank's actor, in rank order: each is a node."""
    return [rank.parent().ppid() for rank in ranks()]


def bounded(program: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(program(), PATIENCE_S))


def served(config: DiffusionParallelConfig = RING, **options: Any) -> AsyncOmni:
    return AsyncOmni("omni-sp/shapes", config, device="cpu", launcher="ray", rank_timeout_s=60.0, **options)


async def drawn(omni: AsyncOmni, at_step_2: Callable[[], Any] = lambda: None) -> Any:
    event: Any = None
    async for event in omni.generate("a red circle", PARAMS):
        if isinstance(event, RequestProgress) and event.done == 2:
            at_step_2()
            at_step_2 = lambda: None  # noqa: E731
    assert isinstance(event, RequestDone), event
    return pixels(event.output)


@pytest.mark.parametrize(
    ("config", "options", "per_node"), [(TWO, {}, [2]), (RING, {"nodes": 2}, [1, 1]), (FOUR, {}, [2, 2])]
)
def test_ranks_over_nodes_draw_what_one_process_draws(
    nodes: Nodes,
    picture: np.ndarray[Any, Any],
    config: DiffusionParallelConfig,
    options: dict[str, Any],
    per_node: list[int],
) -> None:
    with Omni("omni-sp/shapes", config, device="cpu", launcher="ray", **options) as omni:
        assert_alike(pixels(omni.generate("a red circle", PARAMS)[0]), picture)
        places = raylets()
        assert sorted(Counter(places).values()) == per_node
        for first in range(0, config.world_size, config.ulysses_degree):
            assert len(set(places[first : first + config.ulysses_degree])) == 1


def test_what_a_cluster_cannot_hold_is_refused_by_name(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    for config, options, told in (
        (
            DiffusionParallelConfig(ulysses_degree=3),
            {},
            "need 3 CPUs, 3 CPUs of a Ulysses group on one node, and the Ray cluster has 2 nodes with 2 CPUs",
        ),
        (DiffusionParallelConfig(ring_degree=5), {}, "= 5 ranks need 5 CPUs, and the Ray cluster has 2 nodes"),
        (DiffusionParallelConfig(ring_degree=3), {"nodes": 3}, "need 3 nodes with 1 CPU each"),
        (TWO, {"nodes": 2}, "each of which stays on one node"),
        (TWO, {"device": "cuda"}, "need 2 GPUs, .* and the Ray cluster has no GPU"),
        (TWO, {"device": "cuda:0"}, "Ray gives each rank its GPU"),
    ):
        with pytest.raises(ConfigError, match=told):
            Omni("omni-sp/shapes", config, **({"device": "cpu"} | options), launcher="ray")
    monkeypatch.setattr(ray_ranks, "ROOM_S", 1.0)
    with (
        Omni("omni-sp/shapes", TWO, device="cpu", launcher="ray"),
        pytest.raises(ConfigError, match="need 4 CPUs, and others use all but 2 of"),
    ):
        Omni("omni-sp/shapes", FOUR, device="cpu", launcher="ray")


def test_a_folder_that_a_node_lacks_is_named(nodes: Nodes, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shapes_folder(), folder)

    async def program() -> None:
        omni = AsyncOmni(folder, RING, device="cpu", launcher="ray")
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(ModelNotFoundError, match=f"machine {os.uname().nodename} has no '{folder}'"):
            await omni.start()
        await omni.close()

    bounded(program)


def test_ranks_come_back_after_an_actor_is_killed(nodes: Nodes, picture: np.ndarray[Any, Any]) -> None:
    async def program() -> None:
        async with served(nodes=2) as omni:
            assert_alike(await drawn(omni, lambda: ranks()[1].parent().kill()), picture)
            assert omni.stats.restarts == 1
            ranks()[0].kill()  # between two requests, and the rank alone
            while omni.stats.restarts < 2 or omni.status != "ready":
                await asyncio.sleep(0.1)
            assert_alike(await drawn(omni), picture)

    bounded(program)


def test_ranks_move_when_their_node_is_removed(nodes: Nodes, picture: np.ndarray[Any, Any]) -> None:
    async def program() -> None:
        async with served(TWO) as omni:
            assert_alike(await drawn(omni), picture)
            [raylet] = set(raylets())
            [node] = [node for node in nodes.nodes if raylet_pid(node) == raylet]
            assert_alike(await drawn(omni, lambda: nodes.remove(node)), picture)
            # Ray's workers notice a little later that their node is gone, and a rank draws until then.
            while not omni.stats.restarts or omni.status != "ready":
                await asyncio.sleep(0.1)
            assert_alike(await drawn(omni), picture)
            assert {raylet_pid(node) for node in nodes.nodes} == set(raylets())

    bounded(program)


def test_ranks_wait_for_a_node_that_is_added(nodes: Nodes, picture: np.ndarray[Any, Any]) -> None:
    async def program() -> None:
        news: list[str] = []
        async with served(FOUR, on_news=news.append) as omni:
            nodes.remove(nodes.nodes[-1])
            while not any("waiting for 4 CPUs of the Ray cluster" in line for line in news):
                await asyncio.sleep(0.1)
            nodes.add()
            assert_alike(await drawn(omni), picture)

    bounded(program)


def test_replicas_have_places_of_their_own(nodes: Nodes, picture: np.ndarray[Any, Any]) -> None:
    config = DiffusionParallelConfig(ulysses_degree=2, data_parallel_size=2)

    async def program() -> None:
        async with served(config) as omni:
            pictures = await asyncio.gather(*(drawn(omni) for _ in range(4)))
            for one in pictures:
                assert_alike(one, picture)
            assert all(replica.calls for replica in omni.replicas)

    bounded(program)


PROGRAM = """
import sys, time
from omni_sp import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams

params = OmniDiffusionSamplingParams(width=80, height=64, num_inference_steps=100, seed=1)
with Omni("omni-sp/shapes", DiffusionParallelConfig(ring_degree=2), device="cpu", launcher="ray", nodes=2) as omni:
    print("open", flush=True)
    omni.generate(["a red circle"] * 50, params)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_program_that_is_ended_leaves_nothing(nodes: Nodes, number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"open\n"
        time.sleep(2.0)
        program.send_signal(number)
        program.communicate(timeout=60.0)
        assert program.returncode != 0
    assert becomes_true(lambda: not ranks() and not actors(), 20.0)


def test_the_server_runs_on_ray(nodes: Nodes) -> None:
    command = [
        sys.executable,
        "-m",
        "omni_sp.server",
        "--usp",
        "2",
        "--launcher",
        "ray",
        "--device",
        "cpu",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        address = re.search(r"http://\S+", server.stdout.readline())
        assert address is not None
        assert "is ready after" in server.stdout.readline()
        with urllib.request.urlopen(f"{address[0]}/health", timeout=60) as answer:
            assert answer.status == 200
        server.terminate()
        assert server.wait(60.0) == 0


@pytest.mark.parametrize("rounds", [range(first, first + 5) for first in range(0, 20, 5)], ids="from-{0.start}".format)
def test_twenty_rounds_of_accidents(nodes: Nodes, picture: np.ndarray[Any, Any], rounds: range) -> None:
    """Actors and ranks die in turns, in the middle of requests and between them."""

    async def program() -> None:
        async with served(nodes=2) as omni:
            for round_ in rounds:
                victim = ranks()[round_ % 2]
                if round_ % 4 < 2:
                    victim = victim.parent()
                assert_alike(await drawn(omni, victim.kill), picture)
            assert omni.stats.restarts >= len(rounds)

    bounded(program)


def raylet_pid(node: Any) -> int:
    [process] = node.all_processes["raylet"]
    return int(process.process.pid)
