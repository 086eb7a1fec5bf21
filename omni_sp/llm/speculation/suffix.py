"""What followed the last tokens of an answer before: in its own text, and in other answers (arXiv 2411.04975).

There is no tree. Tokens lie in flat arrays. Every place is linked to the place before it that has the same last two
tokens, and the same last one (hash chains, as LZ77 compressors keep them). A lookup walks the latest places of a chain,
measures how far each agrees backwards, and lets those that agree longest vote on what follows, then also shorter ones
while they could still score higher.

The functions are compiled where numba is importable, and then work on arrays. Else they are plain Python on lists.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from omni_sp.llm.speculation.settings import SpeculationSettings

try:
    import numba  # type: ignore[import-not-found, unused-ignore]  # vLLM brings it
except ImportError:
    numba = None

IS_COMPILED = numba is not None
PLACES = 64
"""A lookup looks at so many of the latest places."""
_MAX_TOKENS = 2**20
_FIRST_SIZE = 1024
# Rows of an index. Places are numbered from 1 on, 0 is none; the entry of a place is at its number modulo the row's
# length, a power of two. The heads of the chains are at hash values instead.
_TOKEN, _BEFORE, _AFTER, _LINK, _HEAD, _ROWS = 0, 1, 2, 3, 5, 7  # links and heads: of one token, and of two


def _compiled(function: Any) -> Any:
    if numba is None:
        return function
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder to cache in
        return numba.njit(nogil=True)(function)


@_compiled
def _hash(earlier: int, token: int, mask: int) -> int:
    key = earlier * 1000003 + token
    return (key ^ (key >> 15)) & mask


@_compiled
def _enter(index: Any, count: int, last: int, tokens: Any) -> None:
    """Write tokens at the places from ``count + 1`` on. ``last`` is the place that they follow, or 0."""
    text, before, after = index[_TOKEN], index[_BEFORE], index[_AFTER]
    size = len(text)
    for token in tokens:
        count += 1
        slot = count & (size - 1)
        if last + size <= count:
            last = 0  # overwritten
        text[slot], before[slot], after[slot] = token, last, 0
        heads = index[_HEAD]
        code = token & (size - 1)
        index[_LINK][slot] = heads[code]
        heads[code] = count
        if last > 0:
            after[last & (size - 1)] = count
            heads = index[_HEAD + 1]
            code = _hash(text[last & (size - 1)], token, size - 1)
            index[_LINK + 1][slot] = heads[code]
            heads[code] = count
        last = count


@_compiled
def _find(index: Any, floor: int, own: Any, count: int, gram: int, depth: int, scratch: Any) -> int:
    """The latest places from ``floor`` on after the same last ``gram`` tokens: numbers and lengths into the scratch."""
    text, before, after, link = index[_TOKEN], index[_BEFORE], index[_AFTER], index[_LINK + gram - 1]
    mine, mask, own_mask = own[_TOKEN], len(index[_TOKEN]) - 1, len(own[_TOKEN]) - 1
    token = mine[count & own_mask]
    code = token & mask if gram == 1 else _hash(mine[(count - 1) & own_mask], token, mask)
    place, found = index[_HEAD + gram - 1][code], 0
    while place >= floor and found < PLACES:
        slot = place & mask
        if after[slot] > 0:  # else nothing follows yet
            length, there, here = 0, place, count
            while length < depth and there >= floor and here > 0 and text[there & mask] == mine[here & own_mask]:
                length += 1
                there = before[there & mask]
                here -= 1
            if length >= gram:
                scratch[0][found], scratch[1][found] = place, length
                found += 1
        place = link[slot]
    return found


@_compiled
def _follow(index: Any, alive: int, room: int, least: float, scratch: Any) -> tuple[int, float]:
    """The commonest path from ``alive`` places in the scratch, its tokens into the scratch: length and score."""
    text, after, mask = index[_TOKEN], index[_AFTER], len(index[_TOKEN]) - 1
    places, path = scratch[2], scratch[3]
    length, share, score = 0, 1.0, 0.0
    while length < room:
        total = 0
        for number in range(alive):
            following = after[places[number] & mask]
            if following > 0:
                places[total] = following
                total += 1
        best, votes = -1, 0
        for number in range(total):  # the latest first, which wins where others are as common
            token = text[places[number] & mask]
            if token == best:
                continue
            same = 0
            for other in range(number, total):
                if text[places[other] & mask] == token:
                    same += 1
            if same > votes:
                best, votes = token, same
            if votes >= total - number - 1:
                break
        if votes == 0:
            break
        share *= votes / total
        if share < least:
            break
        path[length] = best
        length += 1
        score += share
        alive = 0
        for number in range(total):
            if text[places[number] & mask] == best:
                places[alive] = places[number]
                alive += 1
    return length, score


@_compiled
def _look(
    own: Any, count: int, shared: Any, floor: int, depth: int, most: int,
    factor: float, offset: float, least: float, scratch: Any,
) -> tuple[int, float]:  # fmt: skip
    """The best draft of the request's own text and the shared one, its tokens into the scratch: length and score."""
    size, score = 0, 0.0
    for gram in (2, 1):
        if size > 0 or count < gram or depth < gram:
            continue
        for is_shared in (False, True):
            index = shared if is_shared else own
            found = _find(index, floor if is_shared else 1, own, count, gram, depth, scratch)
            length = 0
            for number in range(found):
                length = max(length, scratch[1][number])
            while length > 0:
                room = min(most, int(length * factor + offset + 1e-6))
                if room <= score:
                    break  # no path of so few tokens scores higher
                alive, shorter = 0, 0
                for number in range(found):
                    if scratch[1][number] >= length:
                        scratch[2][alive] = scratch[0][number]
                        alive += 1
                    else:
                        shorter = max(shorter, scratch[1][number])
                steps, sum_of_shares = _follow(index, alive, room, least, scratch)
                if sum_of_shares > score:
                    size, score = steps, sum_of_shares
                    for step in range(steps):
                        scratch[4][step] = scratch[3][step]
                length = shorter
    return size, score


