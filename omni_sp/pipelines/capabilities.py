"""What a loaded pipeline can be asked for and what it makes, learned from its signature and its parts."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

# Our name -> the names that pipelines have for it, in order of preference.
NAMES: dict[str, tuple[str, ...]] = {
    "num_outputs_per_prompt": ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"),
    "fps": ("fps", "frame_rate"),
    "num_frames": ("num_frames", "frames", "video_length"),
    "image": ("image", "images", "input_images", "cond_image"),
}
# What a pipeline's output calls its pictures, videos and sounds.
PICTURE_FIELDS, VIDEO_FIELDS, SOUND_FIELDS = ("images", "image"), ("frames", "video"), ("audios", "audio", "sound")
# These give their image argument a default, and fail without it.
_NEED_A_PICTURE = (
    "BriaFiboEdit", "Fill", "ImageToVideo", "Image2Video", "Img2Img", "Inpaint", "LongCatImageEdit", "QwenImageEdit",
    "QwenImageLayered", "Refiner", "VideoToWorld",
)  # fmt: skip
# To these a list is a batch, one picture for each prompt; elsewhere it is several references for one prompt.
_ONE_PICTURE = (
    "Fill", "I2I", "Img2Img", "Inpaint", "Kontext", "LongCatImageEdit", "QwenImageEditPipeline",
    "QwenImageLayered", "Refiner",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PipelineCapabilities:
    """What one loaded pipeline can be asked for. Small and picklable: ranks send it to the front.

    Attributes:
        name: the pipeline's class. parameters: the arguments of its ``__call__`` with their defaults (a default that is
            no plain value is None here). required: those without a default. takes_anything: it has ``**kwargs``.
        makes_videos: its results are videos. makes_sounds: they are sounds, or videos with sound where it makes those.
        needs_image: it fails without a picture to start from. takes_one_image: a list of them would be one for each
            prompt. image_mode: "RGB", or "RGBA" where its VAE reads transparency.
        sampling_rate: of its sounds, in Hz; None where it makes none, or does not say.
        vae_multiple: pixels along a side that the VAE shrinks to one; a size that is no multiple of it is refused.
        height_multiple, width_multiple: pixels of one token; diffusers rounds a size down to a multiple of it.
        frames_multiple: num_frames - 1 is a multiple of this, else diffusers would round it; 1 where anything goes.
        ignores_guidance_scale: it takes guidance_scale only for distilled transformers, and this one is not distilled.
        sampling_defaults: what to use where the user says nothing, named as in OmniDiffusionSamplingParams.
    """

    name: str
    parameters: Mapping[str, Any]
    required: tuple[str, ...] = ()
    takes_anything: bool = False
    makes_videos: bool = False
    makes_sounds: bool = False
    needs_image: bool = False
    takes_one_image: bool = False
    image_mode: str = "RGB"
    sampling_rate: int | None = None
    vae_multiple: int = 1
    height_multiple: int = 1
    width_multiple: int = 1
    frames_multiple: int = 1
    ignores_guidance_scale: bool = False
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)

    def argument_name(self, name: str) -> str | None:
        """The pipeline's own name for one of ours; None where it has nothing of the kind."""
        candidates = NAMES.get(name, (name,))
        known = next((candidate for candidate in candidates if candidate in self.parameters), None)
        return candidates[0] if known is None and self.takes_anything else known

    @property
    def makes(self) -> str:
        """What a result is: "picture", "video" (perhaps with sound) or "sound"."""
        if self.makes_videos:
            return "video"
        return "sound" if self.makes_sounds else "picture"


def inspect_pipeline(pipe: Any, sampling_defaults: Mapping[str, Any] | None = None) -> PipelineCapabilities:
    """Learn from a loaded pipeline's signature and parts what it can be asked for."""
    parameters: dict[str, Any] = {}
    required = []
    takes_anything = False
    for name, parameter in inspect.signature(type(pipe).__call__).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_anything = True
        elif name != "self" and parameter.kind is not parameter.VAR_POSITIONAL:
            default = parameter.default
            parameters[name] = default if isinstance(default, (int, float, str)) else None
            if default is parameter.empty:
                required.append(name)
    name = type(pipe).__name__
    made = _output_fields(pipe, parameters)
    makes_videos, makes_sounds = bool(made & {*VIDEO_FIELDS}), bool(made & {*SOUND_FIELDS})
    vae_multiple = _vae_multiple(pipe)
    height_multiple, width_multiple = _size_multiples(pipe, vae_multiple)
    guidance_embeds = _part_config(pipe, "guidance_embeds")
    image = next((candidate for candidate in NAMES["image"] if candidate in parameters), None)
    return PipelineCapabilities(
        name=name,
        parameters=parameters,
        required=tuple(required),
        takes_anything=takes_anything,
        makes_videos=makes_videos,
        makes_sounds=makes_sounds,
        needs_image=image in required or (image == "image" and any(word in name for word in _NEED_A_PICTURE)),
        takes_one_image=image in ("image", "cond_image")
        and ((makes_videos and "conditions" not in parameters) or any(word in name for word in _ONE_PICTURE)),
        image_mode="RGBA" if _vae_channels(pipe) == 4 else "RGB",
        sampling_rate=_sampling_rate(pipe) if makes_sounds else None,
        vae_multiple=vae_multiple,
        height_multiple=height_multiple,
        width_multiple=width_multiple,
        frames_multiple=_frames_multiple(pipe, parameters),
        ignores_guidance_scale="true_cfg_scale" in parameters and guidance_embeds is False,
        sampling_defaults=dict(sampling_defaults or {}),
    )


