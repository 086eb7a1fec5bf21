"""What answers with pictures have in common: the pictures themselves, their encoding, and the tokens that they took."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from PIL import Image

from omni_sp.outputs import OmniRequestOutput
from omni_sp.pipelines.metadata import model_name
from omni_sp.server.api.schemas import GenerationFields
from omni_sp.server.errors import ApiError
from omni_sp.server.pictures import encode_picture
from omni_sp.server.settings import ServerSettings


def pictures_of(output: OmniRequestOutput) -> list[Image.Image]:
    """The pictures that a request made; ApiError 500 where there is none."""
    pictures = [picture for picture in output.images if isinstance(picture, Image.Image)]
    if not pictures:
        raise ApiError(500, "the pipeline gave no picture", code="no_picture")
    return pictures


async def encode(picture: Image.Image, fields: GenerationFields, kept: Mapping[str, Any] | None = None) -> bytes:
    """A picture as a file of the requested format, encoded in a thread: others should not wait for a large picture.

    ``kept`` is what the file keeps, of kept_settings().
    """
    kind, quality = fields.output_format or "png", fields.output_compression
    return await asyncio.to_thread(encode_picture, picture, kind, quality, kept)


def kept_settings(output: OmniRequestOutput, settings: ServerSettings) -> dict[str, Any]:
    """What the files of an output's pictures keep: the model under the name that requests call it; {} for nothing."""
    if not settings.metadata or not output.settings:
        return {}
    return {**output.settings, "model": model_name(settings.names[0])}


def count_tokens(metrics: Mapping[str, Any], num_pictures: int) -> tuple[int, int]:
    """Tokens of the text and of so many pictures that the transformer had, by an output's metrics."""
    tokens = dict(metrics.get("tokens") or {})
    picture_tokens = tokens.pop("hidden_states", 0) * num_pictures
    return sum(tokens.values()), picture_tokens
