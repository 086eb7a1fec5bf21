"""The options of every command as tables: each entry says its flags, and what takes its value under which name."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.errors import ConfigError, SamplingParamsError
from omni_sp.pipelines.shapes import SHAPES_MODEL
from omni_sp.server.settings import ServerSettings

# What takes the value of an option: DiffusionParallelConfig, Omni or AsyncOmni, OmniDiffusionSamplingParams,
# ServerSettings.
DEGREES, ENGINE, PARAMS, SERVER = "degrees", "engine", "params", "server"
_MIB = 2**20
_SETTINGS = ServerSettings()
_METAVARS = {int: "N", float: "X", Path: "PATH"}


class Option:
    """One option of a command.

    Args:
        flags: the names on the command line, separated by spaces; a name without dashes is a positional argument.
        text: the help.
        owner: DEGREES, ENGINE, PARAMS or SERVER; None where only the command itself reads the option.
        field: the name that the value has there; by default the first flag with underscores.
        convert: makes the field's value of the option's.
        unit: how much of the field one of the option is.
        argparse: further arguments of ``ArgumentParser.add_argument``. The default of an option of ServerSettings is
            the default there.
    """

    def __init__(
        self,
        flags: str,
        text: str | None = None,
        owner: str | None = None,
        field: str | None = None,
        convert: Callable[[Any], Any] | None = None,
        unit: int = 1,
        **argparse: Any,
    ) -> None:
        self.flags, self.owner = tuple(flags.split()), owner
        self.dest = self.flags[0].lstrip("-").replace("-", "_")
        self.field = field or self.dest
        if argparse.get("action") == "append":
            argparse.setdefault("default", [])
            convert = convert or tuple
        elif owner == SERVER and convert is None:
            default = getattr(_SETTINGS, self.field)
            argparse["default"] = default if unit == 1 else default // unit
        if argparse.get("type") in _METAVARS:
            argparse.setdefault("metavar", _METAVARS[argparse["type"]])
        self.argparse = {**argparse, "help": text}
        self.convert = convert or (lambda value: value if unit == 1 else value * unit)


def arguments_for(owner: str, table: Sequence[Option], options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that the options of a command give to one owner.

    Args:
        owner: DEGREES, ENGINE, PARAMS or SERVER.
        table: the options of the command.
        options: their values.

    Returns:
        Field -> value. A field whose options are not given is left out, so that the owner's default holds. Two options
        of one field add up.
    """
    found: dict[str, Any] = {}
    for option in table:
        if option.owner != owner:
            continue
        value = getattr(options, option.dest)
        value = None if value is None else option.convert(value)
        if value is not None:
            found[option.field] = found[option.field] + value if option.field in found else value
    return found


def sampling_params(options: argparse.Namespace) -> OmniDiffusionSamplingParams:
    """The parameters of ``generate``, with --cfg-scale as true_cfg_scale: see with_cfg_scale().

    Raises:
        SamplingParamsError: two options of one thing, or a value that cannot be.
    """
    params = OmniDiffusionSamplingParams(**arguments_for(PARAMS, GENERATE, options))
    if options.cfg_scale is None:
        return params
    if options.true_cfg_scale is not None:
        raise SamplingParamsError("--cfg-scale and --true-cfg-scale are two names of one thing: give one of them")
    return dataclasses.replace(params, true_cfg_scale=options.cfg_scale)


def with_cfg_scale(params: OmniDiffusionSamplingParams, scale: float, *, is_true: bool) -> OmniDiffusionSamplingParams:
    """Give --cfg-scale to the guidance that the pipeline has.

    Args:
        params: of sampling_params().
        scale: the value of --cfg-scale.
        is_true: whether the pipeline has true_cfg_scale; otherwise its guidance is guidance_scale.

    Raises:
        SamplingParamsError: the pipeline has guidance_scale alone, and that is given too.
    """
    if is_true:
        return params
    if params.guidance_scale is not None:
        raise SamplingParamsError("--cfg-scale and --guidance-scale mean the same to this pipeline: give one of them")
    return dataclasses.replace(params, guidance_scale=scale, true_cfg_scale=None)


def _unless_auto(value: str) -> str | None:
    return None if value == "auto" else value


def _extra_args(entries: Sequence[str]) -> dict[str, Any]:
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise SamplingParamsError(f"--extra {entry}: give NAME=JSON, such as strength=0.6")
        if name == "output_type":
            raise SamplingParamsError(
                "--extra output_type: files are written from finished results; use Omni(...) for others"
            )
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise SamplingParamsError(
                f"--extra {entry}: {value!r} is no JSON; text needs quotes of its own: --extra '{name}=\"{value}\"'"
            ) from error
    return found


def _sizes(texts: Sequence[str]) -> list[tuple[int, int]]:
    found = []
    for text in texts:
        sides = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
        if sides is None:
            raise ConfigError(f"--warmup {text}: give HEIGHTxWIDTH in pixels, such as 1024x768")
        found.append((int(sides[1]), int(sides[2])))
    return found


