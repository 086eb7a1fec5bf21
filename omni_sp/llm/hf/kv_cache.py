"""The keys and values that one rank holds."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenCache:
    """Keys and values of one rank's tokens in a generation, all heads of each layer.

    A layer's first write allocates memory for all tokens that this rank will ever hold: too little memory fails in the
    prefill, not in the middle of an answer, and nothing is copied as the answer grows.

    Attributes:
        length: number of tokens held, in the end ``capacity``.
        mask: (batch, length) bool, True = a real token; None where all are.
    """

    def __init__(self, num_layers: int, capacity: int, mask: Tensor | None) -> None:
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._capacity = capacity
        self.length = 0
        self.mask = mask

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(tensor.nbytes for layer in self._layers if layer is not None for tensor in layer)

    def extend(self, tokens: int, mask: Tensor | None = None) -> None:
        """Count the next tokens, which every layer writes afterwards. ``mask`` is (batch, tokens); None: no padding."""
        self.length += tokens
        assert self.length <= self._capacity, f"{self.length} tokens in a cache for {self._capacity}"
        if self.mask is not None:
            if mask is None:
                mask = self.mask.new_ones(self.mask.shape[0], tokens)
            self.mask = torch.cat([self.mask, mask], dim=1)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the newest tokens of a layer, (batch, tokens, kv_heads, head_dim)."""
        memory = self._layers[layer]
        if memory is None:
            shape = (key.shape[0], self._capacity, *key.shape[2:])
            memory = (key.new_empty(shape), value.new_empty(shape))
            self._layers[layer] = memory
        for stored, new in zip(memory, (key, value), strict=True):
            stored[:, self.length - new.shape[1] : self.length] = new

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens held, oldest first."""
        memory = self._layers[layer]
        assert memory is not None, "write() comes first"
        return memory[0][:, : self.length], memory[1][:, : self.length]
