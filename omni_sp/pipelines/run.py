"""One call of a loaded pipeline, timed."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from omni_sp.errors import ConfigError, OmniSPError, SamplingParamsError
from omni_sp.pipelines import quirks
from omni_sp.pipelines.capabilities import our_name, size_multiples
from omni_sp.pipelines.dropped_tokens import DroppedTokens
from omni_sp.pipelines.finite import FiniteCheck
from omni_sp.pipelines.parallelize import transformers_of
from omni_sp.pipelines.results import CallResult, result_of
from omni_sp.pipelines.timing import TEXT, OnLatent, OnStep, StageClock


def run_call(
    pipe: Any,
    arguments: Mapping[str, Any],
    *,
    seed: int | tuple[int, ...] | None,
    device: torch.device | str,
    on_step: OnStep | None = None,
    on_latent: OnLatent | None = None,
) -> CallResult:
    """Call the pipeline, timed, with a CPU generator of this seed.

    A result that is not finite is no error here, where ranks have different parts of it: see require_finite().

    Args:
        seed: of the generator, or one for each prompt or output; None where the pipeline takes no generator.
        on_step: called after every step.
        on_latent: called with the latent after every step.

    Raises:
        SamplingParamsError: the pipeline itself refused its arguments, before denoising began or in the first forward.
        ConfigError: it uses a package that is not installed.
        UnsupportedModelError: its output holds no image, video or sound.
    """
    call = _placed(pipe, arguments, torch.device(device))
    if isinstance(seed, tuple):
        call["generator"] = [torch.Generator("cpu").manual_seed(one) for one in seed]
    elif seed is not None:
        call["generator"] = torch.Generator("cpu").manual_seed(seed)
    began = time.perf_counter()
    finite = FiniteCheck()
    prompt = call.get("prompt")
    dropped = DroppedTokens(pipe, len(prompt) if isinstance(prompt, list) else 1)

    def on_output(stage: str, output: Any) -> None:
        finite.note(stage, output)
        if stage == TEXT:
            dropped.note_encoded(output)

    watched = StageClock(pipe, torch.device(device), on_step, on_output=on_output, on_latent=on_latent)
    with dropped, watched as clock, np.errstate(invalid="ignore"):  # numbers that are not finite are looked for below
        try:
            output = pipe(**call)
        except OmniSPError:
            raise
        except (ValueError, TypeError, ArithmeticError, IndexError, RuntimeError) as error:
            refusal = _refusal(pipe, call, error, clock)
            if refusal is None:
                raise
            raise refusal from error
        except NameError as error:
            package = quirks.OPTIONAL_PACKAGES.get(error.name or "")
            if package is None:
                raise
            raise ConfigError(f"{type(pipe).__name__} needs a package: pip install {package}") from error
        total = clock.now() - began
    timings = {f"{stage}_s": seconds for stage, seconds in clock.seconds.items()}
    timings["num_steps"] = clock.num_steps
    timings["denoise_step_s"] = clock.seconds["denoise"] / clock.num_steps if clock.num_steps else 0.0
    timings["total_s"] = total
    result = result_of(type(pipe).__name__, output, output_type=call.get("output_type"), timings=timings)
    not_finite = finite.first_stage([*result.images, *result.videos, *result.audios])
    return replace(result, not_finite=not_finite, dropped_tokens=dropped.by_prompt())


def _placed(pipe: Any, arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments, with a prompt's tensors on the device, and embeddings in the dtype of the model.

    Latents keep theirs: every pipeline has one of its own for them.
    """
    models = transformers_of(pipe)
    dtype: Any = models[0][1].dtype if models else pipe.dtype

    def placed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [placed(name, one) for one in value]
        if not isinstance(value, torch.Tensor):
            return value
        is_embedding = quirks.EMBEDDINGS in name and value.is_floating_point()
        return value.to(device, dtype if is_embedding else value.dtype)

    return {
        name: placed(name, value) if quirks.PROMPT_TENSORS.fullmatch(name) else value
        for name, value in arguments.items()
    }


def _refusal(pipe: Any, call: Mapping[str, Any], error: Exception, clock: StageClock) -> SamplingParamsError | None:
    """The pipeline's own error as ours, where its arguments are to blame; else None.

    They are where it refuses them before denoising, or its model does in the first forward, as models say that a size
    is too large; code of others that runs by then, such as a callback, raises its errors in lines of its own. Errors of
    arithmetic and of shapes, before denoising and in lines of diffusers, come from pictures of odd sizes.
    """
    name, reason = type(pipe).__name__, " ".join(str(error).split())
    pictures = [picture for value in call.values() for picture in _pictures(value)]
    shown = ", ".join(f"{picture.width} x {picture.height}" for picture in pictures[:3])
    if isinstance(error, (ValueError, TypeError)):
        by_model = isinstance(error, ValueError) and not clock.has_stepped and _is_of_diffusers(error)
        if clock.denoising_began and not by_model:
            return None
        # The argument to blame is the first that its message names.
        blamed = next((word for word in re.findall(r"\w+", reason) if word in call), None)
        text = f"{name} refused the call: {reason}" + (f" (pictures of {shown} pixels)" if pictures else "")
        return SamplingParamsError(text, param=None if blamed is None else our_name(blamed))
    # Subclasses of RuntimeError are of memory, devices and lost ranks.
    is_of_shapes = isinstance(error, (ArithmeticError, IndexError)) or type(error) is RuntimeError
    if clock.denoising_began or not (pictures and is_of_shapes and _is_of_diffusers(error)):
        return None
    height, width = size_multiples(pipe)
    is_small = any(picture.width < width or picture.height < height for picture in pictures)
    return SamplingParamsError(
        f"{name} cannot start from pictures of {shown} pixels ({type(error).__name__}: {reason})"
        + (f": give at least {width} x {height}" if is_small else ""),
        param="image",
    )


def _pictures(value: Any) -> Iterator[Image.Image]:
    if isinstance(value, Image.Image):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _pictures(item)


def _is_of_diffusers(error: Exception) -> bool:
    """Whether a line of diffusers raised it, or called what torch refused."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("diffusers.")
