"""The share of a forward's floating-point operations that one rank of 2, 4 and 8 does, at published sizes.

python -m benchmarks.flops --write                  # every model; then python -m tests.sharding.zoo.all --write
python -m benchmarks.flops --models Wan

Tensors are fake: they have shapes and no numbers, so that a model of any size fits. Numbers that decide what a model
does, such as those of masks, are real. A few blocks are run, and scaled up to all. The rank is the first, whose shards
are the longest. What a model does before its blocks, and what needs a full tensor, every rank does.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.llm_rank_program import absent_ranks
from omni_sp import DiffusionParallelConfig, ParallelMesh, parallelize
from omni_sp.planner.counting import Operations, fake_forward, of_all_blocks
from omni_sp.planner.published import PUBLISHED, Published
from omni_sp.sharding.catalogue import SHARES_FILE, Share

RANKS = (2, 4, 8)
_WORTH_NAMING = 0.002
"""Modules that do so much of a whole forward more than their part are named."""


def degrees_for(heads: int, num_ranks: int) -> tuple[int, int]:
    """Ulysses x ring: as many ranks as the heads can be divided by trade them, and groups of them form rings."""
    ulysses = math.gcd(heads, num_ranks)
    return ulysses, num_ranks // ulysses


def shares(published: Published, ranks: Sequence[int] = RANKS) -> dict[int, Share]:
    """What the first of so many ranks does, as a part of what one process does."""
    whole, _ = count_all_blocks(published, 1)
    found = {}
    for num_ranks in ranks:
        own, gathers = count_all_blocks(published, num_ranks)
        more = {path: (own[path] - flops / num_ranks) / whole.total() for path, flops in whole.items()}
        named = sorted((path for path, part in more.items() if part > _WORTH_NAMING), key=lambda path: -more[path])
        found[num_ranks] = Share(
            "{}x{}".format(*degrees_for(published.heads, num_ranks)),
            round(own.total() / whole.total(), 4),
            {path: round(more[path], 4) for path in named[:4]},
            dict(gathers),
        )
    return found


def count_all_blocks(published: Published, num_ranks: int) -> tuple[Counter[str], ...]:
    """What `count` counts, of a model with all its blocks."""
    return of_all_blocks(published, partial(count, published, num_ranks))


def count(published: Published, num_ranks: int, **changes: Any) -> tuple[Counter[str], Counter[str]]:
    """Run a model with fake weights as the first of so many ranks.

    Args:
        published: the model.
        num_ranks: how many ranks; 1 for one process.
        **changes: other values of its configuration.

    Returns:
        Floating-point operations by the path of the innermost module, and operations that needed a full tensor.
    """
    ulysses, ring = degrees_for(published.heads, num_ranks)
    with absent_ranks(num_ranks), fake_forward(published, **changes) as (model, inputs):
        mesh = ParallelMesh(DiffusionParallelConfig(ulysses_degree=ulysses, ring_degree=ring))
        handle = parallelize(model, mesh, replay=False)
        operations = Operations(model)
        with operations.counting():
            model(**inputs)
        return operations.flops, Counter(handle.gathers)


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[], metavar="WORD", help="only models with such a name")
    parser.add_argument("--write", action="store_true", help="replace the figures that the package ships")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name, published in PUBLISHED.items():
        if options.models and not any(word in name for word in options.models):
            continue
        found = shares(published)
        print(name, *(f"{number}: {share}" for number, share in found.items()), sep="\n   ", flush=True)
        if options.write:
            save(name, published, found)


def save(name: str, published: Published, found: dict[int, Share]) -> None:
    """Replace the figures of one model; those of others stay."""
    saved = json.loads(SHARES_FILE.read_text())
    saved[name] = {
        "transformer": published.transformer,
        "size": published.size,
        "note": published.note,
        "ranks": {str(number): vars(share) for number, share in found.items()},
    }
    # A line each.
    lines = [f"{json.dumps(known)}: {json.dumps(saved[known])}" for known in PUBLISHED if known in saved]
    SHARES_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
