"""Which replica gets which inputs of a request: pure functions of what is under way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from omni_sp.llm.embedding.settings import LEAST_LOADED, RANDOM

_TOKENS_PER_INPUT = 16
"""What an input costs beside its tokens, in tokens: a server of vLLM spends about a millisecond on each."""
_MIN_PART = 256
"""Parts of fewer tokens are not worth a request of their own."""
_MAX_PART_INPUTS = 512
"""More inputs go in several requests: one answer's metadata is a single header, and a lost part is done again."""


class Part(NamedTuple):
    """Consecutive inputs of a request, for one replica.

    Attributes:
        replica: its index among the replicas that were given.
        start: the first input.
        end: the one after the last.
        cost: tokens, by estimate.
    """

    replica: int
    start: int
    end: int
    cost: int


def cost_of(entry: str | Sequence[int]) -> int:
    """About how many tokens an input costs, without a tokenizer: a list of ids is exact."""
    if not isinstance(entry, str):
        return _TOKENS_PER_INPUT + len(entry)
    # Four letters of ASCII make about a token; other scripts take more bytes and fewer letters.
    size = len(entry) // 4 if entry.isascii() else len(entry.encode("utf-8", "surrogatepass")) // 3
    return _TOKENS_PER_INPUT + size


def split(costs: Sequence[int], loads: Sequence[int], policy: str, turn: int) -> list[Part]:
    """Cut the inputs of one request into parts, in the inputs' order.

    Args:
        costs: tokens of each input; at least one.
        loads: tokens under way on each replica; at least one.
        policy: of EmbeddingSettings. With "least-loaded", parts fill the replicas up to a common level; otherwise they
            are equal.
        turn: number of the request: where "round-robin" begins.
    """
    total, num_replicas = sum(costs), len(loads)
    num_parts = min(num_replicas, max(1, total // _MIN_PART), len(costs))
    if policy == LEAST_LOADED:
        order = sorted(range(num_replicas), key=lambda index: loads[index])[:num_parts]
        level = _level(total, [loads[index] for index in order])
        wanted = [max(0.0, level - loads[index]) for index in order]
    else:
        order = [(turn + offset) % num_replicas for offset in range(num_replicas)]
        if policy == RANDOM:
            random.shuffle(order)
        order = order[:num_parts]
        wanted = [total / num_parts] * num_parts
    parts, sums = list[Part](), [0, *accumulate(costs)]
    start, target = 0, 0.0
    for index, tokens in zip(order, wanted, strict=True):
        target += tokens
        end = start
        # An input goes where its middle lies.
        while end < len(costs) and (sums[end] + sums[end + 1]) / 2 <= target:
            end += 1
        end = len(costs) if index == order[-1] else end
        for begin in range(start, end, _MAX_PART_INPUTS):
            stop = min(end, begin + _MAX_PART_INPUTS)
            parts.append(Part(index, begin, stop, sums[stop] - sums[begin]))
        start = end
    return parts


def is_ids(entry: Any) -> bool:
    """Is this a list of token ids, and not an empty one?"""
    return isinstance(entry, list) and set(map(type, entry)) == {int}


def _level(total: int, loads: Sequence[int]) -> float:
    """The height to which ``total`` fills the columns ``loads``, of which the lowest come first."""
    level, filled = 0.0, 0
    for count, load in enumerate(loads, 1):
        filled += load
        level = (total + filled) / count
        if count < len(loads) and level <= loads[count]:
            break
    return level
