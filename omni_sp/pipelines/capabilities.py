"""What a loaded pipeline can be asked for and what it makes, learned from its signature and its components."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omni_sp.errors import SamplingParamsError
from omni_sp.pipelines import quirks
from omni_sp.validation import shown, suggestion


@dataclass(frozen=True, kw_only=True)
class PipelineCapabilities:
    """What one loaded pipeline can be asked for. Small and picklable: ranks send it to the engine's process.

    Attributes:
        parameters: the arguments of its ``__call__`` with their defaults; a default that is no plain value is None.
        required: the arguments without a default.
        takes_anything: whether it has ``**kwargs``.
        makes_sounds: whether its results are sounds, or videos with sound if it makes videos.
        needs_image: whether it fails without an image to start from.
        takes_one_image: whether a list of images would be one for each prompt.
        image_mode: "RGB", or "RGBA" where its VAE reads transparency.
        sampling_rate: of its sounds, in Hz; None where it makes none, or does not say.
        vae_multiple: pixels along a side that the VAE shrinks to one; a size that is no multiple of it is refused.
        height_multiple: pixels of one token along the height; diffusers rounds a height down to a multiple of it.
        frames_multiple: num_frames - 1 must be a multiple of this, or diffusers would round it; 1 for no such rule.
        takes_generators: whether it takes a list of generators, one for each output.
        ignores_guidance_scale: whether it takes guidance_scale only for distilled transformers, and has none.
        sampling_defaults: what to use where the user gives nothing, named as in OmniDiffusionSamplingParams.
        adapters: names of the LoRA adapters that a request may ask for.
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
    takes_generators: bool = False
    ignores_guidance_scale: bool = False
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()

    def require_adapters(self, names: Iterable[str]) -> None:
        """Refuse LoRA adapters that are not loaded: SamplingParamsError."""
        for name in names:
            if name not in self.adapters:
                hint = suggestion(name, self.adapters, "there are {known}" if self.adapters else "none is loaded")
                raise SamplingParamsError(f"there is no LoRA adapter {shown(name)}; {hint}", param="lora")

    def argument_name(self, name: str) -> str | None:
        """Return the pipeline's own name for an argument of ours; None where it has nothing of the kind."""
        candidates = quirks.ARGUMENT_NAMES.get(name, (name,))
        known = next((candidate for candidate in candidates if candidate in self.parameters), None)
        return candidates[0] if known is None and self.takes_anything else known

    @property
    def makes(self) -> str:
        """The kind of a result: "picture", "video" (perhaps with sound) or "sound"."""
        if self.makes_videos:
            return "video"
        return "sound" if self.makes_sounds else "picture"


def our_name(argument_name: str) -> str:
    """Return our name for an argument of a pipeline: the opposite of PipelineCapabilities.argument_name()."""
    return next((ours for ours, theirs in quirks.ARGUMENT_NAMES.items() if argument_name in theirs), argument_name)


def inspect_pipeline(pipe: Any, sampling_defaults: Mapping[str, Any] | None = None) -> PipelineCapabilities:
    """Learn from a loaded pipeline's signature and components what it can be asked for."""
    parameters: dict[str, Any] = {}
    required = []
    takes_anything = False
    signature = inspect.signature(type(pipe).__call__).parameters
    for name, parameter in signature.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_anything = True
        elif name != "self" and parameter.kind is not parameter.VAR_POSITIONAL:
            default = parameter.default
            parameters[name] = default if isinstance(default, (int, float, str)) else None
            if default is parameter.empty:
                required.append(name)
    name = type(pipe).__name__
    made = _output_fields(pipe, parameters)
    makes_videos, makes_sounds = bool(made & {*quirks.VIDEO_FIELDS}), bool(made & {*quirks.SOUND_FIELDS})
    vae_channels = _config_entry(pipe, "vae", "input_channels") or _config_entry(pipe, "vae", "in_channels")
    height_multiple, width_multiple = size_multiples(pipe)
    image = next((candidate for candidate in quirks.ARGUMENT_NAMES["image"] if candidate in parameters), None)
    is_batch = (makes_videos and quirks.SEVERAL_CONDITIONS not in parameters) or any(
        part in name for part in quirks.TAKES_ONE_IMAGE
    )
    return PipelineCapabilities(
        name=name,
        parameters=parameters,
        required=tuple(required),
        takes_anything=takes_anything,
        makes_videos=makes_videos,
        makes_sounds=makes_sounds,
        needs_image=image in required or (image == "image" and any(part in name for part in quirks.NEEDS_IMAGE)),
        takes_one_image=image in quirks.SINGLE_IMAGE_ARGUMENTS and is_batch,
        image_mode="RGBA" if vae_channels == 4 else "RGB",
        sampling_rate=_sampling_rate(pipe) if makes_sounds else None,
        vae_multiple=_vae_multiple(pipe),
        height_multiple=height_multiple,
        width_multiple=width_multiple,
        frames_multiple=_frames_multiple(pipe, parameters),
        takes_generators="generator" in signature and "list[" in str(signature["generator"].annotation).lower(),
        ignores_guidance_scale="true_cfg_scale" in parameters and _transformer_config(pipe, "guidance_embeds") is False,
        sampling_defaults=dict(sampling_defaults or {}),
    )


