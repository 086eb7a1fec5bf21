"""Ranks on a Ray cluster: an actor for each rank is its agent (see agents.py), and a placement group keeps its place.

A bundle of the placement group is on one node. So the ranks of a Ulysses group, which exchange most, share a bundle;
or, where the number of nodes is given, all ranks of a node do. When an actor dies, another one takes its place in its
bundle; when a node dies, Ray looks for a place for its bundles on others, and actors are started there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import override

from omni_sp.config import DiffusionParallelConfig
from omni_sp.engine.devices import check_device_name, threads_per_rank
from omni_sp.engine.messages import RankPlacement
from omni_sp.engine.ranks import Launcher, OnWait, RankProcess
from omni_sp.engine.ranks.agents import AgentAddress, Agents, run_agent
from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.errors import ConfigError
from omni_sp.validation import require_int
from omni_sp.version import __version__

if TYPE_CHECKING:
    from types import ModuleType

ROOM_S = 60.0
"""How long a placement group may wait for what others use, or for a node in place of one that is gone."""
AGENTS_S = 180.0
"""How long the actors of a placement group may take to start."""
_LEAVE_S = 3.0
_NOT_IMPORTED = re.compile("ModuleNotFoundError|ImportError|failed to import")
_POLL_S = 0.1


@dataclass(frozen=True)
class Room:
    """What the ranks of one replica take of a cluster.

    Attributes:
        resource: what each rank takes one of, "GPU" or "CPU".
        bundles: ranks in each bundle, whose ranks share a node; they follow each other.
        on_own_nodes: each bundle has a node for itself; otherwise they are packed onto as few nodes as can be.
        why: the degrees, for messages.
    """

    resource: str
    bundles: tuple[int, ...]
    on_own_nodes: bool
    why: str

    def bundle_of(self, rank: int) -> int:
        """The bundle that a rank is in."""
        return rank // self.bundles[0]

    def lack_in(self, nodes: Mapping[str, float]) -> str | None:
        """What a cluster lacks whose nodes have so much of the resource each, as a message; None where they suffice."""
        each, total = self.bundles[0], sum(self.bundles)
        if self.on_own_nodes:
            fit = sum(has >= each for has in nodes.values())
        else:
            fit = sum(int(has // each) for has in nodes.values())
        if fit >= len(self.bundles):
            return None
        per_bundle = _amount(each, self.resource)
        if self.on_own_nodes:
            needed = f"{_amount(len(self.bundles), 'node')} with {per_bundle} each"
        else:
            together = f", {per_bundle} of a Ulysses group on one node" if each > 1 else ""
            needed = f"{_amount(total, self.resource)}{together}"
        counts = Counter(int(has) for has in nodes.values())
        has = " and ".join(
            f"{_amount(number, 'node')} with {_amount(count, self.resource)}"
            for count, number in sorted(counts.items(), reverse=True)
        )
        return f"{self.why} need {needed}, and the Ray cluster has {has or f'no {self.resource}'}"


def _amount(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def room_for(config: DiffusionParallelConfig, resource: str, nodes: int | None) -> Room:
    """What the ranks of one replica take.

    Args:
        config: the degrees.
        resource: "GPU" or "CPU".
        nodes: how many nodes share the ranks equally; None for as few as can be.

    Raises:
        ConfigError: the ranks cannot be shared so, or a Ulysses group would be on two nodes.
    """
    size, ulysses = config.world_size, config.ulysses_degree
    if nodes is None:
        return Room(resource, (ulysses,) * (size // ulysses), False, config.equation)
    if size % nodes or size // nodes % ulysses:
        groups = size // ulysses
        raise ConfigError(
            f"nodes={nodes}: {config.equation} are {_amount(groups, 'Ulysses group')} of {ulysses}, "
            f"each of which stays on one node: give a number of nodes that divides {groups}, a lower ulysses_degree "
            "with a higher ring_degree, or leave nodes out"
        )
    return Room(resource, (size // nodes,) * nodes, True, f"{config.equation} on nodes={nodes}")


def require_ray() -> None:
    """Refuse where Ray is not installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("launcher=\"ray\" needs Ray on every machine: pip install '.[ray]'")


