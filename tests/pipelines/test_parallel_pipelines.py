"""Whole, unmodified diffusers pipelines under parallelize() against the same pipeline on one process."""

from __future__ import annotations

import pytest
import torch

from testing.ranks import RankPool
from tests.pipelines.zoo.all import ENTRIES
from tests.pipelines.zoo.check import LAYOUTS, compare
from tests.pipelines.zoo.planned import ENTRIES as PLANNED
from tests.thorough import THOROUGH

# Where Ulysses meets ring, and where shares are uneven, in turns; OMNI_SP_THOROUGH=1 runs each pipeline on both.
RUNS = [
    (entry_id, layout)
    for number, entry_id in enumerate(ENTRIES)
    for turn, layout in enumerate(LAYOUTS)
    if number % len(LAYOUTS) == turn or THOROUGH
]
RUNS += [(entry.id, layout) for layout in [(2, 1), (1, 2), (1, 3)] for entry in PLANNED]


@pytest.mark.parametrize(("entry_id", "layout"), RUNS, ids=str)
def test_fp32_equals_one_process(ranks: RankPool, entry_id: str, layout: tuple[int, int]) -> None:
    ulysses, ring = layout
    # That remove() gives the bits back is proven for every transformer by tests/sharding.
    looks_again = THOROUGH or (ulysses, ring) not in LAYOUTS
    results = ranks.run(compare, entry_id, torch.float32, looks_again, ulysses=ulysses, ring=ring)
    for error, _, restored, tokens in results:
        assert error <= ENTRIES[entry_id].error
        assert restored
        assert tokens


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (3, 1)], ids=lambda degree: str(degree))
@pytest.mark.parametrize("entry_id", [entry.id for entry in PLANNED])
def test_bf16_is_as_good_as_one_process(ranks: RankPool, entry_id: str, ulysses: int, ring: int) -> None:
    for error, own, restored, _ in ranks.run(compare, entry_id, torch.bfloat16, ulysses=ulysses, ring=ring):
        assert error <= 1.5 * own
        assert restored
