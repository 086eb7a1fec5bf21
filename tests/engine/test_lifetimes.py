"""Whole programs with real ranks: how they start, how they end, and that nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omni_sp import Omni, OmniDiffusionSamplingParams
from tests.engine.processes import alive, becomes_true, descendants
from tests.preloaded import python

ROOT = Path(__file__).resolve().parents[2]

JOINING = """
from pathlib import Path

from omni_sp import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams

config = DiffusionParallelConfig(cfg_parallel_size=2, ulysses_degree=2, vae_parallel=True, shard_weights=True)
with Omni("omni-sp/shapes", config, device="cpu") as omni:
    asked = OmniDiffusionSamplingParams(width=80, height=64, num_inference_steps=3, seed=11)
    drawn = omni.generate("a red circle on a blue background", asked)[0]
    drawn.images[0].save(f"rank-{omni.info.rank}.png")
    assert drawn.metrics["branches"]["units"] == 6, drawn.metrics["branches"]
    assert drawn.metrics["vae_ranks"] == 4
    assert drawn.metrics["encoder_ranks"] == {"text_encoder": [0, 2]}, drawn.metrics["encoder_ranks"]
    asked = OmniDiffusionSamplingParams(width=16, height=16, num_inference_steps=1)
    # A file each: what several processes print to one pipe may run together.
    Path(f"seed-{omni.info.rank}").write_text(str(omni.generate("a star", asked)[0].metrics["seed"]))
"""

UNGUARDED = """
from omni_sp import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams

print("once")
omni = Omni("omni-sp/shapes", DiffusionParallelConfig(ulysses_degree=2), device="cpu")
asked = OmniDiffusionSamplingParams(width=16, height=16, num_inference_steps=1)
print(omni.generate("a red circle", asked)[0].images[0].size)

from tests.engine.processes import descendants, rank_processes
assert len(descendants()) == 3  # the ranks, and the process that they are forks of
print(*rank_processes())
"""

BUSY = """
from omni_sp import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams

omni = Omni("omni-sp/shapes", DiffusionParallelConfig(ulysses_degree=2), device="cpu")
print("ready", flush=True)
omni.generate("a red circle", OmniDiffusionSamplingParams(num_inference_steps=100_000))
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Where to write a program, and the environment to run it in."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    python()  # which stays
    before = descendants()
    yield tmp_path / "program.py", environment
    assert becomes_true(lambda: descendants() <= before, 5.0)


def test_every_rank_of_torchrun_gets_the_picture_of_all_axes(program: tuple[Path, dict[str, str]]) -> None:
    path, environment = program
    path.write_text(JOINING)
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(path)]
    done = subprocess.run(
        torchrun, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    with Omni("omni-sp/shapes", device="cpu") as omni:
        asked = OmniDiffusionSamplingParams(width=80, height=64, num_inference_steps=3, seed=11)
        alone = np.asarray(omni.generate("a red circle on a blue background", asked)[0].images[0], dtype=np.int16)
    for rank in range(4):
        with Image.open(path.parent / f"rank-{rank}.png") as picture:
            shared = np.asarray(picture, dtype=np.int16)
        assert np.abs(alone - shared).max() <= 2
    assert len({(path.parent / f"seed-{rank}").read_text() for rank in range(4)}) == 1


def test_a_script_needs_no_guard_and_its_end_leaves_nothing(program: tuple[Path, dict[str, str]]) -> None:
    path, environment = program
    path.write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    once, size, ranks = done.stdout.splitlines()
    assert (once, size) == ("once", "(16, 16)")
    assert len(ranks.split()) == 2
    assert not any(alive(int(rank)) for rank in ranks.split())


def test_a_front_that_is_killed_takes_busy_ranks_with_it(program: tuple[Path, dict[str, str]]) -> None:
    path, environment = program
    path.write_text(BUSY)
    with subprocess.Popen([sys.executable, str(path)], env=environment, stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout is not None
        assert front.stdout.readline() == "ready\n"
        ranks = descendants(front.pid)
        assert len(ranks) == 3
        front.send_signal(signal.SIGKILL)
        front.wait(10)
    assert becomes_true(lambda: not any(alive(rank) for rank in ranks), 10.0)
