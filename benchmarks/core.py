"""What a call of the attention core costs the host, with a layout that the caller knows: milliseconds and operations.

python -m benchmarks.core                          # on 2x1, 1x2, 4x1 and 2x2 ranks
python -m benchmarks.core --degrees 2x2 --repeats 200 --no-save

This process is the first rank on a fake process group: nothing is exchanged and nobody waits. Tensors are tiny, so what
remains is the work of the host: Python, and a launch for each operation of aten. All kinds of calls take turns; times
are those of this thread alone, the least of all turns. "Kernel alone" is a call of the kernel on one rank's share.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.interleaved import Timing, add_output_options, report, save
from benchmarks.llm_rank_program import absent_ranks
from omni_sp import DiffusionParallelConfig, ParallelMesh
from omni_sp.attention import SequenceLayout, WholeKeyMask, local_attention, sequence_parallel_attention

DEGREES = ("2x1", "1x2", "4x1", "2x2")
"""Ulysses x ring."""
EVEN, KERNEL = "even", "kernel alone"
TOKENS, HEADS, HEAD_DIM = 8, 8, 16
"""Of one rank, where shares are even."""


class Operations(TorchDispatchMode):
    """Counts operations of aten."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten"
        return func(*args, **(kwargs or {}))


def calls(mesh: ParallelMesh) -> dict[str, Callable[[], Any]]:
    """Calls of this rank, by kind."""
    size, first = mesh.world_size, (TOKENS + 1, *[TOKENS] * (mesh.world_size - 2), TOKENS - 1)
    even = (TOKENS,) * size

    def call(lengths: tuple[int, ...], heads: int, kv_heads: int, **options: Any) -> Callable[[], Any]:
        query = torch.randn(1, lengths[0], heads, HEAD_DIM)
        key, value = (torch.randn(1, lengths[0], kv_heads, HEAD_DIM) for _ in range(2))
        layout = SequenceLayout(lengths, lengths)
        return partial(sequence_parallel_attention, query, key, value, mesh=mesh, layout=layout, **options)

    kept = torch.arange(TOKENS * size)[None] < TOKENS * size * 4 // 5
    share = torch.randn(1, TOKENS * size, max(1, HEADS // size), HEAD_DIM)
    return {
        KERNEL: partial(local_attention, share, share, share),
        EVEN: call(even, HEADS, HEADS),
        "uneven tokens": call(first, HEADS, HEADS),
        "uneven heads": call(even, 5, 5),
        "grouped heads": call(even, HEADS, HEADS // 2),
        "a fifth of the keys masked": call(even, HEADS, HEADS, key_mask=WholeKeyMask(kept, even)),
    }


def measure(ulysses: int, ring: int, repeats: int) -> dict[str, Timing]:
    """Milliseconds and operations of each kind of call, on one layout of ranks."""
    with torch.no_grad(), absent_ranks(ulysses * ring):
        kinds = calls(ParallelMesh(DiffusionParallelConfig(ulysses_degree=ulysses, ring_degree=ring)))
        least = dict.fromkeys(kinds, math.inf)
        for turn in range(-3, repeats):
            for kind, call in kinds.items():
                began = time.thread_time()
                call()
                took = time.thread_time() - began
                least[kind] = min(least[kind], took) if turn >= 0 else math.inf
        found = {}
        for kind, call in kinds.items():
            with Operations() as operations:
                call()
            found[kind] = Timing([least[kind]], facts={"operations": operations.count})
    return found


def table(degrees: str, found: dict[str, Timing]) -> str:
    """One layout of ranks, as text."""
    lines = [f"{degrees + ' ranks':30}{'ms':>8}{'operations':>12}{'/ even':>8}"]
    for kind, timing in found.items():
        ratio = timing.median / found[EVEN].median
        lines.append(f"{kind:30}{timing.median * 1e3:>8.3f}{timing.facts['operations']:>12}{ratio:>8.2f}")
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degrees", nargs="+", choices=DEGREES, default=DEGREES, help="Ulysses x ring")
    parser.add_argument("--repeats", type=int, default=300, help="turns of each kind of call")
    add_output_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    everything: dict[str, Timing] = {}
    for degrees in options.degrees:
        ulysses, ring = map(int, degrees.split("x"))
        found = measure(ulysses, ring, options.repeats)
        print(table(degrees, found), flush=True)
        everything |= {f"{degrees}, {kind}": timing for kind, timing in found.items()}
    report(save(options.output, "core", vars(options), everything))


if __name__ == "__main__":
    main()
