"""What a picture was drawn with, kept in its file: text chunks of a PNG, the EXIF comment of a JPEG or a WebP."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from omni_sp.errors import InvalidInputError
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.version import __version__

_NUMBERS = (
    "seed", "width", "height", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale", "strength",
    "num_outputs_per_prompt", "max_sequence_length",
)  # fmt: skip
FIELDS = ("prompt", "negative_prompt", *_NUMBERS, "scheduler", "lora", "model", "layout", "version")
"""Names of what is kept, most of them those of OmniDiffusionSamplingParams, in the order to show them in."""
_NAME = "Omni-SP "
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_EXIF_IFD, _USER_COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
_MAX_COMMENT = 60_000
"""Bytes of a comment: the EXIF of a JPEG must fit into 64 KiB."""


def drawing_settings(
    capabilities: PipelineCapabilities, arguments: Mapping[str, Any], *, model: str, layout: str, **more: Any
) -> dict[str, Any]:
    """What to ask for to get the same picture again, by the names of FIELDS.

    Args:
        arguments: of the pipeline's call.
        model: as model_name() shows it.
        layout: which rank was where, for people.
        more: the prompt, the seed, and what else the arguments do not say.
    """
    found: dict[str, Any] = {}
    for name in ("negative_prompt", *_NUMBERS):
        argument = capabilities.argument_name(name) or name
        found[name] = arguments.get(argument, _effective_default(capabilities, name, argument, arguments))
    if found["num_outputs_per_prompt"] == 1:
        del found["num_outputs_per_prompt"]  # as where nobody says it
    found |= {**more, "model": model, "layout": layout, "version": _NAME + __version__}
    return {name: found[name] for name in FIELDS if _is_kept(found.get(name))}


def model_name(location: str) -> str:
    """A model's name without the folders that it lies in: those are nobody's business. A hub id stays as it is."""
    is_path = not _HUB_ID.fullmatch(location) or Path(location).exists()
    return Path(location).name if is_path else location


def save_options(kind: str, picture: Image.Image, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``picture.save`` that put the settings into a file of this format; none for other formats.

    Args:
        kind: Pillow's name of the format.
        settings: of drawing_settings(); empty to keep nothing.
    """
    if not settings or kind not in ("PNG", "JPEG", "WEBP"):
        return {}
    record = {"width": picture.width, "height": picture.height, **settings}
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for name in FIELDS:
            if name in record:
                # A file holds whole characters, and a zero would end the text.
                text = str(record[name]).replace("\0", "").encode("utf-8", "replace").decode("utf-8")
                chunks.add_itxt(name, text)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[_EXIF_IFD] = {_USER_COMMENT: _ASCII + _comment({name: record[name] for name in FIELDS if name in record})}
    return {"exif": exif}


def read_settings(file: Any) -> dict[str, Any]:
    """The settings that a picture's file keeps, by the names of FIELDS.

    Args:
        file: a path, or a file that is open.

    Raises:
        InvalidInputError: it is no picture, or keeps none.
    """
    shown = file if isinstance(file, (str, Path)) else "the file"
    try:
        with Image.open(file) as image:
            found = _read_exif(image) or {name: image.info[name] for name in FIELDS if name in image.info}
    except Exception as error:  # a parser may raise anything on a damaged file
        raise InvalidInputError(f"{shown} cannot be read: {error}") from error
    if not str(found.get("version", "")).startswith(_NAME):
        raise InvalidInputError(f"{shown} keeps nothing about how it was drawn: only pictures of Omni-SP do")
    return {name: _typed(name, found[name]) for name in FIELDS if name in found}


def _effective_default(
    capabilities: PipelineCapabilities, name: str, argument: str, arguments: Mapping[str, Any]
) -> Any:
    """The pipeline's own value of what was not given, where giving it would change nothing."""
    is_unused = {
        "guidance_scale": capabilities.ignores_guidance_scale,
        "true_cfg_scale": arguments.get("negative_prompt") is None,
        "num_inference_steps": False,
    }
    return None if is_unused.get(name, True) else capabilities.parameters.get(argument)


def _is_kept(value: Any) -> bool:
    """Numbers, texts and lists of seeds; no empty ones."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list):
        return all(isinstance(item, int) for item in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _comment(record: dict[str, Any]) -> bytes:
    """A record as JSON in ASCII, without the prompts where they are too long."""
    text = json.dumps(record).encode("ascii")
    if len(text) <= _MAX_COMMENT:
        return text
    rest = {name: value for name, value in record.items() if name not in ("prompt", "negative_prompt")}
    return json.dumps({"prompt": "(too long for this format)", **rest}).encode("ascii")


def _read_exif(image: Image.Image) -> dict[str, Any]:
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(_ASCII):
        return {}
    try:
        found = json.loads(comment[len(_ASCII) :].rstrip(b"\0 "))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _typed(name: str, value: Any) -> Any:
    """A value that a file may keep as text."""
    if name in _NUMBERS and isinstance(value, str):
        try:
            number = json.loads(value)
        except (ValueError, RecursionError):  # the file may be anybody's
            return value
        numbers = number if isinstance(number, list) else [number]
        return number if all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers) else value
    return value if isinstance(value, (int, float, list)) else str(value)
