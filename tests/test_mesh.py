"""Meshes over all ranks of a job, and over some of them side by side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni_sp import ConfigError, DiffusionParallelConfig, ParallelMesh, parallelize
from omni_sp.attention import sequence_parallel_attention
from omni_sp.collectives import gather_ints, require_equal
from omni_sp.errors import ShardingError
from omni_sp.mesh import Axis
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import attention, randomise, relative_error
from tests.sharding.models import qwen_image, qwen_inputs

HALVES = {
    "ulysses and ring": (DiffusionParallelConfig(ulysses_degree=2), DiffusionParallelConfig(ring_degree=2)),
    "two replicas": (DiffusionParallelConfig(ulysses_degree=2), DiffusionParallelConfig(ulysses_degree=2)),
}


def half_mesh(job: ParallelMesh, name: str) -> ParallelMesh:
    """The mesh of this rank's half of a job of four: ranks 0 and 1, or 2 and 3."""
    half = job.rank // 2
    return ParallelMesh(HALVES[name][half], ranks=(2 * half, 2 * half + 1))


def attend_in_halves(job: ParallelMesh, name: str) -> tuple[float, tuple[int, ...], int]:
    """Each half attends to tokens of its own, uneven and masked; the halves call the core unequally often."""
    mesh, half = half_mesh(job, name), job.rank // 2
    generator = torch.Generator().manual_seed(half)
    lengths = ((5, 2), (0, 7))[half]
    worst = 0.0
    for _ in range(1 + 2 * half):
        q, k, v = (torch.randn(2, sum(lengths), heads, 32, generator=generator) for heads in (6, 3, 3))
        mask = torch.rand(2, sum(lengths), generator=generator) > 0.4
        own = slice(sum(lengths[: mesh.rank]), sum(lengths[: mesh.rank + 1]))
        out = sequence_parallel_attention(q[:, own], k[:, own], v[:, own], key_mask=mask[:, own], mesh=mesh)
        if out.numel():
            worst = max(worst, relative_error(out, attention(q, k, v, key_mask=mask)[:, own]))
    return worst, mesh.ranks, mesh.rank


@pytest.mark.parametrize("name", HALVES)
def test_two_meshes_run_side_by_side(ranks: RankPool, name: str) -> None:
    answers = ranks.run(attend_in_halves, name, ulysses=2, ring=2)
    assert [answer[1:] for answer in answers] == [((0, 1), 0), ((0, 1), 1), ((2, 3), 0), ((2, 3), 1)]
    assert max(error for error, *_ in answers) <= 2e-6


def draw_in_halves(job: ParallelMesh) -> float:
    """Two replicas of one transformer compute inputs of their own: 13 and 3 text tokens, two prompts in a batch."""
    mesh, half = half_mesh(job, "ulysses and ring"), job.rank // 2
    model, inputs = randomise(qwen_image()), qwen_inputs(text=(13, 3)[half], batch=2)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        handle = parallelize(model, mesh)
        sharded = model(**inputs)[0]
        handle.remove()
    return relative_error(sharded, wanted)


def test_two_replicas_of_a_transformer_are_exact(ranks: RankPool) -> None:
    assert max(ranks.run(draw_in_halves, ulysses=2, ring=2)) <= 1e-5


def build_after_unequal_histories(job: ParallelMesh) -> list[tuple[int, ...]]:
    """Ranks 0 and 1 are in more process groups than rank 2 when the three of them build a mesh."""
    if job.rank < 2:
        ParallelMesh(DiffusionParallelConfig(ring_degree=2), ranks=[0, 1])
    if job.rank == 3:
        return []
    return gather_ints([job.rank], ParallelMesh(DiffusionParallelConfig(ulysses_degree=3), ranks=[0, 1, 2]).world)


def test_ranks_in_unequal_numbers_of_groups_build_a_mesh(ranks: RankPool) -> None:
    assert ranks.run(build_after_unequal_histories, ulysses=2, ring=2) == [[(0,), (1,), (2,)]] * 3 + [[]]


def build_alone(job: ParallelMesh) -> tuple[tuple[int, ...], int, str, str, str]:
    """A mesh of this rank alone, and meshes that cannot be."""
    own = ParallelMesh(DiffusionParallelConfig(), ranks=[job.rank])
    two = DiffusionParallelConfig(ring_degree=2)
    messages = []
    for ranks in ([0, 1, 2], [1, 0], [job.rank ^ 1, 4]):
        with pytest.raises(ConfigError) as error:
            ParallelMesh(two, ranks=ranks)
        messages.append(str(error.value))
    return own.ranks, own.sequence.size, messages[0], messages[1], messages[2]


