"""One call of a loaded pipeline, timed."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from omni_sp.errors import ConfigError, OmniSPError, SamplingParamsError
from omni_sp.pipelines import quirks
from omni_sp.pipelines.capabilities import our_name
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
        SamplingParamsError: the pipeline itself refused its arguments, before denoising began.
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
        except (ValueError, TypeError) as error:
            if clock.denoising_began:
                raise
            raise _refusal(type(pipe).__name__, call, error) from error
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


def _refusal(name: str, call: Mapping[str, Any], error: Exception) -> SamplingParamsError:
    """The pipeline's own error as ours. The argument to blame is the first that its message names."""
    reason = " ".join(str(error).split())
    blamed = next((word for word in re.findall(r"\w+", reason) if word in call), None)
    return SamplingParamsError(f"{name} refused the call: {reason}", param=None if blamed is None else our_name(blamed))
