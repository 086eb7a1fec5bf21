"""What is trained, and for how long."""

from dataclasses import dataclass
from typing import Literal

from omni_sp.errors import ConfigError
from omni_sp.validation import require_int, require_number

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the weights, besides the target, the texts and the machine's rounding.

    Args:
        kind: "lstm" or "mlp".
        n_predict: Tokens of a draft.
        width: Of the speculator's states; None: the target's width.
        tie_weights: The same weights for all tokens of a draft, but for the first projection.
        tie_gates: The gates of an LSTM share an embedding.
        scale_input: The target's states are normalised first.
        steps: Optimizer steps.
        batch_size: Sequences in a step.
        length: Tokens of a sequence, at most.
        learning_rate: Its highest value.
        warmup: Share of the steps over which it rises; then it falls to nothing as a cosine.
        weight_decay: Of AdamW.
        seed: Of the first weights, the order of the sequences, and the answers.

    Raises:
        ConfigError: A number is impossible.
    """

    kind: Literal["lstm", "mlp"] = "lstm"
    n_predict: int = 3
    width: int | None = None
    tie_weights: bool = True
    tie_gates: bool = True
    scale_input: bool = True
    steps: int = 3000
    batch_size: int = 8
    length: int = 512
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_predict", "steps", "batch_size", "length", *(() if self.width is None else ("width",))):
            require_int(name, getattr(self, name), minimum=1, error=ConfigError, hint="give 1 or more")
        require_number("learning_rate", self.learning_rate, above=0, error=ConfigError, hint="give a number above 0")
