"""Which models can share tokens inside vLLM, told from their configuration alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from omni_sp.errors import UnsupportedModelError
from omni_sp.llm.adapter import ARCHITECTURES

_ASK_S = 10


def require_known_model(model: str | os.PathLike[str]) -> None:
    """Refuse a model of another architecture before anything is started.

    What has no readable configuration is left to vLLM, whose message is better.

    Raises:
        UnsupportedModelError: it names the architecture, and the way out.
    """
    architectures = _config(os.fspath(model)).get("architectures") or []
    if architectures and not set(architectures) & set(ARCHITECTURES):
        raise UnsupportedModelError(
            f"{model} is a {architectures[0]}, and sequence parallelism inside vLLM handles "
            f"{', '.join(ARCHITECTURES)}: use tensor parallelism alone for it (leave our flags)"
        )


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
