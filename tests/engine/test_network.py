"""Two machines, as two network namespaces of this one: a link that is cut is noticed at both of its ends.

A torchrun job over them has namespaces of processes too: its ranks then cannot read each other's memory, as on machines
that are two, and all processes of a machine end with its first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omni_sp import Omni, OmniDiffusionSamplingParams
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
JOB = """
import asyncio, sys
from omni_sp import AsyncOmni, DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.events import RequestDone, RequestProgress


async def main():
    params = OmniDiffusionSamplingParams(width=80, height=64, num_inference_steps=int(sys.argv[1]), seed=1)
    omni = AsyncOmni("omni-sp/shapes", DiffusionParallelConfig(ring_degree=2), device="cpu")
    if not omni.is_main:
        await omni.supervise_rank()
        Path("agent-is-over").touch()
        return
    async with omni:
        async for event in omni.generate("a red circle", params):
            if isinstance(event, RequestProgress) and event.done == 2:
                Path("draws").touch()
        if isinstance(event, RequestDone):
            event.output.images[0].save("picture.png")
        else:
            sys.exit(f"no picture: {event.error}")


asyncio.run(main())
"""
JOB_S = 120.0
"""How long a job may take to draw, and to end after its machines lost each other: it tries to start again for 21 s."""


def ip(*words: str) -> str:
    printed: str = subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20).stdout
    return printed


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

    def pids(self) -> list[int]:
        """Its processes."""
        return list(map(int, ip("netns", "pids", self.name).split()))

    def kill(self) -> None:
        """End all of its processes at once."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def machines(network: tuple[Machine, Machine]) -> tuple[Machine, Machine]:
    """Two machines that can reach each other, whatever a test before has cut."""
    for machine in network:
        machine.mend()
    return network


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Machine, Machine]]:
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


class Job:
    """A torchrun job with a rank on each of two machines.

    Args:
        machines: the first one has rank 0, the front.
        folder: where it writes what the program writes.
        steps: of the one picture that it draws.
    """

    def __init__(self, machines: tuple[Machine, Machine], folder: Path, steps: int) -> None:
        self._machines = machines
        self._outputs = [(folder / f"{machine.name}.log").open("w+") for machine in machines]
        (folder / "job.py").write_text(BOUNDS + JOB)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        isolated = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--master-addr", machines[0].address, "--master-port", "29500"]
        self._programs = [
            subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    machine.name,
                    *isolated,
                    *torchrun,
                    "--node-rank",
                    str(i),
                    "job.py",
                    str(steps),
                ],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for i, (machine, output) in enumerate(zip(machines, self._outputs, strict=True))
        ]

    @property
    def exit_codes(self) -> list[int | None]:
        return [program.poll() for program in self._programs]

    def wait(self) -> list[int | None]:
        """The exit codes, once all of it has ended."""
        becomes_true(lambda: None not in self.exit_codes, JOB_S)
        return self.exit_codes

    def said(self) -> list[str]:
        """What each machine has printed."""
        for output in self._outputs:
            output.seek(0)
        return [output.read() for output in self._outputs]

    def close(self) -> None:
        for machine in self._machines:
            machine.kill()
        for program in self._programs:
            program.kill()
            program.wait(10.0)
        for output in self._outputs:
            output.close()


@contextlib.contextmanager
def job(machines: tuple[Machine, Machine], folder: Path, steps: int) -> Iterator[Job]:
    folder.mkdir()
    running = Job(machines, folder, steps)
    try:
        yield running
    finally:
        running.close()


def assert_a_job_works(machines: tuple[Machine, Machine], folder: Path) -> None:
    """A new job draws what one process draws."""
    with job(machines, folder, 4) as running:
        assert running.wait() == [0, 0], "\n".join(running.said())
        assert not [pid for machine in machines for pid in machine.pids()]
    with Omni("omni-sp/shapes", device="cpu") as omni:
        params = OmniDiffusionSamplingParams(width=80, height=64, num_inference_steps=4, seed=1)
        wanted = omni.generate("a red circle", params)[0].images[0]
    with Image.open(folder / "picture.png") as drawn:
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(wanted).astype(int)).max() <= 2


@thorough_only
@pytest.mark.parametrize("what", ["link", "front", "other"])
def test_a_job_ends_when_its_machines_lose_each_other(
    machines: tuple[Machine, Machine], tmp_path: Path, what: str
) -> None:
    """In the middle of a picture the link is cut, or all processes of a machine are killed."""
    lost = {"link": None, "front": 0, "other": 1}[what]
    with job(machines, tmp_path / "lost", 100_000) as running:
        drawing = tmp_path / "lost" / "draws"
        assert becomes_true(lambda: drawing.exists() or None not in running.exit_codes, JOB_S)
        assert drawing.exists(), "\n".join(running.said())
        if lost is None:
            machines[1].cut()
        else:
            machines[lost].kill()
        try:
            codes = running.wait()
            left = [machine.pids() for machine in machines]
        finally:
            machines[1].mend()
        said = running.said()
        assert None not in codes, "\n".join(said)
        assert left == [[], []]
        assert 0 not in codes, "\n".join(said)
        if lost != 0:
            assert "start the job anew" in said[0], said[0]
        if lost != 1:
            assert "rank 0's process of the job is gone" in said[1], said[1]
    assert_a_job_works(machines, tmp_path / "next")
