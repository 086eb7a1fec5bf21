"""One request on one loaded pipeline: the arguments of its own, unmodified ``__call__``, and the call."""

from __future__ import annotations

import difflib
import reprlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.errors import ConfigError, OmniSPError, SamplingParamsError
from omni_sp.pipelines.capabilities import NAMES, PipelineCapabilities, inspect_pipeline
from omni_sp.pipelines.results import CallResult, result_of

if TYPE_CHECKING:
    from omni_sp.pipelines.timing import OnStep

__all__ = [
    "DEFAULT_FPS",
    "CallResult",
    "PipelineCapabilities",
    "Prompt",
    "call_arguments",
    "frames_per_second",
    "inspect_pipeline",
    "output_deviation",
    "rounded_size",
    "run_call",
    "small_arguments",
    "warm_up_arguments",
]

DEFAULT_FPS = 16.0
"""Frames a second of a video whose pipeline says nothing about it."""

_FORWARDED = (
    "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale", "max_sequence_length",
    "output_type", "num_outputs_per_prompt", "fps",
)  # fmt: skip
# Set here and nowhere else: what they are decides whether ranks agree and what comes back.
_RESERVED = ("generator", "return_dict", "prompt", "negative_prompt", "image")
# A list of pictures, also where there is one.
_PICTURE_LISTS = ("images", "input_images")
# Names that pipelines use, and the packages that bring them.
_PACKAGES = {"ftfy": "ftfy", "BeautifulSoup": "beautifulsoup4"}
# A pipeline that has a name for one of these fails without it. Mode and colour of a plain one.
_OTHER_PICTURES = {"mask_image": ("L", "white"), "control_image": ("RGB", "grey")}
_WARM_UP_FRAMES = 17  # one more than a multiple of what the VAEs of videos make one frame of
# Seconds of a sound.
_DURATIONS = ("audio_end_in_s", "audio_length_in_s", "audio_duration", "audio_duration_s", "duration")


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


def call_arguments(
    capabilities: PipelineCapabilities, prompt: Prompt, params: OmniDiffusionSamplingParams
) -> dict[str, Any]:
    """The keyword arguments for the pipeline's ``__call__``, without the generator. Nothing is dropped.

    Where true_cfg_scale is above 1 and nobody gave a negative prompt, it is " ": without one, pipelines would leave the
    guidance out. A pipeline that keeps to an area (FLUX.1 Kontext: ``max_area``) is given that of height and width.

    Raises:
        SamplingParamsError: the pipeline cannot take a parameter, would ignore it, or needs one that is missing; or a
            size does not fit its VAE.
    """
    negative = prompt.negative_text if prompt.negative_text is not None else params.negative_prompt
    wanted = {"prompt": prompt.text, "image": prompt.image, "negative_prompt": negative}
    wanted |= {name: getattr(params, name) for name in _FORWARDED}
    arguments: dict[str, Any] = {}
    for name, value in wanted.items():
        argument_name = capabilities.argument_name(name)
        if value is None or (name == "num_outputs_per_prompt" and value == 1 and argument_name is None):
            continue
        if name == "fps" and argument_name is None and capabilities.makes_videos:
            continue  # how fast the frames are shown is then no business of the pipeline's, only of who writes the file
        if argument_name is None:
            raise _refusal(capabilities, name, value)
        arguments[argument_name] = _adapt_value(capabilities, argument_name, value)
    if params.seed is not None and capabilities.argument_name("generator") is None:
        raise _refusal(capabilities, "seed", params.seed)
    _add_extra_args(capabilities, arguments, params.extra_args)
    for name, value in capabilities.sampling_defaults.items():
        argument_name = capabilities.argument_name(name)
        if argument_name is not None and value is not None:
            arguments.setdefault(argument_name, value)
    if "output_type" in capabilities.parameters and capabilities.makes != "sound":
        arguments.setdefault("output_type", "pil")
    _apply_guidance_rules(capabilities, arguments, user_negative=negative)
    _apply_image_rules(capabilities, arguments, params.extra_args)
    _check_sizes(capabilities, arguments)
    _add_area(capabilities, arguments)
    _require_all(capabilities, arguments)
    return arguments


