"""The planner's predictions are within the limit of every published figure on several devices."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.planner import HERE, LIMIT, RUNS_FILE, at_base, degrees_of, fit, forward_seconds
from omni_sp import DiffusionParallelConfig, ParallelMesh
from omni_sp.planner import Degrees, estimate, machine, model_cost
from omni_sp.planner.published import PUBLISHED

ENTRIES = json.loads(RUNS_FILE.read_text())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["stack"])
def test_published_figures_are_predicted(entry: dict[str, object]) -> None:
    found = fit(entry)
    assert found.num_fitted <= 2
    assert entry["source"]
    assert found.worst <= LIMIT, found.errors


def test_most_stacks_have_more_figures_than_fitted_numbers() -> None:
    assert sum(len(entry["runs"]) > 2 for entry in ENTRIES) >= 9
    assert sum(len(entry["runs"]) for entry in ENTRIES) >= 40


def test_the_base_gives_the_efficiency() -> None:
    cost = model_cost("FLUX.1-dev")
    on = at_base(cost, machine("h100", host_us=0.0), 5.0)
    assert estimate(cost, on, Degrees()).seconds == pytest.approx(5.0)
    assert 0.2 < on.efficiency < 0.7


@pytest.mark.parametrize("name", HERE)
def test_models_of_this_machine_run(name: str) -> None:
    size, changes = HERE[name]
    size = replace(size, height=64, width=64, frames=1)
    config = {**PUBLISHED[name].config, **changes, "num_attention_heads": 1}
    found = forward_seconds(ParallelMesh(DiffusionParallelConfig()), name, size, config, 1)
    assert min(found.whole, found.part, found.small_whole, found.small_part) > 0


def test_degrees_are_read_from_their_names() -> None:
    assert degrees_of("cfg 2 x ring 3 x ulysses 4") == Degrees(cfg_parallel_size=2, ring_degree=3, ulysses_degree=4)
