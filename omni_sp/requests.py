"""What Omni and AsyncOmni share: options of the constructor, prompts as users write them, and their outputs."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from omni_sp.config import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.engine.automatic import automatic_config, is_automatic
from omni_sp.engine.devices import check_device_name
from omni_sp.engine.messages import Call, Done, EngineOptions, Ready
from omni_sp.errors import ConfigError, SamplingParamsError, UnsupportedAttentionError
from omni_sp.outputs import OmniRequestOutput
from omni_sp.pipelines.arguments import Prompt, frames_per_second
from omni_sp.pipelines.fitting import check_offload, check_quantization
from omni_sp.pipelines.load import resolve_model
from omni_sp.pipelines.metadata import drawing_settings
from omni_sp.pipelines.quirks import EMBEDDINGS, PROMPT_TENSORS
from omni_sp.pipelines.results import output_deviation
from omni_sp.validation import nearest, require_bool, require_int, require_number, require_str, shown, suggestion

_DTYPES = ("float32", "bfloat16", "float16")
_PROMPT_KEYS = ("prompt", "negative_prompt", "image")
_MORE_KEYS = "prompt_embeds and its companions, latents"

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")

PromptInput = str | Mapping[str, Any] | Prompt
Model = str | os.PathLike[str]


class NotCopied:
    """A base of what belongs to its process, with the ranks and the memory that go with it."""

    def __reduce_ex__(self, _protocol: object) -> Any:
        """Refuse to be copied or pickled.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{type(self).__name__} belongs to its process, and has no copies: make one where it is used")


def engine_options(
    model: Model,
    parallel_config: DiffusionParallelConfig | str | None = None,
    *,
    device: str | None = None,
    dtype: Any = None,
    single_file_config: Model | None = None,
    attention_backend: str = "auto",
    attention_strategy: str = "omni_sp",
    replay: bool = True,
    compile: bool | str = False,
    cuda_graphs: bool = False,
    quantization: str | None = None,
    offload: str | None = None,
    vae_dtype: Any = None,
    lora: Mapping[str, Model] | None = None,
    rank_timeout_s: float = 600.0,
    startup_timeout_s: float = 3600.0,
) -> EngineOptions:
    """The options of Omni's constructor, checked; Omni documents them. Degrees that are to be chosen are 1 for now.

    Raises:
        ConfigError: an option that cannot be.
        UnsupportedAttentionError: there is no such strategy.
        ModelNotFoundError: there is no such model.
    """
    if is_automatic(parallel_config):
        parallel_config = None
    if parallel_config is not None and not isinstance(parallel_config, DiffusionParallelConfig):
        raise ConfigError(f'parallel_config={shown(parallel_config)}: give a DiffusionParallelConfig, or "auto"')
    check_device_name(device)
    _check_attention(attention_backend, attention_strategy)
    config = parallel_config or DiffusionParallelConfig()
    return EngineOptions(
        source=resolve_model(model, single_file_config),
        config=config,
        device=device,
        dtype=_dtype_name(dtype),
        attention_backend=attention_backend,
        attention_strategy=attention_strategy,
        replay=require_bool("replay", replay, error=ConfigError),
        compile=_checked_compile(compile, replay),
        cuda_graphs=_checked_graphs(cuda_graphs, replay, device),
        quantization=check_quantization(quantization),
        offload=check_offload(offload, config, compile=compile, cuda_graphs=cuda_graphs),
        vae_dtype=_dtype_name(vae_dtype, "vae_dtype"),
        lora=_checked_lora(lora),
        rank_timeout_s=_seconds("rank_timeout_s", rank_timeout_s),
        startup_timeout_s=_seconds("startup_timeout_s", startup_timeout_s),
    )


def with_degrees(
    options: EngineOptions, asked: Any, say: Callable[[str], None], *, joins: bool = True
) -> EngineOptions:
    """The options with the degrees that are chosen where ``parallel_config="auto"`` asks for it.

    Args:
        options: of engine_options().
        asked: the parallel_config that the user gave.
        say: called with a line on what was chosen, and why.
        joins: see automatic_config().
    """
    if not isinstance(asked, str):
        return options
    config = automatic_config(
        asked,
        options.source,
        device=options.device,
        dtype=options.dtype,
        offloads=options.offload is not None,
        quantization=options.quantization,
        joins=joins,
        timeout_s=options.rank_timeout_s,
        say=say,
    )
    return replace(options, config=config)


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
    degrees = list(inspect.signature(DiffusionParallelConfig).parameters)
    for name in options:
        if name in known:
            continue
        if name in degrees:
            raise ConfigError(f"{name} belongs in parallel_config=DiffusionParallelConfig({name}=...)")
        hint, near = suggestion(name, known), nearest(name, [*known, *degrees])
        if near in degrees:
            hint = f"did you mean parallel_config=DiffusionParallelConfig({near}=...)?"
        raise ConfigError(f"{owner.__name__} has no option {shown(name)}; {hint}")


def require_params(params: OmniDiffusionSamplingParams | None) -> OmniDiffusionSamplingParams:
    """The sampling parameters, or those that leave everything to the pipeline."""
    if params is None:
        return OmniDiffusionSamplingParams()
    if not isinstance(params, OmniDiffusionSamplingParams):
        raise SamplingParamsError(f"sampling_params={shown(params)}: give an OmniDiffusionSamplingParams")
    return params


def require_place(request_id: str | None, priority: int) -> None:
    """Refuse names and priorities that the queue, which is everybody's, could not look up or compare."""
    if request_id is not None:
        require_str("request_id", request_id, error=SamplingParamsError, hint="give a string, or leave it out")
    hint = "give a whole number of 64 bits; higher ones come first"
    require_int("priority", priority, minimum=-(2**63), error=SamplingParamsError, hint=hint)


