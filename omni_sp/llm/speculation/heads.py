"""Speculators that are trained for a model: from its last hidden state, the tokens after the one that was sampled.

A speculator drafts one token after the other. Its state begins as the model's hidden state, after the final norm, of
the token whose successor was sampled. For each token it takes that state and the token before, and a head turns the new
state into logits (arXiv 2404.19124). An LSTM keeps a cell beside the state, and gates say what of both goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_sp.llm.speculation.checkpoint import SpeculatorConfig

_EPSILON = 1e-6


class VocabularyLayers(Protocol):
    """Makes the layers that are as long as the vocabulary: whole ones, or one rank's shards."""

    def embedding(self, vocab_size: int, width: int) -> nn.Module:
        """A layer from token ids to vectors."""

    def head(self, width: int, vocab_size: int) -> nn.Module:
        """A layer from states to logits, without a bias."""

    def top_tokens(self, head: nn.Module, states: Tensor) -> Tensor:
        """The most likely token of each state. A collective where layers are shards."""


class WholeLayers:
    """Layers of plain torch, for training and for programs without vLLM."""

    def embedding(self, vocab_size: int, width: int) -> nn.Module:
        """A layer from token ids to vectors."""
        return nn.Embedding(vocab_size, width)

    def head(self, width: int, vocab_size: int) -> nn.Module:
        """A layer from states to logits, without a bias."""
        return nn.Linear(width, vocab_size, bias=False)

    def top_tokens(self, head: nn.Module, states: Tensor) -> Tensor:
        """The most likely token of each state."""
        top: Tensor = head(states).argmax(-1)
        return top


def _normalised(states: Tensor) -> Tensor:
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + _EPSILON)


class _Norm(nn.Module):
    """A norm by the root of the mean square, with a scale and a shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        return _normalised(states) * self.weight + self.bias


class Speculator(nn.Module):
    """An MLP or LSTM that drafts ``n_predict`` tokens.

    Args:
        config: what it is.
        layers: makes the layers that are as long as the vocabulary; None: plain ones, whole on each rank.
    """

    def __init__(self, config: SpeculatorConfig, layers: VocabularyLayers | None = None) -> None:
        super().__init__()
        self.config = config
        self._layers: VocabularyLayers = WholeLayers() if layers is None else layers
        wide, width = config.width * config.gates, config.width
        self.emb, self.proj, self.head = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in range(config.stages("emb")):
            self.emb.append(self._layers.embedding(config.vocab_size, config.embedding_width))
        for index in range(config.stages("proj")):
            self.proj.append(nn.Linear(width if index else config.input_width, wide, bias=False))
        for _ in range(config.stages("head")):
            self.head.append(self._layers.head(width, config.vocab_size))
        for name in ("cell_ln", "state_ln") if config.kind == "lstm" else ("ln",):
            setattr(self, name, nn.ModuleList(_Norm(width) for _ in range(config.stages(name))))
        weight = 0.5 ** (0.5 / config.n_predict)
        self._embedding_weight = math.sqrt((1 - weight**2) * width / 2) / weight

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all matrices at random, as training begins."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                rows, columns = parameter.shape
                if name.startswith("proj"):
                    rows = self.config.width
                elif name.startswith("emb"):
                    columns = self.config.width
                random = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(random / math.sqrt(min(rows, columns)))

    def load(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take whole parameters by name; layers that are shards take their part of them."""
        own = dict(self.named_parameters())
        for name, tensor in parameters:
            parameter = own.pop(name)
            load = getattr(parameter, "weight_loader", None)
            if load is None:
                parameter.data.copy_(tensor)
            else:
                load(parameter, tensor)
        assert not own, "checkpoint.weights() gives all parameters"

    def forward(self, states: Tensor, tokens: Tensor) -> list[Tensor]:
        """The logits of each token of a draft, where the tokens before it are given.

        Args:
            states: (batch, count, input width) hidden states of the model.
            tokens: (batch, count + n_predict - 1) what follows: ``tokens[:, t]`` is the successor of ``states[:, t]``.

        Returns:
            ``n_predict`` tensors (batch, count, vocabulary); of the i-th, [:, t] is about the successor of
            ``tokens[:, t + i]``.
        """
        count, cell, logits = states.shape[1], None, list[Tensor]()
        for index in range(self.config.n_predict):
            states, cell = self._step(index, states, cell, tokens[:, index : index + count])
            logits.append(self._of(self.head, index)(states))
        return logits

    @torch.no_grad()
    def draft(self, states: Tensor, tokens: Tensor, count: int) -> Tensor:
        """Tokens that may come next, each the most likely one. A collective where layers are shards.

        Args:
            states: (rows, input width) hidden states of the model.
            tokens: (rows,) the token that was sampled from each.
            count: tokens of a draft, at most ``n_predict``.

        Returns:
            (rows, count) token ids.
        """
        cell, drafted = None, list[Tensor]()
        for index in range(count):
            states, cell = self._step(index, states, cell, tokens)
            tokens = self._layers.top_tokens(self._of(self.head, index), states)
            drafted.append(tokens)
        return torch.stack(drafted, 1)

    def _of(self, layers: Any, index: int) -> Any:
        """The layer for a token of a draft; tied ones are fewer, and the last of them serves for the rest."""
        return layers[min(index, len(layers) - 1)]

    def _step(self, index: int, states: Tensor, cell: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        config = self.config
        if index == 0 and config.scale_input:
            states = _normalised(states) / math.sqrt(2)
        embedded = self._of(self.emb, index)(tokens)
        if config.tie_gates and config.gates > 1:
            embedded = torch.cat([embedded] * config.gates, -1)
        mixed = self._of(self.proj, index)(states) + self._embedding_weight * embedded
        if config.kind == "mlp":
            return F.gelu(self._of(self.ln, index)(mixed)), None
        forget, enter, leave, candidate = mixed.chunk(config.gates, -1)
        entering = F.gelu(self._of(self.cell_ln, index)(candidate)) * enter.sigmoid()
        cell = entering if cell is None else cell * forget.sigmoid() + entering
        return F.gelu(self._of(self.state_ln, index)(cell)) * leave.sigmoid(), cell
