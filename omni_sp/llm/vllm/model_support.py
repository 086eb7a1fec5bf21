"""Whether a model can run with sequence parallelism inside vLLM, by its ``config.json``, before anything starts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from omni_sp.errors import UnsupportedModelError
from omni_sp.llm.model_files import model_file
from omni_sp.llm.speculation.checkpoint import read_config
from omni_sp.llm.speculation.settings import parse
from omni_sp.llm.swiftkv import ARCHITECTURES as SWIFTKV_ARCHITECTURES
from omni_sp.llm.vllm.config import EngineFeatures, LlmParallelConfig
from omni_sp.llm.vllm.internals import ARCHITECTURES


def require_supported_model(model: str | os.PathLike[str] | None, settings: LlmParallelConfig, **features: Any) -> None:
    """Check a model's configuration, and the known features of an engine (fields of EngineFeatures).

    A model without a readable configuration passes: vLLM refuses it with a better message.

    Raises:
        UnsupportedModelError: another architecture.
        ConfigError: a feature does not run beside sequence parallelism.
    """
    config = {} if model is None else _read_config(os.fspath(model))
    architectures, known = config.get("architectures") or [], (*ARCHITECTURES, *SWIFTKV_ARCHITECTURES)
    if architectures and set(architectures).isdisjoint(known):
        raise UnsupportedModelError(
            f"{model} is a {architectures[0]}, and sequence parallelism inside vLLM handles "
            f"{', '.join(known)}: use tensor parallelism alone for it (leave our flags)"
        )
    if features.get("quantization") is None:
        features["quantization"] = _mapping(config, "quantization_config").get("quant_method")
    rope = _mapping(config, "rope_parameters") or _mapping(config, "rope_scaling")
    heads = config.get("num_attention_heads")
    EngineFeatures(
        **features,
        has_mrope="mrope_section" in rope,
        has_dual_chunks=bool(config.get("dual_chunk_attention_config")),
        attention_heads=heads,
    ).require_supported(settings)


def require_heads_for(model: str | os.PathLike[str] | None, settings: LlmParallelConfig) -> None:
    """Check that the settings' trained speculator is of this model.

    A model without a readable configuration passes: the ranks check vLLM's own.

    Raises:
        ConfigError: it is of another one.
    """
    assert settings.speculation is not None, "the caller has looked"
    assert settings.speculation.head is not None, "the caller has looked"
    config = {} if model is None else _read_config(os.fspath(model))
    vocab_size, width, architectures = map(config.get, ("vocab_size", "hidden_size", "architectures"))
    if isinstance(vocab_size, int) and isinstance(width, int) and architectures:
        read_config(settings.speculation.head).require_fits(
            settings.speculation.head, vocab_size=vocab_size, width=width, architecture=architectures[0]
        )


def speculation_method(speculation: str | Mapping[str, Any] | None) -> str | None:
    """The method in a ``speculative_config``; None where vLLM chooses it."""
    return parse(speculation).get("method")


def _mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    entry = config.get(name)
    return entry if isinstance(entry, Mapping) else {}


def _read_config(model: str) -> dict[str, Any]:
    """The ``config.json`` of a folder or hub id; empty where it cannot be read, or not within the time-out."""
    try:
        config = json.loads(model_file(model, "config.json").read_text(encoding="utf-8"))
    except Exception:  # which class says "no network" depends on the hub client's version
        return {}
    return config if isinstance(config, dict) else {}
