"""Joining attention over parts of the keys into attention over all of them, in fp32."""

from __future__ import annotations

import torch


class Merger:
    """Adds up partial attentions by their log-sum-exp.

    A row whose partial results all saw no key (lse -inf everywhere) ends as output 0, lse -inf.
    """

    def __init__(self) -> None:
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, out: torch.Tensor, lse: torch.Tensor, start: int = 0) -> None:
        """Take in one part: ``out`` (batch, tokens, heads, head_dim) and ``lse`` (batch, heads, tokens) in fp32.

        The tensors become this object's own. The first part is of all tokens; a later one may be of those from
        ``start`` on.
        """
        if self._out is None or self._lse is None:
            # A single part stays as it is, bit for bit.
            self._out, self._lse = out, lse
            return
        if self._out.dtype != lse.dtype:
            self._out = self._out.to(lse.dtype)
        so_far, so_far_lse = self._out[:, start:], self._lse[:, :, start:]
        # A row that neither part attended has the maximum -inf; taken as 0 there, its weights come out 0, its LSE -inf.
        # Every step here rounds alike wherever an element lies (unlike logaddexp and addcmul, whose vectorised and
        # scalar loops differ), so how heads are grouped changes no bit.
        top = torch.maximum(so_far_lse, lse)
        level = top.masked_fill(top == -torch.inf, 0)
        before, now = (so_far_lse - level).exp_(), (lse - level).exp_()
        total = before + now
        total.masked_fill_(total == 0, 1)
        so_far.mul_(_per_token(before.div_(total))).add_(out.to(lse.dtype) * _per_token(now.div_(total)))
        so_far_lse.copy_(top + total.log_())

    def result(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything added so far, the output rounded once to ``dtype``."""
        if self._out is None or self._lse is None:
            raise RuntimeError("nothing was added")
        return self._out.to(dtype), self._lse


def _per_token(weight: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens) -> (batch, tokens, heads, 1), beside an output."""
    return weight.transpose(1, 2).unsqueeze(-1)