def small_arguments(
    capabilities: PipelineCapabilities, arguments: Mapping[str, Any], params: OmniDiffusionSamplingParams
) -> dict[str, Any]:
    """These arguments, small where the user says nothing: token counts that few numbers of ranks divide, two steps."""
    wanted = {
        "height": 11 * capabilities.height_multiple,
        "width": 13 * capabilities.width_multiple,
        "num_frames": 2 * capabilities.frames_multiple + 1,
        "num_inference_steps": 2,
        "output_type": "np",
    }
    small = dict(arguments)
    for name, value in wanted.items():
        argument_name = capabilities.argument_name(name)
        is_said = getattr(params, name) is not None or argument_name in params.extra_args
        if argument_name is not None and argument_name in capabilities.parameters and not is_said:
            small[argument_name] = value
    for name in (*_DURATIONS, "_auto_resize"):
        if name in capabilities.parameters:
            small.setdefault(name, 1.0 if name in _DURATIONS else False)
    if "max_area" not in params.extra_args:
        small.pop("max_area", None)
        _add_area(capabilities, small)
    return small


def warm_up_arguments(capabilities: PipelineCapabilities, height: int, width: int) -> dict[str, Any]:
    """As call_arguments(), for one step at this size that nobody looks at.

    Grey pictures stand in for those that the pipeline cannot do without, and all of them is to be drawn anew. Where it
    takes no size, theirs decides.
    """
    from PIL import Image

    def plain(mode: str = capabilities.image_mode, colour: str = "grey") -> Image.Image:
        return Image.new(mode, (width, height), colour)

    image = plain() if capabilities.needs_image else None
    extra: dict[str, Any] = {
        name: plain(*looks) for name, looks in _OTHER_PICTURES.items() if name in capabilities.parameters
    }
    if _needs_video(capabilities):
        extra["video"] = [plain()] * _WARM_UP_FRAMES
    is_given = image is not None or bool(extra)
    if is_given and "strength" in capabilities.parameters:
        extra["strength"] = 1.0  # of less, a single step would leave none
    is_sized = "height" in capabilities.parameters or not is_given
    params = OmniDiffusionSamplingParams(
        height=height if is_sized else None,
        width=width if is_sized else None,
        num_inference_steps=1,
        extra_args=extra,
    )
    text = "a warm-up" if capabilities.argument_name("prompt") is not None else None
    return call_arguments(capabilities, Prompt(text=text, image=image), params)


def frames_per_second(capabilities: PipelineCapabilities, arguments: Mapping[str, Any], fps: float | None) -> float:
    """How fast a video is meant to be shown: as the user says, else as the pipeline does, else DEFAULT_FPS."""
    name = capabilities.argument_name("fps")
    if fps is None and name is not None:
        given = arguments.get(name)
        fps = capabilities.parameters.get(name) if given is None else given
    return float(fps) if isinstance(fps, (int, float)) and fps > 0 else DEFAULT_FPS


def run_call(
    pipe: Any,
    arguments: Mapping[str, Any],
    *,
    seed: int | tuple[int, ...] | None,
    device: Any,
    on_step: OnStep | None = None,
) -> CallResult:
    """Call the pipeline, timed, with a CPU generator of this seed, or one for each prompt.

    ``seed`` is None where the pipeline takes no generator.

    Raises:
        SamplingParamsError: the pipeline itself refused its arguments, before denoising began.
        ConfigError: it uses a package that is not installed.
        UnsupportedModelError: what it gave holds no picture, video or sound.
    """
    import torch

    from omni_sp.pipelines.timing import StageClock

    call = dict(arguments)
    if isinstance(seed, tuple):
        call["generator"] = [torch.Generator("cpu").manual_seed(one) for one in seed]
    elif seed is not None:
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
        except NameError as error:
            # diffusers imports these where they are installed, and some pipelines then use them without a look.
            if error.name not in _PACKAGES:
                raise
            raise ConfigError(f"{type(pipe).__name__} needs a package: pip install {_PACKAGES[error.name]}") from error
        total = clock.now() - began
    timings = {f"{stage}_s": seconds for stage, seconds in clock.seconds.items()}
    timings["num_steps"] = clock.num_steps
    timings["denoise_step_s"] = clock.seconds["denoise"] / clock.num_steps if clock.num_steps else 0.0
    timings["total_s"] = total
    return result_of(type(pipe).__name__, output, output_type=call.get("output_type"), timings=timings)


