"""The distillation itself: the student's next tokens and its last hidden states become the teacher's."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from omni_sp.errors import ConfigError
from training.swiftkv.settings import Settings
from training.swiftkv.student import learning

__all__ = ["Agreement", "compare", "distill"]

_CHECKPOINT_EVERY = 250


class Agreement(NamedTuple):
    """How near a student is to its teacher, over the tokens of some sequences.

    Args:
        divergence: The mean KL divergence of the next token's distribution, in nats.
        same_choice: The share of tokens after which both find the same one most likely.
    """

    divergence: float
    same_choice: float

    def __str__(self) -> str:
        return f"KL divergence {self.divergence:.4f}, the same choice after {self.same_choice:.1%} of the tokens"


@torch.no_grad()
def compare(teacher: Any, student: Any, sequences: Tensor, batch_size: int = 8) -> Agreement:
    """Compare them on (sequences, tokens) of token ids."""
    divergence = same = 0.0
    for ids in sequences.split(batch_size):
        ids = ids.to(teacher.device)
        wanted, given = teacher(ids).logits, _forward(student, ids).logits
        divergence += float(_divergence(given, wanted, 1.0)) * ids.shape[0]
        same += float((given.argmax(-1) == wanted.argmax(-1)).float().mean()) * ids.shape[0]
    return Agreement(divergence / len(sequences), same / len(sequences))


def distill(
    teacher: Any,
    student: Any,
    sequences: Tensor,
    settings: Settings,
    checkpoint: Path | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Let the student learn.

    Args:
        teacher: A model of transformers, in eval mode.
        student: Of it, by `build_student`; changed in place.
        sequences: (sequences, tokens) token ids; each batch is a random choice of them.
        settings: The recipe.
        checkpoint: A file from which an interrupted run goes on, written every 250 steps; None for none.
        run: What else the result depends on, beside the settings: a checkpoint of another run is refused.

    Raises:
        ConfigError: The checkpoint is another run's.
    """
    run = {**asdict(settings), **(run or {})}
    own = learning(student)
    optimizer = torch.optim.AdamW(own.values(), lr=settings.learning_rate, weight_decay=0.0)
    begun = _read(checkpoint, own, optimizer, run)
    with tqdm(range(begun, settings.steps), initial=begun, total=settings.steps, desc="distilling") as steps:
        for step in steps:
            generator = torch.Generator().manual_seed(settings.seed + step)  # the same after an interruption
            rows = torch.randint(len(sequences), (settings.batch_size,), generator=generator)
            loss = _loss(teacher, student, sequences[rows].to(teacher.device), settings)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate(step, settings)
            optimizer.step()
            steps.set_postfix(loss=f"{float(loss.detach()):.4f}", refresh=False)
            if checkpoint is not None and (step + 1) % _CHECKPOINT_EVERY == 0:
                state = {"step": step + 1, "weights": own, "optimizer": optimizer.state_dict(), "run": run}
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)


def _loss(teacher: Any, student: Any, ids: Tensor, settings: Settings) -> Tensor:
    """KL divergence of softened distributions, and the mean squared error of what enters the last layer."""
    with torch.no_grad(), _last_input(teacher) as wanted_states:
        wanted = teacher(ids, use_cache=False).logits
    with _last_input(student) as given_states:
        given = _forward(student, ids).logits
    divergence = _divergence(given, wanted, settings.temperature) * settings.temperature**2
    return divergence + settings.state_weight * F.mse_loss(given_states[0].float(), wanted_states[0].float())


def _forward(student: Any, ids: Tensor) -> Any:
    """Run a student, whose learning weights are float32 beside others that may be bfloat16."""
    dtype = student.model.embed_tokens.weight.dtype
    mixed = nullcontext() if dtype == torch.float32 else torch.autocast(ids.device.type, dtype=dtype)
    with mixed:
        return student(ids, use_cache=False)


def _divergence(given: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """The mean KL divergence of a student's distributions from the teacher's, (batch, tokens, vocabulary) logits."""
    given, wanted = ((logits.float() / temperature).log_softmax(-1).flatten(0, -2) for logits in (given, wanted))
    return F.kl_div(given, wanted, log_target=True, reduction="batchmean")


@contextmanager
def _last_input(model: Any) -> Iterator[list[Tensor]]:
    """While open, the input of a model's last layer is put into the list."""
    found: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_pre_hook(lambda _layer, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        hook.remove()


def _rate(step: int, settings: Settings) -> float:
    rising = max(1, round(settings.warmup * settings.steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, settings.steps - rising)))


def _read(
    checkpoint: Path | None, own: dict[str, Tensor], optimizer: torch.optim.Optimizer, run: Mapping[str, Any]
) -> int:
    """Read a checkpoint of this run where there is one; the number of steps that it has behind it."""
    if checkpoint is None or not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    begun = state.get("run", {})
    differing = next((name for name in run if begun.get(name) != run[name]), None)
    if differing is not None:
        raise ConfigError(
            f"{checkpoint} is of an interrupted run with {differing}={begun.get(differing)!r}, and this one has "
            f"{run[differing]!r}: go on by the same command, or remove that file"
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
