"""How many tokens of its prompts a pipeline drops, because its text encoders read no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from omni_sp.pipelines import quirks

_SETTINGS = ("add_special_tokens", "is_split_into_words", "split_special_tokens")
"""Arguments of a tokenizer that decide how many tokens a text has."""


class DroppedTokens:
    """Counts, while the block lasts, what tokenizers cut off, and what encode_prompt() cuts off after them.

    Tokenizers get a class of the same name whose ``__call__`` counts, and then their own back: a call looks for no
    attribute of the instance.

    Args:
        num_prompts: how many prompts the call has.
    """

    def __init__(self, pipe: Any, num_prompts: int) -> None:
        self._pipe = pipe
        self._prefix = _prefix_length(pipe)
        self._undo = ExitStack()
        self._dropped: tuple[dict[str, int], ...] = tuple({} for _ in range(num_prompts))
        # name, tokens of each text before and after the tokenizer's limit: since the last encode_prompt()
        self._pending: list[tuple[str, list[int], int]] = []

    def __enter__(self) -> DroppedTokens:
        for name, tokenizer in _tokenizers(self._pipe):
            self._undo.callback(setattr, tokenizer, "__class__", type(tokenizer))
            tokenizer.__class__ = self._counting_class(name, type(tokenizer))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def note_encoded(self, output: Any) -> None:
        """Take what encode_prompt() gave: the prompts' embeddings, which may be shorter than their tokens."""
        length = max(_lengths(output), default=0)
        for name, counts, limit in self._pending:
            # Without a template that is dropped, there is no telling what else a pipeline takes away.
            limit = min(limit, self._prefix + length) if self._prefix and length else limit
            self._add(name, [max(0, count - limit) for count in counts])
        self._pending.clear()

    def by_prompt(self) -> list[dict[str, int]]:
        """For each prompt, the tokenizers that dropped something -> the most tokens of one text that were dropped."""
        self.note_encoded(None)
        return [dict(counts) for counts in self._dropped]

    def _add(self, name: str, dropped: list[int]) -> None:
        for place, counts in enumerate(self._dropped):
            # A list of another length holds negative prompts, or one text several times: any may be meant.
            own = dropped[place : place + 1] if len(dropped) == len(self._dropped) else dropped
            most = max([counts.get(name, 0), *own])
            if most:
                counts[name] = most

    def _counting_class(self, name: str, base: Any) -> Any:
        def counting_call(tokenizer: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            if text is not None and kwargs.get("truncation") not in (None, False, "do_not_truncate"):
                settings = {key: kwargs[key] for key in _SETTINGS if key in kwargs}
                uncut = base.__call__(tokenizer, text, truncation=False, verbose=False, **settings)["input_ids"]
                counts = [len(ids) for ids in ([uncut] if isinstance(text, str) else uncut)]
                limit = kwargs.get("max_length")
                self._pending.append((name, counts, tokenizer.model_max_length if limit is None else limit))
            return base.__call__(tokenizer, text, *args, **kwargs)

        names = {"__call__": counting_call, "__module__": base.__module__, "__qualname__": base.__qualname__}
        return type(base.__name__, (base,), names)


def _tokenizers(pipe: Any) -> Iterator[tuple[str, Any]]:
    """The tokenizers of transformers among the components, and in their processors, each once, with their names."""
    from transformers import PreTrainedTokenizerBase

    seen: list[Any] = []
    for name, component in getattr(pipe, "components", {}).items():
        for part in (component, getattr(component, "tokenizer", None)):
            if isinstance(part, PreTrainedTokenizerBase) and not any(part is one for one in seen):
                seen.append(part)
                yield name, part


def _prefix_length(pipe: Any) -> int:
    """Tokens of a template that the pipeline drops from the beginning of what the text encoder gives."""
    found = getattr(pipe, quirks.TEMPLATE_PREFIX, 0)
    return max(found.values(), default=0) if isinstance(found, Mapping) else int(found)


def _lengths(output: Any) -> list[int]:
    """Tokens of each embedding (batch, tokens, features) in the output of encode_prompt()."""
    items = output if isinstance(output, (list, tuple)) else [output]
    return [one.shape[1] for one in items if isinstance(one, torch.Tensor) and one.ndim == 3]
