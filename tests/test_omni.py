"""The front door, with the demo model: in this process, and on ranks of its own."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni_sp import (
    CallFailedError,
    ConfigError,
    DiffusionParallelConfig,
    EngineClosedError,
    ModelNotFoundError,
    NonFiniteResultError,
    Omni,
    OmniDiffusionSamplingParams,
    OmniRequestOutput,
    RankFailedError,
    RequestAbortedError,
    SamplingParamsError,
)
from omni_sp.engine.steps_display import StepsDisplay
from omni_sp.pipelines.shapes import SHAPES_MODEL
from omni_sp.requests import PromptInput
from tests.engine.accidents import AccidentIn, KillRank, RaiseOnAllRanks, RaiseOnRank
from tests.engine.processes import alive, becomes_true, descendants
from tests.thorough import THOROUGH

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red circle on a blue background"


def small(**values: Any) -> OmniDiffusionSamplingParams:
    return OmniDiffusionSamplingParams(**({"height": 64, "width": 80, "num_inference_steps": 3} | values))


def pixels(output: OmniRequestOutput) -> Any:
    return np.stack([np.asarray(image, dtype=np.int16) for image in output.images])


def start_two() -> Omni:
    return Omni(SHAPES_MODEL, DiffusionParallelConfig(ulysses_degree=2), device="cpu")


def rank_pids(omni: Omni) -> list[int]:
    return [rank.pid for rank in omni._engine._group._processes._ranks]  # type: ignore[union-attr]


def once(act: Callable[[], None]) -> Callable[[], None]:
    """A function that acts the first time only."""
    left = [act]
    return lambda: left.pop()() if left else None


@pytest.fixture(scope="module", autouse=True)
def _no_process_left() -> Iterator[None]:
    sys.path.insert(0, str(ROOT))  # ranks import the accidents from here
    before = descendants()
    yield
    sys.path.remove(str(ROOT))
    assert becomes_true(lambda: descendants() <= before, 5.0)


@pytest.fixture(scope="module")
def one() -> Iterator[Omni]:
    with Omni(SHAPES_MODEL, device="cpu") as omni:
        yield omni


@pytest.fixture(scope="module")
def two() -> Iterator[Omni]:
    with start_two() as omni:
        yield omni


def test_one_rank_starts_no_process(one: Omni) -> None:
    before = descendants()
    with Omni(SHAPES_MODEL, device="cpu") as omni:
        omni.generate(PROMPT, small())
        assert descendants() == before


def test_one_rank_draws_what_the_plain_pipeline_draws(one: Omni) -> None:
    from diffusers import DiffusionPipeline

    from omni_sp.pipelines.shapes import shapes_folder

    pipe = DiffusionPipeline.from_pretrained(shapes_folder(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(
        PROMPT, negative_prompt=" ", true_cfg_scale=2.0, height=64, width=80, num_inference_steps=3,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]  # fmt: skip
    ours = one.generate(PROMPT, small(seed=7, true_cfg_scale=2.0))[0]
    assert np.array_equal(pixels(ours)[0], np.asarray(plain))


def test_two_ranks_draw_what_one_draws(one: Omni, two: Omni) -> None:
    prompts: list[PromptInput] = [PROMPT, {"prompt": "a small green star", "negative_prompt": "red"}]
    asked = small(seed=7, num_outputs_per_prompt=2)
    for alone, shared in zip(one.generate(prompts, asked), two.generate(prompts, asked), strict=True):
        assert alone.prompt == shared.prompt
        assert pixels(alone).shape == (2, 64, 80, 3)
        assert np.abs(pixels(alone) - pixels(shared)).max() <= 1
        assert pixels(alone).std() > 1


def test_four_ranks_with_all_axes_at_once_draw_what_one_draws(one: Omni) -> None:
    config = DiffusionParallelConfig(cfg_parallel_size=2, ulysses_degree=2, vae_parallel=True, shard_weights=True)
    with Omni(SHAPES_MODEL, config, device="cpu") as four:
        first, again = (four.generate(PROMPT, small(seed=7))[0] for _ in range(2))
    assert first.images[0].tobytes() == again.images[0].tobytes()
    assert abs(pixels(first) - pixels(one.generate(PROMPT, small(seed=7))[0])).max() <= 2
    assert again.metrics["branches"]["units"] == 2 * again.metrics["branches"]["rounds"]
    assert again.metrics["vae_ranks"] == 4
    assert again.metrics["encoder_ranks"] == {"text_encoder": [0, 2]}  # two prompts, one in each group


def test_embeddings_latents_seeds_and_a_scheduler_of_ones_own(one: Omni, two: Omni) -> None:
    """Each draws what its plain counterpart draws, on one rank and on two."""
    from diffusers import DiffusionPipeline, UniPCMultistepScheduler

    from omni_sp.pipelines.shapes import shapes_folder

    pipe = DiffusionPipeline.from_pretrained(shapes_folder(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    embeds, mask = pipe.encode_prompt(PROMPT)
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64) if mask is None else mask
    negative, negative_mask = pipe.encode_prompt("a small green star")
    negative_mask = torch.ones(negative.shape[:2], dtype=torch.int64) if negative_mask is None else negative_mask
    noise = torch.randn(1, 4 * 5, pipe.transformer.config.in_channels, generator=torch.Generator().manual_seed(3))
    tensors = {
        "prompt_embeds": embeds, "prompt_embeds_mask": mask, "latents": noise,
        "negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative_mask,
    }  # fmt: skip
    size = {"height": 64, "width": 80, "num_inference_steps": 3, "true_cfg_scale": 2.0}
    plain = np.asarray(pipe(**size, **tensors).images[0], dtype=np.int16)
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=pipe.scheduler.config.shift,
        solver_order=1,
    )
    other = np.asarray(
        pipe(PROMPT, negative_prompt=" ", **size, generator=torch.Generator().manual_seed(2)).images[0], dtype=np.int16
    )
    assert np.abs(plain - other).mean() > 5
    for omni in (one, two):
        given = omni.generate(tensors, small(true_cfg_scale=2.0))[0]
        assert given.prompt == ""
        assert np.abs(pixels(given)[0] - plain).max() <= 1
        chosen = ("UniPCMultistepScheduler", {"solver_order": 1})
        replaced = omni.generate(PROMPT, small(true_cfg_scale=2.0, seed=2, scheduler=chosen))[0]
        assert np.abs(pixels(replaced)[0] - other).max() <= 1
        seeded = omni.generate(PROMPT, small(seed=[1, 2]))[0]
        assert seeded.metrics["seed"] == [1, 2]
        for seed, picture in zip((1, 2), pixels(seeded), strict=True):
            # It is also as it was before there was another scheduler.
            assert np.abs(pixels(omni.generate(PROMPT, small(seed=seed))[0])[0] - picture).max() <= 1
        for chosen_wrongly in ("EulerDiscreteScheduler", "NoScheduler", ("UniPCMultistepScheduler", {"order": 1})):
            with pytest.raises(SamplingParamsError, match="Scheduler"):
                omni.generate(PROMPT, small(scheduler=chosen_wrongly))
    errors = two.check(tensors, OmniDiffusionSamplingParams(height=64, width=80, scheduler="UniPCMultistepScheduler"))
    assert max(errors.values()) < 1e-3


def test_the_tuned_kernel_is_in_the_metrics(one: Omni) -> None:
    assert one.generate(PROMPT, small())[0].metrics["attention_kernels"] == {}
    with Omni(SHAPES_MODEL, device="cpu", attention_backend="tune") as omni:
        kernels = omni.generate(PROMPT, small())[0].metrics["attention_kernels"]
    assert kernels
    assert all(shape.startswith("batch ") for shape in kernels)
    assert set(kernels.values()) <= {"cpu_flash", "math"}


def test_metrics(two: Omni) -> None:
    first, second = two.generate([PROMPT, "a star"], small(seed=7))
    assert first.request_id != second.request_id
    took = first.metrics
    assert (took["ranks"], took["seed"], took["num_steps"]) == (2, 7, 3)
    assert took["tokens"]["hidden_states"] == 4 * 5
    for name in ("load_s", "startup_s", "text_encoder_s", "denoise_s", "denoise_step_s", "vae_s", "total_s"):
        assert took[name] > 0, name
    assert "2 ranks" in two.info.layout


def test_a_result_that_is_not_finite_is_an_error_and_the_next_one_is_drawn(one: Omni, two: Omni) -> None:
    wanted = one.generate(PROMPT, small(seed=7))[0]
    for omni in (one, two):
        for output_type in ("pil", "latent"):
            with pytest.raises(NonFiniteResultError, match="first in the latents after step 1") as caught:
                omni.generate(PROMPT, small(negative_prompt="a star", true_cfg_scale=1e308, output_type=output_type))
            assert caught.value.stage == "the latents after step 1"
        assert np.abs(pixels(omni.generate(PROMPT, small(seed=7))[0]) - pixels(wanted)).max() <= 1


def test_a_fresh_seed_is_named_and_draws_the_same_again(two: Omni) -> None:
    fresh, other = two.generate([PROMPT, PROMPT], small())
    again = two.generate(PROMPT, small(seed=fresh.metrics["seed"]))[0]
    assert fresh.metrics["seed"] != other.metrics["seed"]
    assert np.array_equal(pixels(fresh), pixels(again))


def test_outputs_come_one_by_one(two: Omni) -> None:
    outputs = two.generate_each([PROMPT, PROMPT], small(seed=7))
    assert next(outputs).prompt == PROMPT
    assert two.generate("a star", small(seed=7))[0].prompt == "a star"
    assert next(outputs).prompt == PROMPT


def test_what_ranks_refuse_leaves_them_running(two: Omni) -> None:
    with pytest.raises(SamplingParamsError, match="width=70: QwenImagePipeline needs a multiple of 8"):
        two.generate(PROMPT, small(width=70))
    with pytest.raises(SamplingParamsError, match="QwenImagePipeline refused the call: `max_sequence_length`"):
        two.generate(PROMPT, small(max_sequence_length=5000))
    assert two.generate(PROMPT, small())[0].images


def test_arguments_that_ranks_cannot_import_are_refused(two: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("only_here")
    exec("class Callback: pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(SamplingParamsError, match="cannot be read in the rank processes: No module named 'only_here'"):
        two.generate(PROMPT, small(extra_args={"callback_on_step_end": module.Callback()}))
    assert two.generate(PROMPT, small())[0].images


def test_a_rank_that_raises_in_the_middle() -> None:
    before = descendants()
    omni = start_two()
    began = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 of 2 raised RuntimeError: an accident in the middle") as caught:
        omni.generate(PROMPT, small(extra_args={"callback_on_step_end": RaiseOnRank(1)}))
    assert time.monotonic() - began < 10.0
    assert caught.value.rank == 1
    assert "accidents.py" in caught.value.rank_traceback
    assert not isinstance(caught.value, CallFailedError)
    assert descendants() == before
    omni.close()
    with pytest.raises(EngineClosedError, match="an accident in the middle; make a new one"):
        omni.generate(PROMPT)


def test_a_rank_that_is_killed_is_started_again_at_the_next_call() -> None:
    before = descendants()
    omni = start_two()
    began = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 of 2 was killed by signal 9"):
        omni.generate(PROMPT, small(extra_args={"callback_on_step_end": KillRank(1)}))
    assert time.monotonic() - began < 10.0
    assert descendants() == before
    drawn = pixels(omni.generate(PROMPT, small(seed=4))[0])
    # One that dies while nothing runs costs nobody a call.
    ranks = rank_pids(omni)
    os.kill(ranks[0], signal.SIGKILL)
    assert becomes_true(lambda: not alive(ranks[0]), 5.0)
    assert (pixels(omni.generate(PROMPT, small(seed=4))[0]) == drawn).all()
    omni.close()
    assert descendants() == before


def test_groups_of_guidance_come_back_from_every_accident() -> None:
    """A branch raises, which ends no rank, and a rank dies in each stage of a picture; most of them with THOROUGH."""
    before = descendants()
    config = DiffusionParallelConfig(cfg_parallel_size=2, vae_parallel=True)
    with Omni(SHAPES_MODEL, config, device="cpu") as omni:

        def draw(**more: Any) -> Any:
            params = small(seed=4, true_cfg_scale=2.0, negative_prompt="a star", extra_args=more)
            return pixels(omni.generate(PROMPT, params)[0])

        def hit(stage: str) -> None:
            draw(callback_on_step_end=AccidentIn(1, stage))

        drawn, ranks = draw(), rank_pids(omni)
        with pytest.raises(CallFailedError, match="rank 1 of 2 raised ValueError: there is no such branch; the model"):
            hit("branch")
        assert (draw() == drawn).all()
        assert rank_pids(omni) == ranks
        for stage in ("exchange", "encode", "decode") if THOROUGH else ("exchange", "encode"):
            if stage == "encode":
                hit(stage)  # the next call dies while it encodes
            with pytest.raises(RankFailedError, match="rank 1 of 2 was killed by signal 9"):
                hit(stage)
            assert (draw() == drawn).all()
    assert descendants() == before


def test_an_error_of_all_ranks_and_an_interrupt_keep_the_model(two: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, ranks = pixels(two.generate(PROMPT, small(seed=4))[0]), rank_pids(two)
    with pytest.raises(CallFailedError, match="all 2 ranks raised IndexError: an accident of all; the model stays"):
        two.generate(PROMPT, small(extra_args={"callback_on_step_end": RaiseOnAllRanks()}))
    with monkeypatch.context() as patched:
        interrupt = once(lambda: signal.raise_signal(signal.SIGINT))
        patched.setattr(StepsDisplay, "show", lambda *_: interrupt())
        with pytest.raises(KeyboardInterrupt) as caught:
            two.generate(PROMPT, small(num_inference_steps=100_000))
        assert isinstance(caught.value.__cause__, RequestAbortedError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (pixels(two.generate(PROMPT, small(seed=4))[0]) == drawn).all()
    assert rank_pids(two) == ranks


def test_a_second_interrupt_ends_the_ranks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descendants()
    omni = start_two()
    with monkeypatch.context() as patched:
        patched.setattr(StepsDisplay, "show", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            omni.generate(PROMPT, small(num_inference_steps=100_000))
    assert descendants() == before
    assert omni.generate(PROMPT, small())[0].images
    omni.close()


def test_an_error_in_this_process_leaves_it_open(one: Omni) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("here")

    with pytest.raises(RankFailedError, match="rank 0 of 1 raised RuntimeError: here") as caught:
        one.generate(PROMPT, small(extra_args={"callback_on_step_end": fail}))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert one.generate(PROMPT, small())[0].images


def test_closed_is_closed() -> None:
    omni = Omni(SHAPES_MODEL, device="cpu")
    omni.close()
    omni.close()
    with pytest.raises(EngineClosedError, match="make a new one"):
        omni.generate(PROMPT)


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ([], "the list of prompts is empty"),
        (7, "give a prompt"),
        (b"a red circle", "prompts=b'a red circle': give a prompt"),
        ([7], "give a string, or a dict"),
        ({"prmpt": "a cat"}, "did you mean prompt?"),
        ({"prompt": 7}, "prompt=7: give a string"),
        ({"negative_prompt": "a dog"}, "neither prompt nor image"),
        ({"prompt": "a cat", "image": Image.new("RGB", (8, 8))}, "does not take image"),
        ({"prompt": "a cat", "image": "cat.png"}, "image holds a str: give a PIL picture"),
        ({"prompt": "a cat", "image": [Image.new("RGB", (8, 8)), None]}, "image holds a NoneType: give a PIL picture"),
        ({"prompt": "a cat", "image": []}, "image holds a list: give a PIL picture"),
    ],
)
def test_prompts_that_are_none(one: Omni, prompts: Any, told: str) -> None:
    with pytest.raises(SamplingParamsError) as caught:
        one.generate(prompts)
    assert told in str(caught.value)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_omni_has_no_copies(one: Omni, copied: Callable[[Omni], Any]) -> None:
    with pytest.raises(ConfigError, match="Omni belongs to its process, and has no copies"):
        copied(one)


def test_sampling_params_are_of_their_class(one: Omni) -> None:
    with pytest.raises(SamplingParamsError, match="give an OmniDiffusionSamplingParams"):
        one.generate(PROMPT, {"width": 64})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"devise": "cpu"}, "did you mean device?"),
        ({"ulysses_degree": 2}, r"belongs in parallel_config=DiffusionParallelConfig\(ulysses_degree=...\)"),
        ({"uslyses": 2}, r"did you mean parallel_config=DiffusionParallelConfig\(ulysses_degree=...\)"),
        ({"x" * 100_000: 2}, "^.{1,2000}$"),
        ({"quite_something": 2}, "it takes model, parallel_config"),
        ({"device": "tpu"}, 'give "cpu", "cuda"'),
        ({"dtype": "int8"}, "give one of float32, bfloat16, float16"),
        ({"rank_timeout_s": 0}, "a number of seconds above 0"),
        ({"parallel_config": 4}, "give a DiffusionParallelConfig"),
        ({"device": "cuda:99"}, "no device cuda:99"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Omni(SHAPES_MODEL, **options)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = DiffusionParallelConfig(ulysses_degree=2, ring_degree=2)
    with pytest.raises(ConfigError, match=r"4 ranks need 4 GPUs, one each, and this machine has 2: .*--device cpu"):
        Omni(SHAPES_MODEL, config)


def test_an_unknown_model_is_refused_before_anything_is_started() -> None:
    before = descendants()
    with pytest.raises(ModelNotFoundError):
        Omni("no such model", DiffusionParallelConfig(ulysses_degree=2))
    assert descendants() == before
