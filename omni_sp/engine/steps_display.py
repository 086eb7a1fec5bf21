"""How far calls are, for people: a bar on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class StepsDisplay:
    """A bar over the denoising steps of one prompt, or over all prompts, on stderr; or nothing."""

    def __init__(
        self, shown: bool, number: int, num_prompts: int, *, caption: str = "denoising", unit: str = "step"
    ) -> None:
        self._shown, self._unit = shown, unit
        self._caption = f"prompt {number}/{num_prompts}" if num_prompts > 1 else caption
        self._bar: Any = None
        self.has_shown = False

    def show(self, done: int, total: int, note: str = "") -> None:
        """Draw ``done`` of ``total`` steps, and what takes long just now."""
        self.has_shown = True
        if not self._shown:
            return
        if self._bar is None or done < self._bar.n:
            self._end()
            self._bar = tqdm(total=total, desc=self._caption, unit=self._unit, file=sys.stderr)
        self._bar.set_postfix_str(note, refresh=bool(note))
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> StepsDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
