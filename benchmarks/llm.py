"""A language model inside vLLM: stock tensor parallelism against sequence parallelism and shift parallelism.

python -m benchmarks.llm --prompts 128 512 2048           # time to the first token, to those after it, and throughput
python -m benchmarks.llm --engines "TP2 compiled" "SP2 compiled" SP2       # the same of others, the first in ratios
python -m benchmarks.llm --quality     # log-likelihood of a text and memory of a rank, whichever way it is computed
python -m benchmarks.llm --swiftkv     # time to the first token of a Llama, and of a SwiftKV model of the same size

Needs vLLM (`make install-vllm`, then .venv-vllm/bin/python). Every engine is loaded once. The engines take turns in a
random order in each round, and the others are stopped (SIGSTOP) meanwhile, so that none takes another's cores. The
model is a small Llama with random weights: time and bytes are compared, not its answers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.interleaved import Timing, add_output_options, paired, report, save
from benchmarks.lifetimes import TurnProgram

ENGINES: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_parallel_size": 2},
    "SP2": {"ulysses_sequence_parallel_size": 2},
    "shift": {"ulysses_sequence_parallel_size": 2, "enable_shift_parallel": True},
    "TP2 compiled": {"tensor_parallel_size": 2, "enforce_eager": False},
    "SP2 compiled": {"ulysses_sequence_parallel_size": 2, "enforce_eager": False},
}
DEFAULT_ENGINES = ["TP2", "SP2", "shift"]
QUALITY: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": ENGINES["TP2"],
    "SP2": ENGINES["SP2"],
    "TP2 SP2": {"tensor_parallel_size": 2, "ulysses_sequence_parallel_size": 2},
    "shift": ENGINES["shift"],
    "TP2 shift": {**ENGINES["shift"], "tensor_parallel_size": 2},
}
MODEL = {
    "vocab_size": 2048,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
SWIFTKV_EARLY = 4  # layers of the same Llama that keep keys and values of their own
ANSWER = 33
FIGURES = FIRST, AFTER, SEVERAL = "first", "each after", "several at once"
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Engine(TurnProgram):
    """An engine of vLLM in a program of its own."""

    def __init__(self, model: Path, options: dict[str, Any]) -> None:
        options = {"model": str(model), **options}
        command = [sys.executable, "-m", "benchmarks.llm", "--engine", json.dumps(options)]
        super().__init__(command, _ENVIRONMENT)


def engine_main(options: dict[str, Any]) -> None:
    """The engine's own process: questions on stdin, answers on stdout."""
    from vllm import SamplingParams

    # By the module's own name: vLLM's processes look these functions up there.
    from benchmarks.llm import count_bytes, read_bytes, read_drafting, time_drafting
    from omni_sp.llm import LLM
    from omni_sp.testing.models import memory_of_rank

    speculates = "speculative_config" in options
    llm = LLM(
        dtype="float32", skip_tokenizer_init=True, max_num_batched_tokens=8192, max_num_seqs=8,
        enable_prefix_caching=False, **{"max_model_len": 8192, "enforce_eager": True, **options},
    )  # fmt: skip
    llm.apply_model(count_bytes)
    if speculates:
        llm.collective_rpc(time_drafting)
    print("answer {}", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
        params = SamplingParams(
            temperature=0.0, max_tokens=question["count"], ignore_eos=True, detokenize=False,
            prompt_logprobs=0 if question.get("likelihood") else None,
        )  # fmt: skip
        llm.apply_model(read_bytes)
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - began
        answer: dict[str, Any] = {"seconds": took, "bytes": llm.apply_model(read_bytes)[0]}
        answer["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
        if speculates:
            answer["drafting"] = llm.collective_rpc(read_drafting)[0]
        if question.get("likelihood"):
            entries = zip(question["prompts"][0][1:], outputs[0].prompt_logprobs[1:], strict=True)
            answer["likelihood"] = sum(table[token].logprob for token, table in entries)
            answer["memory"] = llm.apply_model(memory_of_rank)
        if llm.steps is not None:
            answer |= llm.steps._asdict()
        print("answer", json.dumps(answer), flush=True)


def count_bytes(model: Any) -> None:
    """In a rank: count the bytes of every all-reduce of a layer, as a ring of the ranks sends them."""
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.linear import RowParallelLinear

    ranks = get_tensor_model_parallel_world_size()
    model._reduced_bytes = 0

    def count(_linear: Any, _args: Any, output: Any) -> None:
        shift_parallel = getattr(model, "_shift_parallel", None)
        if ranks > 1 and (shift_parallel is None or not shift_parallel._step.is_ulysses):
            model._reduced_bytes += output[0].nbytes * 2 * (ranks - 1) // ranks

    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            module.register_forward_hook(count)


def read_bytes(model: Any) -> float:
    """In a rank: bytes that it sent, per layer, since the last call."""
    total = model._reduced_bytes
    model._reduced_bytes = 0
    shift_parallel = getattr(model, "_shift_parallel", None)
    if shift_parallel is not None:
        traffic = shift_parallel._axis.traffic
        total += traffic.bytes.get("exchange", 0)
        traffic.reset()
    return float(total / len(model.model.layers))


def time_drafting(worker: Any) -> None:
    """In a rank: time every call of the proposer from now on."""
    drafter = worker.model_runner.drafter
    propose, drafter.seconds = drafter.propose, []

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        drafts = propose(*arguments, **named)
        drafter.seconds.append(time.perf_counter() - began)
        return drafts

    drafter.propose = timed


def read_drafting(worker: Any) -> list[float]:
    """In a rank: seconds of each call of the proposer since the last call of this."""
    drafter = worker.model_runner.drafter
    seconds: list[float] = drafter.seconds
    drafter.seconds = []
    return seconds


def make_model(folder: Path) -> None:
    """A small Llama with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL)).save_pretrained(folder)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048], metavar="TOKENS")
    parser.add_argument("--engines", nargs="+", default=DEFAULT_ENGINES, choices=ENGINES, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--quality", action="store_true", help="compare log-likelihoods instead")
    parser.add_argument("--swiftkv", action="store_true", help="compare a model with one whose prompts skip layers")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.engine:
        engine_main(json.loads(options.engine))
        return
    with tempfile.TemporaryDirectory(prefix="omni-sp-llm-") as folder:
        make_model(Path(folder))
        if options.quality:
            quality(Path(folder), options.output)
        elif options.swiftkv:
            swiftkv(Path(folder), options.prompts, options.rounds, options.output)
        else:
            speed(Path(folder), options.engines, options.prompts, options.rounds, options.output)


def speed(model: Path, names: list[str], lengths: list[int], rounds: int, output: Path | None) -> None:
    """Time to the first token, seconds a token after it, and tokens a second of several requests at once."""
    engines: dict[str, Engine] = {}
    found = {(what, length, name): Timing() for what in FIGURES for length in lengths for name in names}
    try:
        for name in names:
            print(f"starting {name}", flush=True)
            engines[name] = Engine(model, ENGINES[name])
        for number in tqdm(range(-1, rounds), desc="rounds, the first to warm up"):
            for length in lengths:
                prompts = prompts_of(length)
                for name in random.Random(1000 * number + length).sample(names, len(names)):
                    first = engines[name].turn({"prompts": prompts[:1], "count": 1})
                    whole = engines[name].turn({"prompts": prompts[:1], "count": ANSWER})
                    several = engines[name].turn({"prompts": prompts, "count": ANSWER})
                    if number < 0:
                        continue
                    after = (whole["seconds"] - first["seconds"]) / (ANSWER - 1)
                    for what, seconds in zip(FIGURES, (first["seconds"], after, several["seconds"]), strict=True):
                        found[what, length, name].seconds.append(seconds)
                    found[FIRST, length, name].facts["bytes_per_layer"] = first["bytes"]
                    found[FIRST, length, name].facts["threshold"] = first.get("threshold", -1)
    finally:
        for engine in engines.values():
            engine.close()
    versus = f"{names[0]} / it"
    print(
        f"prompt       engine  first token s  {versus}  KiB a layer  s a token  {versus}  requests  tokens/s  {versus}"
    )
    for length in lengths:
        num_requests = len(prompts_of(length))
        for name in names:
            own = {what: found[what, length, name] for what in FIGURES}
            all_of = {what: {other: found[what, length, other] for other in names} for what in FIGURES}
            ratio = {
                what: f"{paired(timings, names[0], name):>{1 + len(versus)}.2f}" for what, timings in all_of.items()
            }
            tokens_per_s = num_requests * (length + ANSWER) / own[SEVERAL].median
            print(
                f"{length:>6} {name:>12} {own[FIRST].median:>14.3f} {ratio[FIRST]} "
                f"{own[FIRST].facts['bytes_per_layer'] / 1024:>12.0f} {own[AFTER].median:>10.4f} {ratio[AFTER]} "
                f"{num_requests:>9} {tokens_per_s:>9.0f} {ratio[SEVERAL]}"
            )
    settings = {"model": MODEL, "engines": {name: ENGINES[name] for name in names}, "answer": ANSWER}
    settings |= {"prompts": lengths, "rounds": rounds}
    saved = {f"{name}, {length} tokens, {what}": timing for (what, length, name), timing in found.items()}
    more = "" if names == DEFAULT_ENGINES else "-" + "-".join(names).replace(" ", "-").lower()
    report(save(output, f"llm-speed{more}", settings, saved))


def prompts_of(length: int) -> list[list[int]]:
    """The prompts of a length that are sent at once."""
    count = max(1, min(8, 4096 // length))
    draw = random.Random(length)
    return [draw.choices(range(3, MODEL["vocab_size"]), k=length) for _ in range(count)]


def quality(model: Path, output: Path | None) -> None:
    """The log-likelihood of one sequence, computed by every engine, and the memory of a rank."""
    sequence = random.Random(1).choices(range(3, MODEL["vocab_size"]), k=301)
    timings: dict[str, Timing] = {}
    print("Matrices that vLLM packs for the CPU cannot be counted; those that the shift looks at are not packed.")
    print("           log-likelihood  / TP1 - 1   MiB of matrices  by formula   KV bytes a token  by formula")
    for name, options in QUALITY.items():
        engine = Engine(model, options)
        try:
            found = engine.turn({"prompts": [sequence], "count": 1, "likelihood": True})
        finally:
            engine.close()
        value, memory = found["likelihood"], found["memory"]
        most = {what: max(rank[what] for rank in memory) for what in memory[0]}
        matrices, kv_bytes = by_formula(options)
        counted = most["matrices"] / 2**20 or "packed"
        timings[name] = Timing(
            facts={"log_likelihood": value, **most, "matrices_formula": matrices, "kept_formula": kv_bytes}
        )
        print(
            f"{name:>9} {value:>15.6f} {value / timings['TP1'].facts['log_likelihood'] - 1:>+11.1e} "
            f"{counted:>17} {matrices / 2**20:>11.2f} {most['kept_per_token']:>18} {kv_bytes:>11}",
            flush=True,
        )
    report(save(output, "llm-quality", {"model": MODEL, "engines": QUALITY, "tokens": len(sequence)}, timings))


def swiftkv(model: Path, lengths: list[int], rounds: int, output: Path | None) -> None:
    """Time to the first token of one rank, and how many tokens the late layers see, beside what the sizes say."""
    from omni_sp.llm.swiftkv.config import LlamaSwiftKVConfig
    from omni_sp.llm.swiftkv.reference import LlamaSwiftKVForCausalLM

    config = LlamaSwiftKVConfig(**MODEL, num_key_value_layers=SWIFTKV_EARLY, key_value_group_size=1)
    LlamaSwiftKVForCausalLM(config).save_pretrained(model / "swiftkv")
    engines: dict[str, Engine] = {}
    found = {(length, name): Timing() for length in lengths for name in ("Llama", "SwiftKV")}
    try:
        for name, folder in (("Llama", model), ("SwiftKV", model / "swiftkv")):
            engines[name] = Engine(folder, {})
        before = dict.fromkeys(("early_tokens", "late_tokens"), 0)
        for number in tqdm(range(-1, rounds), desc="rounds, the first to warm up"):
            for length in lengths:
                for name in random.Random(1000 * number + length).sample(list(engines), len(engines)):
                    answer = engines[name].turn({"prompts": prompts_of(length)[:1], "count": 1})
                    own = found[length, name]
                    if name == "SwiftKV":
                        own.facts |= {count: answer[count] - before[count] for count in before}
                        before = {count: answer[count] for count in before}
                    if number >= 0:
                        own.seconds.append(answer["seconds"])
    finally:
        for engine in engines.values():
            engine.close()
    print("prompt  Llama s  SwiftKV s  Llama / it  by work  tokens through early, late layers")
    for length in lengths:
        pair = {name: found[length, name] for name in ("Llama", "SwiftKV")}
        facts = pair["SwiftKV"].facts
        facts["by_work"] = work(length, 0) / work(length, MODEL["num_hidden_layers"] - SWIFTKV_EARLY)
        print(
            f"{length:>6} {pair['Llama'].median:>8.3f} {pair['SwiftKV'].median:>10.3f} "
            f"{paired(pair, 'Llama', 'SwiftKV'):>11.2f} {facts['by_work']:>8.2f} "
            f"{facts['early_tokens']:>9}, {facts['late_tokens']}"
        )
    settings = {"model": MODEL, "early_layers": SWIFTKV_EARLY, "prompts": lengths, "rounds": rounds}
    report(
        save(
            output, "llm-swiftkv", settings, {f"{name}, {length} tokens": own for (length, name), own in found.items()}
        )
    )


def work(tokens: int, late: int) -> int:
    """Multiply-adds of the decoder for a prompt and its first token; so many layers are late ones of SwiftKV."""
    hidden, heads, layers = MODEL["hidden_size"], MODEL["num_attention_heads"], MODEL["num_hidden_layers"]
    keys = 2 * hidden * MODEL["num_key_value_heads"] * hidden // heads
    others = 2 * hidden * hidden + 3 * hidden * MODEL["intermediate_size"]
    whole = tokens * (keys + others) + tokens * (tokens + 1) * hidden
    last = tokens * keys + others + 2 * tokens * hidden  # keys and values of all tokens, the rest of the last one
    return (layers - late) * whole + late * last


def by_formula(options: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the decoder's matrices on a rank, 1/T of them, and of a token's keys and values, 1/(T · S) of them."""
    tensor, sequence = options.get("tensor_parallel_size", 1), options.get("ulysses_sequence_parallel_size", 1)
    hidden, layers, kv_heads = MODEL["hidden_size"], MODEL["num_hidden_layers"], MODEL["num_key_value_heads"]
    head_dim = hidden // MODEL["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv_heads * head_dim + 3 * hidden * MODEL["intermediate_size"]
    kv_numbers = 2 * max(1, kv_heads // (tensor * sequence)) * head_dim
    return layers * layer * 4 // tensor, layers * kv_numbers * 4


if __name__ == "__main__":
    main()
