"""What the operator of an embedding server decides, beside what every server of this package has."""

from __future__ import annotations

from dataclasses import dataclass

from omni_sp.command_line import CommandLine
from omni_sp.errors import ConfigError
from omni_sp.validation import require_int, require_number

LEAST_LOADED, ROUND_ROBIN, RANDOM = "least-loaded", "round-robin", "random"
POLICIES = LEAST_LOADED, ROUND_ROBIN, RANDOM
_TENSOR = ("--tensor-parallel-size", "-tp")
_OURS = {
    "--uds": "the replicas have sockets of their own",
    "--runner": "it is pooling",
    "--model": "the model is the first word",
    "--data-parallel-size": "give --replicas",
    "-dp": "give --replicas",
    "--api-server-count": "give --replicas",
    "--root-path": "the replicas are behind the front",
    **dict.fromkeys(
        ("--ulysses-sequence-parallel-size", "--sequence-parallel-size", "--enable-shift-parallel"),
        "ranks share the tokens of models that generate; give --replicas",
    ),
}


@dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
    """Replicas of one embedding model, and how much they take on.

    Attributes:
        model: a folder or hub id that ``vllm serve --runner pooling`` takes.
        replicas: how many servers of it run side by side.
        gpus: the first so many of the visible GPUs are shared out among them; 0: none; None: all that are visible.
        policy: which replica gets what: "least-loaded" (by tokens under way), "round-robin" or "random".
        max_inputs: texts that may be under way, over all requests; more are refused.
        request_timeout_s: seconds that a request may take, retries included.
        startup_timeout_s: seconds that a replica may take to start.
        vllm_arguments: further arguments of each ``vllm serve``.

    Raises:
        ConfigError: a value that cannot be.
    """

    model: str
    replicas: int = 2
    gpus: int | None = None
    policy: str = LEAST_LOADED
    max_inputs: int = 16384
    request_timeout_s: float = 600.0
    startup_timeout_s: float = 1800.0
    vllm_arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.model or self.model.startswith("-"):
            raise ConfigError(f"model={self.model!r}: give a folder or hub id")
        require_int("replicas", self.replicas, minimum=1, maximum=256, error=ConfigError, hint="give 1 to 256")
        require_int("max_inputs", self.max_inputs, minimum=1, error=ConfigError)
        if self.gpus is not None:
            hint = "give how many GPUs the replicas share, or 0 for the CPU"
            require_int("gpus", self.gpus, minimum=0, error=ConfigError, hint=hint)
        for name in ("request_timeout_s", "startup_timeout_s"):
            hint = "give a number of seconds above 0"
            require_number(name, getattr(self, name), above=0, error=ConfigError, hint=hint)
        if self.policy not in POLICIES:
            raise ConfigError(f"policy={self.policy!r}: give one of {', '.join(POLICIES)}")
        for flag in CommandLine(self.vllm_arguments).flags():
            if flag in _OURS:
                raise ConfigError(f"{flag} is not passed on to vLLM here: {_OURS[flag]}")
        if self.ranks < 1:
            raise ConfigError(f"{_TENSOR[0]} {self.ranks}: give a whole number from 1 on")

    @property
    def ranks(self) -> int:
        """Devices of one replica: vLLM's tensor parallel size."""
        given = CommandLine(self.vllm_arguments).number_of(*_TENSOR)
        return 1 if given is None else given
