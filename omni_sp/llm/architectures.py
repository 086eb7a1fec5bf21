"""Which models can share tokens inside vLLM, told from their configuration alone."""

from __future__ import annotations

import os

from omni_sp.errors import UnsupportedModelError
from omni_sp.llm.adapter import ARCHITECTURES


def require_known_model(model: str | os.PathLike[str]) -> None:
    """Refuse a model of another architecture before anything is started.

    What has no readable configuration is left to vLLM, whose message is better.

    Raises:
        UnsupportedModelError: it names the architecture, and the way out.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(os.fspath(model))
    except (OSError, ValueError):
        return
    architectures = config.get("architectures") or []
    if architectures and not set(architectures) & set(ARCHITECTURES):
        raise UnsupportedModelError(
            f"{model} is a {architectures[0]}, and sequence parallelism inside vLLM handles "
            f"{', '.join(ARCHITECTURES)}: use tensor parallelism alone for it (leave our flags)"
        )
