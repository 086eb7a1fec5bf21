"""Translate ``vllm serve MODEL --omni`` into ``omni-sp serve MODEL``: every option is honoured, or refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from omni_sp.command_line import split_flag, with_dashes
from omni_sp.errors import ConfigError
from vllm_omni.lora.request import lora_of_path

_SEVERAL_VALUES = ("--served-model-name", "--api-key", "--lora-modules", "--lora-path")
_OURS = ("--model", "--dtype", "--allowed-origins", "--vae-patch-parallel-size")
"""Options that have another name here, or other values."""
_SWITCHES: dict[str, str | None] = {
    "--use-hsdp": "--shard-weights",
    "--enable-cpu-offload": "--offload=model",
    "--enable-layerwise-offload": "--offload=group",
    "--enable-lora": None,  # adapters that are named are loaded
}
"""Options without a value that have another name here, or none."""
_DTYPES = {"half": "float16", "float": "float32"}
_WHY_NOT = {
    "--cfg, --usp and --ring say how many processes or GPUs share a picture; leave it out": (
        "--tensor-parallel-size -tp --pipeline-parallel-size -pp --enable-expert-parallel -ep --num-gpus"
    ),
    "it is for vLLM's text engine, which does not run here; leave it out": (
        "--gpu-memory-utilization --max-model-len --max-num-seqs --max-num-batched-tokens --kv-cache-dtype "
        "--kv-cache-memory-bytes --block-size --swap-space --enforce-eager --enable-prefix-caching "
        "--enable-chunked-prefill --compilation-config -cc --chat-template --tokenizer --generation-config"
    ),
    "--log-level says what is logged, a line for each request, and /metrics counts them; leave it out": (
        "--uvicorn-log-level --disable-uvicorn-access-log --disable-access-log-for-endpoints --enable-log-requests "
        "--disable-log-requests --disable-log-stats --log-stats --logging-config --log-config-file"
    ),
    "--launcher spawn, torchrun or ray says what starts the ranks; leave it out": "--distributed-executor-backend",
    "every request has its own seed, steps and guidance; name them there": "--seed --default-sampling-params",
    "--quantization int8 or fp8 says how weights are kept; leave it out": (
        "-q --quantization-config --diffusion-quantization-config"
    ),
    "weights are read as they are; leave it out": "--load-format",
    "--use-hsdp shards over the ranks of --usp and --ring, and --cfg has a copy for each group; leave it out": (
        "--hsdp-shard-size --hsdp-replicate-size"
    ),
    "only classes of diffusers and transformers are loaded; leave it out": "--trust-remote-code",
    "the cache of the hub is used (HF_HOME moves it); download another revision and name its folder": (
        "--revision --download-dir"
    ),
    "a proxy in front does that; leave it out, and keep --host at this machine": ("--ssl-ca-certs --middleware"),
    "options come from the command line alone; write them there": "--config",
    "one process listens, and one set of ranks draws; leave it out": "--api-server-count --headless",
    "one diffusers pipeline is served, from its own folder; leave it out": "--stage-configs-path --deploy-config",
    "token and head counts that nothing divides are always taken; leave it out": "--ulysses-mode",
    "results are exact, and nothing is kept from step to step; leave it out": "--cache-backend --cache-config",
    "adapters stay beside the weights, all of them, and requests name them; leave it out": (
        "--lora-backend --lora-scale --max-loras --max-lora-rank --max-cpu-loras --lora-dtype --fully-sharded-loras "
        "--default-mm-loras --lora-extra-vocab-size"
    ),
    "--vae-parallel on lets all ranks decode a picture together, exactly and without tiles; leave it out": (
        "--vae-use-slicing --vae-use-tiling --vae-parallel-mode"
    ),
    "each text encoder runs on one rank, which gives all others what it makes; leave it out": "--text-encoder-tp-size",
    "--enable-cpu-offload and --enable-layerwise-offload say what waits on the CPU; leave it out": (
        "--diffusion-offload-config --enable-distributed-layerwise-offload --dlo-use-allgather --dlo-no-use-allgather "
        "--dlo-resident-layers"
    ),
    "--attention-backend names the kernel; leave it out": (
        "--diffusion-attention-backend --diffusion-attention-config -dac"
    ),
}
REFUSED = {option: why for why, options in _WHY_NOT.items() for option in options.split()}
"""Options of vLLM and vLLM-Omni that mean nothing here, and what to do instead."""


def as_omni_sp(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Translate the words of vLLM's command into those of ``omni-sp``.

    Args:
        words: from the subcommand on.
        environment: where vLLM looks for ``VLLM_API_KEY``; without that, a server that was locked would be open here.

    Raises:
        ConfigError: an option that only vLLM has, or a value that cannot be.
    """
    words = [word for word in words if word != "--omni"]
    if words[:1] != ["serve"]:
        return words
    translated = ["serve", *_translate(words[1:])]
    key = environment.get("VLLM_API_KEY")
    if key and not any(word.startswith(("--api-key=", "--api-key-file")) for word in translated):
        translated.append(f"--api-key={key}")
    return translated


