"""One request as the keyword arguments of a pipeline's own, unmodified ``__call__``. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.errors import InvalidInputError, SamplingParamsError
from omni_sp.pipelines import quirks
from omni_sp.pipelines.capabilities import PipelineCapabilities, our_name
from omni_sp.pipelines.images import standard_images
from omni_sp.validation import require_int, shown, suggestion

DEFAULT_FPS = 16.0
"""Frames a second of a video whose pipeline says nothing about it."""

_FORWARDED = (
    "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale", "max_sequence_length",
    "output_type", "num_outputs_per_prompt", "fps",
)  # fmt: skip
# Set here and nowhere else: what they are decides whether ranks agree and what comes back.
_RESERVED = ("generator", "return_dict", "prompt", "negative_prompt", "image")
_WARM_UP_FRAMES = 17  # one more than a multiple of the frames that any video's VAE makes one latent of


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt in full: what to draw, what to avoid, and what to start from.

    Attributes:
        image: a PIL image, or a list of them.
        tensors: arguments of the pipeline that stand for the texts, or for the noise: embeddings, their masks, latents.
    """

    text: str | None = None
    negative_text: str | None = None
    image: Any = None
    tensors: Mapping[str, Any] = field(default_factory=dict)


def call_arguments(
    capabilities: PipelineCapabilities, prompt: Prompt, params: OmniDiffusionSamplingParams
) -> dict[str, Any]:
    """Make the keyword arguments for the pipeline's ``__call__``, without the generator. Nothing is dropped.

    Where true_cfg_scale is above 1 and there is no negative prompt, it is " ": without one, pipelines would leave out
    the guidance. A pipeline that takes an area (FLUX.1 Kontext: ``max_area``) gets that of height and width.

    Raises:
        SamplingParamsError: the pipeline cannot take a parameter, would ignore it, or needs one that is missing; or a
            size does not fit its VAE. ``param`` names the parameter.
    """
    negative = prompt.negative_text
    if negative is None and "negative_prompt_embeds" not in prompt.tensors:
        negative = params.negative_prompt
    wanted = {"prompt": prompt.text, "image": prompt.image, "negative_prompt": negative}
    wanted |= {name: getattr(params, name) for name in _FORWARDED}
    arguments: dict[str, Any] = {}
    for name, value in wanted.items():
        argument_name = capabilities.argument_name(name)
        if value is None or (name == "num_outputs_per_prompt" and value == 1 and argument_name is None):
            continue
        if name == "fps" and argument_name is None and capabilities.makes_videos:
            continue  # only whoever writes the file needs to know how fast the frames are shown
        if argument_name is None:
            raise _refusal(capabilities, name, value)
        arguments[argument_name] = _adapt_value(capabilities, argument_name, value)
    capabilities.require_adapters(name for name, _ in params.adapters)
    _apply_seeds(capabilities, arguments, params)
    _add_tensors(capabilities, arguments, prompt)
    _add_extra_args(capabilities, arguments, params.extra_args)
    _add_defaults(capabilities, arguments)
    _standardise_images(capabilities, arguments)
    _apply_guidance_rules(capabilities, arguments, user_negative=negative)
    _apply_image_rules(capabilities, arguments, {**prompt.tensors, **params.extra_args})
    _check_sizes(capabilities, arguments)
    _add_area(capabilities, arguments)
    _require_all(capabilities, arguments)
    return arguments


def small_arguments(
    capabilities: PipelineCapabilities, arguments: Mapping[str, Any], params: OmniDiffusionSamplingParams
) -> dict[str, Any]:
    """Return the arguments that call_arguments() made of ``params``, with small sizes wherever the user gives none.

    There are two steps, and the numbers of tokens are divisible by few numbers of ranks.
    """
    wanted = {
        "height": 11 * capabilities.height_multiple,
        "width": 13 * capabilities.width_multiple,
        "num_frames": 2 * capabilities.frames_multiple + 1,
        "num_inference_steps": 2,
        "output_type": "np",
    }
    small = dict(arguments)
    if any(name.endswith("latents") for name in arguments):
        wanted = {
            name: wanted[name] for name in ("num_inference_steps", "output_type")
        }  # they have a size of their own
    for name, value in wanted.items():
        argument_name = capabilities.argument_name(name)
        is_given = getattr(params, name) is not None or argument_name in params.extra_args
        if argument_name is not None and argument_name in capabilities.parameters and not is_given:
            small[argument_name] = value
    for name, value in quirks.SMALL_VALUES.items():
        if name in capabilities.parameters:
            small.setdefault(name, value)
    if quirks.AREA not in params.extra_args:
        small.pop(quirks.AREA, None)
        _add_area(capabilities, small)
    return small


