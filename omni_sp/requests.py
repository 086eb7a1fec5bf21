"""What Omni and AsyncOmni share: options of the constructor, prompts as users write them, and their outputs."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from omni_sp.config import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.engine.devices import check_device_name
from omni_sp.engine.messages import Call, Done, EngineOptions, Ready
from omni_sp.errors import ConfigError, SamplingParamsError, UnsupportedAttentionError
from omni_sp.outputs import OmniRequestOutput
from omni_sp.pipelines.arguments import Prompt, frames_per_second
from omni_sp.pipelines.load import resolve_model
from omni_sp.pipelines.results import output_deviation
from omni_sp.validation import require_number, suggestion

_DTYPES = ("float32", "bfloat16", "float16")
_PROMPT_KEYS = ("prompt", "negative_prompt", "image")

PromptInput = str | Mapping[str, Any] | Prompt
Model = str | os.PathLike[str]


def engine_options(
    model: Model,
    parallel_config: DiffusionParallelConfig | None = None,
    *,
    device: str | None = None,
    dtype: Any = None,
    attention_backend: str = "auto",
    attention_strategy: str = "omni_sp",
    rank_timeout_s: float = 600.0,
    startup_timeout_s: float = 3600.0,
) -> EngineOptions:
    """The options of Omni's constructor, checked; Omni documents them.

    Raises:
        ConfigError: an option that cannot be.
        UnsupportedAttentionError: there is no such strategy.
        ModelNotFoundError: there is no such model.
    """
    if parallel_config is not None and not isinstance(parallel_config, DiffusionParallelConfig):
        raise ConfigError(f"parallel_config={parallel_config!r}: give a DiffusionParallelConfig")
    check_device_name(device)
    _check_attention(attention_backend, attention_strategy)
    return EngineOptions(
        source=resolve_model(model),
        config=parallel_config or DiffusionParallelConfig(),
        device=device,
        dtype=_dtype_name(dtype),
        attention_backend=attention_backend,
        attention_strategy=attention_strategy,
        rank_timeout_s=_seconds("rank_timeout_s", rank_timeout_s),
        startup_timeout_s=_seconds("startup_timeout_s", startup_timeout_s),
    )


def require_known(options: Mapping[str, Any], owner: type) -> None:
    """Refuse options that a constructor does not know; degrees live in the parallel config.

    Raises:
        ConfigError: it names the option that was probably meant.
    """
    signatures = [inspect.signature(function).parameters.values() for function in (owner, engine_options)]
    named = [
        parameter.name for signature in signatures for parameter in signature if parameter.kind != parameter.VAR_KEYWORD
    ]
    known = list(dict.fromkeys(named))
    for name in options:
        if name in known:
            continue
        if name in inspect.signature(DiffusionParallelConfig).parameters:
            raise ConfigError(f"{name} belongs into parallel_config=DiffusionParallelConfig({name}=...)")
        raise ConfigError(f"{owner.__name__} has no option {name!r}; {suggestion(name, known)}")


def require_params(params: OmniDiffusionSamplingParams | None) -> OmniDiffusionSamplingParams:
    """The sampling parameters, or those that leave everything to the pipeline."""
    if params is None:
        return OmniDiffusionSamplingParams()
    if not isinstance(params, OmniDiffusionSamplingParams):
        raise SamplingParamsError(f"sampling_params={params!r}: give an OmniDiffusionSamplingParams")
    return params


def prompt_list(prompts: Any) -> list[Any]:
    """One prompt or several, as a list."""
    if isinstance(prompts, (str, Mapping, Prompt)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise SamplingParamsError(f"prompts={prompts!r}: give a prompt (a string or a dict), or a list of them")
    if not prompts:
        raise SamplingParamsError("the list of prompts is empty: give at least one")
    return list(prompts)


def parse_prompt(prompt: Any) -> Prompt:
    """The prompt that a user writes as a string, a dict or a Prompt.

    Raises:
        SamplingParamsError: it is no prompt.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if not isinstance(prompt, Mapping):
        raise SamplingParamsError(f"prompt {prompt!r}: give a string, or a dict with {', '.join(_PROMPT_KEYS)}")
    for key in prompt:
        if key not in _PROMPT_KEYS:
            hint = suggestion(str(key), _PROMPT_KEYS, "a prompt has {known}")
            raise SamplingParamsError(f"unknown key {key!r} in a prompt; {hint}", str(key))
    for key in ("prompt", "negative_prompt"):
        if prompt.get(key) is not None and not isinstance(prompt[key], str):
            raise SamplingParamsError(f"{key}={prompt[key]!r}: give a string", key)
    if prompt.get("prompt") is None and prompt.get("image") is None:
        raise SamplingParamsError("a prompt dict has neither prompt nor image: give at least one of them", "prompt")
    image = prompt.get("image")
    pictures = image if isinstance(image, list) else [image]
    if image is not None and not (pictures and all(map(_is_picture, pictures))):
        kind = type(next((one for one in pictures if not _is_picture(one)), image)).__name__
        raise SamplingParamsError(
            f"image holds a {kind}: give a PIL picture or a list of them, such as PIL.Image.open(path).convert('RGB')",
            "image",
        )
    return Prompt(text=prompt.get("prompt"), negative_text=prompt.get("negative_prompt"), image=image)


def output_of(
    ready: Ready, call: Call, prompt: Prompt, params: OmniDiffusionSamplingParams, done: Done, *, startup_s: float
) -> OmniRequestOutput:
    """What the user gets for a call. Warns where the pipeline made something else than was asked for."""
    assert done.result is not None, "rank 0 answers with a result"
    metrics: dict[str, Any] = {
        **done.result.timings,
        "load_s": ready.load_s,
        "startup_s": startup_s,
        "startup_parts_s": dict(ready.start_s),
        "tokens": dict(done.tokens),
        "ranks": ready.ranks,
        "seed": call.seeds[0] if ready.capabilities.argument_name("generator") is not None else None,
    }
    if done.result.videos:
        metrics["fps"] = frames_per_second(ready.capabilities, call.arguments, params.fps)
    if done.result.audios:
        metrics["sampling_rate"] = ready.capabilities.sampling_rate
    deviation = output_deviation(ready.capabilities, call.arguments, done.result)
    if deviation is not None:
        warnings.warn(deviation, stacklevel=3)
    return OmniRequestOutput(
        request_id=call.request_id,
        prompt=prompt.text or "",
        images=done.result.images,
        videos=done.result.videos,
        audios=done.result.audios,
        metrics=metrics,
    )


def _check_attention(backend: str, strategy: str) -> None:
    """Refuse a kernel and a strategy that there are not, before anything is loaded or started for them."""
    if (backend, strategy) == ("auto", "omni_sp"):
        return  # the attention core imports torch, for which a front of other processes need not wait
    from omni_sp.attention import check_kernel, check_strategy, missing_package

    try:
        check_kernel(backend)
    except UnsupportedAttentionError as error:
        raise ConfigError(str(error)) from error
    missing = missing_package(backend)
    if missing is not None:
        raise ConfigError(f"attention kernel {backend!r} needs {missing}, or leave the choice to 'auto'")
    check_strategy(strategy)


def _is_picture(value: Any) -> bool:
    """A PIL picture, or an array or tensor, which pipelines take as well."""
    return isinstance(value, Image.Image) or hasattr(value, "shape")


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: give one of {', '.join(_DTYPES)}, or None to choose")
    return name


def _seconds(name: str, value: float) -> float:
    return require_number(name, value, above=0, below=1e9, error=ConfigError, hint="give a number of seconds above 0")
