"""A real server, the demo model on two rank processes, and everything that may happen to it from outside.

After each fault the next picture is right to the byte, and no process and no port is left behind.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from omni_sp.errors import RankFailedError, SamplingParamsError
from omni_sp.server.errors import to_api_error
from tests.engine.processes import alive, becomes_true
from tests.server.serving import PATIENCE_S, Program, error_of, is_free, running, until
from tests.thorough import thorough_only

SILENCE_S = 6.0
STEPS, MANY_STEPS = 20, 200
OPTIONS = ("--warmup", "64x64", "--rank-timeout", str(SILENCE_S))


def asked(seed: int = 3, steps: int = STEPS) -> dict[str, object]:
    return {"prompt": "a red circle", "size": "64x64", "num_inference_steps": steps, "seed": seed}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with running(tmp_path_factory.mktemp("server") / "stderr", *OPTIONS) as program:
        yield program


@pytest.fixture(scope="module")
def expected(shared: Program) -> dict[int, bytes]:
    """What undisturbed requests give, by their seed."""
    pictures = {seed: shared.draw(**asked(seed)).picture() for seed in (3, 4)}
    assert pictures[3] != pictures[4]
    return pictures


@pytest.fixture
def server(shared: Program, expected: dict[int, bytes]) -> Iterator[Program]:
    """The shared server, which must be as good as new after the test."""
    yield shared
    assert shared.draw(**asked()).picture() == expected[3]
    assert shared.get("/health").json() == {"status": "ready"}
    assert len(shared.ranks()) == 2
    assert len(shared.listening_ports()) == 2  # one for clients, one for the ranks to meet


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_costs_time_and_no_picture(
    server: Program, expected: dict[int, bytes], rank: int
) -> None:
    before = server.ranks()
    disturbed, waiting = server.draw(**asked(3)), server.draw(**asked(4))
    disturbed.wait_for_step(3)
    os.kill(before[rank], signal.SIGKILL)
    until(lambda: server.get("/health").status_code == 503)
    assert server.get("/health").json() == {"status": "restarting"}
    assert server.get("/health").headers["Retry-After"]
    assert disturbed.picture() == expected[3]
    assert waiting.picture() == expected[4]
    assert not any(alive(pid) for pid in before)


def test_a_rank_that_is_killed_while_nothing_runs_is_replaced_before_anybody_asks(server: Program) -> None:
    before = server.ranks()
    os.kill(before[1], signal.SIGKILL)
    until(lambda: server.get("/health").status_code == 503)
    assert server.get("/health").json() == {"status": "restarting"}
    until(lambda: server.get("/health").status_code == 200)
    assert "the ranks start again: rank 1 of 2 was killed by signal 9" in server.errors.read_text()
    assert not any(alive(pid) for pid in before)


def test_a_rank_that_is_stopped_is_named_and_replaced(server: Program, expected: dict[int, bytes]) -> None:
    before = server.ranks()
    disturbed, waiting = server.draw(**asked()), server.draw(**asked(4))
    disturbed.wait_for_step(3)
    os.kill(before[1], signal.SIGSTOP)
    error = disturbed.error()
    assert error["code"] == "rank_failed"
    assert f"no word from rank 1 for {SILENCE_S:g} s: it gives no sign of life" in error["message"]
    assert waiting.picture() == expected[4]
    assert not any(alive(pid) for pid in before)
    assert "the ranks start again: no word from rank 1" in server.errors.read_text()


def test_a_rank_without_memory_says_so_and_what_to_do(server: Program) -> None:
    rank = server.ranks()[0]
    size, most = psutil.Process(rank).memory_info().vms + 32 * 2**20, resource.RLIM_INFINITY
    resource.prlimit(rank, resource.RLIMIT_AS, (size, most))  # the VAE alone takes more than that
    error = server.draw(**asked(steps=2) | {"size": "512x512"}).error()
    assert error["code"] == "out_of_memory"
    assert "out of memory: ask for a smaller size, fewer frames or a smaller n (rank 0 of 2" in error["message"]
    assert server.ranks()[0] == rank  # the others had finished, and none waits for it: the model stays
    resource.prlimit(rank, resource.RLIMIT_AS, (most, most))


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("out_of_memory", "out_of_memory"),
        ("died", "rank_failed"),
        ("raised", "rank_failed"),
        ("silent", "rank_failed"),
    ],
)
@pytest.mark.parametrize("message", ["bananas", "raised MemoryError: out of memory"])
def test_memory_is_blamed_only_where_it_is_known_to_be_the_cause(message: str, kind: Any, code: str) -> None:
    assert to_api_error(RankFailedError(message, rank=1, kind=kind)).code == code


@pytest.mark.parametrize(
    ("param", "field"),
    [("height", "size"), ("width", "size"), ("num_outputs_per_prompt", "n"), ("seed", "seed"), (None, None)],
)
def test_a_field_is_blamed_whatever_the_message_is(param: str | None, field: str | None) -> None:
    error = to_api_error(SamplingParamsError("guidance_scale=1: bananas", param=param))
    assert (error.status, error.message, error.param) == (400, "guidance_scale=1: bananas", field)


def test_a_client_that_leaves_takes_its_picture_along(server: Program, expected: dict[int, bytes]) -> None:
    before = server.get("/v1/info").json()
    left = server.draw(**asked(steps=MANY_STEPS))
    left.wait_for_step(2)
    left.leave()
    assert server.draw(**asked()).picture() == expected[3]
    after = server.get("/v1/info").json()
    assert after["aborted"] == before["aborted"] + 1
    assert after["restarts"] == before["restarts"]
    # The abort comes within a step or two; a slow test takes a few more to go away.
    assert after["steps"] - before["steps"] < STEPS + MANY_STEPS // 4


@pytest.mark.parametrize("place", [0, 1])
def test_one_of_three_may_leave_and_the_others_are_right(
    server: Program, expected: dict[int, bytes], place: int
) -> None:
    """The one that runs, or one that waits."""
    drawings = [server.draw(**asked(steps=MANY_STEPS))]
    for seed in (3, 4):
        drawings.append(server.draw(**asked(seed)))
        drawings[-1].wait_until_queued()
    if place == 1:
        drawings[1].leave()
    drawings[0].leave()
    for seed, drawing in zip((3, 4), drawings[1:], strict=True):
        if seed == 4 or place == 0:
            assert drawing.picture() == expected[seed]


@thorough_only
def test_two_servers_share_a_host_and_one_ends_under_load(
    server: Program, expected: dict[int, bytes], tmp_path: Path
) -> None:
    """SIGTERM: what runs is finished, what waits is sent away, and the other server notices nothing."""
    options = (*OPTIONS, "--drain-timeout", str(PATIENCE_S))
    with running(tmp_path / "stderr", *options) as ending, ThreadPoolExecutor() as pool:
        assert not server.listening_ports() & ending.listening_ports()
        drawings = [one.draw(**asked(seed)) for one in (server, ending) for seed in (3, 4)]
        assert [drawing.picture() for drawing in drawings] == [expected[3], expected[4]] * 2
        ranks = ending.ranks()
        runs = ending.draw(**asked(steps=MANY_STEPS // 2))
        waiting = [pool.submit(ending.post, "/v1/images/generations", asked()) for _ in range(2)]
        until(lambda: ending.get("/v1/info").json()["queued"] == len(waiting))
        ending.process.send_signal(signal.SIGTERM)
        for answer in [*(one.result(PATIENCE_S) for one in waiting), ending.post("/v1/images/generations", asked())]:
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert error_of(answer)["type"] == "service_unavailable_error"
        assert runs.picture().startswith(b"\x89PNG")
        assert ending.wait_until_ended() == 0
        assert not any(alive(pid) for pid in ranks)
        assert is_free(ending.port)


def test_a_server_that_is_killed_leaves_nothing(shared: Program) -> None:
    """The last test here: it ends the shared server."""
    ranks = shared.ranks()
    last = shared.draw(**asked(steps=MANY_STEPS))
    last.wait_for_step(2)
    shared.process.kill()
    shared.wait_until_ended()
    last.leave()
    assert becomes_true(lambda: not any(alive(pid) for pid in ranks), PATIENCE_S)
    assert is_free(shared.port)
