"""Blocks of a sharded transformer compile into one graph and equal eager."""

from __future__ import annotations

import pytest
import torch

from omni_sp import ParallelMesh, parallelize
from tests.attention.reference import relative_error
from tests.ranks import RankPool
from tests.sharding.models import CASES, randomise


def compiled(mesh: ParallelMesh, name: str) -> float:
    build, make_inputs = CASES[name]
    model, inputs = randomise(build()), make_inputs()
    with torch.no_grad():
        wanted = model(**inputs)[0]
        parallelize(model, mesh)
        blocks = getattr(model, "transformer_blocks", None) or model.blocks
        for block in blocks:
            # One graph or an error; the "eager" backend runs it as traced, without minutes of code generation.
            block.compile(fullgraph=True, backend="eager")
        for _ in range(2):
            got = model(**inputs)[0]
        torch.compiler.reset()
    return relative_error(got, wanted)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2)], ids=lambda degree: str(degree))
@pytest.mark.parametrize("name", ["qwen, two prompts", "wan"])
def test_blocks_compile_into_one_graph(ranks: RankPool, name: str, ulysses: int, ring: int) -> None:
    for error in ranks.run(compiled, name, ulysses=ulysses, ring=ring, timeout=300):
        assert error <= 1e-5