def _output_fields(pipe: Any, parameters: Mapping[str, Any]) -> set[str]:
    """The fields of the pipeline's output: those of the output classes that its module names.

    A pipeline whose module names none is judged by its arguments.
    """
    known = {*PICTURE_FIELDS, *VIDEO_FIELDS, *SOUND_FIELDS}
    for owner in type(pipe).__mro__:
        if owner.__name__ == "DiffusionPipeline":
            break  # the base of all; its module has outputs of every kind
        module = sys.modules.get(owner.__module__)
        outputs = [
            thing
            for name, thing in vars(module).items()
            if name.endswith("Output") and isinstance(thing, type) and is_dataclass(thing)
        ]
        found = known & {entry.name for output in outputs for entry in fields(output)}
        if found:
            return found
    if {"num_frames", "num_videos_per_prompt"} & parameters.keys():
        return {"frames"}
    return {"audios"} if "num_waveforms_per_prompt" in parameters else {"images"}


def _part_config(pipe: Any, name: str) -> Any:
    """An entry of the transformer's config; of the second transformer's where the first is left out."""
    for part in (getattr(pipe, "transformer", None), getattr(pipe, "transformer_2", None)):
        if part is not None:
            return getattr(getattr(part, "config", None), name, None)
    return None


def _vae_channels(pipe: Any) -> Any:
    config = getattr(getattr(pipe, "vae", None), "config", None)
    return getattr(config, "input_channels", None) or getattr(config, "in_channels", None)


def _sampling_rate(pipe: Any) -> int | None:
    """Samples a second of the finished sound: the vocoder's, where there is one, else the pipeline's or the VAE's."""
    places = [
        (getattr(getattr(pipe, "vocoder", None), "config", None), "output_sampling_rate"),
        (getattr(getattr(pipe, "vocoder", None), "config", None), "sampling_rate"),
        (pipe, "audio_sample_rate"),
        (pipe, "sample_rate"),
    ]
    for part in ("vae", "sound_tokenizer", "audio_vae"):
        config = getattr(getattr(pipe, part, None), "config", None)
        places += [(config, "sampling_rate"), (config, "sample_rate")]
    found = (getattr(owner, name, None) for owner, name in places)
    return next((rate for rate in found if isinstance(rate, int) and rate > 0), None)


def _first_whole_number(pipe: Any, *names: str) -> int:
    values = (getattr(pipe, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 1)


def _vae_multiple(pipe: Any) -> int:
    """Pixels along a side that the VAE shrinks to one."""
    return _first_whole_number(
        pipe,
        "vae_scale_factor_spatial",
        "vae_spatial_compression_ratio",
        "vae_spatial_scale_factor",
        "vae_scale_factor",
    )


def _size_multiples(pipe: Any, shrink: int) -> tuple[int, int]:
    """Pixels per token along height and width: what the VAE shrinks by, times the transformer's patch.

    The pipeline's own image processor names a multiple as well (FLUX packs 2 × 2, and calls it no patch); both hold.
    """
    patch = _part_config(pipe, "patch_size")
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch or (1, 1))[-2:]
    multiples = [shrink * side for side in sides]
    for name in ("image_processor", "video_processor"):
        config = getattr(getattr(pipe, name, None), "config", None)
        processed = getattr(config, "vae_scale_factor", None)
        if isinstance(processed, int) and processed > 0:
            multiples = [math.lcm(multiple, processed) for multiple in multiples]
    return multiples[0], multiples[-1]


def _frames_multiple(pipe: Any, parameters: Mapping[str, Any]) -> int:
    """Frames that the VAE shrinks to one, where the pipeline's own default obeys 1 + n × that; else 1, for no rule."""
    shrink = _first_whole_number(
        pipe, "vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor"
    )
    name = next((candidate for candidate in NAMES["num_frames"] if candidate in parameters), None)
    default = parameters.get(name) if name is not None else None
    if name is not None and default is None:
        default = _part_config(pipe, "sample_frames")
    obeys = isinstance(default, int) and (default - 1) % shrink == 0
    return shrink if obeys else 1
