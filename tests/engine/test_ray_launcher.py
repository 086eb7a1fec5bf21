"""Where the launcher for Ray puts ranks, and how it notices what is gone: on a cluster that is not there."""

from __future__ import annotations

import contextlib
import pickle
import socket
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from omni_sp import AsyncOmni, ConfigError, DiffusionParallelConfig, Omni
from omni_sp.engine.messages import RankPlacement
from omni_sp.engine.ranks import LOOPBACK, agents
from omni_sp.engine.ranks import ray as ray_ranks
from omni_sp.engine.ranks.agents import AgentAddress, AgentReady, socket_of
from omni_sp.engine.ranks.ray import RayLauncher, Room, room_for
from tests.engine.processes import becomes_true

FOUR = DiffusionParallelConfig(ulysses_degree=2, ring_degree=2)


class FakeRay:
    """As much of Ray as the launcher uses: nodes with CPUs, placement groups, and actors that are threads."""

    def __init__(self, **cpus: int) -> None:
        self.cpus = cpus
        self.groups: list[SimpleNamespace] = []
        self.actors: list[FakeActor] = []
        self.util = SimpleNamespace(
            get_node_ip_address=lambda: LOOPBACK,
            placement_group=self._new_group,
            placement_group_table=self._table,
            remove_placement_group=self.groups.remove,
        )
        self.exceptions = SimpleNamespace(
            WorkerCrashedError=KeyError, NodeDiedError=IndexError, RayActorError=RuntimeError, RayTaskError=OSError
        )
        self.imports = True
        self.available_resources = self.cluster_resources = lambda: {"CPU": float(sum(self.cpus.values()))}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": True, "Resources": {"CPU": cpus}} for name, cpus in self.cpus.items()]

    def is_initialized(self) -> bool:
        return True

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda _version: self._actor(options)))

    def wait(self, actors: list[FakeActor], timeout: float, num_returns: int = 1) -> tuple[list[FakeActor], Any]:
        for actor in actors:
            if actor.thread.is_alive():
                actor.thread.join(timeout)
        return [actor for actor in actors if not actor.thread.is_alive()], None

    def get(self, actor: FakeActor, timeout: float) -> None:
        raise RuntimeError("The actor died: ModuleNotFoundError: No module named 'omni_sp'")

    def kill(self, actor: FakeActor, *, no_restart: bool) -> None:
        actor.kill()

    def _actor(self, options: dict[str, Any]) -> FakeActor:
        group, bundle = options["scheduling_strategy"]
        self.actors.append(FakeActor(self._nodes_of(group)[bundle], self.imports))
        return self.actors[-1]

    def _new_group(self, bundles: list[dict[str, float]], strategy: str) -> SimpleNamespace:
        self.groups.append(SimpleNamespace(bundles=bundles, strategy=strategy))
        return self.groups[-1]

    def _nodes_of(self, group: SimpleNamespace) -> dict[int, str]:
        found: dict[int, str] = {}
        free = dict(self.cpus)
        for number, bundle in enumerate(group.bundles):
            taken = found.values() if group.strategy == "STRICT_SPREAD" else ()
            for node in free:
                if free[node] >= bundle["CPU"] and node not in taken:
                    found[number] = node
                    free[node] -= bundle["CPU"]
                    break
        return found

    def _table(self, group: SimpleNamespace) -> dict[str, Any]:
        nodes = self._nodes_of(group)
        return {"state": "CREATED" if len(nodes) == len(group.bundles) else "PENDING", "bundles_to_node_id": nodes}


