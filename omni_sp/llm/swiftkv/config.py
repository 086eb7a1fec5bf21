"""Configurations of SwiftKV models, which transformers and vLLM read without code from the hub.

The format is that of the published checkpoints: ``model_type`` "llama_swiftkv", architecture
"LlamaSwiftKVForCausalLM"; the names for Qwen3, of which none is published, follow from it. The classes stand at module
level, since vLLM sends them to its processes.
"""

from __future__ import annotations

from typing import Any

import transformers

from omni_sp.errors import ConfigError
from omni_sp.validation import require_int


class LlamaSwiftKVConfig(transformers.LlamaConfig):  # type: ignore[misc]  # known when it runs
    """A Llama whose layers from ``num_key_value_layers`` on share one hidden state for keys and values."""

    model_type = "llama_swiftkv"
    swiftkv: bool = True
    num_key_value_layers: int | None = None
    key_value_group_size: int | None = None


class Qwen2SwiftKVConfig(transformers.Qwen2Config):  # type: ignore[misc]  # known when it runs
    """The same of a Qwen2."""

    model_type = "qwen2_swiftkv"
    swiftkv: bool = True
    num_key_value_layers: int | None = None
    key_value_group_size: int | None = None


class Qwen3SwiftKVConfig(transformers.Qwen3Config):  # type: ignore[misc]  # known when it runs
    """The same of a Qwen3."""

    model_type = "qwen3_swiftkv"
    swiftkv: bool = True
    num_key_value_layers: int | None = None
    key_value_group_size: int | None = None


CONFIGS = (LlamaSwiftKVConfig, Qwen2SwiftKVConfig, Qwen3SwiftKVConfig)


def register() -> None:
    """Let transformers' ``AutoConfig`` know the classes. Idempotent."""
    for cls in CONFIGS:
        transformers.AutoConfig.register(cls.model_type, cls, exist_ok=True)


def late_layers(config: Any) -> tuple[int, int]:
    """Which layers share one hidden state for their keys and values.

    Args:
        config: a SwiftKV model's configuration.

    Returns:
        The first of these layers; and how many of them, one after the other, share keys and values too.

    Raises:
        ConfigError: a number is missing or impossible, or the layers attend to a sliding window.
    """
    what = f"config.json of a {config.model_type}"
    if not config.swiftkv:
        raise ConfigError(f"{what}: swiftkv={config.swiftkv!r}: give true, or use the architecture without SwiftKV")
    layers, first = config.num_hidden_layers, config.num_key_value_layers
    hint = "it is the number of layers that compute their own keys and values"
    first = require_int(f"{what}: num_key_value_layers", first, minimum=1, error=ConfigError, hint=hint)
    if first >= layers:
        raise ConfigError(f"{what}: num_key_value_layers={first} of {layers} layers leave none for SwiftKV")
    group = 1 if config.key_value_group_size is None else config.key_value_group_size
    hint = "it is how many layers share keys and values"
    group = require_int(f"{what}: key_value_group_size", group, minimum=1, error=ConfigError, hint=hint)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise ConfigError(f"{what}: layer_types has {min(kinds)!r}, and SwiftKV handles full attention alone")
    return first, group