def prompt_list(prompts: Any) -> list[Any]:
    """One prompt or several, as a list."""
    if isinstance(prompts, (str, Mapping, Prompt)):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise SamplingParamsError(f"prompts={shown(prompts)}: give a prompt (a string or a dict), or a list of them")
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
        raise SamplingParamsError(f"prompt {shown(prompt)}: give a string, or a dict with {', '.join(_PROMPT_KEYS)}")
    tensors: dict[str, Any] = {}
    for key, value in prompt.items():
        if isinstance(key, str) and PROMPT_TENSORS.fullmatch(key):
            tensors |= {} if value is None else {key: value}
        elif key not in _PROMPT_KEYS:
            hint = suggestion(str(key), _PROMPT_KEYS, f"a prompt has {{known}}, {_MORE_KEYS}")
            raise SamplingParamsError(f"unknown key {shown(key)} in a prompt; {hint}", str(key))
    for key in ("prompt", "negative_prompt"):
        if prompt.get(key) is not None and not isinstance(prompt[key], str):
            raise SamplingParamsError(f"{key}={shown(prompt[key])}: give a string", key)
    has_embeddings = any(EMBEDDINGS in name for name in tensors)
    if prompt.get("prompt") is None and prompt.get("image") is None and not has_embeddings:
        raise SamplingParamsError("a prompt dict has neither prompt nor image: give at least one of them", "prompt")
    image = prompt.get("image")
    pictures = image if isinstance(image, list) else [image]
    if image is not None and not (pictures and all(map(_is_picture, pictures))):
        kind = type(next((one for one in pictures if not _is_picture(one)), image)).__name__
        raise SamplingParamsError(
            f"image holds a {kind}: give a PIL picture or a list of them, such as PIL.Image.open(path).convert('RGB')",
            "image",
        )
    return Prompt(text=prompt.get("prompt"), negative_text=prompt.get("negative_prompt"), image=image, tensors=tensors)


def output_of(
    ready: Ready, call: Call, prompt: Prompt, params: OmniDiffusionSamplingParams, done: Done, *, startup_s: float
) -> OmniRequestOutput:
    """What the user gets for a call. Warns where the pipeline made something else than was asked for."""
    assert done.result is not None, "rank 0 answers with a result"
    seeds: int | list[int] = call.seeds[0] if len(call.seeds) == 1 else list(call.seeds)
    metrics: dict[str, Any] = {
        **done.result.timings,
        "load_s": ready.load_s,
        "startup_s": startup_s,
        "startup_parts_s": dict(ready.start_s),
        "tokens": dict(done.tokens),
        "blocks": dict(done.blocks),
        "attention_kernels": dict(done.kernels),
        "vae_ranks": done.vae_ranks,
        "encoder_ranks": {name: list(ranks) for name, ranks in done.encoder_ranks.items()},
        "dropped_tokens": dict(next(iter(done.result.dropped_tokens), {})),
        "ranks": ready.ranks,
        "seed": seeds if ready.capabilities.argument_name("generator") is not None else None,
    }
    if done.branches:
        metrics["branches"] = dict(done.branches)
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
        settings=drawing_settings(
            ready.capabilities,
            call.arguments,
            model=ready.model,
            layout=ready.layout,
            prompt=prompt.text,
            seed=metrics["seed"],
            scheduler=call.scheduler if isinstance(call.scheduler, str) else None,
            lora=", ".join(f"{name}={scale:g}" for name, scale in call.adapters),
        ),
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


def _checked_compile(compile: Any, replay: bool) -> bool | str:
    """Refuse what torch.compile does not take, before anything is loaded or started for it."""
    if not isinstance(compile, str):
        require_bool("compile", compile, error=ConfigError)
    if compile:
        from omni_sp.sharding.compiled import compile_options

        compile_options(compile, replay=replay)
    checked: bool | str = compile
    return checked


def _checked_graphs(cuda_graphs: bool, replay: bool, device: str | None) -> bool:
    """Refuse CUDA graphs where nothing could ever be captured."""
    if require_bool("cuda_graphs", cuda_graphs, error=ConfigError) and (not replay or device == "cpu"):
        raise ConfigError(
            "cuda_graphs=True captures what is replayed on GPUs: leave replay on, and device at None or cuda"
        )
    return cuda_graphs


def _checked_lora(lora: Any) -> dict[str, str]:
    """Refuse what names no adapters, before anything is loaded or started for it."""
    if not lora:
        return {}
    if not isinstance(lora, Mapping):
        raise ConfigError(f"lora={shown(lora)}: give a dict of names and paths")
    for name, path in lora.items():
        # The name becomes a part of the paths of modules.
        if not isinstance(name, str) or not _ADAPTER_NAME.fullmatch(name):
            raise ConfigError(f"lora: {shown(name)} is no name for an adapter: give letters, digits, - and _")
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ConfigError(f"lora: {name}={shown(path)}: give a folder, a file or a hub id")
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("LoRA adapters need peft: pip install '.[lora]'")
    return {name: str(os.fspath(path)) for name, path in lora.items()}


def _is_picture(value: Any) -> bool:
    """A PIL picture, or an array or tensor, which pipelines take as well."""
    return isinstance(value, Image.Image) or hasattr(value, "shape")


def _dtype_name(dtype: Any, option: str = "dtype") -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"{option}={shown(dtype)}: give one of {', '.join(_DTYPES)}, or None to choose")
    return name


def _seconds(name: str, value: float) -> float:
    return require_number(name, value, above=0, below=1e9, error=ConfigError, hint="give a number of seconds above 0")
