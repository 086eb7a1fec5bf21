"""What a model's configuration alone tells: whether it can share tokens inside vLLM, before anything starts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_sp.errors import UnsupportedModelError
from omni_sp.llm.vllm.config import EngineFeatures, LlmParallelConfig
from omni_sp.llm.vllm.internals import ARCHITECTURES

_ASK_S = 10


def require_handled_model(model: str | os.PathLike[str] | None, settings: LlmParallelConfig, **features: Any) -> None:
    """Look at a model's configuration, and at what else is wished, before anything is started.

    What has no readable configuration is left to vLLM, whose message is better.

    Raises:
        UnsupportedModelError: another architecture. ConfigError: what does not run beside sequence parallelism.
    """
    config = {} if model is None else _config(os.fspath(model))
    architectures = config.get("architectures") or []
    if architectures and not set(architectures) & set(ARCHITECTURES):
        raise UnsupportedModelError(
            f"{model} is a {architectures[0]}, and sequence parallelism inside vLLM handles "
            f"{', '.join(ARCHITECTURES)}: use tensor parallelism alone for it (leave our flags)"
        )
    if features.get("quantization") is None:
        features["quantization"] = _of(config, "quantization_config").get("quant_method")
    rope = _of(config, "rope_parameters") or _of(config, "rope_scaling")
    heads = config.get("num_attention_heads")
    EngineFeatures(**features, has_mrope="mrope_section" in rope, attention_heads=heads).require_handled(settings)


def method_of(speculation: str | Mapping[str, Any] | None) -> str | None:
    """How a ``speculative_config`` speculates; None where vLLM finds that out itself."""
    if isinstance(speculation, str):
        try:
            speculation = json.loads(speculation)
        except ValueError:  # vLLM tells what is wrong with it
            return None
    return speculation.get("method") if isinstance(speculation, Mapping) else None


def _of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    entry = config.get(name)
    return entry if isinstance(entry, Mapping) else {}


def _config(model: str) -> dict[str, Any]:
    """A folder's or a hub id's ``config.json``; empty where there is none to be had soon."""
    folder = Path(model).expanduser()
    try:
        path = folder / "config.json" if folder.is_dir() else _from_hub(model)
        config = json.loads(path.read_text(encoding="utf-8"))
    except Exception:  # which class says "no network" depends on the hub client's version
        return {}
    return config if isinstance(config, dict) else {}


def _from_hub(repo: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=_ASK_S)  # one question, without retries
    return Path(hf_hub_download(repo, "config.json"))
