"""What the user asks for: ranks on each axis, and what to generate. Frozen; ranks and devices live in the mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from omni_sp.errors import ConfigError, SamplingParamsError
from omni_sp.validation import keyword_only, require_bool, require_int, require_number, require_str, shown

LAUNCHERS = ("spawn", "torchrun", "ray")
"""What may start the ranks of an engine: see `Omni`."""
_MOST_PROCESSES = 65536


@keyword_only(ConfigError)
@dataclass(frozen=True, kw_only=True)
class DiffusionParallelConfig:
    """How many ranks share one image or video, and how.

    ``world_size`` = cfg_parallel_size × ulysses_degree × ring_degree. The ranks of one Ulysses group are neighbours
    (the fast links of one node), the ring connects these groups, and guidance, which exchanges least, is outermost.

    Attributes:
        ulysses_degree: ranks that exchange tokens for attention heads by all-to-all (DeepSpeed-Ulysses, arXiv
            2309.14509). Any number of heads works; with more ranks than heads, the surplus ranks have no attention to
            compute.
        ring_degree: ranks around which keys and values travel point to point (Ring Attention, arXiv 2310.01889).
        cfg_parallel_size: groups of ranks that take turns at the transformer calls of a denoising step: with guidance,
            each computes another branch.
        vae_parallel: whether all ranks decode and encode a picture together, each its part of the rows, which is exact
            and needs no tiles: True, False (one rank decodes), or "auto" for videos, and for pictures whose longer side
            has 1024 pixels or more. Then every rank reads the VAE's weights.
        text_encoder_parallel: whether each text or image encoder runs on one rank, which gives all others what it makes
            of a prompt: True, False (every rank runs every encoder), or "auto" within a call of the pipeline alone, so
            that a program may encode prompts by itself on one rank. Ranks that `Omni` started do not read the weights
            of encoders that they do not run.
        shard_weights: whether each rank of ulysses_degree × ring_degree keeps only its part of the weights of a
            transformer's blocks. A block's are gathered while the block before it runs, and freed after it.
        data_parallel_size: replicas: engines side by side behind one queue, each with ``world_size`` ranks of its own.
            A prompt, or a server's request, is drawn by one of them.

    Raises:
        ConfigError: a degree is not a whole number of at least 1, another value is none of those it may be, or a value
            has no name, or one that there is not.
    """

    ulysses_degree: int = 1
    ring_degree: int = 1
    cfg_parallel_size: int = 1
    vae_parallel: bool | Literal["auto"] = "auto"
    text_encoder_parallel: bool | Literal["auto"] = "auto"
    shard_weights: bool = False
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        hint = "each degree is a whole number of at least 1 (1 = do not split on that axis)"
        for axis in ("cfg_parallel_size", "ulysses_degree", "ring_degree", "data_parallel_size"):
            require_int(axis, getattr(self, axis), minimum=1, error=ConfigError, hint=hint)
        if self.num_processes > _MOST_PROCESSES:
            raise ConfigError(f"{self.full_equation}: more than {_MOST_PROCESSES} are never started; lower the degrees")
        for name in ("vae_parallel", "text_encoder_parallel"):
            if (value := getattr(self, name)) != "auto":
                require_bool(name, value, error=ConfigError, hint='give True, False or "auto"')
        require_bool("shard_weights", self.shard_weights, error=ConfigError, hint="give True or False")
        if self.shard_weights and self.ulysses_degree * self.ring_degree == 1 < self.world_size:
            raise ConfigError(
                "shard_weights=True shards over the ranks of one group, which are ulysses_degree 1 × ring_degree 1 = 1 "
                "rank: give a degree above 1, or leave out shard_weights"
            )

    def require_one_replica(self) -> None:
        """Refuse replicas where the ranks of one engine are.

        Raises:
            ConfigError: data_parallel_size is above 1.
        """
        if self.data_parallel_size > 1:
            raise ConfigError(
                f"data_parallel_size={self.data_parallel_size}: here are the ranks of one engine. Omni outside of a "
                "distributed program, AsyncOmni and `omni-sp serve` run replicas; leave it out here"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks that work on one image or video."""
        return self.cfg_parallel_size * self.ulysses_degree * self.ring_degree

    @property
    def num_processes(self) -> int:
        """Number of ranks of all replicas."""
        return self.data_parallel_size * self.world_size

    @property
    def full_equation(self) -> str:
        """``equation``, with data_parallel_size where it is above 1."""
        if self.data_parallel_size == 1:
            return self.equation
        factors = self.equation.partition(" = ")[0]
        return f"data_parallel_size {self.data_parallel_size} × {factors} = {self.num_processes} ranks"

    @property
    def equation(self) -> str:
        """The product of the degrees with their values, for messages; cfg_parallel_size only where it is above 1."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        branches = f"cfg_parallel_size {self.cfg_parallel_size} × " if self.cfg_parallel_size > 1 else ""
        return f"{branches}ulysses_degree {self.ulysses_degree} × ring_degree {self.ring_degree} = {ranks}"


def _is_adapter(value: Any) -> bool:
    """Whether it is the name of an adapter with a finite scale."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not isinstance(value[0], str):
        return False
    return isinstance(value[1], (int, float)) and not isinstance(value[1], bool) and math.isfinite(value[1])


