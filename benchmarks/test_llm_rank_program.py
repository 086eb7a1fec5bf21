"""One rank's program of a language model: its counts equal the formulas, and its table holds finite numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from benchmarks.interleaved import Timing
from benchmarks.llm_rank_program import DECODE, PREFILL, Model, Setting, absent_ranks, measure, table

BYTES = 4
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 16, 8, 4
BANDWIDTH, LATENCY = 1e9, 1e-6
SETTING = Setting(
    Model(HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, layers=3), "cpu", torch.float32, BANDWIDTH, LATENCY, rounds=2
)
MATRICES = HIDDEN * (2 * (HEADS + KV_HEADS) * HEAD_DIM + 3 * INNER) * BYTES


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with absent_ranks(8):
        yield
    assert not dist.is_initialized()


def all_reduced(tokens: int, ranks: int) -> float:
    """Two all-reduces of hidden states; a ring sends all but a rank's share of them twice."""
    return 2 * tokens * HIDDEN * BYTES * 2 * (ranks - 1) / ranks


def traded(tokens: int, tensor: int, sequence: int) -> float:
    """Bytes for other ranks of its tokens' queries, keys and values, and of its heads' outputs."""
    own, heads, kv_heads = tokens / sequence, HEADS / tensor, KV_HEADS / tensor
    there = own * (heads + 2 * kv_heads) * HEAD_DIM * BYTES * (sequence - 1) / sequence
    back = (tokens - own) * heads / sequence * HEAD_DIM * BYTES
    return there + back


def require_numbers(timings: dict[str, Timing], text: str) -> None:
    for name, timing in timings.items():
        values = [timing.median, *timing.facts.values()]
        assert all(math.isfinite(value) and value > 0 for value in values), (name, values)
        exchange = timing.facts["sent_bytes"] / BANDWIDTH + timing.facts["collectives"] * LATENCY
        assert timing.facts["projected_exchange_s"] == pytest.approx(exchange)
        assert timing.facts["projected_whole_s"] == pytest.approx(3 * (timing.median + exchange))
        assert any(line.startswith(name) for line in text.splitlines())
    assert "nan" not in text
    assert "inf" not in text


def test_a_prompt_sends_the_bytes_of_the_formulas() -> None:
    tokens = 40
    timings = measure(SETTING, PREFILL, tokens)
    sent = {name: timing.facts["sent_bytes"] for name, timing in timings.items()}
    assert sent == {
        "TP2": all_reduced(tokens, 2),
        "TP8": all_reduced(tokens, 8),
        "SP8": traded(tokens, 1, 8),
        "T2 x S4": all_reduced(tokens // 4, 2) + traded(tokens, 2, 4),
    }
    held = {name: timing.facts["held_bytes"] / MATRICES for name, timing in timings.items()}
    assert held == {"TP2": 1 / 2, "TP8": 1 / 8, "SP8": 1, "T2 x S4": 1 / 2}
    assert all(timing.facts["read_bytes"] == timing.facts["held_bytes"] for timing in timings.values())
    require_numbers(timings, table(SETTING, timings, tokens))


@pytest.mark.parametrize("batch", [3, 16])
def test_a_shifted_step_reads_and_sends_what_tensor_parallelism_does_but_holds_all(batch: int) -> None:
    timings = measure(SETTING, DECODE, 20, batch)
    facts = {name: timing.facts for name, timing in timings.items()}
    assert {name: fact["read_bytes"] / MATRICES for name, fact in facts.items()} == {
        "TP8": 1 / 8,
        "SP8": 1,
        "shift": 1 / 8,
    }
    assert {name: fact["held_bytes"] / MATRICES for name, fact in facts.items()} == {"TP8": 1 / 8, "SP8": 1, "shift": 1}
    # Fewer tokens than ranks are padded, so that every rank has one.
    assert {name: fact["sent_bytes"] for name, fact in facts.items()} == {
        "TP8": all_reduced(batch, 8),
        "SP8": traded(max(batch, 8), 1, 8),
        "shift": all_reduced(batch, 8),
    }
    require_numbers(timings, table(SETTING, timings, 20, batch))
