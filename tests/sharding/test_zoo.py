"""Every transformer class of diffusers over several ranks against one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_sp.sharding.catalogue import PROVEN_FILE, as_markdown, catalogue, transformer_classes
from omni_sp.testing.ranks import RankPool
from tests.library_versions import DIFFUSERS, newest_only
from tests.sharding.zoo.all import ENTRIES, proven_classes
from tests.sharding.zoo.check import LAYOUTS, compare, expected_output
from tests.thorough import THOROUGH

ROOT = Path(__file__).resolve().parents[2]
NUM_CLASSES = {"0.40": 67, "0.41": 68, "0.42": 75}
FIRST = {entry.name: entry_id for entry_id, entry in reversed(ENTRIES.items())}
# Every class on all layouts, further modes of it where Ulysses meets ring; thoroughly, also on uneven shares.
RUNS = [
    (entry_id, layout)
    for entry_id, entry in ENTRIES.items()
    for layout in LAYOUTS
    if entry.runs_here
    if FIRST[entry.name] == entry_id or layout == (2, 2) or (THOROUGH and layout == (3, 1))
]


def check(ranks: RankPool, entry_id: str, layout: tuple[int, int], limit: float) -> None:
    # That remove() gives the bits back depends on the model, not on how many ranks ran it.
    expected, run_after_removal = expected_output(ranks, entry_id), THOROUGH or layout == (2, 2)
    ulysses, ring = layout
    for error, restored, tokens, _ in ranks.run(
        compare, entry_id, expected, run_after_removal, ulysses=ulysses, ring=ring
    ):
        assert error <= limit
        assert restored
        assert tokens


@pytest.mark.parametrize(("entry_id", "layout"), RUNS, ids=str)
def test_followed_through_its_own_code(ranks: RankPool, entry_id: str, layout: tuple[int, int]) -> None:
    check(ranks, entry_id, layout, ENTRIES[entry_id].error)


def test_every_class_of_this_diffusers_is_run() -> None:
    run = {ENTRIES[entry_id].name for entry_id, _ in RUNS}
    assert run == set(transformer_classes())
    assert len(run) == NUM_CLASSES[f"{DIFFUSERS.major}.{DIFFUSERS.minor}"]


def test_the_list_of_proven_classes_is_what_the_zoo_proves() -> None:
    assert PROVEN_FILE.read_text() == proven_classes(), "run python -m tests.sharding.zoo.all --write"


def test_every_class_of_diffusers_has_a_state() -> None:
    states = {state.name: state for state in catalogue()}
    assert list(states) == transformer_classes()
    proven = {entry.name for entry in ENTRIES.values()}
    assert {name for name, state in states.items() if state.state == "exact"} == proven & states.keys()
    assert all(state.note for state in states.values() if state.state != "exact")


@newest_only
def test_the_page_of_models_is_true() -> None:
    assert (ROOT / "docs" / "models.md").read_text() == as_markdown(catalogue())
    assert "docs/models.md" in (ROOT / "README.md").read_text()