def warm_up_arguments(capabilities: PipelineCapabilities, height: int, width: int) -> dict[str, Any]:
    """Make the arguments of a call of one step at this size in pixels, whose result nobody looks at.

    Grey images stand in for those that the pipeline cannot do without, and a mask covers all of them. Where the
    pipeline takes no size, theirs decides. SamplingParamsError says what cannot be made up, or drawn in this size.
    """
    from PIL import Image

    def plain(mode: str = capabilities.image_mode, colour: str = "grey") -> Image.Image:
        return Image.new(mode, (width, height), colour)

    image = plain() if capabilities.needs_image else None
    extra: dict[str, Any] = {
        name: plain(*looks) for name, looks in quirks.PLACEHOLDER_IMAGES.items() if name in capabilities.parameters
    }
    names = capabilities.parameters.keys()
    changes_video = {"video", "strength"} <= names and names.isdisjoint(quirks.ARGUMENT_NAMES["image"])
    if changes_video or "video" in capabilities.required:
        extra["video"] = [plain()] * _WARM_UP_FRAMES
    has_input = image is not None or bool(extra)
    if has_input and "strength" in capabilities.parameters:
        extra["strength"] = 1.0  # a lower strength would leave none of the single step
    takes_size = "height" in capabilities.parameters or not has_input
    size: dict[str, Any] = {"height": height, "width": width} if takes_size else {}
    params = OmniDiffusionSamplingParams(**size, num_inference_steps=1, extra_args=extra)
    text = "a warm-up" if capabilities.argument_name("prompt") is not None else None
    return call_arguments(capabilities, Prompt(text=text, image=image), params)


def frames_per_second(capabilities: PipelineCapabilities, arguments: Mapping[str, Any], fps: float | None) -> float:
    """Return how fast a video is meant to be shown: the user's ``fps``, else the pipeline's, else DEFAULT_FPS."""
    name = capabilities.argument_name("fps")
    if fps is None and name is not None:
        given = arguments.get(name)
        fps = capabilities.parameters.get(name) if given is None else given
    return float(fps) if isinstance(fps, (int, float)) and fps > 0 else DEFAULT_FPS