def rounded_size(capabilities: PipelineCapabilities, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) that diffusers will draw where it is not what was asked for; None where it is."""
    height, width = arguments.get("height"), arguments.get("width")
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    drawn = height - height % capabilities.height_multiple, width - width % capabilities.width_multiple
    return None if drawn == (height, width) else drawn


def output_deviation(
    capabilities: PipelineCapabilities, arguments: Mapping[str, Any], result: CallResult
) -> str | None:
    """What a pipeline drew otherwise than it was asked to, with no more than a line in its log; None where it obeyed.

    Sizes that rounded_size() foresees are not told again.
    """
    from PIL import Image

    frames = result.videos[0] if result.videos and isinstance(result.videos[0], list) else result.images
    if not frames or not isinstance(frames[0], Image.Image):
        return None
    told = []
    asked = rounded_size(capabilities, arguments) or (arguments.get("height"), arguments.get("width"))
    drawn = frames[0].height, frames[0].width
    if any(isinstance(wish, int) and wish != got for wish, got in zip(asked, drawn, strict=True)):
        told.append(f"{drawn[1]} x {drawn[0]} pixels instead of {asked[1] or 'any'} x {asked[0] or 'any'}")
    num_frames = arguments.get(capabilities.argument_name("num_frames") or "")
    if result.videos and isinstance(num_frames, int) and num_frames != len(frames):
        told.append(f"{len(frames)} frames instead of {num_frames}")
    return f"{capabilities.name} drew {' and '.join(told)}, as it does on one process" if told else None


def _needs_video(capabilities: PipelineCapabilities) -> bool:
    """Whether it starts from a video: it says so, or is told how strongly to change one and takes no picture."""
    takes = capabilities.parameters.keys()
    return "video" in capabilities.required or ({"video", "strength"} <= takes and takes.isdisjoint(NAMES["image"]))


def _adapt_value(capabilities: PipelineCapabilities, name: str, value: Any) -> Any:
    """A value in the pipeline's own form: a list for lists of pictures, a whole number for whole frame rates."""
    if name in _PICTURE_LISTS and not isinstance(value, list):
        return [value]
    is_whole = name in NAMES["fps"] and isinstance(capabilities.parameters.get(name), int) and float(value).is_integer()
    return int(value) if is_whole else value


def _refusal(capabilities: PipelineCapabilities, name: str, value: Any) -> SamplingParamsError:
    taken = [ours for ours in ("prompt", "negative_prompt", "image", *_FORWARDED) if capabilities.argument_name(ours)]
    if "generator" in capabilities.parameters:
        taken.append("seed")
    return SamplingParamsError(
        f"{capabilities.name} does not take {name} (given: {reprlib.repr(value)}); it takes {', '.join(taken)}"
    )


def _add_extra_args(
    capabilities: PipelineCapabilities, arguments: dict[str, Any], extra_args: Mapping[str, Any]
) -> None:
    for name, value in extra_args.items():
        if name in _RESERVED:
            raise SamplingParamsError(f"extra_args cannot set {name!r}: the prompt and the seed decide it")
        if name in arguments:
            raise SamplingParamsError(f"{name} is given twice: {arguments[name]!r}, and {value!r} in extra_args")
        if name not in capabilities.parameters and not capabilities.takes_anything:
            near = difflib.get_close_matches(str(name), capabilities.parameters, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(capabilities.parameters)}"
            raise SamplingParamsError(f"{capabilities.name} does not take {name!r} from extra_args; {hint}")
        arguments[name] = value


