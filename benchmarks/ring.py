"""One attention around a ring in both ways: keys gathered by one exchange, and keys that pass from rank to rank.

python -m benchmarks.ring --ranks 2 4 --tokens 256 1024 2048 4096 8192 16384

Both run in turns. Beside the time there is the least processor time of a call, all ranks' together, which other work on
the machine changes little. The bytes are those that a rank gathers, by which the core decides.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.interleaved import Timing, add_output_options, paired, report, save, take_turns
from omni_sp.attention import SequenceLayout, sequence_parallel_attention, split_evenly
from omni_sp.mesh import ParallelMesh
from omni_sp.testing.ranks import RankPool

WIDTHS = (5, 8, 6, 13, 14, 8, 19)
WAYS = {"gathered": True, "passed on": False}


def run(mesh: ParallelMesh, tokens: int, heads: int, head_dim: int, rounds: int) -> dict[str, Timing]:
    """On one rank: the rounds of both ways."""
    lengths = split_evenly(tokens, mesh.world_size)
    query, key, value = (torch.randn(1, lengths[mesh.rank], heads, head_dim) for _ in range(3))
    attend = partial(sequence_parallel_attention, query, key, value, mesh=mesh, layout=SequenceLayout(lengths, lengths))
    processor: dict[str, list[float]] = {name: [] for name in WAYS}

    def timed(name: str) -> Callable[[], None]:
        def call() -> None:
            began = time.thread_time()
            attend(gather_keys=WAYS[name])
            processor[name].append(time.thread_time() - began)

        return call

    with torch.no_grad():
        seconds = take_turns({name: timed(name) for name in WAYS}, rounds)
    return {name: Timing(seconds[name], facts={"processor_seconds": min(processor[name])}) for name in WAYS}


def compare(ranks: int, tokens: int, options: argparse.Namespace) -> dict[str, Timing]:
    """One shape on all ranks: a round takes as long as its slowest rank."""
    rounds = max(1, min(options.rounds, options.rounds * 4096 // tokens))
    pool = RankPool(ranks)
    try:
        answers = pool.run(run, tokens, options.heads, options.head_dim, rounds, ring=ranks, timeout=1800)
    finally:
        pool.close()
    timings = {}
    for name in WAYS:
        of_ranks = [answer[name] for answer in answers]
        processor = sum(timing.facts["processor_seconds"] for timing in of_ranks)
        seconds = [max(of_round) for of_round in zip(*(timing.seconds for timing in of_ranks), strict=True)]
        timings[name] = Timing(seconds, facts={"processor_seconds": processor})
    return timings


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    add_output_options(parser)
    options = parser.parse_args()
    columns = zip(
        ("ranks", "tokens", "MiB", "gathered ms", "passed on ms", "ratio", "of processor time"), WIDTHS, strict=True
    )
    print("".join(f"{name:>{width}}" for name, width in columns))
    everything: dict[str, Any] = {}
    for tokens in options.tokens:
        for ranks in options.ranks:
            timings = compare(ranks, tokens, options)
            gathered, passed = (timings[name] for name in WAYS)
            of_processor = gathered.facts["processor_seconds"] / passed.facts["processor_seconds"]
            mebibytes = 2 * 4 * tokens * options.heads * options.head_dim / 2**20
            medians = [f"{timing.median * 1e3:.2f}" for timing in (gathered, passed)]
            ratios = [f"{paired(timings, *WAYS):.3f}", f"{of_processor:.3f}"]
            row = zip((ranks, tokens, f"{mebibytes:.0f}", *medians, *ratios), WIDTHS, strict=True)
            print("".join(f"{value:>{width}}" for value, width in row), flush=True)
            everything |= {f"{ranks} ranks, {tokens} tokens, {name}": timing for name, timing in timings.items()}
            path = save(options.output, "ring", vars(options), everything)
    report(path)


if __name__ == "__main__":
    main()
