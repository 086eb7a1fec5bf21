"""One request on one loaded pipeline: what its own, unmodified ``__call__`` takes, the arguments, and the call."""

from __future__ import annotations

import difflib
import inspect
import math
import reprlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.errors import OmniSPError, SamplingParamsError

if TYPE_CHECKING:
    from omni_sp.pipelines.timing import OnStep

# Our name -> the names that pipelines have for it, in order of preference.
_NAMES: dict[str, tuple[str, ...]] = {
    "num_outputs_per_prompt": ("num_images_per_prompt", "num_videos_per_prompt"),
    "fps": ("fps", "frame_rate"),
}
_PLAIN = (
    "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale", "max_sequence_length",
    "output_type", "num_outputs_per_prompt", "fps",
)  # fmt: skip
# Set here and nowhere else: what they are decides whether ranks agree and what comes back.
_OURS = ("generator", "return_dict", "prompt", "negative_prompt", "image")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt in full.

    Attributes:
        text: what to draw. negative_text: what to keep away from.
        image: a PIL picture, or a list of them, to start from.
    """

    text: str | None = None
    negative_text: str | None = None
    image: Any = None


@dataclass(frozen=True, kw_only=True)
class PipelineFacts:
    """What one loaded pipeline can be asked for. Small and picklable: ranks send it to the front.

    Attributes:
        name: the pipeline's class. parameters: the arguments of its ``__call__`` with their defaults (a default that is
            no plain value is None here). takes_anything: it has ``**kwargs``.
        makes_videos: its results are videos, not pictures.
        vae_multiple: pixels along a side that the VAE shrinks to one; a size that is no multiple of it is refused.
        height_multiple, width_multiple: pixels of one token; diffusers rounds a size down to a multiple of it.
        frames_multiple: num_frames - 1 is a multiple of this, else diffusers would round it; 1 where anything goes.
        ignores_guidance_scale: it takes guidance_scale only for distilled transformers, and this one is not distilled.
        sampling_defaults: what to use where the user says nothing, named as in OmniDiffusionSamplingParams.
    """

    name: str
    parameters: Mapping[str, Any]
    takes_anything: bool = False
    makes_videos: bool = False
    vae_multiple: int = 1
    height_multiple: int = 1
    width_multiple: int = 1
    frames_multiple: int = 1
    ignores_guidance_scale: bool = False
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)

    def taken_as(self, name: str) -> str | None:
        """The pipeline's own name for one of ours; None where it has nothing of the kind."""
        candidates = _NAMES.get(name, (name,))
        known = next((candidate for candidate in candidates if candidate in self.parameters), None)
        return candidates[0] if known is None and self.takes_anything else known


@dataclass(frozen=True, kw_only=True)
class CallResult:
    """What a pipeline made, and where its seconds went (see outputs.OmniRequestOutput.metrics)."""

    images: list[Any]
    videos: list[Any]
    timings: dict[str, Any]


def pipeline_facts(pipe: Any, sampling_defaults: Mapping[str, Any] | None = None) -> PipelineFacts:
    """Learn from a loaded pipeline's signature and parts what it can be asked for."""
    parameters: dict[str, Any] = {}
    takes_anything = False
    for name, parameter in inspect.signature(type(pipe).__call__).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_anything = True
        elif name != "self" and parameter.kind is not parameter.VAR_POSITIONAL:
            default = parameter.default
            parameters[name] = default if isinstance(default, (int, float, str)) else None
    vae_multiple = _vae_multiple(pipe)
    height_multiple, width_multiple = _size_multiples(pipe, vae_multiple)
    guidance_embeds = _part_config(pipe, "guidance_embeds")
    return PipelineFacts(
        name=type(pipe).__name__,
        parameters=parameters,
        takes_anything=takes_anything,
        makes_videos="num_frames" in parameters or "num_videos_per_prompt" in parameters,
        vae_multiple=vae_multiple,
        height_multiple=height_multiple,
        width_multiple=width_multiple,
        frames_multiple=_frames_multiple(pipe, parameters.get("num_frames")),
        ignores_guidance_scale="true_cfg_scale" in parameters and guidance_embeds is False,
        sampling_defaults=dict(sampling_defaults or {}),
    )


