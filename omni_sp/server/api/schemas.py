"""What requests for pictures have in common: their fields, the limits, and how they become sampling parameters."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from omni_sp.async_omni import AsyncOmni
from omni_sp.config import MAX_SEED, OmniDiffusionSamplingParams
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.server.errors import ApiError, refusal, unknown_field
from omni_sp.server.pictures import PictureFormat
from omni_sp.server.settings import ServerSettings
from omni_sp.validation import shown

MAX_PROMPT_CHARS = 32_000
_SHOWN = 80
"""Characters of a client's own text that an error repeats, at most."""
_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")
_NUMBER = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?")
_Form = TypeVar("_Form", bound=BaseModel)

Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS)]


class NumberOrText:
    """For a field's annotation: a number may come as text, as forms and many clients of JSON send it ("4", "7.5").

    A whole number may be written with a fraction of zero (4.0), as languages without whole numbers do. Limits that
    stand before it in the annotation hold for the number.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read the number before pydantic looks at it."""
        return core_schema.no_info_before_validator_function(_read_number, handler(source))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Describe both for the API's description."""
        return {"anyOf": [handler(schema), {"type": "string", "pattern": f"^{_NUMBER.pattern}$"}]}


def _read_number(value: Any) -> Any:
    """What is no number stays as it is: pydantic's error names it."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value) if any(letter in ".eE" for letter in value) else int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _require_opaque(value: Any) -> Any:
    if value == "transparent":
        raise ValueError("pictures are drawn opaque: leave background out, or give auto or opaque")
    return value


def _random_if_negative(seed: int | None) -> int | None:
    return None if seed == -1 else seed


Count = Annotated[int, Field(ge=1), NumberOrText]
Scale = Annotated[float, NumberOrText]
Seed = Annotated[Annotated[int, Field(ge=-1, le=MAX_SEED), NumberOrText] | None, AfterValidator(_random_if_negative)]
"""A seed; -1 or null for one at random."""
# The pattern is for the API's description; the errors about a size come from parse_size().
Size = Annotated[str, Field(json_schema_extra={"pattern": f"^(auto|{_SIZE.pattern})$"})]


def _describe_without_effect(schema: dict[str, Any], model: type[Any]) -> None:
    for name in model.without_effect:
        schema["properties"][name]["description"] = "changes nothing here"


def _read_adapters(value: Any) -> Any:
    """One adapter stands for a list of it, a name for an adapter; a form has JSON, or a name."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("it begins as JSON and is none") from None
    entries = value if isinstance(value, list) else [value]
    return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]


class Fields(BaseModel):
    """A part of a request. A field that it does not know is an error that names the nearest known one.

    An object ``extra_body`` counts as if its fields stood beside it: clients that write JSON by hand take the name of
    OpenAI's argument over.
    """

    without_effect: ClassVar[tuple[str, ...]] = ()
    """Fields that clients of OpenAI send, and that change nothing here."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_describe_without_effect
    )

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        extra = data.get("extra_body")
        if isinstance(extra, dict):
            data = {name: value for name, value in data.items() if name != "extra_body"}
            for name in extra:
                if name in data:
                    raise refusal(str(name)[:_SHOWN], "it is given twice, once in extra_body")
            data |= extra
        for name in data:
            if name not in cls.model_fields:
                raise unknown_field(str(name), cls.model_fields)
        return data


class LoraFields(Fields):
    """A LoRA adapter of a request: its name in ``/v1/loras``, and what it counts."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    scale: Scale = 1.0


