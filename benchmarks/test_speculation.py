"""What the benchmark of drafters adds up, over engines whose answers are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.speculation import COUNTS, PLAIN, Turns, engines_of, table
from benchmarks.speculation_models import PROMPT, Training, make_models, prompts_from

ANSWER = 5


class Scripted:
    """Answers each token with the one after it, and counts two drafts a turn by each drafter."""

    def __init__(self, seconds: float, *, drafts: bool, wrong: bool) -> None:
        self.seconds, self.drafts, self.wrong, self.turns = seconds, drafts, wrong, 0

    def turn(self, question: dict[str, Any]) -> dict[str, Any]:
        self.turns += 1
        count = question["count"]
        tokens = [[prompt[-1] + 1 + place for place in range(count)] for prompt in question["prompts"]]
        if self.wrong:
            tokens[0][-1] = -1
        answer: dict[str, Any] = {"seconds": 1.0 + self.seconds * (count - 1) * len(tokens), "tokens": tokens}
        if self.drafts:
            answer |= {name: self.turns * (1 + index) for index, name in enumerate(COUNTS)}
            answer["drafting"] = [1e-5, 3e-5, 2e-5]
        return answer


def test_times_drafts_and_answers_are_those_of_counted_turns() -> None:
    engines: Any = {
        PLAIN: Scripted(0.4, drafts=False, wrong=False),
        "suffix": Scripted(0.1, drafts=True, wrong=False),
        "LSTM": Scripted(0.2, drafts=True, wrong=True),
    }
    turns = Turns(engines, [1, 3], ANSWER)
    for number in range(-1, 2):
        for batch in (1, 3):
            turns.take([[7, 8]] * batch, list(engines), is_counted=number >= 0)
    turns.summarise()
    suffix, lstm = turns.found[3, "suffix"], turns.found[3, "LSTM"]
    assert suffix.seconds == pytest.approx([0.1, 0.1])
    assert suffix.facts["tokens"] == 2 * 3 * (ANSWER - 1)
    # Two rounds, each of a turn for the first token and one for all of them.
    assert [suffix.facts[name] for name in COUNTS] == [4 * (1 + index) for index in range(len(COUNTS))]
    assert suffix.facts["us_a_step"] == pytest.approx(20)
    assert suffix.facts["steps"] == 6
    assert (suffix.facts["same_answers"], suffix.facts["answers"]) == (6, 6)
    assert (lstm.facts["same_answers"], lstm.facts["answers"]) == (4, 6)
    line = next(line for line in table(turns.found).splitlines() if line.split()[:2] == ["3", "suffix"])
    # ms a token, plain / it, us a step; drafts, tokens and accepted tokens of both drafters; accepted a draft; answers
    assert line.split()[2:] == ["100.000", "4.00", "20", "20", "28", "36", "1.80", "6", "of", "6"]


def test_all_drafters_take_part_and_prompts_are_pieces_of_the_text(tmp_path: Path) -> None:
    engines = engines_of({name: tmp_path / name for name in ("target", "mlp", "lstm")})
    assert list(engines) == [PLAIN, "suffix", "MLP", "LSTM", "LSTM + suffix"]
    assert engines["MLP"]["speculative_config"]["model"] == str(tmp_path / "mlp")
    text = list(range(1000))
    prompts = prompts_from(text, 5, seed=1)
    assert all(prompt == text[prompt[0] : prompt[0] + PROMPT] for prompt in prompts)
    assert prompts != prompts_from(text, 5, seed=2)


def test_models_of_another_training_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text('{"target_steps": 3}')
    with pytest.raises(SystemExit, match="name another folder"):
        make_models(tmp_path, Training())