class FakeActor:
    """An agent that says where it is, and starts nothing."""

    def __init__(self, node: str, imports: bool = True) -> None:
        self.node, self._imports = node, imports
        self.run = SimpleNamespace(remote=self._run)
        self.connection: Any = None

    def kill(self) -> None:
        with contextlib.suppress(OSError, AttributeError), socket_of(self.connection) as there:
            there.shutdown(socket.SHUT_RDWR)

    def _run(self, address: AgentAddress, number: int, ranks_on_node: int) -> FakeActor:
        self.thread = threading.Thread(target=self._listen)
        if not self._imports:
            return self
        self.connection = address.connect()
        placement = RankPlacement(host=self.node, device="cpu", num_threads=ranks_on_node, parent_pid=0)
        self.connection.send_bytes(pickle.dumps(AgentReady(number, placement)))
        self.thread.start()
        return self

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self.connection.recv_bytes()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    """Two nodes of two CPUs."""
    fake = FakeRay(a=2, b=2)
    strategies: Any = SimpleNamespace(
        PlacementGroupSchedulingStrategy=lambda group, placement_group_bundle_index: (
            group,
            placement_group_bundle_index,
        )
    )
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    monkeypatch.setattr(ray_ranks, "connected_ray", lambda: fake)
    monkeypatch.setattr(ray_ranks, "require_ray", lambda: None)
    yield fake
    assert not fake.groups
    assert becomes_true(lambda: not any(actor.thread.is_alive() for actor in fake.actors), 5.0)


@contextlib.contextmanager
def launched(nodes: int | None = None) -> Iterator[RayLauncher]:
    launcher = RayLauncher(nodes)
    try:
        yield launcher
    finally:
        launcher.close()


def hosts(launcher: RayLauncher, config: DiffusionParallelConfig = FOUR, told: list[str] | None = None) -> list[str]:
    placements = launcher.placements(config, "cpu", (told if told is not None else []).append)
    return [placement.host for placement in placements]


def test_a_ulysses_group_is_on_one_node(cluster: FakeRay) -> None:
    with launched() as launcher:
        assert hosts(launcher) == ["a", "a", "b", "b"]
        assert (cluster.groups[0].bundles, cluster.groups[0].strategy) == ([{"CPU": 2.0}] * 2, "PACK")
    with launched(nodes=2) as launcher:
        assert hosts(launcher, DiffusionParallelConfig(ring_degree=2)) == ["a", "b"]
        assert (cluster.groups[0].bundles, cluster.groups[0].strategy) == ([{"CPU": 1.0}] * 2, "STRICT_SPREAD")


def test_actors_that_are_gone_are_replaced_and_others_stay(cluster: FakeRay) -> None:
    with launched() as launcher:
        hosts(launcher)
        cluster.actors[1].kill()
        assert becomes_true(lambda: bool(launcher._agents and launcher._agents.lost([1])), 5.0)
        assert hosts(launcher) == ["a", "a", "b", "b"]
        assert len(cluster.actors) == 5
        cluster.cpus = {"a": 2, "c": 2}  # a node goes, and another one comes
        assert hosts(launcher) == ["a", "a", "c", "c"]
        assert len(cluster.actors) == 7


def test_what_a_cluster_lacks_is_said_and_waited_for_after_the_first_start(
    cluster: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        launched() as launcher,
        pytest.raises(ConfigError, match=r"= 6 ranks need 6 CPUs, 2 CPUs of a .*has 2 nodes with 2"),
    ):
        hosts(launcher, DiffusionParallelConfig(ulysses_degree=2, ring_degree=3))
    with launched() as launcher:
        hosts(launcher)
        del cluster.cpus["b"]
        monkeypatch.setattr(ray_ranks, "ROOM_S", 0.5)
        told: list[str] = []
        with pytest.raises(
            ConfigError, match=r"the Ray cluster has 1 node with 2 CPUs: after 0\.5 s there was no room"
        ):
            hosts(launcher, told=told)
        assert told[0] == "waiting for 4 CPUs of the Ray cluster"
        cluster.cpus["b"] = 2
        assert hosts(launcher) == ["a", "a", "b", "b"]


def test_a_node_without_the_package_is_named(cluster: FakeRay) -> None:
    cluster.imports = False
    with launched() as launcher, pytest.raises(ConfigError, match="cannot be imported on a node of the Ray cluster"):
        hosts(launcher)


