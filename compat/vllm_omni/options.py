"""vLLM-Omni's keyword arguments of ``Omni`` and of the degrees, as ours: each is honoured, or refused by name.

Programs pass many of them with the value that changes nothing, which is what they get here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omni_sp.errors import ConfigError
from omni_sp.validation import require_bool, shown
from vllm_omni.entrypoints.cli.translate import REFUSED
from vllm_omni.lora.request import lora_of_path

_OFFLOADS = {"enable_cpu_offload": "model", "enable_layerwise_offload": "group"}
_TIMEOUTS = ("init_timeout", "stage_init_timeout")
_UNCHANGED: dict[str, tuple[Any, ...]] = {
    "allgather_degree": (1,),
    "cache_backend": ("none",),
    "cache_config": ({},),
    "enforce_eager": (True,),
    "lora_backend": ("peft",),
    "lora_scale": (1,),
    "mode": ("text-to-image",),
    "pipeline_parallel_size": (1,),
    "tensor_parallel_size": (1,),
    "text_encoder_tp_size": (1,),
    "ulysses_mode": ("strict", "advanced_uaa"),
    "vae_parallel_mode": ("tile", "spatial_shard_height", "spatial_shard_width"),
}
"""Values beside None and False that ask for what is done here anyway."""
_METRICS = "the metrics of every result have the times of its stages; leave it out"
_WHY_NOT = {
    "allgather_degree": "ring_degree gathers keys and values; leave it out",
    "auxiliary_text_encoder": "text encoders are those of the model's folder; leave it out",
    "enable_diffusion_pipeline_profiler": _METRICS,
    "profiler_config": _METRICS,
    "enable_cache_dit_summary": REFUSED["--cache-backend"],
    "enable_distributed_layerwise_offload": "enable_layerwise_offload moves layers; leave it out",
    "enable_expert_parallel": REFUSED["--enable-expert-parallel"],
    "lora_scale": "give it in each request, beside lora_request; leave it out",
    "mode": "the pipeline in the model's folder says what is made; leave it out",
    "mask_sp_padding": "nothing is padded; leave it out",
    "quantization_config": "quantization='int8' or 'fp8' says how weights are kept; leave it out",
    "text_encoder_tp_size": "each encoder runs on one rank, which gives all others what it makes; leave it out",
    "vae_parallel_mode": "the longer side is cut, exactly and without tiles; leave it out",
}


def as_degrees(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the fields of vLLM-Omni's ``DiffusionParallelConfig``.

    Raises:
        ConfigError: a field that means nothing here has a value that would change something, or two fields say the
            same.
    """
    fields = _without_unchanged(given)
    for theirs, ours in (("vae_patch_parallel_size", "vae_parallel"), ("use_hsdp", "shard_weights")):
        if theirs in fields and ours in fields:
            raise ConfigError(f"{theirs} and {ours} say the same: give one of them")
    if (size := fields.pop("vae_patch_parallel_size", None)) is not None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"vae_patch_parallel_size={shown(size)}: give a whole number of at least 1")
        fields["vae_parallel"] = size > 1
    if (use_hsdp := fields.pop("use_hsdp", None)) is not None:
        fields["shard_weights"] = require_bool("use_hsdp", use_hsdp, error=ConfigError)
    degrees = {name: fields.get(name, 1) for name in ("ulysses_degree", "ring_degree", "cfg_parallel_size")}
    if all(isinstance(degree, int) for degree in degrees.values()):  # else omni_sp says what is wrong with them
        group = degrees["ulysses_degree"] * degrees["ring_degree"]
        _require_product(fields, "sequence_parallel_size", group, "ulysses_degree × ring_degree")
        _require_product(fields, "hsdp_shard_size", group, "ulysses_degree × ring_degree", -1)
        _require_product(fields, "hsdp_replicate_size", degrees["cfg_parallel_size"], "cfg_parallel_size", 1)
    return fields


def as_options(given: Mapping[str, Any], degrees: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Translate the keyword arguments of vLLM-Omni's ``Omni``.

    Args:
        given: the keyword arguments.
        degrees: the fields of its ``DiffusionParallelConfig``, which may be among them.

    Returns:
        Those of ours, and the degrees among them as they were given.

    Raises:
        ConfigError: one that means nothing here has a value that would change something, or two say the same.
    """
    own = {name: value for name, value in given.items() if name in degrees and value is not None}
    options = _without_unchanged({name: value for name, value in given.items() if name not in degrees})
    for name, ours in _OFFLOADS.items():
        if require_bool(name, options.pop(name, False), error=ConfigError):
            if "offload" in options:
                raise ConfigError(f"{name}=True is offload={ours!r}, and there is another one: give one of them")
            options["offload"] = ours
    if given.get("enforce_eager") and options.get("compile"):
        raise ConfigError("enforce_eager=True and compile say the opposite: give one of them")
    if (paths := options.pop("lora_path", None)) is not None:
        if options.get("lora"):
            raise ConfigError("lora_path and lora say the same: give one of them")
        options["lora"] = dict(map(lora_of_path, [paths] if isinstance(paths, str) else paths))
    if seconds := [value for name in _TIMEOUTS if (value := options.pop(name, None)) is not None]:
        options.setdefault("startup_timeout_s", max(seconds))
    return options, own


def _without_unchanged(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, without what only says how it is here anyway."""
    kept = {}
    for name, value in given.items():
        why = _WHY_NOT.get(name) or REFUSED.get(f"--{name.replace('_', '-')}")
        if why is None or name in ("hsdp_shard_size", "hsdp_replicate_size"):
            kept[name] = value
        elif value is not None and value is not False and value not in _UNCHANGED.get(name, ()):
            raise ConfigError(f"no {name}={shown(value)}: {why}")
    return kept


def _require_product(fields: dict[str, Any], name: str, product: int, equation: str, *unset: int) -> None:
    """Take a field out that follows from others, where it does."""
    value = fields.pop(name, None)
    if value not in (None, product, *unset):
        raise ConfigError(f"{name}={shown(value)}, and {equation} = {product}: leave it out")
