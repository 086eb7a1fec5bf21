"""What the user said: how many ranks on which axis, and what to draw. Frozen; ranks and devices live in the mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from omni_sp.errors import ConfigError, SamplingParamsError


@dataclass(frozen=True, kw_only=True)
class DiffusionParallelConfig:
    """How many ranks share one picture, and how.

    Attributes:
        ulysses_degree: ranks that trade tokens for attention heads by all-to-all. Any head count works; more ranks
            than heads leaves the surplus ranks without attention work.
        ring_degree: ranks around which keys and values travel point to point.

    ``world_size`` = ulysses_degree × ring_degree. Ulysses ranks are neighbours (one node's fast links), the ring
    goes around outside them.

    Raises:
        ConfigError: a degree is not a whole number of at least 1.
    """

    ulysses_degree: int = 1
    ring_degree: int = 1

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{name}={value!r}: each degree is a whole number of at least 1 (1 = do not split on that axis)"
                )

    @property
    def world_size(self) -> int:
        """Number of ranks that one picture runs on."""
        return self.ulysses_degree * self.ring_degree

    @property
    def equation(self) -> str:
        """``ulysses_degree × ring_degree = ranks`` with the values, for messages."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"ulysses_degree {self.ulysses_degree} × ring_degree {self.ring_degree} = {ranks}"


_POSITIVE_INTS = (
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "num_outputs_per_prompt",
    "max_sequence_length",
)
_FINITE_FLOATS = ("fps", "guidance_scale", "true_cfg_scale")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class OmniDiffusionSamplingParams:
    """What to draw with; ``None`` always means the pipeline's own default.

    Attributes:
        height, width: pixels. num_frames: of a video. fps: how many of them are shown in a second; pipelines that know
            it (frame_rate, fps) are told, for the others it is for the file alone.
        num_inference_steps: denoising steps.
        guidance_scale: the pipeline's own ``guidance_scale``. true_cfg_scale: classifier-free guidance with a
            negative prompt, for pipelines that know both (Qwen-Image, FLUX); above 1, a missing negative prompt
            is taken as " ".
        negative_prompt: for every prompt that brings none of its own.
        num_outputs_per_prompt: pictures, videos or sounds for each prompt.
        seed: 0 … 2**63-1; the same seed gives the same picture as the plain diffusers pipeline with a CPU generator
            seeded so. None draws a fresh seed, which the result's metrics name.
        max_sequence_length: longest text, in tokens.
        output_type: "pil" (default; sounds come as arrays), or what else the pipeline offers, such as "latent" or "np".
        extra_args: further keyword arguments of the pipeline's ``__call__``, as they are.

    Raises:
        SamplingParamsError: a value is out of range.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    num_outputs_per_prompt: int | None = None
    seed: int | None = None
    max_sequence_length: int | None = None
    output_type: str | None = None
    extra_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _POSITIVE_INTS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SamplingParamsError(f"{name}={value!r}: give a whole number of at least 1, or leave it out")
        for name in _FINITE_FLOATS:
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
            ):
                raise SamplingParamsError(f"{name}={value!r}: give a finite number, or leave it out")
        if self.fps is not None and self.fps <= 0:
            raise SamplingParamsError(f"fps={self.fps!r}: give a number above 0, or leave it out")
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED
        ):
            raise SamplingParamsError(f"seed={self.seed!r}: give a whole number from 0 to 2**63-1, or leave it out")
        for name in ("negative_prompt", "output_type"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise SamplingParamsError(f"{name}={value!r}: give a string, or leave it out")
        if not isinstance(self.extra_args, Mapping):
            raise SamplingParamsError(f"extra_args={self.extra_args!r}: give a mapping of argument names to values")
