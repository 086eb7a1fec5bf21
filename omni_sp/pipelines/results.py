"""What a pipeline's output holds, whatever the pipeline calls it: images, videos, sounds. Its import needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omni_sp.errors import NonFiniteResultError, UnsupportedModelError
from omni_sp.pipelines import quirks
from omni_sp.pipelines.arguments import rounded_size
from omni_sp.pipelines.capabilities import PipelineCapabilities


@dataclass(frozen=True, kw_only=True)
class CallResult:
    """What one call of a pipeline made, and how long it took.

    Attributes:
        images: PIL images, or what the output type makes of them.
        videos: lists of PIL images, or what the output type makes of them.
        timings: seconds of the stages; see OmniRequestOutput.
        audios: float32 arrays of shape (channels, samples).
        not_finite: the first stage that gave NaN or infinite numbers, for people; None where the result is finite.
        dropped_tokens: for each prompt, tokenizer -> tokens of it that the text encoder did not get.
    """

    images: list[Any]
    videos: list[Any]
    timings: dict[str, Any]
    audios: list[Any] = field(default_factory=list)
    not_finite: str | None = None
    dropped_tokens: list[dict[str, int]] = field(default_factory=list)


def result_of(name: str, output: Any, *, output_type: str | None, timings: dict[str, Any]) -> CallResult:
    """Take the images, videos and sounds out of the output of the pipeline class ``name``; latents stay as they are."""
    is_latent = output_type == "latent"
    images = _items(_first(output, quirks.IMAGE_FIELDS))
    if not is_latent:  # some are lists of layers
        images = [layer for image in images for layer in (image if isinstance(image, list) else [image])]
    videos = _first(output, quirks.VIDEO_FIELDS)
    result = CallResult(
        images=images,
        videos=_items(videos if is_latent or not _is_single_video(videos) else [videos]),
        audios=_items(_first(output, quirks.SOUND_FIELDS)) if is_latent else _waves(output),
        timings=timings,
    )
    if not result.images and not result.videos and not result.audios:
        held = ", ".join(output) if isinstance(output, Mapping) and output else "nothing"
        raise UnsupportedModelError(
            f"{name} gave a {type(output).__name__} (it holds: {held}), in which there are no pictures, videos or "
            "sounds"
        )
    return result


def require_finite(result: CallResult | None, capabilities: PipelineCapabilities, dtype: str) -> None:
    """Refuse a result that holds NaN or infinite numbers, or was made of them.

    Args:
        dtype: of the pipeline's weights.

    Raises:
        NonFiniteResultError: it names the stage where they first appeared.
    """
    if result is None or result.not_finite is None:
        return
    other = " or bfloat16 or float32 as dtype" if dtype == "float16" else ""
    raise NonFiniteResultError(
        f"{capabilities.name} made NaN or infinite numbers in {dtype}, first in {result.not_finite}: "
        f"try a lower guidance{other}",
        stage=result.not_finite,
    )


def output_deviation(
    capabilities: PipelineCapabilities, arguments: Mapping[str, Any], result: CallResult
) -> str | None:
    """Say in which size or number of frames a result differs from the arguments; None where it does not.

    Pipelines note such a difference at most in their log. A size that rounded_size() foresees is no difference.
    """
    from PIL import Image

    frames = result.videos[0] if result.videos and isinstance(result.videos[0], list) else result.images
    if not frames or not isinstance(frames[0], Image.Image):
        return None
    differences = []
    asked = rounded_size(capabilities, arguments) or (arguments.get("height"), arguments.get("width"))
    drawn = frames[0].height, frames[0].width
    if any(isinstance(side, int) and side != got for side, got in zip(asked, drawn, strict=True)):
        differences.append(f"{drawn[1]} x {drawn[0]} pixels instead of {asked[1] or 'any'} x {asked[0] or 'any'}")
    num_frames = arguments.get(capabilities.argument_name("num_frames") or "")
    if result.videos and isinstance(num_frames, int) and num_frames != len(frames):
        differences.append(f"{len(frames)} frames instead of {num_frames}")
    return f"{capabilities.name} drew {' and '.join(differences)}, as it does on one process" if differences else None


def _first(output: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(output, name, None)) is not None), None)


def _items(batch: Any) -> list[Any]:
    """One entry for each output, on the CPU, whatever the pipeline's output type holds them in."""
    import torch

    return [] if batch is None else [item.cpu() if isinstance(item, torch.Tensor) else item for item in batch]


def _is_single_video(videos: Any) -> bool:
    """True for the frames of one video, where most pipelines give a list of videos."""
    if isinstance(videos, list):
        return bool(videos) and not isinstance(videos[0], list) and getattr(videos[0], "ndim", 2) < 4
    return getattr(videos, "ndim", 5) == 4


def _waves(output: Any) -> list[Any]:
    """Each output's sound as a float32 array of shape (channels, samples)."""
    import numpy as np
    import torch

    sounds = _first(output, quirks.SOUND_FIELDS)
    if sounds is None:
        return []
    if sounds is getattr(output, quirks.SINGLE_SOUND_FIELD, None):
        sounds = [sounds]
    arrays = (item.float().cpu().numpy() if isinstance(item, torch.Tensor) else np.asarray(item) for item in sounds)
    return [np.atleast_2d(array).astype(np.float32) for array in arrays]
