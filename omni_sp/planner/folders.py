"""What the folder of a pipeline says of its parts: configurations, and the heads of files of weights."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADS = ("num_attention_heads", "n_heads", "num_heads", "heads")
"""What configurations call the number of heads."""
_LONGEST_HEAD = 100_000_000  # bytes, as safetensors has it
_SCALES = ("true_cfg_scale", "guidance_scale")
"""Arguments of a pipeline for classifier-free guidance; where it has both, the first is that."""


@dataclass(frozen=True)
class PipelineFolder:
    """What a pipeline's folder says.

    Attributes:
        transformer: the configuration of its transformer.
        transformers: how many it has, of which one runs at a time.
        encoder_parameters: of its text encoders; 0 where their files are not there.
        vae: the class of its autoencoder; "" where the folder does not say.
        vae_parameters: of it; 0 where its files are not there.
        branches: forwards of one step by the defaults of the pipeline's class; None where that is not diffusers' own.
        steps: of denoising by the same defaults; None as there.
    """

    transformer: Mapping[str, Any]
    transformers: int = 1
    encoder_parameters: float = 0.0
    vae: str = ""
    vae_parameters: float = 0.0
    branches: int | None = None
    steps: int | None = None

    @property
    def heads(self) -> int | None:
        """Of the transformer's attention; None where its configuration names none."""
        named = (self.transformer.get(name) for name in HEADS)
        return next((number for number in named if isinstance(number, int) and number > 0), None)


def read_folder(model: str) -> PipelineFolder | None:
    """Read a folder, or a repository in the hub's cache; None where it has no ``transformer/config.json``.

    No weights are read, only the heads of their files, which say how many there are.
    """
    folder = _folder_of(model)
    if folder is None:
        return None
    config = _json(folder / "transformer" / "config.json")
    parts = sorted(path for path in folder.iterdir() if path.is_dir())
    branches, steps = _defaults_of(str(_json(folder / "model_index.json").get("_class_name", "")))
    return PipelineFolder(
        transformer=config,
        transformers=max(1, sum(part.name.startswith("transformer") for part in parts)),
        encoder_parameters=sum(_parameters(part) for part in parts if part.name.startswith("text_encoder")),
        vae=str(_json(folder / "vae" / "config.json").get("_class_name", "")),
        vae_parameters=_parameters(folder / "vae"),
        branches=branches,
        steps=steps,
    )


def _folder_of(model: str) -> Path | None:
    path = Path(model).expanduser()
    with contextlib.suppress(OSError):  # too long a name, or a folder that this user may not look into
        if (path / "transformer" / "config.json").is_file():
            return path
    if model.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "transformer/config.json")
    return Path(cached).parent.parent if isinstance(cached, str) else None


def _json(path: Path) -> dict[str, Any]:
    """A file's entries; none where there is no such file, or nothing to read in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _parameters(folder: Path) -> float:
    """How many numbers the .safetensors files of a folder hold, by their heads: 8 bytes of length, then JSON."""
    total = 0.0
    for path in folder.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                length = min(int.from_bytes(file.read(8), "little"), _LONGEST_HEAD)  # of another file it may be any
                head = json.loads(file.read(length))
            total += sum(math.prod(entry["shape"]) for name, entry in head.items() if name != "__metadata__")
        except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError):  # no file of weights
            continue
    return total


def _defaults_of(class_name: str) -> tuple[int | None, int | None]:
    """Branches and steps of a pipeline by the defaults of its ``__call__``.

    With a negative prompt and a scale above 1 there is guidance, of two branches.
    """
    import diffusers

    pipeline = getattr(diffusers, class_name, None) if class_name else None
    if not inspect.isclass(pipeline):
        return None, None
    arguments = inspect.signature(pipeline.__call__).parameters
    scale = next((arguments[name].default for name in _SCALES if name in arguments), None)
    is_guided = "negative_prompt" in arguments and isinstance(scale, (int, float)) and scale > 1
    steps = arguments["num_inference_steps"].default if "num_inference_steps" in arguments else None
    return 2 if is_guided else 1, steps if isinstance(steps, int) else None
