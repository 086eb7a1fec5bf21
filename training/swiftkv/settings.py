"""What is distilled, and for how long."""

from dataclasses import dataclass

from omni_sp.errors import ConfigError
from omni_sp.validation import require_int, require_number

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the weights, besides the teacher, the texts and the machine's rounding.

    The defaults are those of the paper (arXiv 2410.03960) where it names them.

    Args:
        num_key_value_layers: How many of the first layers keep keys and values of their own.
        key_value_group_size: How many of the other layers, one after the other, share keys and values.
        steps: Optimizer steps.
        batch_size: Sequences in a step.
        length: Tokens of a sequence.
        learning_rate: Its highest value.
        warmup: Share of the steps over which it rises; then it falls to nothing as a cosine.
        temperature: That of the distributions which are compared.
        state_weight: Of the mean squared error of the last layer's input, beside the KL divergence.
        seed: Of the order of the sequences.

    Raises:
        ConfigError: A number is impossible.
    """

    num_key_value_layers: int
    key_value_group_size: int = 1
    steps: int = 2000
    batch_size: int = 8
    length: int = 1024
    learning_rate: float = 2e-4
    warmup: float = 0.05
    temperature: float = 2.0
    state_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_key_value_layers", "key_value_group_size", "steps", "batch_size", "length"):
            require_int(name, getattr(self, name), minimum=1, error=ConfigError, hint="give 1 or more")
        for name in ("learning_rate", "temperature"):
            require_number(name, getattr(self, name), above=0, error=ConfigError, hint="give a number above 0")