def _output_fields(pipe: Any, parameters: Mapping[str, Any]) -> set[str]:
    """The fields of the output classes that the pipeline's module names; where it names none, its arguments decide."""
    known = {*quirks.IMAGE_FIELDS, *quirks.VIDEO_FIELDS, *quirks.SOUND_FIELDS}
    for owner in type(pipe).__mro__:
        if owner.__name__ == "DiffusionPipeline":
            break  # the base of all; its module has outputs of every kind
        module = sys.modules.get(owner.__module__)
        outputs = [
            value
            for name, value in vars(module).items()
            if name.endswith("Output") and isinstance(value, type) and is_dataclass(value)
        ]
        found = known & {entry.name for output in outputs for entry in fields(output)}
        if found:
            return found
    if parameters.keys() & {*quirks.VIDEO_ARGUMENTS}:
        return {*quirks.VIDEO_FIELDS}
    return {*quirks.SOUND_FIELDS} if parameters.keys() & {*quirks.SOUND_ARGUMENTS} else {*quirks.IMAGE_FIELDS}


def _config_entry(pipe: Any, component: str, name: str) -> Any:
    return getattr(getattr(getattr(pipe, component, None), "config", None), name, None)


def _transformer_config(pipe: Any, name: str) -> Any:
    """An entry of the transformer's config; of the second transformer's where the first is left out."""
    component = "transformer" if getattr(pipe, "transformer", None) is not None else "transformer_2"
    return _config_entry(pipe, component, name)


def _sampling_rate(pipe: Any) -> int | None:
    """Samples a second of the finished sound: the vocoder's, where there is one, else the pipeline's or the VAE's."""
    found = (
        _config_entry(pipe, component, name) if component else getattr(pipe, name, None)
        for component, name in quirks.SAMPLING_RATES
    )
    return next((rate for rate in found if isinstance(rate, int) and rate > 0), None)


def _first_positive_int(pipe: Any, names: tuple[str, ...]) -> int:
    values = (getattr(pipe, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 1)


def _vae_multiple(pipe: Any) -> int:
    return _first_positive_int(pipe, quirks.SPATIAL_FACTORS)


def size_multiples(pipe: Any) -> tuple[int, int]:
    """Pixels per token along height and width: what the VAE shrinks by, times the transformer's patch.

    The pipeline's own image processor names a multiple as well (FLUX packs 2 × 2, and calls it no patch); both hold.
    """
    patch = _transformer_config(pipe, "patch_size")
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch or (1, 1))[-2:]
    multiples = [_vae_multiple(pipe) * side for side in sides]
    for name in ("image_processor", "video_processor"):
        processed = _config_entry(pipe, name, "vae_scale_factor")
        if isinstance(processed, int) and processed > 0:
            multiples = [math.lcm(multiple, processed) for multiple in multiples]
    return multiples[0], multiples[-1]


def _frames_multiple(pipe: Any, parameters: Mapping[str, Any]) -> int:
    """Frames that the VAE shrinks to one, where the pipeline's own default obeys 1 + n × that; else 1, for no rule."""
    factor = _first_positive_int(pipe, quirks.TEMPORAL_FACTORS)
    name = next((candidate for candidate in quirks.ARGUMENT_NAMES["num_frames"] if candidate in parameters), None)
    default = parameters.get(name) if name is not None else None
    if name is not None and default is None:
        default = _transformer_config(pipe, "sample_frames")
    return factor if isinstance(default, int) and (default - 1) % factor == 0 else 1
