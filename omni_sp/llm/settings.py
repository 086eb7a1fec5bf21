"""How a vLLM engine is to share tokens among ranks, and how that travels inside vLLM's own configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from omni_sp.errors import ConfigError

CONFIG_KEY = "omni_sp"
"""Where the settings lie in vLLM's ``additional_config``, which every process gets and its compile cache counts."""

DEFAULT_SHIFT_THRESHOLD = 512


@dataclass(frozen=True)
class LlmParallelConfig:
    """Degrees of an LLM engine.

    Attributes:
        sequence_parallel_size: ranks that trade tokens for heads around attention (Ulysses).
        tensor_parallel_size: ranks among which each of those splits its weights. vLLM runs the product of the two.
        enable_shift_parallel: steps with few tokens use the same weights by tensor parallelism over all ranks.
        shift_parallel_threshold: the most tokens of such a step.
    """

    sequence_parallel_size: int = 1
    tensor_parallel_size: int = 1
    enable_shift_parallel: bool = False
    shift_parallel_threshold: int = DEFAULT_SHIFT_THRESHOLD

    def __post_init__(self) -> None:
        for name in ("sequence_parallel_size", "tensor_parallel_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: give a whole number from 1 on")
        threshold = self.shift_parallel_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 0:
            raise ConfigError(f"shift_parallel_threshold={threshold!r}: give a number of tokens from 0 on")

    @property
    def world_size(self) -> int:
        """Ranks in all; what vLLM is told as its tensor parallel size."""
        return self.sequence_parallel_size * self.tensor_parallel_size

    @property
    def is_asked_for(self) -> bool:
        """False where vLLM is to run as it does without us."""
        return self.sequence_parallel_size > 1

    def additional_config(self, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The ``additional_config`` of vLLM with these settings in it, and the user's own entries."""
        merged = dict(others or {})
        if CONFIG_KEY in merged:
            raise ConfigError(f"additional_config already holds {CONFIG_KEY!r}: give the degrees in one place")
        return merged | {CONFIG_KEY: asdict(self)}

    @classmethod
    def found_in(cls, additional_config: Any) -> LlmParallelConfig | None:
        """The settings in a vLLM ``additional_config``; None where nobody asked for any."""
        entry = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if entry is None:
            return None
        try:
            settings = cls(**entry)
        except TypeError as error:
            raise ConfigError(f"additional_config[{CONFIG_KEY!r}]={entry!r}: {error}") from error
        return settings if settings.is_asked_for else None