def rounded_size(capabilities: PipelineCapabilities, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (height, width) in pixels that diffusers rounds the arguments' size to; None where it keeps it."""
    height, width = arguments.get("height"), arguments.get("width")
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    drawn = height - height % capabilities.height_multiple, width - width % capabilities.width_multiple
    return None if drawn == (height, width) else drawn


def _adapt_value(capabilities: PipelineCapabilities, name: str, value: Any) -> Any:
    """A value in the pipeline's own form: a list for lists of images, a whole number for whole frame rates."""
    if name in quirks.IMAGE_LIST_ARGUMENTS and not isinstance(value, list):
        return [value]
    takes_int = name in quirks.ARGUMENT_NAMES["fps"] and isinstance(capabilities.parameters.get(name), int)
    return int(value) if takes_int and float(value).is_integer() else value


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor of torch, which need not be imported here: whoever has one has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _copied(value: Any) -> Any:
    """Copies of tensors on the CPU; anything else as it is.

    A request may wait, its tensors go to other processes, and a view would take along all that it is a view of.
    """
    if isinstance(value, (list, tuple)) and value and all(map(_is_tensor, value)):
        return [_copied(tensor) for tensor in value]
    return value.detach().cpu().clone() if _is_tensor(value) else value


def _refusal(capabilities: PipelineCapabilities, name: str, value: Any) -> SamplingParamsError:
    taken = [ours for ours in ("prompt", "negative_prompt", "image", *_FORWARDED) if capabilities.argument_name(ours)]
    if "generator" in capabilities.parameters:
        taken.append("seed")
    return SamplingParamsError(
        f"{capabilities.name} does not take {name} (given: {shown(value)}); it takes {', '.join(taken)}",
        param=name,
    )


def _apply_seeds(
    capabilities: PipelineCapabilities, arguments: dict[str, Any], params: OmniDiffusionSamplingParams
) -> None:
    """Refuse seeds that the pipeline has no use for; a list of them says how many outputs there are."""
    if not params.seeds:
        return
    if capabilities.argument_name("generator") is None:
        raise _refusal(capabilities, "seed", params.seed)
    if len(params.seeds) == 1:
        return
    argument_name = capabilities.argument_name("num_outputs_per_prompt")
    if not capabilities.takes_generators or argument_name is None:
        raise SamplingParamsError(
            f"{capabilities.name} takes one seed a call, and {len(params.seeds)} are given: make a call for each",
            param="seed",
        )
    arguments[argument_name] = len(params.seeds)


def _add_tensors(capabilities: PipelineCapabilities, arguments: dict[str, Any], prompt: Prompt) -> None:
    """Add the tensors of a prompt, which stand for its texts."""
    for name, value in prompt.tensors.items():
        if name not in capabilities.parameters and not capabilities.takes_anything:
            taken = [one for one in capabilities.parameters if quirks.PROMPT_TENSORS.fullmatch(one)]
            hint = suggestion(name, taken, "it takes {known}" if taken else "it takes no such tensors")
            raise SamplingParamsError(
                f"{capabilities.name} does not take {shown(name)} in a prompt; {hint}", param=name
            )
        held = value if isinstance(value, (list, tuple)) else [value]
        if not held or not all(map(_is_tensor, held)):
            kind = type(next((one for one in held if not _is_tensor(one)), value)).__name__
            raise SamplingParamsError(f"{name} holds a {kind}: give a torch tensor, or a list of them", param=name)
        odd = next((one for one in held if one.is_meta or "strided" not in str(one.layout)), None)
        if odd is not None:
            what = "no numbers (device meta)" if odd.is_meta else f"the layout {odd.layout}"
            raise SamplingParamsError(f"{name} has {what}: give a dense tensor with numbers", param=name)
        arguments[name] = _copied(value)
    for text in ("prompt", "negative_prompt"):
        embeddings = f"{text}_embeds"
        if embeddings not in prompt.tensors:
            continue
        if arguments.get(text) is not None:
            raise SamplingParamsError(f"{text} and {embeddings} say the same: give one of them", param=embeddings)
        if text in capabilities.required:
            arguments[text] = None


def _add_defaults(capabilities: PipelineCapabilities, arguments: dict[str, Any]) -> None:
    """Add what belongs to the model, or to every call, where nothing is given."""
    for name, value in capabilities.sampling_defaults.items():
        argument_name = capabilities.argument_name(name)
        stands_for_it = f"{name}_embeds" in arguments
        if argument_name is not None and value is not None and not stands_for_it:
            arguments.setdefault(argument_name, value)
    if "output_type" in capabilities.parameters and capabilities.makes != "sound":
        arguments.setdefault("output_type", "pil")


def _add_extra_args(
    capabilities: PipelineCapabilities, arguments: dict[str, Any], extra_args: Mapping[str, Any]
) -> None:
    for name, value in extra_args.items():
        reason = None
        if name in _RESERVED:
            reason = f"extra_args cannot set {shown(name)}: the prompt and the seed decide it"
        elif name in arguments:
            reason = f"{name} is given twice: {shown(arguments[name])}, and {shown(value)} in extra_args"
        elif name not in capabilities.parameters and not capabilities.takes_anything:
            hint = suggestion(str(name), capabilities.parameters)
            reason = f"{capabilities.name} does not take {shown(name)} from extra_args; {hint}"
        if reason is not None:
            raise SamplingParamsError(reason, param=our_name(str(name)))
        arguments[name] = _copied(value)


def _apply_guidance_rules(
    capabilities: PipelineCapabilities, arguments: dict[str, Any], user_negative: str | None
) -> None:
    """Refuse guidance that the pipeline would leave out, with a warning or without one."""
    if capabilities.ignores_guidance_scale and arguments.get("guidance_scale") is not None:
        raise SamplingParamsError(
            f"{capabilities.name} would ignore guidance_scale={shown(arguments['guidance_scale'])}: its transformer is "
            "not guidance-distilled; use true_cfg_scale",
            param="guidance_scale",
        )
    if not {"true_cfg_scale", "negative_prompt"} <= capabilities.parameters.keys():
        return
    given = arguments.get("true_cfg_scale")
    scale = capabilities.parameters["true_cfg_scale"] if given is None else given
    if scale is not None and scale <= 1:
        if user_negative is not None or arguments.get("negative_prompt_embeds") is not None:
            raise SamplingParamsError(
                f"{capabilities.name} would ignore the negative prompt at true_cfg_scale={shown(scale)}: give one "
                "above 1",
                param="true_cfg_scale",
            )
        arguments.pop("negative_prompt", None)
    elif given is not None and arguments.get("negative_prompt_embeds") is None:
        arguments.setdefault("negative_prompt", " ")


def _standardise_images(capabilities: PipelineCapabilities, arguments: dict[str, Any]) -> None:
    """Convert every PIL image, whoever gave it, as decode_image() would have read it, and to the pipeline's mode."""
    for name, value in arguments.items():
        mode = None if quirks.MASK in name else capabilities.image_mode
        try:
            arguments[name] = standard_images(value, mode)
        except (InvalidInputError, OSError) as error:
            raise SamplingParamsError(f"{our_name(name)}: {error}", param=our_name(name)) from error


def _apply_image_rules(
    capabilities: PipelineCapabilities, arguments: dict[str, Any], others: Mapping[str, Any]
) -> None:
    """Refuse a missing image, and several where one is meant: some pipelines would go on with the first."""
    name = capabilities.argument_name("image")
    if name is None:
        return
    images = arguments.get(name)
    if isinstance(images, list) and capabilities.takes_one_image:
        if len(images) != 1:
            raise SamplingParamsError(
                f"{capabilities.name} starts from one picture, and {len(images)} are given", param="image"
            )
        arguments[name] = images[0]
    if images is None and capabilities.needs_image:
        if not any(word in other for other in others for word in quirks.REPLACES_IMAGE):
            raise SamplingParamsError(
                f"{capabilities.name} needs a picture to start from: give image in the prompt, or --image on the "
                "command line",
                param="image",
            )
        if name in capabilities.required:
            arguments[name] = None


def _require_all(capabilities: PipelineCapabilities, arguments: Mapping[str, Any]) -> None:
    missing = [name for name in capabilities.required if name not in arguments and name != "generator"]
    if missing:
        where = "the prompt" if missing[0] in ("prompt", "negative_prompt") else "extra_args"
        raise SamplingParamsError(
            f"{capabilities.name} needs {missing[0]}: give it in {where}", param=our_name(missing[0])
        )


def _add_area(capabilities: PipelineCapabilities, arguments: dict[str, Any]) -> None:
    """Add the area of height and width where the pipeline takes one."""
    height, width = arguments.get("height"), arguments.get("width")
    if quirks.AREA in capabilities.parameters and isinstance(height, int) and isinstance(width, int):
        arguments.setdefault(quirks.AREA, height * width)


def _require_countable(name: str, value: int) -> None:
    """Refuse a size of any number of digits, which extra_args may hold, before it is computed with."""
    require_int(name, value, minimum=1, error=partial(SamplingParamsError, param=name))


def _check_sizes(capabilities: PipelineCapabilities, arguments: Mapping[str, Any]) -> None:
    """Refuse sizes that the VAE cannot make, and those of less than one token."""
    for name, multiple in (("height", capabilities.height_multiple), ("width", capabilities.width_multiple)):
        value = arguments.get(name)
        if not isinstance(value, int):
            continue
        _require_countable(name, value)
        if value % capabilities.vae_multiple:
            below = value // multiple * multiple
            nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise SamplingParamsError(
                f"{name}={value}: {capabilities.name} needs a multiple of {capabilities.vae_multiple}, and draws "
                f"multiples of {multiple}; nearest: {nearest}",
                param=name,
            )
        if value < multiple:
            raise SamplingParamsError(f"{name}={value}: {capabilities.name} draws {multiple} pixels or more", name)
    frames = arguments.get(capabilities.argument_name("num_frames") or "")
    if isinstance(frames, int):
        _require_countable("num_frames", frames)
    if isinstance(frames, int) and (frames - 1) % capabilities.frames_multiple:
        below = (frames - 1) // capabilities.frames_multiple * capabilities.frames_multiple + 1
        raise SamplingParamsError(
            f"num_frames={frames}: {capabilities.name} needs 1 more than a multiple of {capabilities.frames_multiple}; "
            f"nearest: {below} or {below + capabilities.frames_multiple}",
            param="num_frames",
        )
