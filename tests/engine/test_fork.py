"""Ranks that are forks of one process: as true, as clean and as separate as those that are started each by itself."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import omni_sp.engine.ranks.fork as fork
from omni_sp import ConfigError, DiffusionParallelConfig
from omni_sp.engine.engine import Engine, open_engine
from omni_sp.engine.messages import Call
from omni_sp.engine.ranks.remote import RemoteRanks
from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.engine.startup import Startup
from omni_sp.errors import RankFailedError
from omni_sp.requests import engine_options
from tests.engine import processes
from tests.engine.processes import alive, becomes_true

pytestmark = [
    pytest.mark.usefixtures("no_process_left"),
    pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux"),
]
OPTIONS = engine_options("omni-sp/shapes", DiffusionParallelConfig(ulysses_degree=2), device="cpu")
CALL = Call(
    request_id="a", arguments={"prompt": "a star", "height": 64, "width": 80, "num_inference_steps": 2}, seeds=(3,)
)


def drawn(engine: Engine) -> bytes:
    done = engine.run(CALL, None)
    assert done.result is not None
    return bytes(done.result.images[0].tobytes())


@pytest.fixture(autouse=True)
def others() -> set[int]:
    """Processes that other tests of this session keep."""
    _OTHERS.clear()
    _OTHERS.update(processes.descendants())
    return _OTHERS


_OTHERS: set[int] = set()


def descendants() -> set[int]:
    return processes.descendants() - _OTHERS


def rank_processes() -> list[int]:
    return processes.rank_processes(but=_OTHERS)


@pytest.fixture
def launcher() -> Iterator[fork.ForkLauncher]:
    launcher = fork.ForkLauncher(OPTIONS.source)
    yield launcher
    launcher.close()


def opened(launcher: fork.ForkLauncher | SpawnLauncher) -> Engine:
    return Engine(RemoteRanks(OPTIONS, launcher), Startup(lambda _news: None))


def status_of(pid: int, field: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(f"{field}:"))


@pytest.mark.usefixtures("new_programs")
def test_forked_ranks_draw_what_spawned_ones_draw_and_come_back_from_the_same_process(
    launcher: fork.ForkLauncher,
) -> None:
    spawned = opened(SpawnLauncher())
    expected = drawn(spawned)
    spawned.close()
    engine = opened(launcher)
    assert drawn(engine) == expected
    ranks = rank_processes()
    (server,) = descendants() - set(ranks)
    assert {int(status_of(rank, "PPid")) for rank in ranks} == {server}
    assert status_of(server, "Threads") == "1"  # a fork copies no other thread
    # A session each, so that Ctrl-C reaches the front alone.
    assert [os.getsid(pid) for pid in (server, *ranks)] == [server, *ranks]
    os.kill(ranks[1], signal.SIGKILL)
    with pytest.raises(RankFailedError, match="rank 1 of 2 was killed by signal 9"):
        engine.run(CALL, None)
    assert descendants() == {server}
    again = opened(launcher)
    assert drawn(again) == expected
    again.close()
    assert descendants() == {server}
    launcher.close()
    assert not descendants()


def test_ranks_end_with_the_process_that_they_are_forks_of(launcher: fork.ForkLauncher) -> None:
    engine = opened(launcher)
    ranks = rank_processes()
    (server,) = descendants() - set(ranks)
    os.kill(ranks[0], signal.SIGSTOP)
    os.kill(server, signal.SIGKILL)
    with pytest.raises(RankFailedError, match=r"rank \d of 2 was killed by signal 9"):
        engine.run(CALL, None)
    assert becomes_true(lambda: not any(map(alive, ranks)), 5.0)
    again = opened(launcher)  # from a new one
    assert len(rank_processes()) == 2
    again.close()


def test_an_engine_without_a_launcher_leaves_nothing() -> None:
    engine = open_engine(OPTIONS, lambda _news: None)
    assert len(descendants()) == 3
    os.kill(rank_processes()[0], signal.SIGTERM)
    with pytest.raises(RankFailedError, match="rank 0 of 2 was killed by signal 15"):
        engine.run(CALL, None)
    assert not descendants()


def test_a_start_that_is_refused_leaves_nothing(launcher: fork.ForkLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("too few")

    monkeypatch.setattr(SpawnLauncher, "placements", refuse)
    with pytest.raises(ConfigError, match="too few"):
        opened(launcher)
    assert not descendants()


def test_where_the_cuda_driver_was_touched_ranks_are_new_programs(
    launcher: fork.ForkLauncher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "touching.py").write_text(
        "import omni_sp.engine.ranks.fork as fork\n"
        "fork._touched_cuda = lambda: True\n"
        "def serve(front):\n"
        "    fork.serve_forks(front)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(launcher, "_spawn", SpawnLauncher("touching", "serve"))
    engine = opened(launcher)
    ranks = rank_processes()
    assert len(ranks) == 2
    assert all(b"rank_main" in Path(f"/proc/{rank}/cmdline").read_bytes() for rank in ranks)
    assert drawn(engine)
    engine.close()


@pytest.mark.parametrize(("answer", "is_touched"), [(3, False), (0, True), (100, True)])
def test_the_cuda_driver_itself_is_asked(monkeypatch: pytest.MonkeyPatch, answer: int, is_touched: bool) -> None:
    class Driver:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDeviceGetCount(self, _count: object) -> int:  # noqa: N802
            return answer

    assert not fork._touched_cuda()  # it is not even there
    monkeypatch.setattr(ctypes, "CDLL", Driver)
    monkeypatch.setattr(fork, "_loaded_libraries", lambda: "7f00-7f01 r-xp /usr/lib/libcuda.so.570")
    assert fork._touched_cuda() == is_touched
