"""What the command line wishes for, as Omni takes it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.errors import SamplingParamsError


def sampling_params(options: argparse.Namespace) -> OmniDiffusionSamplingParams:
    """All but --cfg-scale, which means what the pipeline has."""
    given = (options.cfg_scale is not None) + (options.true_cfg_scale is not None)
    if given > 1:
        raise SamplingParamsError("--cfg-scale and --true-cfg-scale are two names of one thing: give one of them")
    params = OmniDiffusionSamplingParams(
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        fps=options.fps,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        true_cfg_scale=options.true_cfg_scale if options.cfg_scale is None else options.cfg_scale,
        negative_prompt=options.negative_prompt,
        num_outputs_per_prompt=options.num_outputs_per_prompt,
        seed=options.seed,
        max_sequence_length=options.max_sequence_length,
        extra_args=dict(_extra(entry) for entry in options.extra),
    )
    if "output_type" in params.extra_args:
        raise SamplingParamsError(
            "--extra output_type: files are written from finished results; use Omni(...) for others"
        )
    return params


def _extra(entry: str) -> tuple[str, Any]:
    name, equals, value = entry.partition("=")
    if not equals or not name:
        raise SamplingParamsError(f"--extra {entry}: give NAME=JSON, such as strength=0.6")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise SamplingParamsError(
            f"--extra {entry}: {value!r} is no JSON; text needs quotes of its own: --extra '{name}=\"{value}\"'"
        ) from error


def with_cfg_scale(params: OmniDiffusionSamplingParams, scale: float, *, is_true: bool) -> OmniDiffusionSamplingParams:
    """--cfg-scale for this pipeline, whose only guidance may be guidance_scale."""
    if is_true:
        return params
    if params.guidance_scale is not None:
        raise SamplingParamsError("--cfg-scale and --guidance-scale mean the same to this pipeline: give one of them")
    return dataclasses.replace(params, guidance_scale=scale, true_cfg_scale=None)


def make_prompt(text: str | None, pictures: list[Any]) -> str | dict[str, Any]:
    """A prompt as Omni takes it."""
    if not pictures:
        return text or ""
    return {"prompt": text, "image": pictures if len(pictures) > 1 else pictures[0]}