def call_arguments(facts: PipelineFacts, prompt: Prompt, params: OmniDiffusionSamplingParams) -> dict[str, Any]:
    """The keyword arguments for the pipeline's ``__call__``, without the generator. Nothing is dropped.

    Where true_cfg_scale is above 1 and nobody gave a negative prompt, it is " ": without one, pipelines would leave the
    guidance out.

    Raises:
        SamplingParamsError: the pipeline cannot take a parameter, would ignore it, or a size does not fit its VAE.
    """
    negative = prompt.negative_text if prompt.negative_text is not None else params.negative_prompt
    wanted = {"prompt": prompt.text, "image": prompt.image, "negative_prompt": negative}
    wanted |= {name: getattr(params, name) for name in _PLAIN}
    arguments: dict[str, Any] = {}
    for name, value in wanted.items():
        taken_as = facts.taken_as(name)
        if value is None or (name == "num_outputs_per_prompt" and value == 1 and taken_as is None):
            continue
        if name == "fps" and taken_as is None and facts.makes_videos:
            continue  # how fast the frames are shown is then no business of the pipeline's, only of who writes the file
        if taken_as is None:
            raise _refusal(facts, name, value)
        arguments[taken_as] = value
    if params.seed is not None and facts.taken_as("generator") is None:
        raise _refusal(facts, "seed", params.seed)
    _add_extra_args(facts, arguments, params.extra_args)
    for name, value in facts.sampling_defaults.items():
        taken_as = facts.taken_as(name)
        if taken_as is not None and value is not None:
            arguments.setdefault(taken_as, value)
    if "output_type" in facts.parameters:
        arguments.setdefault("output_type", "pil")
    _settle_guidance(facts, arguments, user_negative=negative)
    _check_sizes(facts, arguments)
    return arguments


def small_arguments(facts: PipelineFacts) -> dict[str, Any]:
    """A small call whose token counts few numbers of ranks divide: what a check draws where the user says nothing."""
    wanted = {
        "height": 11 * facts.height_multiple,
        "width": 13 * facts.width_multiple,
        "num_frames": 2 * facts.frames_multiple + 1,
        "num_inference_steps": 2,
        "output_type": "np",
    }
    return {name: value for name, value in wanted.items() if name in facts.parameters}


def run_call(
    pipe: Any, arguments: Mapping[str, Any], *, seed: int | None, device: Any, on_step: OnStep | None = None
) -> CallResult:
    """Call the pipeline, timed, with a CPU generator of this seed (None where the pipeline takes no generator).

    Raises:
        SamplingParamsError: the pipeline itself refused its arguments, before denoising began.
    """
    import torch

    from omni_sp.pipelines.timing import StageClock

    call = dict(arguments)
    if seed is not None:
        call["generator"] = torch.Generator("cpu").manual_seed(seed)
    began = time.perf_counter()
    with StageClock(pipe, torch.device(device), on_step) as clock:
        try:
            output = pipe(**call)
        except OmniSPError:
            raise
        except (ValueError, TypeError) as error:
            if clock.denoising_began:
                raise
            reason = " ".join(str(error).split())
            raise SamplingParamsError(f"{type(pipe).__name__} refused the call: {reason}") from error
        total = clock.now() - began
    timings = {f"{stage}_s": seconds for stage, seconds in clock.seconds.items()}
    timings["num_steps"] = clock.num_steps
    timings["denoise_step_s"] = clock.seconds["denoise"] / clock.num_steps if clock.num_steps else 0.0
    timings["total_s"] = total
    return CallResult(
        images=_rows(getattr(output, "images", None)), videos=_rows(getattr(output, "frames", None)), timings=timings
    )


def _rows(result: Any) -> list[Any]:
    """One entry for each output, on the CPU, whatever the pipeline's output type holds them in."""
    import torch

    if result is None:
        return []
    return [row.cpu() if isinstance(row, torch.Tensor) else row for row in result]


def _refusal(facts: PipelineFacts, name: str, value: Any) -> SamplingParamsError:
    taken = [ours for ours in ("prompt", "negative_prompt", "image", *_PLAIN) if facts.taken_as(ours)]
    if "generator" in facts.parameters:
        taken.append("seed")
    return SamplingParamsError(
        f"{facts.name} does not take {name} (given: {reprlib.repr(value)}); it takes {', '.join(taken)}"
    )


