from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.embedding.running import Embedding, embedding_server


@pytest.fixture(scope="package")
def embedding() -> Iterator[Embedding]:
    """One server over two replicas, for tests that leave it as it was."""
    with embedding_server() as running:
        yield running
