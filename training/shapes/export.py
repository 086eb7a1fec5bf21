"""The export stage: the trained parts as one diffusers pipeline folder in bfloat16."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

from training.shapes.autoencoder import load_autoencoder
from training.shapes.settings import Settings
from training.shapes.text import load_text_encoder, load_tokenizer

__all__ = ["build_scheduler", "export_pipeline"]

# What the libraries note about where a part was loaded from: no property of the model.
_PRIVATE_KEYS = ("_name_or_path",)


def build_scheduler(settings: Settings) -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler that fits the training: a fixed shift, whatever the picture's size."""
    return FlowMatchEulerDiscreteScheduler(shift=settings.shift, use_dynamic_shifting=False)


def export_pipeline(parts: Path, settings: Settings, folder: Path) -> None:
    """Write the pipeline to a folder, in one move: whoever reads there finds the old pipeline or the new one, whole.

    Args:
        parts: Folder with the trained tokenizer/, text_encoder/, vae/ and transformer/.
        settings: For the scheduler.
        folder: Where the pipeline goes.  A pipeline there is replaced; its model card, README.md, is kept.
    """
    cpu = torch.device("cpu")
    pipeline = QwenImagePipeline(
        scheduler=build_scheduler(settings),
        vae=load_autoencoder(parts / "vae", cpu),
        text_encoder=load_text_encoder(parts / "text_encoder", cpu),
        tokenizer=load_tokenizer(parts / "tokenizer"),
        transformer=QwenImageTransformer2DModel.from_pretrained(parts / "transformer"),
    )
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.to(torch.bfloat16).save_pretrained(new, safe_serialization=True)
    for config in new.rglob("*.json"):
        _tidy(config)
    for file in new.rglob("*.safetensors"):
        file.chmod(0o644)  # written for the owner alone, but the package is for all
    if (folder / "README.md").exists():
        shutil.copy(folder / "README.md", new / "README.md")
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _tidy(config: Path) -> None:
    """Remove the notes of origin from a configuration, and see that the text encoder is loaded in float32.

    Diffusers loads its own models in float32 by default, so the text encoder must not come in bfloat16.
    """
    content: dict[str, Any] = json.loads(config.read_text())
    if config.parent.name == "tokenizer":
        return
    for key in _PRIVATE_KEYS:
        content.pop(key, None)
    if "dtype" in content:
        content["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
