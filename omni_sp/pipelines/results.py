"""What a pipeline's output holds, whatever the pipeline calls it: pictures, videos, sounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omni_sp.errors import UnsupportedModelError
from omni_sp.pipelines.capabilities import PICTURE_FIELDS, SOUND_FIELDS, VIDEO_FIELDS


@dataclass(frozen=True, kw_only=True)
class CallResult:
    """What a pipeline made, and where its seconds went (see outputs.OmniRequestOutput)."""

    images: list[Any]
    videos: list[Any]
    timings: dict[str, Any]
    audios: list[Any] = field(default_factory=list)


def result_of(name: str, output: Any, *, output_type: str | None, timings: dict[str, Any]) -> CallResult:
    """Take the pictures, videos and sounds out of a pipeline's output.

    Args:
        name: the pipeline's class. output_type: what it was asked for; latents are left as they are.

    Raises:
        UnsupportedModelError: there is none of them in it.
    """
    is_latent = output_type == "latent"
    images = _rows(_first(output, PICTURE_FIELDS))
    videos = _first(output, VIDEO_FIELDS)
    result = CallResult(
        images=images if is_latent else _without_layers(images),
        videos=_rows(videos if is_latent or not _is_single_video(videos) else [videos]),
        audios=_rows(_first(output, SOUND_FIELDS)) if is_latent else _waves(output),
        timings=timings,
    )
    if not result.images and not result.videos and not result.audios:
        held = ", ".join(output) if isinstance(output, Mapping) and output else "nothing"
        raise UnsupportedModelError(
            f"{name} gave a {type(output).__name__} (it holds: {held}), in which there are no pictures, videos or "
            "sounds"
        )
    return result


def _first(output: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(output, name, None)) is not None), None)


def _rows(result: Any) -> list[Any]:
    """One entry for each output, on the CPU, whatever the pipeline's output type holds them in."""
    import torch

    if result is None:
        return []
    return [row.cpu() if isinstance(row, torch.Tensor) else row for row in result]


def _without_layers(images: list[Any]) -> list[Any]:
    """Pictures that come as lists of layers (Qwen-Image-Layered), one after the other."""
    return [layer for image in images for layer in (image if isinstance(image, list) else [image])]


def _is_single_video(videos: Any) -> bool:
    """True for the frames of one video, where most pipelines give a list of videos."""
    if isinstance(videos, list):
        return bool(videos) and not isinstance(videos[0], list) and getattr(videos[0], "ndim", 2) < 4
    return getattr(videos, "ndim", 5) == 4


def _waves(output: Any) -> list[Any]:
    """Each output's sound as a float32 array of channels × samples."""
    import numpy as np
    import torch

    sounds = _first(output, SOUND_FIELDS)
    if sounds is None:
        return []
    if sounds is getattr(output, "sound", None):
        sounds = [sounds]  # the sound of one video, where most pipelines give one for each
    rows = (row.float().cpu().numpy() if isinstance(row, torch.Tensor) else np.asarray(row) for row in sounds)
    return [np.atleast_2d(row).astype(np.float32) for row in rows]
