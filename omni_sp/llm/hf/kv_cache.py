"""Keys and values of the tokens that one rank holds."""

from __future__ import annotations

import torch


class TokenCache:
    """One rank's part of a generation's keys and values, all heads of them, layer after layer.

    Memory for all tokens that this rank will ever hold is taken when a layer first writes: what cannot fit fails in the
    prefill, not in the middle of an answer, and nothing is copied as the answer grows.

    Args:
        num_layers: layers of the model.
        capacity: tokens that this rank will come to hold.
        mask: (batch, 0) on the tokens' device, where some tokens are padding; else None.

    Attributes:
        length: tokens held. mask: (batch, length) bool, True = a real token; None where all are.
    """

    def __init__(self, num_layers: int, capacity: int, mask: torch.Tensor | None) -> None:
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers
        self._capacity = capacity
        self.length = 0
        self.mask = mask

    @property
    def num_bytes(self) -> int:
        """Memory taken for keys and values."""
        return sum(tensor.nbytes for layer in self._layers if layer is not None for tensor in layer)

    def extend(self, tokens: int, mask: torch.Tensor | None = None) -> None:
        """Make room for the next tokens; every layer writes them afterwards.

        Args:
            mask: (batch, tokens) bool; None where all are real.
        """
        self.length += tokens
        assert self.length <= self._capacity, f"{self.length} tokens in a cache for {self._capacity}"
        if self.mask is not None:
            if mask is None:
                mask = self.mask.new_ones(self.mask.shape[0], tokens)
            self.mask = torch.cat([self.mask, mask], dim=1)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put (batch, tokens, kv_heads, head_dim) into the newest places."""
        held = self._layers[layer]
        if held is None:
            shape = (key.shape[0], self._capacity, *key.shape[2:])
            held = (key.new_empty(shape), value.new_empty(shape))
            self._layers[layer] = held
        for memory, new in zip(held, (key, value), strict=True):
            memory[:, self.length - new.shape[1] : self.length] = new

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens held, oldest first."""
        held = self._layers[layer]
        assert held is not None, "write() comes first"
        return held[0][:, : self.length], held[1][:, : self.length]
