"""Our flags on vLLM's command line, rewritten into vLLM's own flags before vLLM reads them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omni_sp.command_line import CommandLine
from omni_sp.errors import ConfigError
from omni_sp.llm.speculation.settings import SHORT_OPTIONS, WORKER, SpeculationSettings, with_short_options
from omni_sp.llm.vllm.config import CONFIG_KEY, LlmParallelConfig
from omni_sp.llm.vllm.model_support import require_heads_for, require_supported_model, speculation_method
from omni_sp.llm.vllm.step_metrics import start_step_counter

_SEQUENCE = ("--ulysses-sequence-parallel-size", "--sequence-parallel-size")
_SHIFT, _THRESHOLD = "--enable-shift-parallel", "--shift-parallel-threshold"
_TENSOR = ("--tensor-parallel-size", "-tp")
_MEMORY = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
_ADDITIONAL_CONFIG, _EAGER, _NOT_EAGER = "--additional-config", "--enforce-eager", "--no-enforce-eager"
_SPECULATION, _WORKER = ("--speculative-config", "-sc"), "--worker-cls"
_SHORT = {f"--{name.replace('_', '-')}": name for name in SHORT_OPTIONS}
_SHORTEST = len("--abc")  # what is shorter begins several of vLLM's flags, or is one itself
_REWRITTEN = (_TENSOR[0], _ADDITIONAL_CONFIG, _EAGER, _NOT_EAGER, _SPECULATION[0], _WORKER)


def is_vllm_command() -> bool:
    """True in a process that is ``vllm ...`` or ``python -m vllm...``, not in a program that imports vLLM."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name == "vllm" or (spec is not None and spec.name.startswith("vllm."))


def for_vllm(arguments: Sequence[str], *, count_steps: bool = False) -> list[str]:
    """The arguments as vLLM knows them; unchanged without a flag of ours.

    Args:
        arguments: the words after vLLM's command.
        count_steps: let this process show on its /metrics how the steps ran.

    Raises:
        InvalidInputError: a flag is invalid, or the model or a feature of vLLM does not run beside our flags.
    """
    line = CommandLine(arguments)
    sequence = line.take_number(*_SEQUENCE)
    threshold = line.take_number(_THRESHOLD)
    shift = line.take_switch(_SHIFT)
    if sequence is None and (shift or threshold is not None):
        raise ConfigError(f"{_SHIFT} and {_THRESHOLD} need {_SEQUENCE[0]} N: the ranks that share a prompt")
    speculation = _take_speculation(line)
    if sequence is None and speculation is None:
        return list(arguments)
    _require_whole_names(line)
    _require_none_in_file(line)
    tensor = line.take_number(*_TENSOR)
    settings = LlmParallelConfig(
        sequence_parallel_size=1 if sequence is None else sequence,
        tensor_parallel_size=1 if tensor is None else tensor,
        enable_shift_parallel=shift,
        shift_parallel_threshold=threshold,
        speculation=speculation,
    )
    user_config = line.take_value(_ADDITIONAL_CONFIG)
    if any(flag.startswith(f"{_ADDITIONAL_CONFIG}.") for flag in line.flags()):
        raise ConfigError(f"give {_ADDITIONAL_CONFIG} as one JSON object beside our flags")
    if not settings.is_enabled:
        unchanged = [_ADDITIONAL_CONFIG, user_config] if user_config is not None else []
        return [*line.rest, *unchanged, _TENSOR[0], str(settings.world_size)]
    if settings.is_sharded:
        _require_supported(line, settings)
    if settings.keeps_states:
        require_heads_for(line.value_of("--model") or line.positional_after("serve"), settings)
    user_entries = _parse_json(user_config) if user_config is not None else None
    if count_steps:
        settings = replace(settings, step_counts_file=str(start_step_counter().path))
    merged = json.dumps(settings.additional_config(user_entries))
    # What it runs on is not known here: each rank checks again.
    reason = settings.reason_for_eager(on_cpu=True) if _NOT_EAGER in line.flags() else None
    if reason is not None:
        raise ConfigError(f"{reason}: leave {_NOT_EAGER}")
    eager = [_EAGER] if settings.prefers_eager and not {_EAGER, _NOT_EAGER} & set(line.flags()) else []
    ours = [_TENSOR[0], str(settings.world_size), _ADDITIONAL_CONFIG, merged]
    if speculation is not None:
        ours += [_SPECULATION[0], json.dumps(speculation.for_vllm()), _WORKER, WORKER]
    return [*line.rest, *eager, *ours]


