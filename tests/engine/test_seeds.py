"""A seed decides everything, also where a scheduler draws from torch's global generator between the steps."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_sp import (
    AsyncOmni,
    DiffusionParallelConfig,
    Omni,
    OmniDiffusionSamplingParams,
    OmniRequestOutput,
)
from omni_sp.events import RequestDone
from omni_sp.pipelines import shapes

PROMPTS = ["a red circle on a blue background", "a small yellow star on a green background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a scheduler that adds noise of its own in every step."""
    folder = tmp_path_factory.mktemp("models") / "stochastic"
    shutil.copytree(Path(shapes.__file__).parent / "weights", folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stochastic_sampling": True}))
    return folder


def small(seed: int) -> OmniDiffusionSamplingParams:
    return OmniDiffusionSamplingParams(seed=seed, height=64, width=80, num_inference_steps=4)


def pixels(output: OmniRequestOutput) -> Any:
    return np.asarray(output.images[0], dtype=np.int16)


def test_every_layout_repeats_and_agrees(folder: Path) -> None:
    drawn = []
    for config in (None, DiffusionParallelConfig(ulysses_degree=2)):
        with Omni(str(folder), config, device="cpu") as omni:
            torch.manual_seed(99)
            state = torch.get_rng_state()
            drawn += [pixels(omni.generate(PROMPTS[0], small(seed))[0]) for seed in (7, 7, 8)]
            assert torch.equal(torch.get_rng_state(), state)  # the program's own generator is left alone
    first, _, other = drawn[:3]
    assert np.abs(first - other).max() > 50
    for again in (drawn[1], drawn[3], drawn[4]):
        assert np.abs(again - first).max() <= 2
    assert np.abs(drawn[5] - other).max() <= 2


def test_threads_do_not_draw_each_others_numbers(folder: Path) -> None:
    """Each Omni of one rank draws in this process, which has one generator for all threads."""
    with Omni(str(folder), device="cpu") as first, Omni(str(folder), device="cpu") as second:
        alone = [pixels(first.generate(PROMPTS[0], small(seed))[0]) for seed in (7, 8)]
        both = threading.Barrier(2)

        def draw(omni: Omni, seed: int) -> list[Any]:
            both.wait(30)
            return [pixels(omni.generate(PROMPTS[0], small(seed))[0]) for _ in range(3)]

        with ThreadPoolExecutor(2) as threads:
            drawn = list(threads.map(draw, (first, second), (7, 8)))
    for of_one, wanted in zip(drawn, alone, strict=True):
        assert max(int(np.abs(one - wanted).max()) for one in of_one) <= 2


def test_requests_that_wait_together_draw_what_they_draw_alone(folder: Path) -> None:
    async def draw(omni: AsyncOmni, place: int) -> Any:
        events = [event async for event in omni.generate(PROMPTS[place], small(place))]
        last = events[-1]
        assert isinstance(last, RequestDone)
        return pixels(last.output)

    async def program() -> None:
        async with AsyncOmni(str(folder), device="cpu", max_batch_size=2, batch_wait_ms=500) as omni:
            # A scheduler that draws only in some calls is not seen when the ranks start.
            omni._dispatcher.queue.batching.proven.update({True, False})
            alone = [await draw(omni, place) for place in (0, 1)]
            for _ in range(2):
                together = await asyncio.gather(draw(omni, 0), draw(omni, 1))
                for one, other in zip(together, alone, strict=True):
                    assert np.abs(one - other).max() <= 2
            assert omni.stats.restarts == 0
            assert omni._dispatcher.queue.batching.refused

    asyncio.run(asyncio.wait_for(program(), 120))
