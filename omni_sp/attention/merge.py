"""Merging attention over several blocks of keys into attention over all of them, in fp32, as in Ring Attention.

Shape suffixes: B batch, L query tokens, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Merger:
    """Merges partial attentions, each over other keys, by their log-sum-exp.

    A query that no key of any part may attend (LSE -inf in all of them) ends with output 0 and LSE -inf.
    """

    def __init__(self) -> None:
        self._out_BLHD: Tensor | None = None
        self._lse_BHL: Tensor | None = None

    def add(self, out_BLHD: Tensor, lse_BHL: Tensor, start: int = 0) -> None:
        """Merge one more partial attention. Both tensors belong to this object then, which may overwrite them.

        Args:
            out_BLHD: its output, (batch, tokens, heads, head_dim).
            lse_BHL: its log-sum-exp, (batch, heads, tokens) in fp32 (fp64 for fp64).
            start: it is of the query tokens from this one on. The first one added is of all of them.
        """
        if self._out_BLHD is None or self._lse_BHL is None:
            # A single partial attention stays as it is, bit for bit.
            self._out_BLHD, self._lse_BHL = out_BLHD, lse_BHL
            return
        if self._out_BLHD.dtype != lse_BHL.dtype:
            self._out_BLHD = self._out_BLHD.to(lse_BHL.dtype)
        merged_BLHD, merged_BHL = self._out_BLHD[:, start:], self._lse_BHL[:, :, start:]
        # A query without any key so far has the maximum -inf; taken as 0 there, its weights come out 0, its LSE -inf.
        # Every step here rounds alike wherever an element lies (unlike logaddexp and addcmul, whose vectorised and
        # scalar loops differ), so how heads are grouped changes no bit.
        top = torch.maximum(merged_BHL, lse_BHL)
        level = top.masked_fill(top == -torch.inf, 0)
        before, now = (merged_BHL - level).exp_(), (lse_BHL - level).exp_()
        total = before + now
        total.masked_fill_(total == 0, 1)
        before_BLH1, now_BLH1 = (x.div_(total).transpose(1, 2).unsqueeze(-1) for x in (before, now))
        merged_BLHD.mul_(before_BLH1).add_(out_BLHD.to(lse_BHL.dtype) * now_BLH1)
        merged_BHL.copy_(top + total.log_())

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The merged output, rounded once to ``dtype``, and the merged log-sum-exp."""
        if self._out_BLHD is None or self._lse_BHL is None:
            raise RuntimeError("nothing was added")
        return self._out_BLHD.to(dtype), self._lse_BHL