def world_size(rewritten: Sequence[str]) -> int:
    """Number of ranks of an engine, from arguments as vLLM knows them."""
    return CommandLine(rewritten).number_of(*_TENSOR) or 1


def sets_memory(rewritten: Sequence[str]) -> bool:
    """Whether the arguments give the memory of the cache."""
    return not set(CommandLine(rewritten).flags()).isdisjoint(_MEMORY)


def _require_supported(line: CommandLine, settings: LlmParallelConfig) -> None:
    require_supported_model(
        line.value_of("--model") or line.positional_after("serve"),
        settings,
        enable_lora="--enable-lora" in line.flags(),
        pipeline_parallel_size=line.number_of("--pipeline-parallel-size", "-pp") or 1,
        data_parallel_size=line.number_of("--data-parallel-size", "-dp") or 1,
        quantization=line.value_of("--quantization", "-q"),
        speculation=speculation_method(_speculative_config(line)),
        runner=line.value_of("--runner"),
        decode_context_parallel_size=line.number_of("--decode-context-parallel-size", "-dcp"),
        prefill_context_parallel_size=line.number_of("--prefill-context-parallel-size", "-pcp"),
        enable_dbo="--enable-dbo" in line.flags(),
    )


def _require_whole_names(line: CommandLine) -> None:
    """Refuse the beginning of a flag's name where we give vLLM the whole one: it would take ours alone."""
    for flag in line.flags():
        beginning = flag.partition(".")[0]
        if len(beginning) < _SHORTEST:
            continue
        whole = next((name for name in _REWRITTEN if name.startswith(beginning)), beginning)
        if whole != beginning:
            raise ConfigError(f"{flag}: beside our flags, write the whole name, {whole}")


def _require_none_in_file(line: CommandLine) -> None:
    """Refuse a file of flags that gives one of those that we rewrite: what we add to the line would count."""
    path = line.value_of("--config")
    if path is None:
        return
    import yaml

    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return  # vLLM has a message for it
    given = {f"--{str(name).replace('_', '-')}" for name in entries} if isinstance(entries, dict) else set()
    found = sorted(given & {*_SEQUENCE, _SHIFT, _THRESHOLD, *_REWRITTEN, *_SHORT} - {_EAGER, _NOT_EAGER})
    if found:
        raise ConfigError(f"{path} gives {found[0]}: beside our flags, give it on the command line")


def _speculative_config(line: CommandLine) -> Any:
    """What the flags say of speculation together; each stays where it is."""
    words = {name: line.value_of(flag) for flag, name in _SHORT.items()}
    given: dict[str, Any] = {name: word for name, word in words.items() if word is not None}
    tokens = words["spec_tokens"]
    if tokens is not None and tokens.isdecimal():
        given["spec_tokens"] = int(tokens)
    return with_short_options(line.value_of(*_SPECULATION), given)


def _take_speculation(line: CommandLine) -> SpeculationSettings | None:
    """Take the flags of speculation where it is ours: what vLLM does itself stays."""
    settings = SpeculationSettings.from_config(_speculative_config(line))
    dotted = [flag for flag in line.flags() if flag.startswith(tuple(f"{name}." for name in _SPECULATION))]
    if dotted:
        method = line.value_of(*(f"{name}.method" for name in _SPECULATION))
        if (
            settings is not None
            or method == "arctic"
            or SpeculationSettings.from_config({"method": method}) is not None
        ):
            raise ConfigError(f"{dotted[0]}: give {_SPECULATION[0]} as one JSON object")
    if settings is not None:
        line.take_value(*_SPECULATION)
        for flag in _SHORT:
            line.take_value(flag)
        if line.value_of(_WORKER) is not None:
            raise ConfigError(f"our speculation brings a worker class of its own: leave {_WORKER}")
    return settings


def _parse_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{_ADDITIONAL_CONFIG} {text}: no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{_ADDITIONAL_CONFIG} {text}: give a JSON object")
    if CONFIG_KEY in value:
        raise ConfigError(f"{_ADDITIONAL_CONFIG} holds {CONFIG_KEY!r} already: give the degrees in one place")
    return value
