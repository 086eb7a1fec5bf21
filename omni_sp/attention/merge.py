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
        together = torch.logaddexp(so_far_lse, lse)
        # -inf - -inf is nan: rows that nothing attended keep weight 0.
        nothing = together == -torch.inf
        before = (so_far_lse - together).masked_fill_(nothing, -torch.inf).exp_()
        now = (lse - together).masked_fill_(nothing, -torch.inf).exp_()
        so_far.mul_(_per_row(before)).addcmul_(out.to(lse.dtype), _per_row(now))
        so_far_lse.copy_(together)

    def result(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything added so far, the output rounded once to ``dtype``."""
        if self._out is None or self._lse is None:
            raise RuntimeError("nothing was added")
        return self._out.to(dtype), self._lse


def _per_row(weight: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens) -> (batch, tokens, heads, 1), beside an output."""
    return weight.transpose(1, 2).unsqueeze(-1)
