"""Drafts of the suffix index equal those of a search through all of the text, compiled and as plain Python."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from omni_sp.llm.speculation.settings import SpeculationSettings

SUFFIX = "omni_sp.llm.speculation.suffix"


def without_numba() -> ModuleType:
    """A copy of the module as it is where numba is not installed."""
    spec = importlib.util.find_spec(SUFFIX)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)
        spec.loader.exec_module(module)
    return module


PLAIN = without_numba()
HAS_NUMBA = importlib.util.find_spec("numba") is not None
MODULES = [
    pytest.param(PLAIN, id="lists"),
    pytest.param(
        importlib.import_module(SUFFIX) if HAS_NUMBA else None,
        id="numba",
        marks=pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed here"),
    ),
]


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> ModuleType:
    chosen: ModuleType = request.param
    return chosen


class Search:
    """The same drafts by comparing every place of every text.

    Texts are lists of (number, token); numbers count the tokens of all answers in the order in which they were entered.
    """

    def __init__(self, chosen: SpeculationSettings, max_tokens: int) -> None:
        self.chosen, self.max_tokens = chosen, max_tokens
        self.own: dict[str, list[int]] = {}
        self.answers: list[list[tuple[int, int]]] = []
        self.answer_of: dict[str, list[tuple[int, int]]] = {}
        self.count = 0

    def extend(self, request: str, tokens: Sequence[int], *, is_answer: bool = True) -> None:
        if not tokens:
            return
        self.own.setdefault(request, []).extend(tokens)
        if not is_answer or not self.chosen.max_requests:
            return
        if request not in self.answer_of:
            self.answer_of[request] = []
            self.answers.append(self.answer_of[request])
        for token in tokens:
            self.count += 1
            self.answer_of[request].append((self.count, token))

    def drop(self, request: str) -> None:
        self.own.pop(request, None)
        self.answer_of.pop(request, None)

    def lookup(self, request: str, limit: int) -> tuple[list[int], float]:
        own = self.own[request]
        kept = self.answers[len(self.answers) - self.chosen.max_requests :] if self.chosen.max_requests else []
        kept = self.answers if len(self.answers) <= self.chosen.max_requests else kept
        floor = max(kept[0][0][0] if kept else self.count + 1, self.count - self.max_tokens + 1)
        shared = [[token for token in answer if token[0] >= floor] for answer in self.answers]
        for gram in (2, 1):
            best: tuple[list[int], float] = [], 0.0
            if gram > self.chosen.max_depth:
                continue
            for texts in ([list(enumerate(own))], shared):
                found = self._best(texts, own, gram, limit)
                best = found if found[1] > best[1] else best
            if best[0]:
                break
        return best

    def _best(
        self, texts: list[list[tuple[int, int]]], own: list[int], gram: int, limit: int
    ) -> tuple[list[int], float]:
        places = []
        for text in texts:
            for end in range(1, len(text)):  # a token follows
                length = 0
                while (
                    length < min(self.chosen.max_depth, end, len(own)) and text[end - 1 - length][1] == own[-1 - length]
                ):
                    length += 1
                if length >= gram:
                    places.append((text[end - 1][0], length, [token for _, token in text[end:]]))
        places = sorted(places, reverse=True)[: PLAIN.PLACES]
        best: tuple[list[int], float] = [], 0.0
        for length in sorted({place[1] for place in places}, reverse=True):
            room = int(length * self.chosen.max_spec_factor + self.chosen.max_spec_offset + 1e-6)
            alive = [rest for _, own_length, rest in places if own_length >= length]
            path: list[int] = []
            share, score = 1.0, 0.0
            while len(path) < min(limit, self.chosen.num_speculative_tokens, room):
                alive = [rest for rest in alive if len(rest) > len(path)]
                votes = Counter(rest[len(path)] for rest in alive)  # counts in order, the latest first
                if not votes:
                    break
                token, count = votes.most_common(1)[0]
                share *= count / len(alive)
                if share < self.chosen.min_token_prob:
                    break
                path.append(token)
                score += share
                alive = [rest for rest in alive if rest[len(path) - 1] == token]
            if score > best[1]:
                best = path, score
        return best


TOKENS = st.lists(st.integers(0, 2), max_size=12)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["prompt", "answer", "drop"]), TOKENS), min_size=5, max_size=30
)


@pytest.mark.parametrize("implementation", MODULES)
@settings(max_examples=100, deadline=None)
@given(
    operations=OPERATIONS,
    depth=st.integers(1, 9),
    max_requests=st.sampled_from([0, 1, 2, 50]),
    max_tokens=st.sampled_from([8, 16, 128]),
    factor=st.sampled_from([0.5, 1.0, 2.0]),
    offset=st.sampled_from([-1.0, 0.0, 3.0]),
    least=st.sampled_from([0.0, 0.1, 0.4]),
)
def test_drafts_equal_those_of_a_search_through_all_of_the_text(
    implementation: ModuleType,
    operations: list[tuple[str, str, list[int]]],
    depth: int,
    max_requests: int,
    max_tokens: int,
    factor: float,
    offset: float,
    least: float,
) -> None:
    chosen = SpeculationSettings(
        num_speculative_tokens=6, max_depth=depth, max_requests=max_requests,
        max_spec_factor=factor, max_spec_offset=offset, min_token_prob=least,
    )  # fmt: skip
    index, search = implementation.SuffixIndex(chosen, max_tokens=max_tokens), Search(chosen, max_tokens)
    for request, what, tokens in operations:
        for one in (index, search):
            if what == "drop":
                one.drop(request)
            else:
                one.extend(request, tokens, is_answer=what == "answer")
        known = sorted(search.own)
        assert sorted(index.requests()) == known
        for draft, name in zip(index.lookup(known, [6] * len(known)), known, strict=True):
            expected = search.lookup(name, 6)
            assert (draft.tokens, draft.score) == (expected[0], pytest.approx(expected[1]))


def drafts(index: Any, *requests: str, limit: int = 32) -> list[list[int]]:
    return [draft.tokens for draft in index.lookup(requests, [limit] * len(requests))]


def test_a_repeated_text_is_drafted_up_to_the_limits(module: ModuleType) -> None:
    index = module.SuffixIndex(SpeculationSettings())
    text = list(range(100, 200))
    index.extend("a", text, is_answer=False)
    index.extend("a", text[:10])
    assert drafts(index, "a") == [text[10:20]]  # as many as agreed
    assert drafts(index, "a", limit=3) == [text[10:13]]
    index.extend("a", text[10:50])
    assert drafts(index, "a") == [text[50:82]]  # num_speculative_tokens


def test_more_places_than_are_looked_at_and_a_long_text(module: ModuleType) -> None:
    """The latest places vote: what followed most often before them counts no more."""
    index = module.SuffixIndex(SpeculationSettings())
    for _ in range(3000):
        index.extend("a", [1, 2, 3], is_answer=False)
    index.extend("a", [1, 2, 4] * module.PLACES, is_answer=False)
    index.extend("a", [9, 1, 2], is_answer=False)
    assert drafts(index, "a", limit=1) == [[4]]
    assert index.length("a") == 9000 + 3 * module.PLACES + 3


def test_answers_are_for_all_requests_as_they_grow_and_prompts_for_their_own(module: ModuleType) -> None:
    index = module.SuffixIndex(SpeculationSettings())
    index.extend("a", [1, 2, 3, 4, 5], is_answer=False)
    index.extend("a", [6, 7, 8])
    index.extend("b", [6, 7])
    index.extend("a", [9])
    index.extend("c", [1, 2])
    assert drafts(index, "b", "c") == [[8, 9], []]
    index.drop("a")
    index.drop("a")
    assert drafts(index, "b") == [[8, 9]]
    assert index.requests() == ["b", "c"]
    assert index.length("a") == 0


def test_answers_of_the_oldest_requests_and_the_oldest_tokens_are_forgotten(module: ModuleType) -> None:
    index = module.SuffixIndex(SpeculationSettings(max_requests=2))
    index.extend("a", [1, 2, 3, 4])
    index.extend("b", [1, 2])
    assert drafts(index, "b") == [[3, 4]]
    index.extend("c", [7])
    assert drafts(index, "b") == [[]]
    index = module.SuffixIndex(SpeculationSettings(), max_tokens=8)
    index.extend("a", [1, 2, 3, 4])
    index.extend("b", [1, 2])
    assert drafts(index, "b") == [[3, 4]]
    index.extend("c", [5, 6, 7])  # one place too many
    assert drafts(index, "b") == [[3]]  # one token before it is left, so one agrees
    index.extend("c", [8])
    assert drafts(index, "b") == [[]]