def _add_extra_args(facts: PipelineFacts, arguments: dict[str, Any], extra_args: Mapping[str, Any]) -> None:
    for name, value in extra_args.items():
        if name in _OURS:
            raise SamplingParamsError(f"extra_args cannot set {name!r}: the prompt and the seed decide it")
        if name in arguments:
            raise SamplingParamsError(f"{name} is given twice: {arguments[name]!r}, and {value!r} in extra_args")
        if name not in facts.parameters and not facts.takes_anything:
            near = difflib.get_close_matches(str(name), facts.parameters, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(facts.parameters)}"
            raise SamplingParamsError(f"{facts.name} does not take {name!r} from extra_args; {hint}")
        arguments[name] = value


def _settle_guidance(facts: PipelineFacts, arguments: dict[str, Any], user_negative: str | None) -> None:
    """Refuse guidance that the pipeline would leave out, with a warning or without one."""
    if facts.ignores_guidance_scale and arguments.get("guidance_scale") is not None:
        raise SamplingParamsError(
            f"{facts.name} would ignore guidance_scale={arguments['guidance_scale']}: its transformer is not "
            "guidance-distilled; use true_cfg_scale"
        )
    if not {"true_cfg_scale", "negative_prompt"} <= facts.parameters.keys():
        return
    given = arguments.get("true_cfg_scale")
    scale = facts.parameters["true_cfg_scale"] if given is None else given
    if scale is not None and scale <= 1:
        if user_negative is not None:
            raise SamplingParamsError(
                f"{facts.name} would ignore the negative prompt at true_cfg_scale={scale}: give one above 1"
            )
        arguments.pop("negative_prompt", None)
    elif given is not None and arguments.get("negative_prompt_embeds") is None:
        arguments.setdefault("negative_prompt", " ")


def rounded_size(facts: PipelineFacts, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) that diffusers will draw where it is not what was asked for; None where it is."""
    height, width = arguments.get("height"), arguments.get("width")
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    drawn = height - height % facts.height_multiple, width - width % facts.width_multiple
    return None if drawn == (height, width) else drawn


def _check_sizes(facts: PipelineFacts, arguments: Mapping[str, Any]) -> None:
    """Refuse sizes that the VAE cannot make, and those of less than one token."""
    for name, multiple in (("height", facts.height_multiple), ("width", facts.width_multiple)):
        value = arguments.get(name)
        if not isinstance(value, int):
            continue
        if value % facts.vae_multiple:
            raise SamplingParamsError(
                f"{name}={value}: {facts.name} needs a multiple of {facts.vae_multiple}, and draws multiples of "
                f"{multiple}; nearest: {_nearest(value, multiple)}"
            )
        if value < multiple:
            raise SamplingParamsError(f"{name}={value}: {facts.name} draws {multiple} pixels or more")
    frames = arguments.get("num_frames")
    if isinstance(frames, int) and (frames - 1) % facts.frames_multiple:
        below = (frames - 1) // facts.frames_multiple * facts.frames_multiple + 1
        raise SamplingParamsError(
            f"num_frames={frames}: {facts.name} needs 1 more than a multiple of {facts.frames_multiple}; "
            f"nearest: {below} or {below + facts.frames_multiple}"
        )


def _nearest(value: int, multiple: int) -> str:
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below else f"{multiple}"


def _part_config(pipe: Any, name: str) -> Any:
    """An entry of the transformer's config; of the second transformer's where the first is left out."""
    for part in (getattr(pipe, "transformer", None), getattr(pipe, "transformer_2", None)):
        if part is not None:
            return getattr(getattr(part, "config", None), name, None)
    return None


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


def _frames_multiple(pipe: Any, default_frames: Any) -> int:
    """Frames that the VAE shrinks to one, where the pipeline's own default obeys 1 + n × that; else 1, for no rule."""
    shrink = _first_whole_number(
        pipe, "vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor"
    )
    obeys = isinstance(default_frames, int) and (default_frames - 1) % shrink == 0
    return shrink if obeys else 1