class RayLauncher(Launcher):
    """Starts the ranks of one replica on the Ray cluster that this program is connected to, or that runs here.

    Args:
        nodes: how many nodes share the ranks equally; None for as few as can be.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, nodes: int | None = None) -> None:
        require_ray()
        if nodes is not None:
            hint = "give the number of nodes that share the ranks, or None for as few as can be"
            require_int("nodes", nodes, minimum=1, error=ConfigError, hint=hint)
        self._nodes = nodes
        self._owner = os.getpid()
        self._closed = threading.Event()
        self._numbers = itertools.count()
        self._ray: ModuleType | None = None
        self._agents: Agents | None = None
        self._group: Any = None
        self._actors: dict[int, _Actor] = {}

    @property
    @override
    def rendezvous_host(self) -> str:
        assert self._agents is not None, "placements() comes first"
        return self._agents.address.host

    @override
    def placements(self, config: DiffusionParallelConfig, device: str | None, on_wait: OnWait) -> list[RankPlacement]:
        ray = self._ray = self._ray or connected_ray()
        if self._agents is None:
            host = ray.util.get_node_ip_address()
            self._agents = Agents(host, host)
        room = room_for(config, _resource_of(device, ray), self._nodes)
        until = time.monotonic() + ROOM_S + AGENTS_S
        while True:  # a node may go while actors are started on it
            bundle_nodes = self._await_room(ray, room, on_wait)
            missing = self._await_agents(ray, room, bundle_nodes, on_wait)
            if not missing:
                return [self._agents.placement(self._actors[rank].number) for rank in range(config.world_size)]
            if time.monotonic() > until:
                ranks = ", ".join(map(str, missing))
                raise ConfigError(f"the actors of ranks {ranks} did not start on the Ray cluster in {AGENTS_S:g} s")

    @override
    def start(self, rank: int) -> RankProcess:
        assert self._agents is not None, "placements() comes first"
        return self._agents.start(self._actors[rank].number, rank)

    @override
    def close(self) -> None:
        self._closed.set()
        if os.getpid() != self._owner:  # a forked copy of the front does not own the actors
            return
        if self._agents is not None:
            self._agents.close()
        ray = self._ray
        if ray is None or not ray.is_initialized():  # with its program's connection, Ray ends what belongs to it
            return
        actors, self._actors = list(self._actors.values()), {}
        with contextlib.suppress(Exception):
            ray.wait([actor.over for actor in actors], num_returns=max(1, len(actors)), timeout=_LEAVE_S)
        for actor in actors:
            actor.kill(ray)
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(Exception):
                ray.util.remove_placement_group(group)

    def _await_room(self, ray: ModuleType, room: Room, on_wait: OnWait) -> list[str]:
        """Have the placement group, on nodes that are alive. Returns the node of each bundle."""
        is_first = self._group is None
        if is_first:
            lack = room.lack_in(_alive_nodes(ray, room.resource))
            if lack is not None:
                raise ConfigError(f"{lack}: lower the degrees, or add nodes")
            self._group = ray.util.placement_group(
                [{room.resource: float(ranks)} for ranks in room.bundles],
                strategy="STRICT_SPREAD" if room.on_own_nodes else "PACK",
            )
        until = time.monotonic() + ROOM_S
        while True:
            table, alive = ray.util.placement_group_table(self._group), _alive_nodes(ray, room.resource)
            nodes = [table["bundles_to_node_id"].get(bundle) for bundle in range(len(room.bundles))]
            if table["state"] == "CREATED" and all(node in alive for node in nodes):
                return nodes
            if time.monotonic() > until:
                lack = room.lack_in(alive)
                if lack is None:
                    free = ray.available_resources().get(room.resource, 0.0)
                    needed = _amount(sum(room.bundles), room.resource)
                    lack = f"{room.why} need {needed}, and others use all but {free:g} of the Ray cluster's"
                raise ConfigError(f"{lack}: after {ROOM_S:g} s there was no room")
            on_wait(f"waiting for {_amount(sum(room.bundles), room.resource)} of the Ray cluster")
            self._pause()

    def _await_agents(self, ray: ModuleType, room: Room, bundle_nodes: Sequence[str], on_wait: OnWait) -> list[int]:
        """Have a live actor for each rank, connected as its agent. Returns the ranks whose actors are missing."""
        assert self._agents is not None
        ranks_of_node = Counter(bundle_nodes[room.bundle_of(rank)] for rank in range(sum(room.bundles)))
        for rank in range(sum(room.bundles)):
            node, actor = bundle_nodes[room.bundle_of(rank)], self._actors.get(rank)
            if actor is not None and actor.node == node and not self._agents.lost([actor.number]):
                continue
            if actor is not None:
                actor.kill(ray)
            self._actors[rank] = self._new_actor(ray, room, rank, node, ranks_of_node[node])
        numbers = {actor.number: rank for rank, actor in self._actors.items()}
        until = time.monotonic() + AGENTS_S
        while time.monotonic() < until:
            missing = self._agents.missing(numbers, _POLL_S, lambda: None)
            if not missing:
                return []
            on_wait(f"starting actors on the Ray cluster: {len(numbers) - len(missing)} of {len(numbers)} are there")
            self._pause()
            for number in missing:
                actor = self._actors[numbers[number]]
                if actor.is_over(ray) or actor.node not in _alive_nodes(ray, room.resource):
                    del self._actors[numbers[number]]
                    actor.kill(ray)
                    return [numbers[number]]
        return [numbers[number] for number in missing]

    def _new_actor(self, ray: ModuleType, room: Room, rank: int, node: str, ranks_on_node: int) -> _Actor:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert self._agents is not None
        number = next(self._numbers)
        kind = ray.remote(RankAgent).options(
            num_cpus=int(room.resource == "CPU"),
            num_gpus=int(room.resource == "GPU"),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=room.bundle_of(rank)
            ),
        )
        handle = kind.remote(__version__)
        return _Actor(number, node, handle, handle.run.remote(self._agents.address, number, ranks_on_node))

    def _pause(self) -> None:
        if self._closed.wait(_POLL_S):
            raise ConfigError("the launcher was closed while it looked for a place for the ranks")


class RankAgent:
    """The Ray actor: the agent of one rank. Its resources decide on the rank's device."""

    def __init__(self, version: str) -> None:
        self._versions = version, __version__

    def run(self, address: AgentAddress, number: int, ranks_on_node: int) -> None:
        """Be an agent until the front is gone. Actors run in their process's main thread, which the rank watches."""
        run_agent(address, number, self._placement(ranks_on_node))

    def _placement(self, ranks_on_node: int) -> RankPlacement | ConfigError:
        import ray

        host = ray.util.get_node_ip_address()
        theirs, ours = self._versions
        if theirs != ours:
            return ConfigError(f"node {host} has omni-sp {ours}, and the program has {theirs}: install the same on all")
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return RankPlacement(
            host=host,
            device="cuda:0" if gpus else "cpu",  # Ray lets an actor see its own GPU alone
            num_threads=threads_per_rank(ranks_on_node),
            parent_pid=SpawnLauncher().parent_pid(),
            gpu=f"cuda:{gpus[0]}" if gpus else "",
        )


