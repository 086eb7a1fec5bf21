"""Texts to learn from, as sequences of token ids."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_sp.errors import InvalidInputError

__all__ = ["random_sequences", "read_sequences"]


def read_sequences(tokenizer: Any, files: Iterable[Path], length: int) -> Tensor:
    """Tokenise texts, put one after the other, and cut them into (sequences, length); the rest is left out.

    Args:
        tokenizer: The teacher's.
        files: Text files; or .jsonl, each line of which has "text", or "messages" for the chat template.
        length: Tokens of a sequence.

    Raises:
        InvalidInputError: A line has neither, or all texts together are shorter than one sequence.
    """
    ids: list[int] = []
    for text in (text for file in files for text in _texts(tokenizer, file)):
        ids += tokenizer(text, add_special_tokens=False).input_ids
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    if len(ids) < length:
        raise InvalidInputError(f"the texts have {len(ids)} tokens, fewer than one sequence of {length}")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def random_sequences(vocab_size: int, count: int, length: int, seed: int) -> Tensor:
    """(count, length) random token ids, to try the program without texts."""
    return torch.randint(vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))


def _texts(tokenizer: Any, file: Path) -> Iterator[str]:
    content = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(filter(str.strip, content.splitlines()), start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InvalidInputError(f"{file}, line {number}: no JSON ({error})") from error
        if isinstance(entry, dict) and isinstance(entry.get("text"), str):
            yield entry["text"]
        elif isinstance(entry, dict) and "messages" in entry:
            yield str(tokenizer.apply_chat_template(entry["messages"], tokenize=False))
        else:
            raise InvalidInputError(f'{file}, line {number}: neither "text" nor "messages"')
