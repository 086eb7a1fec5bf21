"""Sequences to learn from: the target's own answers, or a given text."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from omni_sp.errors import ConfigError

__all__ = ["Sequences", "answer", "batches", "load_answers", "random_prompts", "save_answers", "split_text"]

_IGNORED = -100  # what cross_entropy leaves out


class Sequences(NamedTuple):
    """Token ids, and where in each what is to be learnt begins.

    Args:
        tokens: Of each sequence.
        starts: The number of tokens of its prompt; 0 where all of it is text.
    """

    tokens: list[list[int]]
    starts: list[int]


def split_text(tokenizer: Any, files: Iterable[Path], length: int) -> Sequences:
    """Cut the text of files, one after the other, into sequences of ``length`` tokens; the rest of each is left out."""
    found = list[list[int]]()
    for file in files:
        ids = list(tokenizer(file.read_text(encoding="utf-8", errors="ignore"), add_special_tokens=False).input_ids)
        found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return Sequences(found, [0] * len(found))


def random_prompts(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens, for a target of which no text is at hand."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = torch.randint(vocab_size, (count, length), generator=generator).tolist()
    return prompts


@torch.no_grad()
def answer(
    target: Any, prompts: Sequence[Sequence[int]], max_tokens: int, *, temperature: float, batch_size: int, seed: int
) -> Sequences:
    """Let the target answer prompts.

    Args:
        target: A causal language model of transformers.
        prompts: Token ids.
        max_tokens: Of an answer, which ends earlier at an end token.
        temperature: 0 for the most likely tokens.
        batch_size: Prompts of one length that are answered at once.
        seed: Of the sampling.
    """
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    end = target.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    found = Sequences([], [])
    with tqdm(total=len(prompts), desc="answers", unit="prompt") as progress:
        for length, same in itertools.groupby(sorted(map(list, prompts), key=len), key=len):
            group = list(same)
            for first in range(0, len(group), batch_size):
                ids = torch.tensor(group[first : first + batch_size], device=target.device)
                rows = target.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, pad_token_id=0, **sampling
                )
                for row in rows.tolist():
                    stops = (place + 1 for place in range(length, len(row)) if row[place] in ends)
                    found.tokens.append(row[: next(stops, len(row))])
                    found.starts.append(length)
                progress.update(len(ids))
    return found


def save_answers(path: Path, sequences: Sequences) -> None:
    """Write one JSON object a line: the token ids of a prompt and of its answer."""
    lines = (
        json.dumps({"prompt": tokens[:start], "answer": tokens[start:]})
        for tokens, start in zip(*sequences, strict=True)
    )
    path.write_text("".join(f"{line}\n" for line in lines))


def load_answers(path: Path, vocab_size: int | None = None) -> Sequences:
    """What save_answers() wrote, or another program in the same form.

    Args:
        path: The file.
        vocab_size: Token ids are below it; None: whatever they are.

    Raises:
        ConfigError: A line has another form, or a token that the target does not know.
    """
    found = Sequences([], [])
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, tokens = row["prompt"], row["prompt"] + row["answer"]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f'{path}, line {number}: no {{"prompt": [...], "answer": [...]}} ({error!r})') from error
        if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
            raise ConfigError(f"{path}, line {number}: prompt and answer are lists of token ids")
        if vocab_size is not None and max(tokens, default=0) >= vocab_size:
            raise ConfigError(f"{path}, line {number}: token {max(tokens)}, and the target knows {vocab_size}")
        found.tokens.append(tokens)
        found.starts.append(len(prompt))
    return found


def batches(
    sequences: Sequences, batch_size: int, length: int, least: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: (batch, longest) token ids, and the same as labels.

    Padding follows a sequence, so that the target, which looks back only, needs no mask; it and prompts are no labels.
    Sequences of more than ``length`` tokens are cut where they end, those of fewer than ``least`` left out.
    """
    usable = [(tokens[:length], start) for tokens, start in zip(*sequences, strict=True) if len(tokens) >= least]
    usable = [(tokens, start) for tokens, start in usable if start < len(tokens)]
    if not usable:
        raise SystemExit(f"no sequence has {least} tokens or more, of which the last are no prompt's: give more text")
    while True:
        order = torch.randperm(len(usable), generator=generator).tolist()
        for first in range(0, len(order), batch_size):
            chosen = [usable[index] for index in order[first : first + batch_size]]
            longest = max(len(tokens) for tokens, _ in chosen)
            ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
            labels = torch.full_like(ids, _IGNORED)
            for row, (tokens, start) in enumerate(chosen):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
            yield ids, labels
