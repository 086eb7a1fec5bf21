from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.fakes import EDITS, FakeOmni
from tests.server.serving import Served, serving


@pytest.fixture(scope="package")
def served() -> Iterator[Served]:
    """One server over a FakeOmni that makes pictures, for tests that leave it as it was."""
    with serving(FakeOmni()) as running:
        yield running


@pytest.fixture(scope="package")
def editor() -> Iterator[Served]:
    """The same over one that edits pictures."""
    with serving(FakeOmni(capabilities=EDITS)) as running:
        yield running
