from __future__ import annotations

import gc
import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from omni_sp.testing.ranks import RankPool
from tests import preloaded
from tests.fake_cuda import FakeCuda, install_device_guard
from tests.forked_starts import rank_starts

_POOL: list[RankPool] = []


def pytest_sessionstart() -> None:
    # Else inductor compiles a program for each kind of vector instructions before the first kernel.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    # Tests send these to their own process and to others. Started in the background, pytest would ignore some.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if "OMNI_SP_DIFFUSERS" in os.environ:
        importlib.import_module("tests.library_versions")  # which refuses another version


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start programs come first: they take longest, and at the end each would run alone."""
    items.sort(key=lambda item: not _starts_programs(item.path.relative_to(Path(__file__).parent.parent)))


def pytest_collection_finish() -> None:
    # What was imported stays. pytest looks for garbage five times at the end, half a second each with all of that.
    gc.freeze()


def _starts_programs(path: Path) -> bool:
    return path.parent.as_posix() in ("tests", "tests/engine", "tests/server")


@pytest.fixture(scope="session", autouse=True)
def _forked_starts() -> Iterator[None]:
    with rank_starts(forked=True):
        yield


@pytest.fixture
def new_programs() -> Iterator[None]:
    """Rank processes are new programs, as they are outside tests."""
    with rank_starts(forked=False):
        yield


@pytest.fixture
def ranks() -> RankPool:
    """The session's rank processes, started anew after a failure ended them."""
    if not _POOL or not _POOL[-1].alive:
        _POOL.append(RankPool())
    return _POOL[-1]


@pytest.fixture(scope="session", autouse=True)
def _end_processes() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    preloaded.close()
    for pool in _POOL:
        pool.close()


@pytest.fixture
def fake_cuda(request: pytest.FixtureRequest) -> FakeCuda:
    """A mode for tensors on a CUDA device that is not there; see tests/fake_cuda.py."""
    assert request.config.cache is not None
    install_device_guard(Path(request.config.cache.mkdir("fake_cuda")))
    return FakeCuda()
