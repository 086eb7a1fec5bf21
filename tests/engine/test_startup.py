"""The start as people see it, and what each rank reads for it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_sp import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams
from omni_sp.async_omni import AsyncOmni
from omni_sp.engine.engine import Engine
from omni_sp.engine.messages import EngineOptions
from omni_sp.engine.ranks.remote import RemoteRanks
from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.engine.startup import (
    CAPTIONS,
    IMPORTS,
    JOINING,
    WARM_UP,
    WEIGHTS,
    Startup,
    StartupDisplay,
    StartupMessage,
    format_seconds,
)
from omni_sp.errors import ModelNotFoundError, RankFailedError, SamplingParamsError
from omni_sp.pipelines.load import ModelSource
from omni_sp.pipelines.shapes import SHAPES_MODEL
from tests.engine.processes import descendants
from tests.engine.readers import Read

ROOT = Path(__file__).resolve().parents[2]
TWO = DiffusionParallelConfig(ulysses_degree=2)
PATIENCE_S = 120.0


pytestmark = pytest.mark.usefixtures("no_process_left")


def scripted(script: str, news: list[str]) -> Engine:
    options = EngineOptions(
        source=ModelSource(name="scripted", location=""),
        config=TWO,
        device="cpu",
        dtype=None,
        attention_backend="auto",
        attention_strategy="omni_sp",
        replay=True,
        compile=False,
        cuda_graphs=False,
        rank_timeout_s=30.0,
        startup_timeout_s=30.0,
    )
    return Engine(RemoteRanks(options, SpawnLauncher("tests.engine.readers", script)), Startup(news.append))


def parts_of(news: list[str]) -> list[str]:
    """The parts of a start in the order in which they were told, each once."""
    return list(dict.fromkeys(item.part for item in news if isinstance(item, StartupMessage)))


def test_the_slowest_rank_decides_what_is_told() -> None:
    news: list[str] = []
    engine = scripted("reads_two_parts", news)
    engine.start.finish()
    engine.close()
    assert parts_of(news) == [IMPORTS, WEIGHTS, JOINING]
    assert news[:2] == ["starting 2 ranks", "importing libraries: 1 of 2 ranks have"]
    # Rank 0 has loaded everything before rank 1 says its first word.
    assert [item for item in news if item.startswith("reading")] == [
        "reading the weights of 2 parts",
        "reading the body, 1 of 2",
        "reading the mind, 2 of 2",
    ]
    assert news[-1] == f"ready in {format_seconds(engine.ready.start_s)}"
    assert engine.ready.start_s.keys() == {IMPORTS, WEIGHTS, JOINING}


@pytest.mark.parametrize("script", ["raises_while_reading", "dies_while_reading"])
def test_an_error_in_the_middle_of_loading_names_its_rank_and_cause(script: str) -> None:
    news: list[str] = []
    with pytest.raises(RankFailedError) as caught:
        scripted(script, news)
    cause = "raised KeyError: the body" if script == "raises_while_reading" else "ended with exit code 3"
    assert str(caught.value) == f"rank 1 of 2 {cause}"
    assert parts_of(news)[-1] == WEIGHTS


def test_files_that_only_rank_0_reads_may_be_damaged() -> None:
    with pytest.raises(ModelNotFoundError, match=r"^no such file$"):
        scripted("misses_a_file_on_rank_0", [])


def test_parts_follow_each_other_and_end_once() -> None:
    news: list[str] = []
    start = Startup(news.append)
    start.report(IMPORTS, "a")
    start.report(WEIGHTS, "b", 0, 2)
    start.report(WEIGHTS, "b", 0, 2)
    start.report(WEIGHTS, "c", 1, 2)
    start.finish()
    start.finish()
    assert news == ["a", "b", "c", f"ready in {format_seconds(start.seconds)}"]
    assert list(start.seconds) == [IMPORTS, WEIGHTS]
    assert format_seconds(dict.fromkeys(CAPTIONS, 1.25)) == (
        "5.0 s: processes and imports 1.2, weights 1.2, joining 1.2, warm-up 1.2"
    )


def show_one_start(screen: StartupDisplay) -> None:
    start = Startup(screen.show)
    start.report(IMPORTS, "starting 2 ranks")
    start.report(WEIGHTS, "reading vae, 1 of 2", 0, 2)
    start.finish()
    screen.close()


def test_where_nobody_watches_a_start_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_one_start(StartupDisplay())
    show_one_start(StartupDisplay(shown=False))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "omni-sp: starting 2 ranks",
        "omni-sp: reading vae, 1 of 2",
        "omni-sp: ready in 0.0 s: processes and imports 0.0, weights 0.0",
    ]


def test_a_terminal_gets_a_bar_and_in_the_end_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        show_one_start(StartupDisplay())
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while piece := os.read(reader, 2**16):
            shown += piece
    os.close(reader)
    states = [state.strip() for state in shown.decode().split("\r") if state.strip()]
    assert states[-1] == "omni-sp: ready in 0.0 s: processes and imports 0.0, weights 0.0"
    assert [state.rpartition("| ")[2] for state in states[1:-1]] == ["starting 2 ranks", "reading vae, 1 of 2"]
    assert states[2].startswith("starting  25%|")


def drawn(omni: Omni) -> Any:
    params = OmniDiffusionSamplingParams(height=64, width=80, num_inference_steps=2, seed=3)
    return np.asarray(omni.generate("a red circle", params)[0].images[0], dtype=np.int16)


def test_ranks_that_stop_at_the_latent_read_no_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_sp.omni.open_engine", _with_watched_ranks)
    with Omni(SHAPES_MODEL, TWO, device="cpu") as omni:
        two = drawn(omni)
        read = {rank: Read.by(rank) for rank in (0, 1)}
        errors = omni.check("a red circle", OmniDiffusionSamplingParams(num_inference_steps=1))
        read_for_check = Read.by(1)
        parts = omni.generate("a star", OmniDiffusionSamplingParams(num_inference_steps=1))[0].metrics
    assert read[0].parts == ["text_encoder", "transformer", "vae"]
    assert read[1].parts == ["transformer"]  # rank 0 encodes for both
    assert read[1].num_parameters < read[0].num_parameters - read[0].of_vae
    assert read[1].num_bytes < read[0].num_bytes
    # A check decodes on every rank: the weights that it needs are read then.
    assert read_for_check == read[0]
    assert max(errors.values()) < 1e-3
    assert list(parts["startup_parts_s"]) == [IMPORTS, WEIGHTS, JOINING]
    assert sum(parts["startup_parts_s"].values()) <= parts["startup_s"]
    with Omni(SHAPES_MODEL, device="cpu") as omni:
        assert abs(two - drawn(omni)).max() <= 2


def _with_watched_ranks(options: EngineOptions, on_news: Any, _launcher: None) -> Engine:
    return Engine(RemoteRanks(options, SpawnLauncher("tests.engine.readers", "watched")), Startup(on_news))


def test_a_warm_up_is_part_of_the_start() -> None:
    news: list[str] = []

    async def program() -> None:
        options = {"device": "cpu", "warmup": [(64, 80), (80, 64)], "on_news": news.append}
        launcher = SpawnLauncher("tests.engine.scripted", "draws_in_steps", thread_stays=True)
        async with AsyncOmni(SHAPES_MODEL, TWO, launcher=launcher, **options) as omni:  # type: ignore[arg-type]
            assert list(omni.stats.start_s) == [IMPORTS, WEIGHTS, JOINING, WARM_UP]
            assert omni.info.start_s == omni.stats.start_s

    asyncio.run(asyncio.wait_for(program(), PATIENCE_S))
    assert parts_of(news) == [IMPORTS, WEIGHTS, JOINING, WARM_UP]
    assert news[-3:-1] == ["warming up: 80 x 64, 1 of 2", "warming up: 64 x 80, 2 of 2"]
    assert news[-1].startswith("ready in ")


@pytest.mark.parametrize(
    ("script", "kind", "told"),
    [
        ("raises_on_rank_1", RankFailedError, "the warm-up 80 x 64 failed: rank 1 of 2 raised RuntimeError: boom"),
        ("reads_two_parts", SamplingParamsError, "the warm-up 80 x 64 failed: not this"),
    ],
)
def test_a_warm_up_that_fails_ends_the_start_and_is_named(script: str, kind: type[Exception], told: str) -> None:
    async def program() -> None:
        module = "tests.engine.scripted" if script == "raises_on_rank_1" else "tests.engine.readers"
        launcher = SpawnLauncher(module, script, thread_stays=True)
        omni = AsyncOmni(SHAPES_MODEL, TWO, device="cpu", warmup=[(64, 80)], launcher=launcher)
        with pytest.raises(kind) as caught:
            await omni.start()
        assert str(caught.value) == told
        assert omni.status == "failed"
        assert not descendants() - before
        await omni.close()

    before = descendants()
    asyncio.run(asyncio.wait_for(program(), PATIENCE_S))


def test_a_warm_up_that_the_pipeline_cannot_draw_is_named() -> None:
    async def program() -> None:
        omni = AsyncOmni(SHAPES_MODEL, DiffusionParallelConfig(), device="cpu", warmup=[(64, 77)])
        with pytest.raises(SamplingParamsError, match=r"^the warm-up 77 x 64 failed: width=77: "):
            await omni.start()
        await omni.close()

    asyncio.run(asyncio.wait_for(program(), PATIENCE_S))