def test_a_mesh_of_one_rank_and_meshes_that_cannot_be(ranks: RankPool) -> None:
    for rank, (mesh_ranks, size, three, descending, unknown) in enumerate(ranks.run(build_alone, ulysses=2, ring=2)):
        assert (mesh_ranks, size) == ((rank,), 1)
        assert "= 2 ranks, but ranks=[0, 1, 2] of a job of 4: give as many ranks as the product" in three
        assert "ranks=[1, 0] of a job of 4" in descending
        assert "of a job of 4" in unknown


def build_a_strangers_mesh(job: ParallelMesh) -> str:
    with pytest.raises(ConfigError) as error:
        ParallelMesh(DiffusionParallelConfig(), ranks=[(job.rank + 1) % 2])
    return str(error.value)


def test_a_rank_builds_the_mesh_that_it_is_in(ranks: RankPool) -> None:
    assert ranks.run(build_a_strangers_mesh, ulysses=2)[0] == (
        "rank 0 builds a mesh of ranks [1]: each rank builds the mesh that it is in"
    )


@pytest.mark.parametrize("config", [None, "auto", {"ulysses_degree": 2}])
def test_a_mesh_of_something_else_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="give a DiffusionParallelConfig"):
        ParallelMesh(config)
    with pytest.raises(ConfigError, match="give a list of ranks"):
        ParallelMesh(DiffusionParallelConfig(), ranks=0)  # type: ignore[arg-type]


def axis_of_a_group(mesh: ParallelMesh) -> tuple[tuple[int, ...], int, bool, list[tuple[int, ...]]]:
    assert mesh.ring.group is not None
    axis = Axis.of_group(mesh.ring.group, "of the user", shared_memory=False)
    return axis.ranks, axis.rank, axis.channel is None, gather_ints([mesh.rank], axis)


def test_an_axis_of_an_existing_group(ranks: RankPool) -> None:
    got = ranks.run(axis_of_a_group, ulysses=2, ring=2)
    assert got[3] == ((1, 3), 1, True, [(1,), (3,)])


def compare_values(mesh: ParallelMesh, odd: str) -> str:
    """Ranks that hold the same but for one value on rank 2."""
    x = torch.arange(6.0)
    values: dict[str, Any] = {
        "number": 7,
        "large": 2**70,
        "name": "a",
        "dtype": torch.float32,
        "tensor": x,
        "nothing": None,
    }
    values |= {"picture": Image.new("L", (3, 2), 5), "items": [1, {"b": x, "a": 2}], "array": np.arange(5000)}
    other = {
        "picture": Image.new("L", (2, 3), 5),
        "items": [1, {"b": x + 1, "a": 2}],
        "array": np.arange(5000) * np.where(np.arange(5000) == 2500, 2, 1),
        "number": 8,
        "large": 2**70 + 1,
        "name": "b",
        "dtype": torch.bfloat16,
        "tensor": x.flip(0),
        "nothing": torch.zeros(0),
    }
    if mesh.rank == 2 and odd:
        values[odd] = other[odd]
    try:
        return str(require_equal(mesh.world, "{name} differs on {ranks}: {values}", gathered=[mesh.rank], **values))
    except ShardingError as error:
        return str(error)


@pytest.mark.parametrize(
    "odd", ["number", "large", "name", "dtype", "tensor", "nothing", "picture", "items", "array", ""]
)
def test_what_differs_between_ranks_is_named(ranks: RankPool, odd: str) -> None:
    messages = ranks.run(compare_values, odd, ulysses=2, ring=2)
    if not odd:
        assert messages == [str([(0,), (1,), (2,), (3,)])] * 4
        return
    assert len({*messages}) == 1, "all ranks raise alike"
    assert messages[0].startswith(f"{odd} differs on [2]: rank 0: ")
    if odd in ("number", "dtype"):
        assert f"rank 2: {8 if odd == 'number' else torch.bfloat16}" in messages[0]


THREADS_AFTER_THE_JOB = """
import os
import torch.distributed as dist
from omni_sp import DiffusionParallelConfig, ParallelMesh

dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
from transformers.models.llama import modeling_llama

mesh = ParallelMesh(DiffusionParallelConfig())
dist.barrier()
dist.destroy_process_group()
print(*(open(f"/proc/self/task/{{task}}/comm").read().strip() for task in os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads' names from /proc")
def test_no_thread_of_a_group_runs_on_after_its_end(tmp_path: Path) -> None:
    """One that still ran as the interpreter ends would abort the process."""
    program = THREADS_AFTER_THE_JOB.format(file=tmp_path / "rendezvous")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip()
    assert "gloo" not in done.stdout
