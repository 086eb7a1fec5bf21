"""What the tests of engines share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.processes import becomes_true, descendants

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_process_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A folder of the test's own to work in, from which ranks find the tests; afterwards no rank is there."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    before = descendants()
    yield
    gc.collect()
    assert becomes_true(lambda: descendants() <= before, 5.0)
