"""Where a training command writes: never over another model, whose weights would be gone."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_sp.errors import ConfigError

__all__ = ["require_finite", "require_own_folder"]

_WEIGHTS = "model*.safetensors", "pytorch_model*.bin"


def require_own_folder(folder: Path, architectures: Collection[str]) -> None:
    """Refuse a folder that holds a model of another kind than what will be saved there.

    Args:
        folder: where to; it need not exist.
        architectures: by one of these its config.json says that the folder is an earlier result.

    Raises:
        ConfigError: it holds another model, such as the one that is learnt from, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file: name a folder")
    config, found = folder / "config.json", None
    if config.exists():
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
            found = content.get("architectures") if isinstance(content, dict) else None
        except ValueError:
            found = None
    elif not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        return
    names = [found] if isinstance(found, str) else found or []
    if not set(names) & set(architectures):
        what = ", ".join(map(str, names)) or "an unknown kind"
        raise ConfigError(f"--output {folder} holds a model of {what}, which would be lost: name another folder")


def require_finite(weights: Mapping[str, Tensor]) -> None:
    """Refuse to save weights that are no numbers.

    Raises:
        ConfigError: the training has diverged.
    """
    bad: list[Any] = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if bad:
        raise ConfigError(
            f"the training has diverged: {bad[0]} has numbers that are not finite, and nothing is saved; try a lower "
            "--learning-rate"
        )