class Draft(NamedTuple):
    """Tokens that may come next, and how many of them are expected to be right."""

    tokens: list[int]
    score: float


class _Text:
    """The tokens of one request in an index of its own, which grows."""

    def __init__(self) -> None:
        self.index, self.count = _zeros(_ROWS, _FIRST_SIZE), 0
        self.shared_place = 0  # of its latest token in the shared index

    def extend(self, tokens: Any) -> None:
        size = len(self.index[0])
        if self.count + len(tokens) >= size:
            while size <= self.count + len(tokens):
                size *= 2
            earlier = self.index[_TOKEN][1 : self.count + 1]
            self.index = _zeros(_ROWS, size)
            _enter(self.index, 0, 0, earlier)
        _enter(self.index, self.count, self.count, tokens)
        self.count += len(tokens)


class SuffixIndex:
    """The texts of requests, and drafts of how each may go on.

    A draft comes from the request's own text, prompt included, or from the answers of all requests, whichever scores
    higher. Answers are entered as they grow. The oldest are forgotten: what is before the beginning of the answers to
    the latest ``max_requests`` requests, and before the latest ``max_tokens`` tokens.

    Args:
        settings: how drafts are made.
        max_tokens: the most tokens of answers that are kept for other requests; a power of two.
    """

    def __init__(self, settings: SpeculationSettings, *, max_tokens: int = _MAX_TOKENS) -> None:
        assert max_tokens & (max_tokens - 1) == 0, f"max_tokens={max_tokens} is no power of two"
        self._settings, self._texts = settings, dict[Hashable, _Text]()
        self._shared, self._count, self._max_tokens = _zeros(_ROWS, max_tokens), 0, max_tokens
        self._beginnings: deque[int] = deque(maxlen=settings.max_requests)
        self._scratch = _zeros(5, max(PLACES, settings.num_speculative_tokens))

    def warm_up(self) -> None:
        """Compile what is compiled at its first use, which takes seconds."""
        index = SuffixIndex(self._settings, max_tokens=PLACES)
        index.extend("", [1, 2, 1, 2])
        index.lookup([""], [1])

    def requests(self) -> list[Hashable]:
        """The requests that are known."""
        return list(self._texts)

    def length(self, request: Hashable) -> int:
        """The number of a request's tokens; 0 where it is unknown."""
        return self._texts[request].count if request in self._texts else 0

    def extend(self, request: Hashable, tokens: Sequence[int] | np.ndarray, *, is_answer: bool = True) -> None:
        """Append tokens to a request's text, which begins with its first ones.

        Args:
            request: a name of the request.
            tokens: the tokens.
            is_answer: other requests may be drafted from them.
        """
        values = _tokens(tokens)
        if not len(values):
            return
        text = self._texts.setdefault(request, _Text())
        text.extend(values)
        if not is_answer or not self._settings.max_requests:
            return
        if not text.shared_place:
            self._beginnings.append(self._count + 1)
        _enter(self._shared, self._count, text.shared_place, values)
        self._count += len(values)
        text.shared_place = self._count

    def lookup(self, requests: Iterable[Hashable], limits: Iterable[int]) -> list[Draft]:
        """A draft for each request, of at most so many tokens; empty where nothing agrees."""
        chosen, drafts = self._settings, list[Draft]()
        floor = max(1, self._count - self._max_tokens + 1, self._beginnings[0] if self._beginnings else self._count + 1)
        for request, limit in zip(requests, limits, strict=True):
            text = self._texts[request]
            size, score = _look(
                text.index, text.count, self._shared, floor, chosen.max_depth,
                min(limit, chosen.num_speculative_tokens), float(chosen.max_spec_factor),
                float(chosen.max_spec_offset), float(chosen.min_token_prob), self._scratch,
            )  # fmt: skip
            drafts.append(Draft([int(token) for token in self._scratch[4][:size]], float(score)))
        return drafts

    def drop(self, request: Hashable) -> None:
        """Forget a request's own text; its answer stays for others. Idempotent."""
        self._texts.pop(request, None)


def _zeros(rows: int, size: int) -> Any:
    return [[0] * size for _ in range(rows)] if numba is None else np.zeros((rows, size), np.int64)


def _tokens(tokens: Sequence[int] | np.ndarray) -> Any:
    values = np.asarray(tokens, np.int64)
    return values.tolist() if numba is None else values
