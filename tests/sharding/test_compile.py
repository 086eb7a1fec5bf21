"""Blocks of a sharded transformer compile into one graph and equal eager."""

from __future__ import annotations

import warnings

import pytest
import torch

from omni_sp import ParallelMesh, parallelize
from testing.ranks import RankPool
from testing.reference import randomise, relative_error
from tests.sharding.models import CASES


def compiled(mesh: ParallelMesh, name: str, backend: str) -> float:
    build, make_inputs = CASES[name]
    model, inputs = randomise(build()), make_inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own: old imports, complex numbers that it leaves to eager
        wanted = model(**inputs)[0]
        parallelize(model, mesh)
        blocks = getattr(model, "transformer_blocks", None) or model.blocks
        for block in blocks:
            block.compile(fullgraph=True, backend=backend)  # one graph, or an error
        for _ in range(2):
            got = model(**inputs)[0]
        torch.compiler.reset()
    return relative_error(got, wanted)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (2, 2)], ids=lambda degree: str(degree))
@pytest.mark.parametrize("name", ["qwen, two prompts", "wan"])
def test_blocks_compile_into_one_graph(ranks: RankPool, name: str, ulysses: int, ring: int) -> None:
    """The "eager" backend runs the graph as it was traced, without generating code."""
    for error in ranks.run(compiled, name, "eager", ulysses=ulysses, ring=ring, timeout=300):
        assert error <= 1e-5


def test_generated_code_equals_eager(ranks: RankPool) -> None:
    for error in ranks.run(compiled, "qwen, 5 heads", "inductor", ulysses=2, timeout=300):
        assert error <= 1e-5
