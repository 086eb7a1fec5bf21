"""Results that are no numbers are found, and the stage that made them first is named."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from omni_sp.errors import NonFiniteResultError
from omni_sp.pipelines.capabilities import inspect_pipeline
from omni_sp.pipelines.finite import FiniteCheck
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.preview import Previews
from omni_sp.pipelines.results import require_finite
from omni_sp.pipelines.run import run_call
from omni_sp.pipelines.shapes import SHAPES_MODEL
from omni_sp.pipelines.timing import StageClock

SMALL = {"prompt": "a red circle", "height": 64, "width": 80, "num_inference_steps": 3, "output_type": "pil"}
NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def shapes() -> Any:
    pipe = load_pipeline(resolve_model(SHAPES_MODEL), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def poisoned(module: torch.nn.Module, value: float, calls: int = 0) -> Iterator[None]:
    """From so many calls on, one number of what the module gives is this value."""
    seen = 0

    def hook(_module: Any, _args: Any, output: Any) -> None:
        nonlocal seen
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        if seen >= calls:
            tensor.view(-1)[3] = value
        seen += 1

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def stage(pipe: Any, **arguments: Any) -> str | None:
    return run_call(pipe, SMALL | arguments, seed=7, device="cpu").not_finite


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
def test_the_first_stage_is_named(shapes: Any, output_type: str, value: float) -> None:
    assert stage(shapes, output_type=output_type) is None
    with poisoned(shapes.transformer.proj_out, value, calls=1):
        assert stage(shapes, output_type=output_type) == "the latents after step 2"
    with poisoned(shapes.text_encoder.get_input_embeddings(), NAN):
        assert stage(shapes, output_type=output_type) == "the text encoder's output"
    with poisoned(shapes.vae.decoder, NAN):  # this VAE clamps, which makes an infinite number white
        decoded = None if output_type == "latent" else "what the VAE decoded"
        assert stage(shapes, output_type=output_type) == decoded


def test_a_scale_that_overflows(shapes: Any) -> None:
    result = run_call(shapes, SMALL | {"negative_prompt": "x", "true_cfg_scale": 1e308}, seed=7, device="cpu")
    assert result.not_finite == "the latents after step 1"
    capabilities = inspect_pipeline(shapes)
    with pytest.raises(
        NonFiniteResultError, match=r"QwenImagePipeline made NaN or .*step 1: try a lower guid"
    ) as caught:
        require_finite(result, capabilities, "float32")
    assert caught.value.stage == "the latents after step 1"
    with pytest.raises(NonFiniteResultError, match="bfloat16 or float32 as dtype"):
        require_finite(result, capabilities, "float16")


def test_what_a_preview_decodes_is_no_stage(shapes: Any) -> None:
    previews = Previews(shapes, 64, 80)
    pictures: list[Any] = []

    def on_step(done: int, total: int) -> None:
        if 0 < done < total:
            with poisoned(shapes.vae.decoder, NAN):
                pictures.extend(previews.images())

    result = run_call(shapes, SMALL, seed=7, device="cpu", on_step=on_step, on_latent=previews.keep)
    assert len(pictures) == 2
    assert result.not_finite is None


def test_numbers_of_a_result_itself() -> None:
    sounds = [np.zeros((2, 5), np.float32), np.array([[0.0, NAN]], np.float32)]
    assert FiniteCheck().first_stage(sounds[:1]) is None
    assert FiniteCheck().first_stage(sounds) == "the result"
    assert FiniteCheck().first_stage([torch.tensor([1.0, INFINITE], dtype=torch.bfloat16)]) == "the result"
    assert FiniteCheck().first_stage([torch.zeros(0), torch.tensor([2]), "text"]) is None


def test_an_infinite_number_that_does_not_reach_the_result_is_no_error() -> None:
    check = FiniteCheck()
    check.note("the text encoder's output", (torch.tensor([0.0, -INFINITE]), None))
    check.note("the latents after step 1", torch.tensor([1.0]))
    assert check.first_stage([]) is None


def test_schedulers_stay_what_pipelines_know(shapes: Any) -> None:
    """Pipelines look into the signature of step(), and some make copies of their scheduler that step beside it."""
    plain = inspect.signature(shapes.scheduler.step)
    latents: list[torch.Tensor] = []
    with StageClock(shapes, torch.device("cpu"), on_latent=latents.append):
        assert inspect.signature(shapes.scheduler.step) == plain
        other = copy.deepcopy(shapes.scheduler)
        for scheduler in (shapes.scheduler, other):
            scheduler.set_timesteps(4, mu=0.5)
        sample = torch.ones(1, 2)
        shapes.scheduler.step(sample, shapes.scheduler.timesteps[0], sample)
        assert (shapes.scheduler.step_index, other.step_index) == (1, None)
        other.step(sample, other.timesteps[0], sample)
        assert (shapes.scheduler.step_index, other.step_index) == (1, 1)
    assert len(latents) == 1
    assert "step" not in vars(shapes.scheduler)