@dataclass(frozen=True)
class _Actor:
    """An actor as the front sees it.

    Attributes:
        number: it has as an agent.
        node: the id of the node that its bundle is on.
        handle: Ray's.
        over: Ray's reference to the end of RankAgent.run().
    """

    number: int
    node: str
    handle: Any
    over: Any

    def is_over(self, ray: ModuleType) -> bool:
        """Whether it has ended. ConfigError where it never could start."""
        if not ray.wait([self.over], timeout=0)[0]:
            return False
        try:
            ray.get(self.over, timeout=_LEAVE_S)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError):
            return True
        except ray.exceptions.RayActorError as error:
            if _NOT_IMPORTED.search(str(error)):
                raise ConfigError(
                    f"omni_sp cannot be imported on a node of the Ray cluster: install it on all of them. {error}"
                ) from error
            return True
        except ray.exceptions.RayTaskError as error:
            raise ConfigError(f"the agent of a rank failed on the Ray cluster: {error}") from error
        return True

    def kill(self, ray: ModuleType) -> None:
        """End it; its rank ends with it."""
        with contextlib.suppress(Exception):
            ray.kill(self.handle, no_restart=True)


def connected_ray() -> ModuleType:
    """Ray, connected to a cluster: as the program has done it, or to the one that RAY_ADDRESS or this machine has.

    Raises:
        ConfigError: there is no cluster, or the program is a client of one from outside.
    """
    import ray

    if not ray.is_initialized():
        with _same_signals():
            try:
                ray.init(address="auto", logging_level=logging.ERROR)
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ConfigError(
                    f"no Ray cluster was found ({reason}): start one with `ray start --head` and, on the other "
                    "machines, `ray start --address=HEAD:6379`; set RAY_ADDRESS; or call ray.init() before"
                ) from error
    if ray.util.client.ray.is_connected():
        raise ConfigError(
            "this program is a client of a Ray cluster from outside (ray://), which ranks cannot reach: run it on a "
            "node, such as with `ray job submit`"
        )
    return cast("ModuleType", ray)


@contextlib.contextmanager
def _same_signals() -> Iterator[None]:
    """Keep what SIGTERM does: ray.init() sets a handler of its own in the main thread."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _alive_nodes(ray: ModuleType, resource: str) -> dict[str, float]:
    """How much of a resource each node has that is alive and has some, by its id."""
    nodes = {node["NodeID"]: float(node["Resources"].get(resource, 0.0)) for node in ray.nodes() if node["Alive"]}
    return {name: amount for name, amount in nodes.items() if amount}


def _resource_of(device: str | None, ray: ModuleType) -> str:
    check_device_name(device)
    if device is not None and ":" in device:
        raise ConfigError(f'device="{device}": Ray gives each rank its GPU; give "cuda", "cpu", or None to choose')
    if device is None:
        return "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    return "CPU" if device == "cpu" else "GPU"
