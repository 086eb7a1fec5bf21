"""What SwiftKV relies on inside vLLM: layers that share a KV cache, and steps whose sampled tokens are known."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from omni_sp.errors import ConfigError, UnsupportedModelError
from omni_sp.llm.swiftkv import ARCHITECTURES
from omni_sp.llm.swiftkv import config as configs
from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.config import CONFIG_KEY, LlmParallelConfig
from omni_sp.llm.vllm.step_metrics import start_step_counter

_MODEL = "omni_sp.llm.swiftkv.model"
_HOOKS = "vllm.model_executor.models.config"
_ATTENTION = "vllm.model_executor.layers.attention"
_ARGUMENTS = ("num_kv_heads", "cache_config", "quant_config", "prefix", "kv_sharing_target_layer_name")
_WRITER_ATTRIBUTES = ("attn_backend", "sliding_window", "layer_name", "head_size", "num_heads", "num_kv_heads")
_SCALES = ("_k_scale_float", "_v_scale_float")


def register() -> None:
    """Register the models with vLLM, their configurations, and what vLLM calls to complete a configuration."""
    configs.register()
    for architecture in ARCHITECTURES:
        internals.register(architecture, f"{_MODEL}:{architecture}")
    # Where vLLM has no such table it runs as ever, and a SwiftKV model names what is missing when it is made.
    try:
        hooks = importlib.import_module(_HOOKS)
        base, table = hooks.VerifyAndUpdateConfig, hooks.MODELS_CONFIG_MAP
    except (ImportError, AttributeError):
        return
    completer = type("SwiftKVConfigHook", (base,), {"verify_and_update_config": staticmethod(complete_config)})
    table.update(dict.fromkeys(ARCHITECTURES, completer))


def complete_config(vllm_config: Any) -> None:
    """Set what SwiftKV needs in vLLM's configuration, in the main process: eager steps, and cache sharing that skips.

    Raises:
        ConfigError: the model's configuration is impossible.
    """
    configs.late_layers(internals.read_config(vllm_config, "model_config.hf_config"))
    internals.require_attributes(vllm_config.model_config, ("enforce_eager",), "its model_config")
    internals.require_attributes(vllm_config.cache_config, ("kv_sharing_fast_prefill",), "its cache_config")
    vllm_config.model_config.enforce_eager = True
    vllm_config.cache_config.kv_sharing_fast_prefill = True
    entries = vllm_config.additional_config or {}
    if not isinstance(entries, Mapping):
        raise ConfigError(f"additional_config is a {type(entries).__name__}, and SwiftKV adds to it: give a dict")
    world = internals.read_config(vllm_config, "parallel_config.tensor_parallel_size")
    settings = LlmParallelConfig.from_additional_config(entries) or LlmParallelConfig(tensor_parallel_size=world)
    if settings.step_counts_file is None:
        settings = replace(settings, step_counts_file=str(start_step_counter().path))
    vllm_config.additional_config = {**entries, CONFIG_KEY: asdict(replace(settings, swiftkv=True))}


def require_supported(vllm_config: Any) -> LlmParallelConfig:
    """The settings of a SwiftKV model; raises ConfigError and UnsupportedModelError for what does not run with it."""
    settings = internals.settings_of(vllm_config)
    if settings is None or not settings.swiftkv:
        raise internals.unknown_vllm(f"did not complete the configuration of a SwiftKV model by {_HOOKS}")
    internals.require_known_vllm()
    internals.require_supported_config(vllm_config, settings, what="SwiftKV")
    if internals.read_config(vllm_config, "kv_transfer_config") is not None:
        raise ConfigError(
            "SwiftKV does not run with a KV connector, which would miss the late layers: leave --kv-transfer-config"
        )
    for name, arguments in (("Attention", _ARGUMENTS), ("attention.unified_kv_cache_update", ())):
        owner, _, last = f"{_ATTENTION}.{name}".rpartition(".")
        found = getattr(importlib.import_module(owner), last, None)
        if found is None or set(arguments) - set(inspect.signature(found).parameters):
            raise internals.unknown_vllm(f"has no {name} as SwiftKV knows it in {_ATTENTION}")
    return settings


def forget_layer(vllm_config: Any, attention: Any) -> None:
    """Let vLLM give an attention layer no cache: another one stores its keys and values."""
    context = internals.read_config(vllm_config, "compilation_config.static_forward_context")
    if context.pop(attention.layer_name, None) is not attention:
        raise internals.unknown_vllm(f"does not know {attention.layer_name} among the layers with a cache")


def require_writer(attention: Any) -> None:
    """Raise UnsupportedModelError where keys and values cannot be stored without attention being computed."""
    internals.require_attributes(attention, _WRITER_ATTRIBUTES, "an attention layer")
    if attention.sliding_window is not None:
        raise UnsupportedModelError(
            f"{attention.layer_name} attends to a sliding window, which SwiftKV does not handle"
        )
    if getattr(attention.attn_backend, "forward_includes_kv_cache_update", True):
        raise UnsupportedModelError(
            f"vLLM's attention backend {attention.attn_backend.get_name()} stores keys and values only while it "
            "attends: choose another by --attention-backend"
        )


def reader_of(writer: Any, name: str, scale: float, vllm_config: Any) -> Any:
    """An attention layer that reads what another one stores. All readers are made after all writers.

    vLLM gives the metadata of sampled tokens to the last run of layers that read another's cache.
    """
    attention: Any = importlib.import_module(_ATTENTION).Attention
    return attention(
        writer.num_heads, writer.head_size, scale, num_kv_heads=writer.num_kv_heads,
        cache_config=vllm_config.cache_config, quant_config=vllm_config.quant_config, prefix=name,
        kv_sharing_target_layer_name=writer.layer_name,
    )  # fmt: skip


def require_same_scales(writer: Any, reader: Any) -> None:
    """Raise UnsupportedModelError where a reader would undo other scales than those that its writer stores with."""
    for name in _SCALES:
        pair = [getattr(layer, name, None) for layer in (writer, reader)]
        if pair[0] != pair[1]:
            raise UnsupportedModelError(
                f"{reader.layer_name} reads keys and values with the scale {pair[1]}, and they are stored with "
                f"{pair[0]}: SwiftKV does not handle calibrated scales of the KV cache"
            )


def store(writer: Any, key: Tensor, value: Tensor) -> None:
    """Store the keys and values of a step, (tokens, kv heads x head_dim), in a layer's cache."""
    attention = importlib.import_module(f"{_ATTENTION}.attention")
    shape = (-1, writer.num_kv_heads, writer.head_size)
    attention.unified_kv_cache_update(key.reshape(shape), value.reshape(shape), writer.layer_name)


def sampled_rows(layer_name: str) -> tuple[bool, Tensor | None]:
    """Whether a step has requests, and the rows of those tokens that something is sampled after; None: all rows."""
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    if metadata is None:  # vLLM measures memory
        return False, None
    if not isinstance(metadata, dict):
        raise internals.unknown_vllm(f"gives the metadata of attention as a {type(metadata).__name__}, not by layer")
    own = metadata[layer_name]
    rows = getattr(own, "logits_indices_padded", None)
    return True, None if rows is None else rows[: own.num_logits_indices]
