"""One call of a loaded pipeline, timed."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import torch

from omni_sp.errors import ConfigError, OmniSPError, SamplingParamsError
from omni_sp.pipelines.capabilities import our_name
from omni_sp.pipelines.quirks import OPTIONAL_PACKAGES
from omni_sp.pipelines.results import CallResult, result_of
from omni_sp.pipelines.timing import OnStep, StageClock


def run_call(
    pipe: Any,
    arguments: Mapping[str, Any],
    *,
    seed: int | tuple[int, ...] | None,
    device: torch.device | str,
    on_step: OnStep | None = None,
) -> CallResult:
    """Call the pipeline, timed, with a CPU generator of this seed.

    Args:
        seed: of the generator, or one for each prompt; None where the pipeline takes no generator.

    Raises:
        SamplingParamsError: the pipeline itself refused its arguments, before denoising began.
        ConfigError: it uses a package that is not installed.
        UnsupportedModelError: its output holds no image, video or sound.
    """
    call = dict(arguments)
    if isinstance(seed, tuple):
        call["generator"] = [torch.Generator("cpu").manual_seed(one) for one in seed]
    elif seed is not None:
        call["generator"] = torch.Generator("cpu").manual_seed(seed)
    began = time.perf_counter()
    with StageClock(pipe, torch.device(device), on_step) as clock:
        try:
            output = pipe(**call)
        except OmniSPError:
            raise
        except (ValueError, TypeError) as error:
            if clock.denoising_began:
                raise
            raise _refusal(type(pipe).__name__, call, error) from error
        except NameError as error:
            package = OPTIONAL_PACKAGES.get(error.name or "")
            if package is None:
                raise
            raise ConfigError(f"{type(pipe).__name__} needs a package: pip install {package}") from error
        total = clock.now() - began
    timings = {f"{stage}_s": seconds for stage, seconds in clock.seconds.items()}
    timings["num_steps"] = clock.num_steps
    timings["denoise_step_s"] = clock.seconds["denoise"] / clock.num_steps if clock.num_steps else 0.0
    timings["total_s"] = total
    return result_of(type(pipe).__name__, output, output_type=call.get("output_type"), timings=timings)


def _refusal(name: str, call: Mapping[str, Any], error: Exception) -> SamplingParamsError:
    """The pipeline's own error as ours. The argument to blame is the first that its message names."""
    reason = " ".join(str(error).split())
    blamed = next((word for word in re.findall(r"\w+", reason) if word in call), None)
    return SamplingParamsError(f"{name} refused the call: {reason}", param=None if blamed is None else our_name(blamed))