def test_who_waits_may_give_up(cluster: FakeRay) -> None:
    def give_up(waited_for: str) -> None:
        raise KeyboardInterrupt

    with launched() as launcher:
        hosts(launcher)
        del cluster.cpus["b"]
        with pytest.raises(KeyboardInterrupt):
            launcher.placements(FOUR, "cpu", give_up)


@pytest.mark.parametrize(
    ("degrees", "nodes", "cpus", "bundles", "fits"),
    [
        ((2, 2), None, [4], (2, 2), True),
        ((2, 2), None, [3, 1], (2, 2), False),
        ((2, 2), 2, [4], (2, 2), False),
        ((2, 2), 2, [2, 3], (2, 2), True),
        ((1, 4), 2, [2, 2], (2, 2), True),
        ((4, 1), 1, [3, 4], (4,), True),
        ((1, 3), None, [1, 1, 1], (1, 1, 1), True),
    ],
)
def test_bundles(
    degrees: tuple[int, int], nodes: int | None, cpus: list[int], bundles: tuple[int, ...], fits: bool
) -> None:
    ulysses, ring = degrees
    room = room_for(DiffusionParallelConfig(ulysses_degree=ulysses, ring_degree=ring), "CPU", nodes)
    assert room.bundles == bundles
    assert (room.lack_in({str(number): count for number, count in enumerate(cpus)}) is None) == fits


def test_bundles_of_all_ranks_are_numbered_in_order() -> None:
    assert [Room("GPU", (4, 4), True, "").bundle_of(rank) for rank in range(8)] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("nodes", [3, 4, 8])
def test_nodes_that_would_part_a_ulysses_group_are_refused(nodes: int) -> None:
    with pytest.raises(ConfigError, match=f"nodes={nodes}: .* 2 Ulysses groups of 2, each of which stays on one node"):
        room_for(FOUR, "GPU", nodes)


@pytest.mark.parametrize("kind", [Omni, AsyncOmni])
def test_launchers_that_cannot_be_are_refused(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    for options, told in (
        ({"launcher": "rai"}, "did you mean ray?"),
        ({"launcher": "mpi"}, "it takes spawn, torchrun, ray"),
        ({"launcher": "torchrun"}, "this process is none of a torchrun job"),
        ({"launcher": "ray"}, r"needs Ray on every machine: pip install '.\[ray\]'"),
        ({"nodes": 2}, 'nodes=2 is for launcher="ray"'),
    ):
        with pytest.raises(ConfigError, match=told):
            kind("omni-sp/shapes", FOUR, **options)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    given: tuple[tuple[dict[str, Any], str], ...] = (
        ({"parallel_config": "auto"}, "looks at the devices of this machine"),
        ({"nodes": 0}, "nodes=0"),
        ({"nodes": True}, "nodes=True"),
    )
    for options, told in given:
        with pytest.raises(ConfigError, match=told):
            kind("omni-sp/shapes", **({"parallel_config": FOUR} | options), launcher="ray")


@pytest.mark.parametrize("launcher", ["spawn", "ray"])
def test_processes_of_a_job_start_no_ranks_of_their_own(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="each process of the job around would start ranks of its own"):
        AsyncOmni("omni-sp/shapes", FOUR, launcher=launcher)


def test_a_connection_to_an_agent_ends_when_its_machine_is_gone() -> None:
    front = agents.Agents(LOOPBACK, LOOPBACK)
    actor = FakeActor("a")
    actor._run(front.address, 0, 1)
    assert front.missing([0], 5.0, lambda: None) == []
    for connection in (actor.connection, front._agents[0]._connection):
        with socket_of(connection) as there:
            assert there.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert there.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == agents.CUT_OFF_S * 1000
    front.close()
    actor.thread.join(5.0)
    assert not actor.thread.is_alive()
