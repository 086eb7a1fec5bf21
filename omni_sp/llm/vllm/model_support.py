"""Whether a model can run with sequence parallelism inside vLLM, by its ``config.json``, before anything starts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_sp.errors import UnsupportedModelError
from omni_sp.llm.speculation.settings import parse
from omni_sp.llm.vllm.config import EngineFeatures, LlmParallelConfig
from omni_sp.llm.vllm.internals import ARCHITECTURES

_HUB_TIMEOUT_S = 10


def require_supported_model(model: str | os.PathLike[str] | None, settings: LlmParallelConfig, **features: Any) -> None:
    """Check a model's configuration, and the known features of an engine (fields of EngineFeatures).

    A model without a readable configuration passes: vLLM refuses it with a better message.

    Raises:
        UnsupportedModelError: another architecture.
        ConfigError: a feature does not run beside sequence parallelism.
    """
    config = {} if model is None else _read_config(os.fspath(model))
    architectures = config.get("architectures") or []
    if architectures and not set(architectures) & set(ARCHITECTURES):
        raise UnsupportedModelError(
            f"{model} is a {architectures[0]}, and sequence parallelism inside vLLM handles "
            f"{', '.join(ARCHITECTURES)}: use tensor parallelism alone for it (leave our flags)"
        )
    if features.get("quantization") is None:
        features["quantization"] = _mapping(config, "quantization_config").get("quant_method")
    rope = _mapping(config, "rope_parameters") or _mapping(config, "rope_scaling")
    heads = config.get("num_attention_heads")
    EngineFeatures(**features, has_mrope="mrope_section" in rope, attention_heads=heads).require_supported(settings)


def speculation_method(speculation: str | Mapping[str, Any] | None) -> str | None:
    """The method in a ``speculative_config``; None where vLLM chooses it."""
    return parse(speculation).get("method")


def _mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    entry = config.get(name)
    return entry if isinstance(entry, Mapping) else {}


def _read_config(model: str) -> dict[str, Any]:
    """The ``config.json`` of a folder or hub id; empty where it cannot be read, or not within the time-out."""
    folder = Path(model).expanduser()
    try:
        path = folder / "config.json" if folder.is_dir() else _path_from_hub(model)
        config = json.loads(path.read_text(encoding="utf-8"))
    except Exception:  # which class says "no network" depends on the hub client's version
        return {}
    return config if isinstance(config, dict) else {}


def _path_from_hub(repo: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=_HUB_TIMEOUT_S)  # one request, without retries
    return Path(hf_hub_download(repo, "config.json"))