def _adapter(entry: Any) -> tuple[str, float]:
    return (entry, 1.0) if isinstance(entry, str) else (entry[0], float(entry[1]))


_COUNTS = ("height", "width", "num_frames", "num_inference_steps", "num_outputs_per_prompt", "max_sequence_length")
_NUMBERS = ("fps", "guidance_scale", "true_cfg_scale")
MAX_SEED = 2**63 - 1
_SEED_HINT = "give a whole number from 0 to 2**63-1"


@keyword_only(SamplingParamsError)
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
            that seed. None picks a new seed, which the metrics of the result name. A list has one seed for each output
            of a prompt, where the pipeline takes a list of generators; each output is then, to rounding, the one that
            its seed makes alone.
        max_sequence_length: the longest text, in tokens.
        output_type: "pil" (the default; sounds come as arrays), or another one of the pipeline, such as "latent" or
            "np".
        scheduler: the name of a diffusers scheduler that takes the loaded one's place in this request, made from its
            configuration; or (name, options), with options that replace entries of that configuration:
            ``("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})``.
        lora: LoRA adapters that Omni has loaded, for this request: a name, (name, scale), or a list of these; a name
            alone has scale 1.
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
    seed: int | Sequence[int] | None = None
    max_sequence_length: int | None = None
    output_type: str | None = None
    scheduler: str | tuple[str, Mapping[str, Any]] | None = None
    lora: str | tuple[str, float] | Sequence[str | tuple[str, float]] | None = None
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
        if isinstance(self.seed, Sequence) and not isinstance(self.seed, (str, bytes)):
            self._check_seeds(self.seed)
        else:
            check(require_int, "seed", _SEED_HINT, minimum=0, maximum=MAX_SEED)
        self._check_scheduler()
        self._check_lora()
        for name in ("negative_prompt", "output_type"):
            check(require_str, name, "give a string")
        if not isinstance(self.extra_args, Mapping):
            raise SamplingParamsError(
                f"extra_args={shown(self.extra_args)}: give a mapping of argument names to values", param="extra_args"
            )

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of one prompt's outputs: one for all of them, or one for each; none where ``seed`` is None."""
        return () if self.seed is None else (self.seed,) if isinstance(self.seed, int) else tuple(self.seed)

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        """The LoRA adapters of this request, (name, scale), in the order of their names."""
        return tuple(sorted(map(_adapter, self._lora_entries())))

    def _lora_entries(self) -> list[Any]:
        if self.lora is None:
            return []
        return [self.lora] if isinstance(self.lora, str) or _is_adapter(self.lora) else list(self.lora)

    def _check_lora(self) -> None:
        """Check the form of ``lora``; which adapters there are is known where the model is."""
        entries = self._lora_entries() if self.lora is None or isinstance(self.lora, Sequence) else [self.lora]
        error = partial(SamplingParamsError, param="lora")
        if not all(isinstance(entry, str) or _is_adapter(entry) for entry in entries):
            hint = 'give a name, (name, scale), or a list of these, such as [("style", 0.8), "light"]'
            raise error(f"lora={shown(self.lora)}: {hint}")
        names = [name for name, _ in map(_adapter, entries)]
        if len(set(names)) < len(names):
            raise error(f"lora={shown(self.lora)}: each adapter is named once")

    def _check_seeds(self, seeds: Sequence[int]) -> None:
        """Check a list of seeds against the number of outputs."""
        error = partial(SamplingParamsError, param="seed")
        for index, seed in enumerate(seeds):
            require_int(f"seed[{index}]", seed, minimum=0, maximum=MAX_SEED, error=error, hint=_SEED_HINT)
        if not seeds or self.num_outputs_per_prompt not in (None, len(seeds)):
            count = self.num_outputs_per_prompt or 1
            raise error(
                f"seed is a list of {len(seeds)}, and num_outputs_per_prompt={count}: give a seed for each output"
            )
        object.__setattr__(self, "seed", tuple(seeds))  # the caller's list may change

    def _check_scheduler(self) -> None:
        """Check the form of ``scheduler``; whether it fits the model is known where the model is."""
        chosen = self.scheduler
        name, options = chosen if isinstance(chosen, (tuple, list)) and len(chosen) == 2 else (chosen, {})
        is_well_formed = isinstance(name, str) and isinstance(options, Mapping)
        if chosen is not None and not (is_well_formed and all(isinstance(option, str) for option in options)):
            raise SamplingParamsError(
                f"scheduler={shown(chosen)}: give the name of a diffusers scheduler, or (name, options), such as "
                '("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})',
                param="scheduler",
            )