def _apply_guidance_rules(
    capabilities: PipelineCapabilities, arguments: dict[str, Any], user_negative: str | None
) -> None:
    """Refuse guidance that the pipeline would leave out, with a warning or without one."""
    if capabilities.ignores_guidance_scale and arguments.get("guidance_scale") is not None:
        raise SamplingParamsError(
            f"{capabilities.name} would ignore guidance_scale={arguments['guidance_scale']}: its transformer is not "
            "guidance-distilled; use true_cfg_scale"
        )
    if not {"true_cfg_scale", "negative_prompt"} <= capabilities.parameters.keys():
        return
    given = arguments.get("true_cfg_scale")
    scale = capabilities.parameters["true_cfg_scale"] if given is None else given
    if scale is not None and scale <= 1:
        if user_negative is not None:
            raise SamplingParamsError(
                f"{capabilities.name} would ignore the negative prompt at true_cfg_scale={scale}: give one above 1"
            )
        arguments.pop("negative_prompt", None)
    elif given is not None and arguments.get("negative_prompt_embeds") is None:
        arguments.setdefault("negative_prompt", " ")


def _apply_image_rules(
    capabilities: PipelineCapabilities, arguments: dict[str, Any], extra_args: Mapping[str, Any]
) -> None:
    """Refuse a missing picture, and several where one is meant: some pipelines would go on with the first."""
    name = capabilities.argument_name("image")
    pictures = arguments.get(name) if name is not None else None
    if isinstance(pictures, list) and capabilities.takes_one_image and name is not None:
        if len(pictures) != 1:
            raise SamplingParamsError(f"{capabilities.name} starts from one picture, and {len(pictures)} are given")
        arguments[name] = pictures[0]
    if pictures is None and capabilities.needs_image and name is not None:
        stands_in = ("image", "video", "latents", "conditions")
        if not any(word in extra for extra in extra_args for word in stands_in):
            raise SamplingParamsError(
                f"{capabilities.name} needs a picture to start from: give image in the prompt, or --image on the "
                "command line"
            )
        if name in capabilities.required:
            arguments[name] = None


def _require_all(capabilities: PipelineCapabilities, arguments: Mapping[str, Any]) -> None:
    missing = [name for name in capabilities.required if name not in arguments and name != "generator"]
    if missing:
        where = "the prompt" if missing[0] in ("prompt", "negative_prompt") else "extra_args"
        raise SamplingParamsError(f"{capabilities.name} needs {missing[0]}: give it in {where}")


def _add_area(capabilities: PipelineCapabilities, arguments: dict[str, Any]) -> None:
    """Where a pipeline keeps to an area, height and width alone would tell it no more than their ratio."""
    height, width = arguments.get("height"), arguments.get("width")
    if "max_area" in capabilities.parameters and isinstance(height, int) and isinstance(width, int):
        arguments.setdefault("max_area", height * width)


def _check_sizes(capabilities: PipelineCapabilities, arguments: Mapping[str, Any]) -> None:
    """Refuse sizes that the VAE cannot make, and those of less than one token."""
    for name, multiple in (("height", capabilities.height_multiple), ("width", capabilities.width_multiple)):
        value = arguments.get(name)
        if not isinstance(value, int):
            continue
        if value % capabilities.vae_multiple:
            raise SamplingParamsError(
                f"{name}={value}: {capabilities.name} needs a multiple of {capabilities.vae_multiple}, and draws "
                f"multiples of {multiple}; nearest: {_nearest(value, multiple)}"
            )
        if value < multiple:
            raise SamplingParamsError(f"{name}={value}: {capabilities.name} draws {multiple} pixels or more")
    frames = arguments.get(capabilities.argument_name("num_frames") or "")
    if isinstance(frames, int) and (frames - 1) % capabilities.frames_multiple:
        below = (frames - 1) // capabilities.frames_multiple * capabilities.frames_multiple + 1
        raise SamplingParamsError(
            f"num_frames={frames}: {capabilities.name} needs 1 more than a multiple of {capabilities.frames_multiple}; "
            f"nearest: {below} or {below + capabilities.frames_multiple}"
        )


def _nearest(value: int, multiple: int) -> str:
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below else f"{multiple}"
