"""What requests for pictures have in common: their fields, the limits, and how they become sampling parameters."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from omni_sp.async_omni import AsyncOmni
from omni_sp.config import MAX_SEED, OmniDiffusionSamplingParams
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.server.errors import ApiError, unknown_field
from omni_sp.server.pictures import PictureFormat
from omni_sp.server.settings import ServerSettings

MAX_PROMPT_CHARS = 32_000
_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")
_Form = TypeVar("_Form", bound=BaseModel)

Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]
# The pattern is for the API's description; the errors about a size come from parse_size().
Size = Annotated[str, Field(json_schema_extra={"pattern": f"^(auto|{_SIZE.pattern})$"})]


class Fields(BaseModel):
    """A part of a request. A field that it does not know is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    raise unknown_field(str(name), cls.model_fields)
        return data


class GenerationFields(Fields):
    """The fields of a request for pictures, whatever the route. The model decides what is left out or null.

    ``size`` is "WIDTHxHEIGHT" in pixels or "auto"; ``true_cfg_scale`` is classifier-free guidance with the negative
    prompt, of models that know it; the same ``seed`` draws the same picture; ``strength`` is how far from the given
    picture a model goes that is made for that. ``user`` and ``safety_identifier`` are accepted and not looked at.
    """

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: Size | None = None
    negative_prompt: Text | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    output_format: PictureFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None


class ImageFields(GenerationFields):
    """The fields that both image routes share.

    ``quality``, ``style``, ``background`` and ``moderation`` are taken with the values that mean nothing special. With
    ``stream``, ``partial_images`` asks for up to 3 previews, and ``progress`` for an event at every step.
    """

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
    response_format: Literal["b64_json", "url"] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    progress: bool | None = None
    quality: Literal["auto", "standard"] | None = None
    style: Literal["auto", "vivid"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None


class EditFields(ImageFields):
    """The fields of an edit, beside its pictures."""

    input_fidelity: Literal["auto", "low"] | None = None


def from_form(kind: type[_Form], fields: dict[str, str]) -> _Form:
    """Read a request whose numbers and truth values came as text."""
    return kind.model_validate(fields, strict=False)


def check_model(settings: ServerSettings, model: str | None) -> None:
    """Refuse another model than the one that is served: ApiError 404, as OpenAI answers."""
    if model is not None and model not in settings.names:
        known = " or ".join(settings.names)
        message = f"there is no model {model!r}; this server runs {known}"
        raise ApiError(404, message, param="model", code="model_not_found")


def require_at_most(name: str, value: int | None, most: int) -> None:
    """Refuse a field above the operator's limit: ApiError 400."""
    if value is not None and value > most:
        raise ApiError(400, f"{name}={value}: this server allows up to {most}", param=name, code="invalid_value")


def check_generation(fields: GenerationFields, settings: ServerSettings) -> None:
    """Refuse what does not fit together, or is more than the operator allows.

    Raises:
        ApiError: 400, naming the field; 404 for another model.
    """
    check_model(settings, fields.model)
    require_at_most("n", fields.n, settings.max_n)
    require_at_most("num_inference_steps", fields.num_inference_steps, settings.max_steps)
    lossy = fields.output_format in ("jpeg", "webp")
    if fields.output_compression not in (None, 100) and not lossy:
        message = f"output_compression={fields.output_compression}: PNG loses nothing; use output_format jpeg or webp"
        raise ApiError(400, message, param="output_compression", code="invalid_value")


def require_pictures(omni: AsyncOmni, settings: ServerSettings) -> PipelineCapabilities:
    """The capabilities of the loaded pipeline, which makes pictures.

    Raises:
        EngineClosedError: it is not loaded yet.
        ApiError: 400: it makes no pictures.
    """
    capabilities = omni.info.capabilities
    if capabilities.makes != "picture":
        where = "use POST /v1/videos" if capabilities.makes_videos else "no route here gives them"
        message = f"{settings.names[0]} ({capabilities.name}) makes {capabilities.makes}s and no pictures: {where}"
        raise ApiError(400, message, param="model", code="unsupported_model")
    return capabilities


def sampling_params(
    fields: GenerationFields, settings: ServerSettings, extra_args: dict[str, Any] | None = None
) -> OmniDiffusionSamplingParams:
    """The parameters that a request asks for; ``extra_args`` are further arguments of the pipeline.

    Raises:
        ApiError: 400: no size, or too large a one.
        SamplingParamsError: a value that cannot be.
    """
    width, height = parse_size(fields.size, settings)
    extra = dict(extra_args or {})
    if fields.strength is not None:
        extra["strength"] = fields.strength
    return OmniDiffusionSamplingParams(
        height=height,
        width=width,
        num_inference_steps=fields.num_inference_steps,
        guidance_scale=fields.guidance_scale,
        true_cfg_scale=fields.true_cfg_scale,
        negative_prompt=fields.negative_prompt,
        num_outputs_per_prompt=fields.n,
        seed=fields.seed,
        extra_args=extra,
    )


def parse_size(size: str | None, settings: ServerSettings) -> tuple[int | None, int | None]:
    """Read ``size``: width and height in pixels, or None twice for the model's own.

    Raises:
        ApiError: 400: no size, or too large a one.
    """
    if size is None or size == "auto":
        return None, None
    sides = _SIZE.fullmatch(size)
    if sides is None:
        message = f"size={size[:40]!r}: give WIDTHxHEIGHT in pixels, or auto"
        raise ApiError(400, message, param="size", code="invalid_value")
    width, height = int(sides[1]), int(sides[2])
    if width * height > settings.max_pixels:
        message = f"size={size}: {width * height} pixels are more than {settings.max_pixels}, which is the most here"
        raise ApiError(400, message, param="size", code="invalid_value")
    return width, height
