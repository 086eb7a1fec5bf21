"""What the user asks for: ranks on each axis, and what to generate. Frozen; ranks and devices live in the mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from omni_sp.errors import ConfigError, SamplingParamsError
from omni_sp.validation import require_int, require_number, require_str


@dataclass(frozen=True, kw_only=True)
class DiffusionParallelConfig:
    """How many ranks share one image or video, and how.

    ``world_size`` = ulysses_degree × ring_degree. The ranks of one Ulysses group are neighbours (the fast links of one
    node), and the ring connects these groups.

    Attributes:
        ulysses_degree: ranks that exchange tokens for attention heads by all-to-all (DeepSpeed-Ulysses, arXiv
            2309.14509). Any number of heads works; with more ranks than heads, the surplus ranks have no attention to
            compute.
        ring_degree: ranks around which keys and values travel point to point (Ring Attention, arXiv 2310.01889).

    Raises:
        ConfigError: a degree is not a whole number of at least 1.
    """

    ulysses_degree: int = 1
    ring_degree: int = 1

    def __post_init__(self) -> None:
        hint = "each degree is a whole number of at least 1 (1 = do not split on that axis)"
        for axis in fields(self):
            require_int(axis.name, getattr(self, axis.name), minimum=1, error=ConfigError, hint=hint)

    @property
    def world_size(self) -> int:
        """Number of ranks that work on one image or video."""
        return self.ulysses_degree * self.ring_degree

    @property
    def equation(self) -> str:
        """``ulysses_degree × ring_degree = ranks`` with the values, for messages."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"ulysses_degree {self.ulysses_degree} × ring_degree {self.ring_degree} = {ranks}"


_COUNTS = ("height", "width", "num_frames", "num_inference_steps", "num_outputs_per_prompt", "max_sequence_length")
_NUMBERS = ("fps", "guidance_scale", "true_cfg_scale")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class OmniDiffusionSamplingParams:
    """How to generate; ``None`` always means the pipeline's own default.

    Attributes:
        height: pixels.
        width: pixels.
        num_frames: frames of a video.
        fps: frames of a video that are shown in a second. Pipelines that have an argument for it (frame_rate, fps)
            receive it; for the others it only matters for the file.
        num_inference_steps: denoising steps.
        guidance_scale: the pipeline's own ``guidance_scale``.
        true_cfg_scale: classifier-free guidance with a negative prompt, for pipelines that have both this and
            ``guidance_scale`` (Qwen-Image, FLUX). Above 1, a missing negative prompt is taken as " ".
        negative_prompt: for every prompt that has none of its own.
        num_outputs_per_prompt: images, videos or sounds for each prompt.
        seed: 0 … 2**63-1. With the same seed the result is that of the plain diffusers pipeline with a CPU generator of
            that seed. None picks a new seed, which the metrics of the result name.
        max_sequence_length: the longest text, in tokens.
        output_type: "pil" (the default; sounds come as arrays), or another one of the pipeline, such as "latent" or
            "np".
        extra_args: further keyword arguments of the pipeline's ``__call__``, passed on unchanged.

    Raises:
        SamplingParamsError: a value is out of range; ``param`` names it.
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
        def check(require: Callable[..., object], name: str, hint: str, **limits: int) -> None:
            if (value := getattr(self, name)) is not None:
                error = partial(SamplingParamsError, param=name)
                require(name, value, error=error, hint=f"{hint}, or leave it out", **limits)

        for name in _COUNTS:
            check(require_int, name, "give a whole number of at least 1", minimum=1)
        for name in _NUMBERS:
            check(require_number, name, "give a finite number")
        check(require_number, "fps", "give a number above 0", above=0)
        check(require_int, "seed", "give a whole number from 0 to 2**63-1", minimum=0, maximum=MAX_SEED)
        for name in ("negative_prompt", "output_type"):
            check(require_str, name, "give a string")
        if not isinstance(self.extra_args, Mapping):
            raise SamplingParamsError(
                f"extra_args={self.extra_args!r}: give a mapping of argument names to values", param="extra_args"
            )
