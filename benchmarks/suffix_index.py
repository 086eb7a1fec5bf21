"""Suffix decoding by itself, without a model: what a step costs this thread, and how many tokens a step gives.

python -m benchmarks.suffix_index                    # compiled where numba is importable (.venv-vllm/bin/python has it)
python -m benchmarks.suffix_index --no-exact --no-save

The texts are source files of Python's library, as a session that edits code has them: a third of the answers repeats
its prompt with changes, a third goes on with the file, a third repeats an earlier answer with changes. Tokens a step
are compared with those of an exact suffix tree: drafts from all places of all match lengths, not the latest 64. Times
are CPU times of the thread, the least of some rounds.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.interleaved import add_output_options, report, write
from benchmarks.speculation_models import WORD
from omni_sp.llm.speculation import suffix
from omni_sp.llm.speculation.settings import SpeculationSettings

PROMPT = 200
SETTINGS = SpeculationSettings()


class Stream(NamedTuple):
    """A prompt and the answer that the model would give, whatever is drafted."""

    prompt: list[int]
    answer: list[int]


def streams(number: int, length: int) -> list[Stream]:
    """Texts of token ids, from Python's library."""
    generator, ids = random.Random(0), dict[str, int]()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    generator.shuffle(files)
    found: list[Stream] = []
    for file in files:
        words = WORD.findall(file.read_text(encoding="utf8", errors="ignore"))
        if len(words) < length + PROMPT:
            continue
        start = generator.randrange(len(words) - length - PROMPT + 1)
        tokens = [ids.setdefault(word, len(ids)) for word in words[start : start + length + PROMPT]]
        kind = len(found) % 3
        if kind == 0:
            found.append(Stream(tokens, _changed(tokens[:length], len(ids), generator)))
        elif kind == 1:
            found.append(Stream(tokens[:PROMPT], tokens[PROMPT:]))
        else:
            earlier = _changed(found[-2].answer, len(ids), generator)
            found.append(Stream(tokens[:PROMPT], earlier[: length // 2] + tokens[PROMPT : PROMPT + length // 2]))
        if len(found) == number:
            break
    return found


def _changed(tokens: list[int], vocabulary: int, generator: random.Random) -> list[int]:
    changed = list(tokens)
    for _ in range(len(tokens) // 33):
        at, length = generator.randrange(len(changed)), generator.randrange(4)
        changed[at : at + generator.randrange(4)] = [generator.randrange(vocabulary) for _ in range(length)]
    return changed


class ExactTree:
    """What an exact suffix tree drafts: the votes of all places of every match length, in one text or all answers."""

    def __init__(self) -> None:
        self.own: dict[str, list[int]] = {}
        self.places: dict[str, dict[int, list[int]]] = {}
        self.extend("", [-1])  # answers, between separators

    def extend(self, request: str, tokens: list[int], *, is_answer: bool = False) -> None:
        """Append tokens; ``is_answer``: also to the answers of all."""
        text, places = self.own.setdefault(request, []), self.places.setdefault(request, defaultdict(list))
        if is_answer and not text:
            self.extend("", [-1])
        for token in tokens:
            text.append(token)
            places[token].append(len(text))
        if is_answer:
            self.extend("", tokens)

    def lookup(self, request: str, most: int) -> list[int]:
        """A draft."""
        own = self.own[request]
        return max((self._best(own, text) for text in (request, "")), key=lambda draft: draft[1])[0][:most]

    def _best(self, own: list[int], name: str) -> tuple[list[int], float]:
        text, found = self.own[name], list[tuple[int, int]]()
        for place in self.places[name][own[-1]]:
            length, limit = 1, min(SETTINGS.max_depth, len(own), place)
            while length < limit and text[place - 1 - length] == own[-1 - length]:
                length += 1
            if place < len(text):
                found.append((length, place))
        found.sort(reverse=True)
        best: tuple[list[int], float] = [], 0.0
        for length in sorted({length for length, _ in found}, reverse=True):
            room = min(SETTINGS.num_speculative_tokens, length)
            if room <= best[1]:
                break
            alive, path, share, score = [place for size, place in found if size >= length], list[int](), 1.0, 0.0
            while len(path) < room:
                at = len(path)
                alive = [place for place in alive if place + at < len(text) and text[place + at] >= 0]
                if not alive:
                    break
                token, votes = Counter(text[place + at] for place in alive).most_common(1)[0]
                share *= votes / len(alive)
                if share < SETTINGS.min_token_prob:
                    break
                path.append(token)
                score += share
                alive = [place for place in alive if text[place + at] == token]
            if score > best[1]:
                best = path, score
        return best


class _Ours:
    def __init__(self) -> None:
        self.index = suffix.SuffixIndex(SETTINGS)

    def extend(self, request: str, tokens: list[int], *, is_answer: bool = False) -> None:
        self.index.extend(request, tokens, is_answer=is_answer)

    def lookup(self, request: str, most: int) -> list[int]:
        return self.index.lookup([request], [most])[0].tokens


def tokens_a_step(index: Any, texts: list[Stream]) -> tuple[float, list[list[list[int]]]]:
    """Answer all texts one after the other: tokens a step, and the tokens of each step of each text."""
    steps = list[list[list[int]]]()
    for number, (prompt, answer) in enumerate(texts):
        name, at, draft = str(number), 0, list[int]()
        index.extend(name, prompt)
        steps.append([])
        while at < len(answer):
            accepted = 0
            while accepted < min(len(draft), len(answer) - at) and draft[accepted] == answer[at + accepted]:
                accepted += 1
            new = answer[at : at + accepted + 1]
            index.extend(name, new, is_answer=True)
            draft = index.lookup(name, SETTINGS.num_speculative_tokens)
            steps[-1].append(new)
            at += len(new)
    return sum(map(len, (one.answer for one in texts))) / sum(map(len, steps)), steps


def least(run: Callable[[], float], rounds: int) -> float:
    """The least of some rounds."""
    return min(run() for _ in range(rounds))


def seconds_of_steps(texts: list[Stream], steps: list[list[list[int]]]) -> float:
    """Seconds of all steps of one request after the other: extend and look up."""
    index, seconds = _Ours(), 0.0
    for number, (prompt, _) in enumerate(texts):
        name = str(number)
        index.extend(name, prompt)
        start = time.thread_time()
        for new in steps[number]:
            index.extend(name, new, is_answer=True)
            index.lookup(name, SETTINGS.num_speculative_tokens)
        seconds += time.thread_time() - start
    return seconds


def seconds_of_a_batch(texts: list[Stream], requests: int, steps: int) -> float:
    """Seconds of steps of many requests at once, a token each."""
    index = suffix.SuffixIndex(SETTINGS)
    names = [str(number) for number in range(requests)]
    for number, name in enumerate(names):
        index.extend(name, texts[number % len(texts)].prompt, is_answer=False)
    limits = [SETTINGS.num_speculative_tokens] * requests
    start = time.thread_time()
    for step in range(steps):
        for number, name in enumerate(names):
            index.extend(name, texts[number % len(texts)].answer[step : step + 1])
        index.lookup(names, limits)
    return time.thread_time() - start


def seconds_of_a_prompt(tokens: list[int]) -> float:
    """Seconds until a prompt is known."""
    index = suffix.SuffixIndex(SETTINGS)
    start = time.thread_time()
    index.extend("", tokens, is_answer=False)
    return time.thread_time() - start


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=24, help="number of texts (default: 24)")
    parser.add_argument("--length", type=int, default=1000, help="tokens of an answer (default: 1000)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the least time counts (default: 5)")
    parser.add_argument("--no-exact", action="store_true", help="leave the exact tree, which takes a minute")
    add_output_options(parser)
    options = parser.parse_args()
    texts = streams(options.texts, options.length)
    suffix.SuffixIndex(SETTINGS).warm_up()
    tokens, steps = tokens_a_step(_Ours(), texts)
    long = [token for text in streams(10_000, options.length) for token in text.prompt]
    long = (long * (1 + 100_000 // len(long)))[:100_000]
    results = {
        "compiled": suffix.IS_COMPILED,
        "tokens_a_step": tokens,
        "exact_tokens_a_step": None if options.no_exact else tokens_a_step(ExactTree(), texts)[0],
        "us_a_step": least(lambda: seconds_of_steps(texts, steps), options.repeats) / sum(map(len, steps)) * 1e6,
        "us_a_request_at_batch_64": least(lambda: seconds_of_a_batch(texts, 64, 100), options.repeats) / 6400 * 1e6,
        "ms_for_a_prompt_of_100k": least(lambda: seconds_of_a_prompt(long), options.repeats) * 1e3,
    }
    for name, value in results.items():
        print(f"{name:28}{value:10.3f}" if isinstance(value, float) else f"{name:28}{value!s:>10}")
    chosen = {name: getattr(options, name) for name in ("texts", "length", "repeats")}
    report(write(options.output, "suffix-index", chosen, results))


if __name__ == "__main__":
    main()