def _translate(words: Sequence[str]) -> Iterator[str]:
    rest = list(words)
    is_model_known = not words[:1] or not words[0].startswith("-") or any(re.match("--model(=|$)", w) for w in words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            yield word
            continue
        name, value = split_flag(word)
        _require_ours(name)
        values = [] if value is None else [value]
        if name == "--help":
            yield name  # vLLM's users ask for --help=all
        elif name in _SWITCHES:
            if value is not None:
                raise ConfigError(f"{name} takes no value")
            ours = _SWITCHES[name]
            yield from [] if ours is None else [ours]
        elif name in _SEVERAL_VALUES:
            while rest and value is None and not rest[0].startswith("-"):
                values.append(rest.pop(0))
            if len(values) > 1 and not is_model_known:
                raise ConfigError(f"{name} takes every word after it: name the model first, vllm serve MODEL --omni")
            yield from _several(name, values) if values else [name]
        elif name in _OURS:
            if not values and not rest:
                raise ConfigError(f"{name} needs a value")
            yield from _with_our_name(name, values[0] if values else rest.pop(0))
        else:
            yield with_dashes(word)


def _several(name: str, values: Sequence[str]) -> Iterator[str]:
    for value in values:
        if name == "--lora-modules":
            yield f"--lora={_adapter(value)}"
        elif name == "--lora-path":
            yield f"--lora={'='.join(lora_of_path(value))}"
        else:
            yield f"{name}={value}"


def _adapter(value: str) -> str:
    """``NAME=PATH`` of vLLM's ``--lora-modules``, which takes that, or a JSON object with name and path."""
    if not value.startswith("{"):
        return value
    try:
        entry = json.loads(value)
        return f"{entry['name']}={entry['path']}"
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--lora-modules {value}: give NAME=PATH, or a JSON object with name and path") from None


def _with_our_name(name: str, value: str) -> Iterator[str]:
    if name == "--model":
        yield value
    elif name == "--dtype":
        yield f"{name}={_DTYPES.get(value, value)}"
    elif name == "--vae-patch-parallel-size":
        if not re.fullmatch("[1-9][0-9]*", value):
            raise ConfigError(f"{name} {value}: give a whole number of at least 1")
        yield f"--vae-parallel={'off' if value == '1' else 'on'}"
    else:
        try:
            origins = json.loads(value)
        except ValueError:
            origins = None
        if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
            raise ConfigError(f"""{name} {value}: give a JSON list, such as '["https://example.org"]'""")
        yield from (f"--allow-origin={origin}" for origin in origins)


def _require_ours(name: str) -> None:
    why = REFUSED.get(name) or REFUSED.get(name.replace("--no-", "--", 1))
    if why:
        raise ConfigError(f"no option {name} with --omni: {why}")
