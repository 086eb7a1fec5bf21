"""``ray stop`` in the middle of a picture: the call ends by an error, no rank is left, and the next cluster draws.

It ends every process of Ray's on a machine, also those of others. So all of this runs in namespaces of its own, for
processes and for the network, and whatever is left there ends with the first process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from omni_sp import Omni, OmniDiffusionSamplingParams
from tests.thorough import thorough_only

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ("unshare", "--pid", "--fork", "--mount-proc", "--net", "--kill-child")
PROGRAM = """
import sys
import numpy as np
from omni_sp import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams

params = OmniDiffusionSamplingParams(width=80, height=64, num_inference_steps=int(sys.argv[2]), seed=1)
with Omni("omni-sp/shapes", DiffusionParallelConfig(ring_degree=2), device="cpu", launcher="ray") as omni:
    print("open", flush=True)
    for output in omni.generate(["a red circle"] * int(sys.argv[1]), params):
        np.save("picture.npy", np.asarray(output.images[0]))
"""
MACHINE = """
import subprocess, sys, time
import psutil

def ray(*words):
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words], check=True, timeout=120, stdout=sys.stderr)

def start():
    where = ("--port", "6379", "--node-ip-address", "127.0.0.1", "--temp-dir", sys.argv[1])
    ray("start", "--head", *where, "--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats",
        "--object-store-memory", "83886080")

def program(*words):
    command = [sys.executable, "program.py", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def others():
    ours = {psutil.Process().pid, drawing.pid}
    return [x.cmdline() for x in psutil.process_iter() if x.pid not in ours and x.status() != psutil.STATUS_ZOMBIE]

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
start()
drawing = program("50", "100")
assert drawing.stdout.readline() == "open\\n", drawing.communicate()
time.sleep(2.0)
ray("stop")
_, errors = drawing.communicate(timeout=90)
print(drawing.returncode, errors.strip().splitlines()[-1])
until = time.monotonic() + 20
while others() and time.monotonic() < until:
    time.sleep(0.1)
print("left:", others())
start()
drawing = program("1", "4")
_, errors = drawing.communicate(timeout=180)
print(drawing.returncode, errors if drawing.returncode else "")
"""


def lacks() -> str | None:
    """Why it cannot be tried here."""
    if importlib.util.find_spec("ray") is None:
        return "needs Ray: pip install '.[ray]'"
    try:
        tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, timeout=20)
    except OSError as error:
        return f"needs unshare: {error}"
    return f"needs namespaces: {tried.stderr.strip()}" if tried.returncode else None


@thorough_only
def test_ray_stop_ends_the_call_and_the_next_cluster_draws(tmp_path: Path) -> None:
    if (reason := lacks()) is not None:
        pytest.skip(reason)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "machine.py").write_text(MACHINE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "127.0.0.1:6379"}
    # The names of Ray's sockets have to be short.
    ray_folder = f"/tmp/omni-sp-ray-{os.getpid()}"
    try:
        machine = subprocess.run(
            [*NAMESPACES, sys.executable, "machine.py", ray_folder],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
    finally:
        subprocess.run(["rm", "-rf", ray_folder], check=False)
    assert machine.returncode == 0, machine.stderr[-3000:]
    stopped, left, again = machine.stdout.splitlines()
    assert stopped.startswith("1 omni_sp.errors.RankFailedError: "), stopped
    assert "out of reach" in stopped
    assert left == "left: []"
    assert again.strip() == "0"
    with Omni("omni-sp/shapes", device="cpu") as omni:
        params = OmniDiffusionSamplingParams(width=80, height=64, num_inference_steps=4, seed=1)
        alone = np.asarray(omni.generate("a red circle", params)[0].images[0]).astype(int)
    assert np.abs(np.load(tmp_path / "picture.npy").astype(int) - alone).max() <= 2
