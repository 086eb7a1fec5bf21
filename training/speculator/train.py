"""The training itself: from the target's hidden states, the tokens that it goes on with."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from omni_sp.llm.speculation.checkpoint import SpeculatorConfig
from omni_sp.llm.speculation.heads import Speculator
from training.speculator.data import Sequences, batches
from training.speculator.settings import Settings

__all__ = ["build_speculator", "hidden_states", "train"]


def build_speculator(target: Any, settings: Settings) -> Speculator:
    """A speculator for a target, with random weights, in float32 on the target's device."""
    text = target.config.get_text_config()
    config = SpeculatorConfig(
        kind=settings.kind,
        n_predict=settings.n_predict,
        vocab_size=text.vocab_size,
        input_width=text.hidden_size,
        width=text.hidden_size if settings.width is None else settings.width,
        tie_weights=settings.tie_weights,
        tie_gates=settings.kind == "mlp" or settings.tie_gates,
        scale_input=settings.scale_input,
        base_architectures=tuple(target.config.architectures or (type(target).__name__,)),
    )
    speculator = Speculator(config)
    speculator.initialise(torch.Generator().manual_seed(settings.seed))
    return speculator.to(target.device)


@torch.no_grad()
def hidden_states(target: Any, ids: Tensor) -> Tensor:
    """The target's hidden states after its final norm, (batch, length, width), in float32."""
    states: Tensor = target.base_model(input_ids=ids.to(target.device), use_cache=False).last_hidden_state
    return states.float()


def _losses(speculator: Speculator, states: Tensor, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """Cross-entropy of each token of a draft: token t + 2 + i from state t, and the true tokens between them."""
    count = ids.shape[1] - speculator.config.n_predict - 1
    logits = speculator(states[:, :count], ids[:, 1:])
    wanted = [labels[:, 2 + index : 2 + index + count].flatten() for index in range(len(logits))]
    return [
        F.cross_entropy(own.flatten(0, 1), want, reduction="sum") / (want >= 0).sum().clamp(min=1)  # of none: 0
        for own, want in zip(logits, wanted, strict=True)
    ]


def _rate(step: int, settings: Settings) -> float:
    rising = max(1, round(settings.warmup * settings.steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, settings.steps - rising)))


def train(target: Any, sequences: Sequences, settings: Settings, *, quiet: bool = False) -> Speculator:
    """Train a speculator for a target.

    Args:
        target: A causal language model of transformers, which stays as it is.
        sequences: What to learn from.
        settings: How.
        quiet: Show no progress.
    """
    speculator = build_speculator(target, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    source: Iterator[tuple[Tensor, Tensor]] = batches(
        sequences, settings.batch_size, settings.length, settings.n_predict + 2, generator
    )
    optimizer = torch.optim.AdamW(
        speculator.parameters(), settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    with tqdm(range(settings.steps), desc=f"train {settings.kind}", unit="step", disable=quiet) as progress:
        for _ in progress:
            ids, labels = (tensor.to(target.device) for tensor in next(source))
            losses = _losses(speculator, hidden_states(target, ids), ids, labels)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(losses).sum().backward()
            torch.nn.utils.clip_grad_norm_(speculator.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix(losses=" ".join(f"{loss.item():.2f}" for loss in losses), refresh=False)
    return speculator.eval()
