"""Drafters inside vLLM against plain decoding: suffix decoding, an MLP, an LSTM, and the LSTM beside suffix decoding.

python -m benchmarks.speculation                    # in .venv-vllm (`make install-vllm`)
python -m benchmarks.speculation --rounds 2 --answer 32 --no-save

A small Llama goes on with Python source that it has not learnt; it and the speculators are trained first, for some
minutes, into the folder --models, which later runs use again (benchmarks.speculation_models). All five engines run
eagerly on one core, in float32. They answer the same prompts greedily, new ones in every round, in turns in a random
order, while the others are stopped. An answer that is not plain decoding's is counted: there should be none but where
two tokens are as likely as float32 can tell. Time for each output token is that of all tokens after the first ones.
Time a step is that of vLLM's call of the proposer, on rank 0's wall clock.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.interleaved import Timing, add_output_options, paired, report, save
from benchmarks.llm import Engine
from benchmarks.speculation_models import PROMPT, SIZES, Training, make_models, prompts_from, source_text

PLAIN = "plain"
COUNTS = (
    "drafts", "draft_tokens", "accepted_tokens", "head_drafts", "head_draft_tokens", "head_accepted_tokens"
)  # fmt: skip


def engines_of(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The options of each engine, by name."""
    mlp, lstm = ({"method": "arctic", "model": str(folders[kind])} for kind in ("mlp", "lstm"))
    drafters: dict[str, dict[str, Any]] = {
        "suffix": {"method": "suffix"},
        "MLP": mlp,
        "LSTM": lstm,
        "LSTM + suffix": {**lstm, "enable_suffix_decoding": True},
    }
    return {PLAIN: {}, **{name: {"speculative_config": config} for name, config in drafters.items()}}


class Turns:
    """What the engines took and drafted, by how many requests there were at once, and engine.

    Args:
        engines: that run.
        batches: numbers of requests at once.
        answer: tokens of an answer.
    """

    def __init__(self, engines: dict[str, Engine], batches: list[int], answer: int) -> None:
        self._engines, self._answer = engines, answer
        self._before = {name: dict.fromkeys(COUNTS, 0) for name in engines}
        self._steps: dict[tuple[int, str], list[float]] = {(batch, name): [] for batch in batches for name in engines}
        self.found = {
            key: Timing(facts=dict.fromkeys((*COUNTS, "tokens", "same_answers", "answers"), 0)) for key in self._steps
        }

    def take(self, prompts: list[list[int]], order: list[str], *, is_counted: bool) -> None:
        """Let each engine answer these prompts, all at once."""
        answers: dict[str, list[list[int]]] = {}
        for name in order:
            engine, key = self._engines[name], (len(prompts), name)
            first = engine.turn({"prompts": prompts, "count": 1})
            whole = engine.turn({"prompts": prompts, "count": self._answer})
            answers[name] = whole["tokens"]
            before, self._before[name] = self._before[name], {count: whole.get(count, 0) for count in COUNTS}
            if not is_counted:
                continue
            own = self.found[key]
            tokens = len(prompts) * (self._answer - 1)
            own.seconds.append((whole["seconds"] - first["seconds"]) / tokens)
            own.facts["tokens"] += tokens
            for count in COUNTS:
                own.facts[count] += self._before[name][count] - before[count]
            self._steps[key] += whole.get("drafting", [])
        for name in order if is_counted else []:
            facts = self.found[len(prompts), name].facts
            facts["answers"] += len(prompts)
            facts["same_answers"] += sum(map(list.__eq__, answers[name], answers[PLAIN]))

    def summarise(self) -> None:
        """Add to the facts the steps of drafting, and the median of their times."""
        for key, steps in self._steps.items():
            if steps:
                self.found[key].facts |= {"steps": len(steps), "us_a_step": statistics.median(steps) * 1e6}