class _ReadAdapters:
    """For a field's annotation: an adapter, or a name alone, may stand for a list of one."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_read_adapters, handler(source))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        several = handler(schema)
        # In place, since routes whose forms are read by hand describe them without a list of definitions.
        adapter = handler.resolve_ref_schema(several["items"])
        name = {"type": "string", "minLength": 1, "maxLength": 100, "pattern": "^[A-Za-z0-9_-]+$"}
        one = {"anyOf": [adapter, name]}
        return {"anyOf": [{**several, "items": one}, *one["anyOf"]]}


Lora = Annotated[list[LoraFields], Field(max_length=16), _ReadAdapters]
"""The LoRA adapters of a request."""


def as_adapters(lora: list[LoraFields] | None) -> list[tuple[str, float]] | None:
    """The adapters of a request, as OmniDiffusionSamplingParams takes them."""
    return None if lora is None else [(one.name, one.scale) for one in lora]


class GenerationFields(Fields):
    """The fields of a request for pictures, whatever the route. The model decides what is left out or null.

    ``size`` is "WIDTHxHEIGHT" in pixels or "auto"; ``true_cfg_scale`` is classifier-free guidance with the negative
    prompt, of models that know it; the same ``seed`` draws the same picture; ``strength`` is how far from the given
    picture a model goes that is made for that; ``lora`` names adapters of ``/v1/loras``, each with a ``scale``.
    ``output_compression`` is that of JPEG and WebP. Numbers may come as text; ``user`` and ``safety_identifier`` are
    not looked at. The answer's ``ignored`` names fields without effect.
    """

    without_effect: ClassVar[tuple[str, ...]] = ("user", "safety_identifier")

    model: str | None = None
    n: Count | None = None
    size: Size | None = None
    negative_prompt: Text | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Scale | None = None
    true_cfg_scale: Scale | None = None
    strength: Annotated[float, Field(ge=0, le=1), NumberOrText] | None = None
    seed: Seed = None
    lora: Lora | None = None
    output_format: PictureFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100), NumberOrText] | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None

    @property
    def ignored(self) -> list[str]:
        """The fields of this request that change nothing."""
        names = [*self.without_effect, *(() if self.output_format in ("jpeg", "webp") else ("output_compression",))]
        return [name for name in names if getattr(self, name) is not None]


class ImageFields(GenerationFields):
    """The fields that both image routes share.

    ``quality``, ``style``, ``complexity`` and ``moderation`` are accepted and change nothing: a model has its number of
    steps and its guidance instead. Pictures are opaque. With ``stream``, ``partial_images`` asks for up to 3 previews,
    and ``progress`` for an event at every step. Without ``response_format`` the answer is ``b64_json``, and a ``url``
    where the model goes by a name that begins with dall-e, as OpenAI has it.
    """

    without_effect: ClassVar[tuple[str, ...]] = (
        *GenerationFields.without_effect, "quality", "style", "complexity", "background", "moderation",
    )  # fmt: skip

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
    response_format: Literal["b64_json", "url"] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3), NumberOrText] | None = None
    progress: bool | None = None
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    style: Literal["auto", "vivid", "natural"] | None = None
    complexity: Literal["auto", "low", "medium", "high"] | None = None
    background: Annotated[Literal["auto", "opaque"], BeforeValidator(_require_opaque)] | None = None
    moderation: Literal["auto", "low"] | None = None

    @property
    def gives_urls(self) -> bool:
        """Is the answer to have addresses of pictures, in place of the pictures?"""
        is_url_model = (self.model or "").startswith("dall-e") and not self.stream
        return self.response_format == "url" or (self.response_format is None and is_url_model)


class EditFields(ImageFields):
    """The fields of an edit, beside its pictures. ``input_fidelity`` is accepted and changes nothing."""

    without_effect: ClassVar[tuple[str, ...]] = (*ImageFields.without_effect, "input_fidelity")

    input_fidelity: Literal["auto", "low", "high"] | None = None


def from_form(kind: type[_Form], fields: dict[str, str]) -> _Form:
    """Read a request whose numbers and truth values came as text."""
    return kind.model_validate(fields, strict=False)


def check_model(settings: ServerSettings, model: str | None) -> None:
    """Refuse another model than the one that is served: ApiError 404, as OpenAI answers."""
    if model is not None and model not in settings.names:
        known = " or ".join(settings.names)
        message = f"there is no model {shown(model)}; this server runs {known}"
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
        lora=as_adapters(fields.lora),
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
