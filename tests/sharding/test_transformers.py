"""Sharded transformers against the same transformer on one process, fp32 and bf16."""

from __future__ import annotations

import pytest
import torch

from omni_sp import parallelize
from omni_sp.mesh import ParallelMesh
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.one_rank import by_one_rank
from tests.sharding.models import CASES, qwen_image, qwen_inputs
from tests.thorough import in_turns

LAYOUTS = [(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)]


def compare(mesh: ParallelMesh, name: str, dtype: torch.dtype) -> tuple[float, float, bool, dict[str, int]]:
    """Error sharded, error of this dtype itself, whether remove() gives back the very bits, tokens."""
    build, make_inputs = CASES[name]
    model, inputs = randomise(build()), make_inputs()
    with torch.no_grad():
        wanted = by_one_rank(mesh, lambda: model(**inputs)[0])
        model.to(dtype)
        inputs = {
            key: value.to(dtype)
            if isinstance(value, torch.Tensor) and key.endswith(("states", "projections"))
            else value
            for key, value in inputs.items()
        }
        alone = wanted if dtype == torch.float32 else by_one_rank(mesh, lambda: model(**inputs)[0])
        handle = parallelize(model, mesh)
        for _ in range(2):  # lengths are learned on the first forward, known on the second
            sharded = model(**inputs)[0]
        tokens = handle.tokens
        handle.remove()
        again = model(**inputs)[0]
    assert sharded.shape == wanted.shape
    return relative_error(sharded, wanted), relative_error(alone, wanted), torch.equal(again, alone), tokens


# tests/sharding/test_zoo.py has the classes themselves on all layouts.
@pytest.mark.parametrize(("name", "layout"), in_turns(CASES, LAYOUTS, each=2), ids=str)
def test_fp32_equals_one_process(ranks: RankPool, name: str, layout: tuple[int, int]) -> None:
    ulysses, ring = layout
    for error, _, restored, _ in ranks.run(compare, name, torch.float32, ulysses=ulysses, ring=ring):
        assert error <= 1e-5
        assert restored


@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS, ids=lambda degree: str(degree))
@pytest.mark.parametrize("name", ["qwen, two prompts", "wan"])
def test_bf16_is_as_good_as_one_process(ranks: RankPool, name: str, ulysses: int, ring: int) -> None:
    for error, own, restored, _ in ranks.run(compare, name, torch.bfloat16, ulysses=ulysses, ring=ring):
        assert error <= 1.5 * own
        assert restored


def test_tokens_are_counted(ranks: RankPool) -> None:
    for *_, tokens in ranks.run(compare, "qwen, two prompts", torch.float32, ulysses=2):
        assert tokens == {"hidden_states": 35, "encoder_hidden_states": 13}


def changing(mesh: ParallelMesh) -> list[float]:
    """A model called with token counts that leave some ranks' shards as long as before."""
    model = randomise(qwen_image())
    calls = [qwen_inputs(height=5, width=7, text=text) for text in (8, 7, 8, 6)]
    with torch.no_grad():
        wanted = [model(**inputs)[0] for inputs in calls]
        parallelize(model, mesh)
        return [relative_error(model(**inputs)[0], one) for inputs, one in zip(calls, wanted, strict=True)]


@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (2, 2)], ids=lambda degree: str(degree))
def test_lengths_that_change_on_other_ranks_only(ranks: RankPool, ulysses: int, ring: int) -> None:
    for errors in ranks.run(changing, ulysses=ulysses, ring=ring):
        assert max(errors) <= 1e-5