def table(found: dict[tuple[int, str], Timing]) -> str:
    """A line for each number of requests and engine."""
    lines = [
        f"{'requests':>8} {'':14}{'ms a token':>11}{'plain / it':>11}{'us a step':>10}{'drafts':>8}{'tokens':>8}"
        f"{'accepted':>9}{'a draft':>8}{'same answers':>14}"
    ]
    for (batch, name), own in found.items():
        facts = own.facts
        ratio = paired({other: found[batch, other] for other in (PLAIN, name)}, PLAIN, name)
        drafts, tokens, accepted = (facts[count] + facts[f"head_{count}"] for count in COUNTS[:3])
        drafting = f"{facts['us_a_step']:>10.0f}" if "us_a_step" in facts else f"{'':10}"
        lines.append(
            f"{batch:>8} {name:14}{own.median * 1e3:>11.3f}{ratio:>11.2f}{drafting}{drafts:>8}{tokens:>8}{accepted:>9}"
            f"{accepted / max(1, drafts):>8.2f}{facts['same_answers']:>7} of {facts['answers']}"
        )
        if facts["drafts"] and facts["head_drafts"]:
            for by, prefix in (("of the LSTM", "head_"), ("of suffix", "")):
                drafts, tokens, accepted = (facts[f"{prefix}{count}"] for count in COUNTS[:3])
                share = accepted / max(1, drafts)
                lines.append(f"{'':8}   {by:34}{'':10}{drafts:>8}{tokens:>8}{accepted:>9}{share:>8.2f}")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, measure, print a table, write JSON."""
    usual = Training()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="(default: 9)")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8], metavar="N", help="at once (default: 1 8)")
    parser.add_argument("--answer", type=int, default=96, metavar="TOKENS", help="of an answer (default: 96)")
    parser.add_argument(
        "--models",
        type=Path,
        default=Path("results/speculation-models"),
        metavar="FOLDER",
        help="where the trained models are kept (default: results/speculation-models)",
    )
    for name, value in usual._asdict().items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=value, metavar="N", help=f"of the training (default: {value})")
    parser.add_argument("--train-only", action="store_true", help="end when the models are trained")
    add_output_options(parser)
    options = parser.parse_args()
    if min(options.rounds, *options.requests, options.answer - 1) < 1 or max(options.requests) > 8:
        parser.error("--rounds is 1 or more, --requests are from 1 to 8, and --answer is 2 or more")
    if PROMPT + options.answer > SIZES["max_position_embeddings"]:
        parser.error(f"prompts of {PROMPT} tokens and --answer are at most {SIZES['max_position_embeddings']} tokens")
    training = Training(**{name: getattr(options, name) for name in usual._asdict()})
    folders = make_models(options.models, training)
    if not options.train_only:
        measure(folders, training, options)


def measure(folders: dict[str, Path], training: Training, options: argparse.Namespace) -> None:
    """Run the engines in turns."""
    text, engines = source_text().others, dict[str, Engine]()
    try:
        for name, own in engines_of(folders).items():
            print(f"starting {name}", flush=True)
            engines[name] = Engine(folders["target"], {"max_model_len": SIZES["max_position_embeddings"], **own})
        turns = Turns(engines, options.requests, options.answer)
        for number in tqdm(range(-1, options.rounds), desc="rounds, the first to warm up"):
            for batch in options.requests:
                prompts = prompts_from(text, batch, seed=1000 * number + batch)
                order = random.Random(1000 * number + batch).sample(list(engines), len(engines))
                turns.take(prompts, order, is_counted=number >= 0)
        turns.summarise()
    finally:
        for engine in engines.values():
            engine.close()
    print(table(turns.found))
    settings = {
        "model": SIZES,
        "training": training._asdict(),
        **{name: getattr(options, name) for name in ("rounds", "requests", "answer")},
    }
    saved = {f"{name}, {batch} at once": timing for (batch, name), timing in turns.found.items()}
    report(save(options.output, "speculation", settings, saved))


if __name__ == "__main__":
    main()