def _keys_in(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key: anybody would be let in")
    return keys


_DTYPES = ("float32", "bfloat16", "float16")

# One entry a line reads as a table.
# fmt: off
_LAYOUT = (
    Option("--ulysses-degree --usp", "ranks that trade tokens for heads", DEGREES, type=int, default=1),
    Option("--ring-degree --ring", "ranks that keys and values travel around", DEGREES, type=int, default=1),
    Option("--device", "auto (GPUs where there are any), cpu, cuda, or cuda:N for all ranks on one GPU",
           ENGINE, convert=_unless_auto, default="auto"),
    Option("--attention-backend", "attention kernel (%(default)s)", ENGINE, default="auto", metavar="NAME"),
)
_DTYPE = Option("--dtype", "auto: bfloat16 on GPUs",
                ENGINE, convert=_unless_auto, default="auto", choices=("auto", *_DTYPES))
_IMAGE = Option("--image", "picture to edit or to start from; repeat it where the model takes several",
                action="append", metavar="PATH")
_SIZE = (
    Option("--width", owner=PARAMS, type=int, metavar="PIXELS"),
    Option("--height", owner=PARAMS, type=int, metavar="PIXELS"),
    Option("--num-frames", "frames of a video", PARAMS, type=int),
    Option("--num-inference-steps", "denoising steps", PARAMS, type=int),
)
GENERATE = (
    Option("--model", f"hub id, folder of a pipeline, or {SHAPES_MODEL} (default: %(default)s)", default=SHAPES_MODEL),
    Option("--prompt", "what to draw; repeat it for more outputs", action="append", metavar="TEXT"),
    Option("--negative-prompt", "what to keep away from", PARAMS, metavar="TEXT"),
    _IMAGE,
    *_LAYOUT,
    *_SIZE,
    Option("--fps", "frames a second of a video; without it, the pipeline's own default, or 16 where it has none",
           PARAMS, type=float),
    Option("--cfg-scale", "guidance: true_cfg_scale where the model has it, or guidance_scale", type=float),
    Option("--true-cfg-scale", "the pipeline's own true_cfg_scale", PARAMS, type=float),
    Option("--guidance-scale", "the pipeline's own guidance_scale", PARAMS, type=float),
    Option("--max-sequence-length", "longest text, in tokens", PARAMS, type=int),
    Option("--seed", "the same seed draws the same picture; without it, a fresh one", PARAMS, type=int),
    Option("--num-outputs-per-prompt --num-images-per-prompt", owner=PARAMS, type=int),
    Option("--extra", "another argument of the pipeline's own call, such as strength=0.6 or 'sigmas=[1.0, 0.5]'",
           PARAMS, "extra_args", _extra_args, action="append", metavar="NAME=JSON"),
    Option("--output", "folder or file: .png, .jpg, .webp, ... for pictures, .mp4 for videos, .wav for sounds "
           "(a folder: pictures, videos or sounds)", metavar="PATH"),
    _DTYPE,
    Option("--attention-strategy", "whose parallel attention (%(default)s, yunchang)",
           ENGINE, default="omni_sp", metavar="NAME"),
)
CHECK = (
    Option("model", f"hub id, folder of a diffusers pipeline, or {SHAPES_MODEL}", metavar="MODEL"),
    *_LAYOUT,
    Option("--prompt", default="a red circle", metavar="TEXT"),
    _IMAGE,
    *_SIZE,
    Option("--dtype", owner=ENGINE, default="float32", choices=_DTYPES),
)
MODELS = (Option("--markdown", "as the page docs/models.md", action="store_true"),)
SERVE = (
    Option("model", "hub id, folder of a diffusers pipeline, or %(default)s", SERVER, nargs="?", metavar="MODEL"),
    Option("--served-model-name", "what requests call it; repeatable",
           SERVER, "served_model_names", action="append", metavar="NAME"),
    Option("--host", "address to listen on (%(default)s: this machine only)", SERVER),
    Option("--port", "(%(default)s); 0 takes a free one", SERVER, type=int),
    *_LAYOUT,
    _DTYPE,
    Option("--rank-timeout", "longest silence of working ranks", ENGINE, "rank_timeout_s", type=float, metavar="S"),
    Option("--startup-timeout", "the same while they load the model",
           ENGINE, "startup_timeout_s", type=float, metavar="S"),
    Option("--warmup", "draw a step of this size before being ready; repeatable",
           ENGINE, convert=_sizes, action="append", metavar="HEIGHTxWIDTH"),
    Option("--api-key", "let in who has one; repeatable", SERVER, "api_keys", action="append", metavar="KEY"),
    Option("--api-key-file", "the same, one on each line, out of sight of ps",
           SERVER, "api_keys", _keys_in, type=Path),
    Option("--allow-origin", "web pages that may call; repeatable",
           SERVER, "allow_origins", action="append", metavar="ORIGIN"),
    Option("--data-dir", "keep videos, pictures and jobs here; else until it ends", SERVER, type=Path),
    Option("--file-max-age", "keep them so long", SERVER, "file_max_age_s", type=float, metavar="S"),
    Option("--file-max-mib", "keep so much", SERVER, "file_max_total_bytes", unit=_MIB, type=int),
    Option("--max-queue-length", "requests that wait", SERVER, type=int),
    Option("--max-batch-size", "requests drawn together, at most (%(default)s)", ENGINE, type=int, default=1),
    Option("--batch-wait-ms", "how long one may wait for others (%(default)g)",
           ENGINE, type=float, default=0.0, metavar="MS"),
    Option("--max-pixels", "of a picture (%(default)s)", SERVER, type=int),
    Option("--max-steps", "of a request (%(default)s)", SERVER, type=int),
    Option("--max-n", "results of a request (%(default)s)", SERVER, type=int),
    Option("--max-frames", "of a video (%(default)s)", SERVER, type=int),
    Option("--max-body-mib", "of a request", SERVER, "max_body_bytes", unit=_MIB, type=int),
    Option("--allow-url-images", "fetch pictures that chats name by http(s) URL", SERVER, action="store_true"),
    Option("--drain-timeout", "to finish, at the end", SERVER, "drain_timeout_s", type=float, metavar="S"),
)
# fmt: on
