"""Drafters inside vLLM against plain decoding: time per output token, accepted tokens, and what a step's draft costs.

python -m benchmarks.speculators --prepare models      # a tiny Llama of characters, an MLP and an LSTM for it: minutes
.venv-vllm/bin/python -m benchmarks.speculators --models models

The texts are source files of Python's library, of which the last twelve were not trained with. Each contender is an
engine of its own, on one rank; all run at once, and take turns in an order that changes from round to round. Requests
are answered one after the other, so that nothing but drafts makes a step longer than a token. Suffix decoding keeps no
answers for other requests here, since rounds repeat the prompts.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.interleaved import Timing, add_output_options, paired, report, take_turns, write
from omni_sp.llm.speculation import checkpoint
from training.speculator.data import Sequences
from training.speculator.evaluate import simulate
from training.speculator.settings import Settings
from training.speculator.train import train

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
HELD_OUT, LENGTH = 12, 128
SPECULATORS: tuple[Literal["mlp", "lstm"], ...] = ("mlp", "lstm")
SUFFIX = {"method": "arctic", "enable_suffix_decoding": True, "suffix_cache_max_requests": 0}


def texts() -> list[list[int]]:
    """Files of Python's library as ids of characters; what is none of them is a blank."""
    ids = {character: number for number, character in enumerate(CHARACTERS)}
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [[ids.get(one, 1) for one in file.read_text(encoding="utf8", errors="ignore")] for file in files]


def prepare(folder: Path, steps: int, threads: int) -> None:
    """Train the target, then a speculator of each kind for it, and save them below a folder."""
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    target = transformers.LlamaForCausalLM(config)
    data = torch.tensor([token for text in texts()[:-HELD_OUT] for token in text])
    optimizer = torch.optim.AdamW(target.parameters(), 3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    with tqdm(range(steps), desc="target", unit="step") as progress:
        for _ in progress:
            starts = torch.randint(len(data) - LENGTH, (8,)).tolist()
            batch = torch.stack([data[start : start + LENGTH] for start in starts])
            loss = F.cross_entropy(target(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    target = target.eval().requires_grad_(False)
    target.save_pretrained(folder / "target")
    pieces = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)
    chosen = pieces[torch.randperm(len(pieces))[: steps * 8]].tolist()
    unseen = Sequences([text[400 : 400 + LENGTH] for text in texts()[-HELD_OUT:]], [32] * HELD_OUT)
    for kind in SPECULATORS:
        settings = Settings(kind=kind, steps=steps, learning_rate=3e-3)
        speculator = train(target, Sequences(chosen, [0] * len(chosen)), settings)
        checkpoint.save(folder / kind, speculator.config, dict(speculator.named_parameters()))
        print(f"{kind}: {simulate(target, speculator, unseen)}", flush=True)


def time_drafter(worker: Any) -> None:
    """Let a worker's proposer note how long it takes."""
    proposer = worker.model_runner.drafter
    inner, proposer.seconds, proposer.calls = proposer.propose, 0.0, 0

    def propose(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        drafts = inner(*arguments, **named)
        proposer.seconds += time.perf_counter() - start
        proposer.calls += 1
        return drafts

    proposer.propose = propose


def drafter_times(worker: Any) -> tuple[float, int]:
    """Seconds and calls of a worker's proposer so far."""
    proposer = worker.model_runner.drafter
    return proposer.seconds, proposer.calls


def measure(models: Path, requests: int, tokens: int, rounds: int) -> dict[str, Timing]:
    """Start an engine for each contender, and let them take turns."""
    from vllm import SamplingParams

    from benchmarks.speculators import time_drafter  # by the module's own name, under which engines look it up
    from omni_sp.llm import LLM

    contenders: dict[str, dict[str, Any] | None] = {"plain": None, "suffix": SUFFIX}
    contenders |= {kind: {"method": "arctic", "model": str(models / kind)} for kind in SPECULATORS}
    contenders["lstm + suffix"] = SUFFIX | {"model": str(models / "lstm")}
    shared: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
    }
    engines = {
        name: LLM(str(models / "target"), speculative_config=options, **shared) for name, options in contenders.items()
    }
    for name, engine in engines.items():
        if contenders[name] is not None:
            engine.collective_rpc(time_drafter)
    prompts = [{"prompt_token_ids": text[400:500]} for text in texts()[-requests:]]
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    answers: dict[str, list[list[int]]] = {}

    def run(name: str) -> None:
        outputs = [engines[name].generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts]
        answers[name] = [list(output.outputs[0].token_ids) for output in outputs]

    seconds = take_turns({name: partial(run, name) for name in engines}, rounds, warmup=1)
    assert all(found == answers["plain"] for found in answers.values()), "drafts change no token"
    timings = {name: Timing([one / (requests * tokens) for one in seconds[name]]) for name in engines}
    for name, engine in engines.items():
        if contenders[name] is not None:
            timings[name].facts = _facts(engine, tokens * requests * (rounds + 1), requests * (rounds + 1))
    return timings


def _facts(engine: Any, tokens: int, requests: int) -> dict[str, Any]:
    """What drafts came to in an engine that has generated so many tokens in answer to so many requests."""
    from benchmarks.speculators import drafter_times

    metrics = {metric.name: metric for metric in engine.get_metrics()}
    by_place = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    drafted = metrics["vllm:spec_decode_num_draft_tokens"].value
    accepted = metrics["vllm:spec_decode_num_accepted_tokens"].value
    seconds, calls = engine.collective_rpc(drafter_times)[0]
    return {
        "drafts": metrics["vllm:spec_decode_num_drafts"].value,
        "draft_tokens": drafted,
        "accepted_tokens": accepted,
        "accepted_by_place": list(by_place)[:8],
        "tokens_a_step": (tokens - requests) / (tokens - requests - accepted),  # beside the one of the prompt's step
        "us_a_step": seconds / calls * 1e6,
        "drafts_by": {"suffix": engine.steps.drafts, "head": engine.steps.head_drafts},
    }


def main() -> None:
    """Prepare, or measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prepare", type=Path, metavar="DIR", help="train the models, and save them in DIR")
    what.add_argument("--models", type=Path, metavar="DIR", help="measure with the models in DIR")
    parser.add_argument("--steps", type=int, default=600, help="of each training (default: 600)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each training (default: 1)")
    parser.add_argument("--requests", type=int, default=6, help="requests of a round, at most 12 (default: 6)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of an answer (default: 96)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the one that warms up (default: 5)")
    add_output_options(parser)
    options = parser.parse_args()
    if options.prepare is not None:
        prepare(options.prepare, options.steps, options.threads)
        return
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions of this file are sent to the engines
    timings = measure(options.models.resolve(), options.requests, options.tokens, options.rounds)
    print(
        f"{'':16}{'ms a token':>11}{'/ plain':>9}{'tokens a step':>15}{'drafts':>8}{'accepted':>14}{'us a draft':>12}"
    )
    for name, timing in timings.items():
        line = f"{name:16}{timing.median * 1e3:>11.2f}{paired(timings, name, 'plain'):>9.2f}"
        if facts := timing.facts:
            accepted = f"{facts['accepted_tokens']} of {facts['draft_tokens']}"
            line += f"{facts['tokens_a_step']:>15.2f}{facts['drafts']:>8}{accepted:>14}{facts['us_a_step']:>11.0f}"
        print(line)
    chosen = {name: getattr(options, name) for name in ("requests", "tokens", "rounds")}
    results = {name: asdict(timing) | {"median": timing.median} for name, timing in timings.items()}
    report(write(options.output, "speculators", chosen, {"timings": results}))


if __name__ == "__main__":
    main()
