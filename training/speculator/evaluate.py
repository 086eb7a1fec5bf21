"""How many drafted tokens a target would accept, without vLLM: the target's tokens are known, drafts are compared."""

from typing import Any, NamedTuple

import torch

from omni_sp.llm.speculation.heads import Speculator
from training.speculator.data import Sequences
from training.speculator.train import hidden_states

__all__ = ["Acceptance", "simulate"]


class Acceptance(NamedTuple):
    """What became of drafts.

    Args:
        drafts: Their number.
        by_place: How many of them were right up to each token.
    """

    drafts: int
    by_place: list[int]

    def __str__(self) -> str:
        shares = ", ".join(f"{count / max(1, self.drafts):.1%}" for count in self.by_place)
        tokens = 1 + sum(self.by_place) / max(1, self.drafts)
        return f"{self.drafts} drafts, accepted up to each token: {shares}; {tokens:.2f} tokens a step"


def simulate(target: Any, speculator: Speculator, sequences: Sequences, *, margin: int = 0) -> Acceptance:
    """Draft along sequences as vLLM does along greedy answers: after each step from the token that it sampled last.

    Args:
        target: A causal language model of transformers.
        speculator: Of it.
        sequences: Prompts with answers; texts are answers to their first token.
        margin: Drafts do not begin at so many last tokens of each, which are there to be compared with.
    """
    places, drafts = speculator.config.n_predict, 0
    by_place = [0] * places
    for tokens, start in zip(*sequences, strict=True):
        states = hidden_states(target, torch.tensor([tokens]))[0]
        ids = torch.tensor(tokens, device=states.device)
        first = max(1, start)
        # All drafts at once: from the state before each token, and that token.
        drafted = speculator.draft(states[first - 1 : -1], ids[first:], places).tolist()
        at = first
        while at < len(tokens) - 1 - margin:
            drafts, accepted = drafts + 1, 0
            for guess, true in zip(drafted[at - first], tokens[at + 1 :], strict=False):
                if guess != true:
                    break
                by_place[accepted] += 1
                accepted += 1
            at += accepted + 1
    return Acceptance(drafts, by_place)
