"""Whole, unmodified diffusers pipelines under parallelize() against the same pipeline on one process."""

from __future__ import annotations

import pytest
import torch

from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error
from tests.pipelines.zoo.all import ENTRIES
from tests.pipelines.zoo.check import LAYOUTS, draw_sharded, expected_output
from tests.pipelines.zoo.qwen_flux_wan import ENTRIES as QWEN_FLUX_WAN
from tests.thorough import THOROUGH, in_turns

# Where Ulysses meets ring, and where shares are uneven, in turns; OMNI_SP_THOROUGH=1 runs each pipeline on both.
RUNS = in_turns([entry_id for entry_id, entry in ENTRIES.items() if entry.runs_here], LAYOUTS)
SOME = [entry.id for entry in QWEN_FLUX_WAN]
RUNS += in_turns(SOME, [(2, 1), (1, 2), (1, 3)])


@pytest.mark.parametrize(("entry_id", "layout"), RUNS, ids=str)
def test_fp32_equals_one_process(ranks: RankPool, entry_id: str, layout: tuple[int, int]) -> None:
    expected, (ulysses, ring) = expected_output(ranks, entry_id), layout
    # That remove() gives the bits back is proven for every transformer by tests/sharding.
    unsharded = expected if THOROUGH or layout == (2, 1) else None
    answers = ranks.run(draw_sharded, entry_id, torch.float32, unsharded, ulysses=ulysses, ring=ring)
    for sharded, restored, tokens in answers:
        assert relative_error(sharded, expected) <= ENTRIES[entry_id].error
        assert restored
        assert tokens


@pytest.mark.parametrize(("entry_id", "layout"), in_turns(SOME, LAYOUTS), ids=str)
def test_bf16_is_as_good_as_one_process(ranks: RankPool, entry_id: str, layout: tuple[int, int]) -> None:
    ulysses, ring = layout
    expected, unsharded = (expected_output(ranks, entry_id, dtype) for dtype in (torch.float32, torch.bfloat16))
    answers = ranks.run(draw_sharded, entry_id, torch.bfloat16, unsharded, ulysses=ulysses, ring=ring)
    for sharded, restored, _ in answers:
        assert relative_error(sharded, expected) <= 1.5 * relative_error(unsharded, expected)
        assert restored
