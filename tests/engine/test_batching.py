"""Requests that share a call of the pipeline: which may, that none notices, and that none harms the others."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_sp import AsyncOmni, DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.engine.batching import Batching, call_for, merge_calls, split_result
from omni_sp.engine.engine import Engine
from omni_sp.engine.messages import Call, Done
from omni_sp.engine.ranks.local import LocalRank
from omni_sp.engine.startup import Startup
from omni_sp.errors import ConfigError, NonFiniteResultError, RankFailedError, RequestAbortedError
from omni_sp.events import RequestDone, RequestEvent, RequestProgress
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.pipelines.results import CallResult
from omni_sp.requests import engine_options
from omni_sp.testing.models import save_flux_kontext, save_wan
from tests.engine.test_async_omni import bounded, draw, error_of, is_done, scripted
from tests.thorough import THOROUGH

FACTS = PipelineCapabilities(
    name="APipeline",
    parameters=dict.fromkeys(("prompt", "negative_prompt", "generator", "height", "num_images_per_prompt")),
)


pytestmark = pytest.mark.usefixtures("no_process_left")


def call(prompt: Any = "a star", seed: int = 0, **arguments: Any) -> Call:
    return Call(request_id=f"{prompt}-{seed}", arguments={"prompt": prompt, **arguments}, seeds=(seed,))


def proven(*kinds: bool) -> Batching:
    return Batching(max_size=4, proven=set(kinds))


def test_requests_that_differ_in_prompt_and_seed_share_a_call() -> None:
    batching = proven(False, True)
    first = batching.key(FACTS, call("a star", 1, height=64, output_type="pil"))
    assert first is not None
    assert first == batching.key(FACTS, call("a longer prompt", 2, output_type="pil", height=64))
    for other in (
        call(height=72, output_type="pil"),
        call(height=64, output_type="np"),
        call(height=64, output_type="pil", num_inference_steps=3),
        call(height=64, output_type="pil", negative_prompt="red"),
    ):
        assert batching.key(FACTS, other) not in (None, first)
    styled = replace(call(height=64, output_type="pil"), adapters=(("style", 0.5),))
    assert batching.key(FACTS, styled) not in (None, first)
    assert batching.key(FACTS, styled) == batching.key(FACTS, replace(styled, seeds=(3,)))
    assert batching.key(FACTS, styled) != batching.key(FACTS, replace(styled, adapters=(("style", 1.0),)))
    guided = call(negative_prompt="red", true_cfg_scale=4.0)
    assert batching.key(FACTS, guided) == batching.key(FACTS, call("b", negative_prompt="", true_cfg_scale=4.0))


@pytest.mark.parametrize(
    ("batching", "alone"),
    [
        (Batching(max_size=1, proven={False, True}), call()),
        (proven(), call()),
        (proven(False), call(negative_prompt="red")),
        (proven(True), call()),
        (proven(False), call(["a", "b"])),
        (proven(False), call(None)),
        (proven(False), call(num_images_per_prompt=2)),
        (proven(False), call(prompt_2="another text")),
        (proven(False), call(image=object())),
        (proven(False), call(sigmas=[1.0, 0.5])),
        (proven(False), call(latents=torch.ones(1))),
        (proven(False), call(None, prompt_embeds=torch.ones(1))),
        (proven(False), replace(call(), seeds=(1, 2))),
        (proven(False), replace(call(), scheduler="EulerDiscreteScheduler")),
    ],
    ids=[
        "off",
        "nothing proven",
        "guidance",
        "no guidance",
        "lists",
        "no prompt",
        "n",
        "text",
        "picture",
        "list",
        "latents",
        "embeddings",
        "seeds",
        "scheduler",
    ],
)
def test_what_may_not_be_shared_is_drawn_alone(batching: Batching, alone: Call) -> None:
    assert batching.key(FACTS, alone) is None


def test_calls_are_joined_and_taken_apart() -> None:
    calls = [call("a", 1, negative_prompt="x", height=8), call("b", 2, negative_prompt="y", height=8)]
    joined = merge_calls("both", calls)
    assert joined.arguments == {"prompt": ["a", "b"], "negative_prompt": ["x", "y"], "height": 8}
    assert joined.seeds == (1, 2)
    assert [call_for(joined, index).arguments for index in (0, 1)] == [one.arguments for one in calls]
    assert [call_for(joined, index).seeds for index in (0, 1)] == [(1,), (2,)]
    result = CallResult(images=["of a", "of b"], videos=[], timings={"denoise_s": 1.0})
    done = split_result(Done(request_id="both", result=result, tokens={"picture": 9}), calls)
    assert [(one.request_id, one.result.images if one.result else None) for one in done] == [
        ("a-1", ["of a"]),
        ("b-2", ["of b"]),
    ]
    short = CallResult(images=["only one"], videos=[], timings={})
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        split_result(Done(request_id="both", result=short, tokens={}), calls)


def batches_of(location: str, dtype: str | None = None, strip_mask: bool = False) -> tuple[set[bool], list[str]]:
    """What proves exact for a model, and what is told about the rest."""
    told: list[str] = []
    options = engine_options(location, device="cpu", dtype=dtype)
    rank = LocalRank(options, joined=False)
    engine = Engine(rank, Startup(told.append))
    if strip_mask:

        def without(_module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {name: value for name, value in kwargs.items() if not name.endswith("_mask")}

        assert rank._runner is not None
        rank._runner._pipe.transformer.register_forward_pre_hook(without, with_kwargs=True, prepend=True)
    told.clear()
    batching = Batching(max_size=2)
    batching.prove(engine.ready.capabilities, lambda one: engine.run(one, None), told.append)
    engine.close()
    return batching.proven, told


def test_a_pipeline_that_masks_its_padding_is_proven_and_one_that_does_not_is_caught() -> None:
    assert batches_of("omni-sp/shapes") == ({False, True}, [])
    assert batches_of("omni-sp/shapes", "bfloat16") == ({False, True}, [])
    if THOROUGH:
        assert batches_of("omni-sp/shapes", "bfloat16", strip_mask=True)[0] == set()
    kinds, told = batches_of("omni-sp/shapes", strip_mask=True)
    assert kinds == set()
    assert [news.partition(":")[0] for news in told] == [
        "requests are drawn one by one",
        "requests with negative prompts are drawn one by one",
    ]
    assert "QwenImagePipeline draws otherwise in a batch" in told[0]


@pytest.mark.filterwarnings("ignore")
def test_other_pipelines_are_proven_likewise(tmp_path: Path) -> None:
    for save in (save_flux_kontext, save_wan):
        save(tmp_path / save.__name__)
        assert batches_of(str(tmp_path / save.__name__)) == ({False, True}, [])


def test_what_waits_is_drawn_together_and_told_apart() -> None:
    async def program() -> None:
        async with scripted(max_batch_size=3) as omni:
            running = asyncio.create_task(draw(omni, "running", steps=20))
            await asyncio.sleep(0.1)
            names = ["a", "b", "c", "d"]
            alike = [asyncio.create_task(draw(omni, name, steps=4)) for name in names]
            other = asyncio.create_task(draw(omni, "other", steps=5))
            for task in alike:
                events = await task
                assert is_done(events)
                assert isinstance(events[-1], RequestDone)
                assert events[-1].output.images == [{"prompt": events[-1].request_id, "steps": 4}]
                assert [e.done for e in events if isinstance(e, RequestProgress)] == [0, 1, 2, 3]
            assert is_done(await running)
            assert is_done(await other)
            # running; a, b and c; d; other
            assert (omni.stats.done, omni.stats.calls, omni.stats.steps) == (6, 4, 19 + 3 + 3 + 4)

    bounded(program)


def test_a_request_waits_a_little_for_others_and_no_longer() -> None:
    async def program() -> None:
        async with scripted(max_batch_size=2, batch_wait_ms=700) as omni:
            first = asyncio.create_task(draw(omni, "first"))
            await asyncio.sleep(0.1)
            second = asyncio.create_task(draw(omni, "second"))
            assert is_done(await first)
            assert is_done(await second)
            assert omni.stats.calls == 1
            assert is_done(await draw(omni, "nobody comes"))
            assert omni.stats.calls == 2

    bounded(program)


def test_an_abort_of_one_leaves_the_others_of_its_batch() -> None:
    async def program() -> None:
        async with scripted(max_batch_size=3, batch_wait_ms=500) as omni:
            tasks = {name: asyncio.create_task(draw(omni, name, steps=60)) for name in ("a", "b", "c")}
            await asyncio.sleep(0.3)
            assert omni.stats.running == 3
            assert await omni.abort("b")
            assert isinstance(error_of(await tasks["b"]), RequestAbortedError)
            assert is_done(await tasks["a"])
            assert is_done(await tasks["c"])
            assert (omni.stats.done, omni.stats.aborted, omni.stats.calls) == (2, 1, 1)
            everybody = [asyncio.create_task(draw(omni, name, steps=5000)) for name in ("d", "e", "f")]
            await asyncio.sleep(0.3)
            for name in ("d", "e", "f"):
                assert await omni.abort(name)
            for task in everybody:
                assert isinstance(error_of(await task), RequestAbortedError)
            assert is_done(await draw(omni, "after"))
            assert omni.stats.restarts == 0

    bounded(program)


@pytest.mark.parametrize("fault", ["die", "raise"])
def test_of_a_batch_that_failed_each_is_tried_alone(fault: str) -> None:
    async def program() -> None:
        async with scripted(max_batch_size=3, batch_wait_ms=500) as omni:
            tasks = {name: asyncio.create_task(draw(omni, name, steps=3)) for name in ("a", fault, "c")}
            assert isinstance(error_of(await tasks[fault]), RankFailedError)
            assert is_done(await tasks["a"])
            assert is_done(await tasks["c"])
            assert (omni.stats.done, omni.stats.failed, omni.stats.restarts) == (2, 1, 2)

    bounded(program)


def test_of_a_batch_that_is_not_finite_only_the_one_fails() -> None:
    async def program() -> None:
        async with scripted(max_batch_size=3, batch_wait_ms=500) as omni:
            tasks = {name: asyncio.create_task(draw(omni, name, steps=3)) for name in ("a", "overflow", "c")}
            assert isinstance(error_of(await tasks["overflow"]), NonFiniteResultError)
            assert is_done(await tasks["a"])
            assert is_done(await tasks["c"])
            assert (omni.stats.done, omni.stats.failed, omni.stats.restarts) == (2, 1, 0)

    bounded(program)


def test_sizes_and_waits_that_cannot_be_are_refused() -> None:
    for options in ({"max_batch_size": 0}, {"max_batch_size": 1.5}, {"batch_wait_ms": -1}, {"batch_wait_ms": "soon"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            scripted(**options)


def test_in_a_batch_every_request_gets_the_picture_that_it_gets_alone() -> None:
    """The demo model on two ranks: prompts of different lengths, with and without guidance, previews for who asked."""
    prompts = ["a red circle", "a small yellow star on a green background"]

    async def one(omni: AsyncOmni, place: int, **guidance: Any) -> list[RequestEvent]:
        params = OmniDiffusionSamplingParams(width=80, height=64, num_inference_steps=2, seed=place, **guidance)
        return [event async for event in omni.generate(prompts[place], params, previews=place != 1)]

    def picture(events: list[RequestEvent]) -> Any:
        last = events[-1]
        assert isinstance(last, RequestDone)
        return np.asarray(last.output.images[0], dtype=np.int16)

    async def program() -> None:
        config = DiffusionParallelConfig(ulysses_degree=2)
        async with AsyncOmni("omni-sp/shapes", config, device="cpu", max_batch_size=2, batch_wait_ms=2000) as omni:
            for guidance in ({}, {"negative_prompt": "blue", "true_cfg_scale": 2.0}):
                before = omni.stats.calls
                batch = await asyncio.gather(*(one(omni, place, **guidance) for place in range(2)))
                assert omni.stats.calls == before + 1
                for place, events in enumerate(batch):
                    shown = [e.preview for e in events if isinstance(e, RequestProgress) and e.preview is not None]
                    assert bool(shown) == (place != 1)
                    assert all(len(e.previews) <= 1 for e in events if isinstance(e, RequestProgress))
                    alone = await one(omni, place, **guidance)
                    assert np.abs(picture(alone) - picture(events)).max() <= 1
                    assert alone[-1].output.metrics["seed"] == place  # type: ignore[union-attr]

    bounded(program)
