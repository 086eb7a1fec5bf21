"""Two machines, as two network namespaces of this one: a link that is cut is noticed at both of its ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.processes import becomes_true
from tests.thorough import thorough_only

ROOT = Path(__file__).resolve().parents[2]
CUT_OFF_S = 5.0
BOUNDS = f"""
import os, pickle, time
from pathlib import Path
from omni_sp.engine.messages import RankPlacement
from omni_sp.engine.ranks import agents

agents.CUT_OFF_S, agents._PROBE_S = {CUT_OFF_S}, 1.0
"""
FRONT = """
front = agents.Agents("10.213.7.1", "10.213.7.1")
Path("address.new").write_bytes(pickle.dumps(front.address))
Path("address.new").rename("address")
assert not front.missing([0], 60.0, lambda: None)
Path("connected").touch()
while not front.lost([0]):
    time.sleep(0.05)
"""
AGENT = """
while not Path("address").exists():
    time.sleep(0.05)
placement = RankPlacement(host="far", device="cpu", num_threads=1, parent_pid=0)
agents.run_agent(pickle.loads(Path("address").read_bytes()), 0, placement)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@dataclass(frozen=True)
class Machine:
    """A network namespace with one end of the link.

    Attributes:
        name: of the namespace.
        link: the name of its end.
        address: there.
    """

    name: str
    link: str
    address: str

    def cut(self) -> None:
        """Cut the link at this end; nobody is told."""
        ip("-n", self.name, "link", "set", self.link, "down")

    def mend(self) -> None:
        ip("-n", self.name, "link", "set", self.link, "up")


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines with one link between them."""
    mark = f"osp{os.getpid() % 10000}"
    pair = Machine(f"{mark}a", f"{mark}va", "10.213.7.1"), Machine(f"{mark}b", f"{mark}vb", "10.213.7.2")
    try:
        for machine in pair:
            ip("netns", "add", machine.name)
        ip("link", "add", pair[0].link, "type", "veth", "peer", "name", pair[1].link)
        for machine in pair:
            ip("link", "set", machine.link, "netns", machine.name)
            ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.link)
            ip("-n", machine.name, "link", "set", "lo", "up")
            machine.mend()
    except (OSError, subprocess.SubprocessError) as error:
        delete(pair)
        why = getattr(error, "stderr", None) or error
        pytest.skip(f"no network namespaces here (`ip netns add` needs root, and the kernel's veth): {why}")
    yield pair
    delete(pair)


def delete(pair: tuple[Machine, Machine]) -> None:
    for machine in pair:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            ip("netns", "del", machine.name)


@thorough_only
def test_a_cut_link_ends_the_agent_and_is_told_to_the_front(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    programs = []
    try:
        for machine, program in zip(machines, (FRONT, AGENT), strict=True):
            command = ["ip", "netns", "exec", machine.name, sys.executable, "-c", BOUNDS + program]
            programs.append(subprocess.Popen(command, cwd=tmp_path, env=environment))
        assert becomes_true((tmp_path / "connected").exists, 60.0)
        time.sleep(1.0)
        assert [program.poll() for program in programs] == [None, None]
        machines[1].cut()
        since = time.monotonic()
        assert [program.wait(CUT_OFF_S + 5.0) for program in programs] == [0, 0]
        assert time.monotonic() - since > CUT_OFF_S / 2
    finally:
        for left in programs:
            left.kill()
            left.wait(10.0)
