"""What a call of the core costs: every kind of call runs, and is timed and counted."""

from __future__ import annotations

import math

import torch.distributed as dist

from benchmarks import core


def test_every_kind_of_call_is_timed_and_counted() -> None:
    found = core.measure(2, 2, repeats=1)
    assert not dist.is_initialized()
    assert {core.KERNEL, core.EVEN} < found.keys()
    assert all(0 < timing.median < math.inf for timing in found.values())
    assert 0 < found[core.KERNEL].facts["operations"] < found[core.EVEN].facts["operations"] <= 30
    text = core.table("2x2", found)
    assert all(kind in text for kind in found)
