"""Run entries of the zoo on several ranks against one process, and print the errors and what had to be gathered.

python -m tests.sharding.zoo.check SD3            # every entry whose id contains the word
"""

from __future__ import annotations

import sys
import warnings
from functools import lru_cache
from typing import Any

import torch

from omni_sp import parallelize
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding import tracked_plan_for
from testing.ranks import RankError, RankPool
from testing.reference import randomise, relative_error

LAYOUTS = [(2, 1), (1, 2), (2, 2), (3, 1)]


def first_tensor(output: Any) -> torch.Tensor:
    """What a transformer gives back, tuple or not, as one flat row (some give a list)."""
    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "values"):
        output = tuple(output.values())
    parts = [first_tensor(part).flatten() for part in output if isinstance(part, (torch.Tensor, list, tuple))]
    return torch.cat(parts)


@lru_cache(maxsize=1)
def alone(entry_id: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model, and what it gives on one process; kept for the next layout, as every comparison leaves it as it was."""
    from tests.sharding.zoo.all import ENTRIES

    entry = ENTRIES[entry_id]
    model = randomise(entry.build())
    with torch.no_grad():
        wanted = first_tensor(model(**entry.inputs()))
    assert wanted.isfinite().all(), "the entry itself gives no finite numbers"
    assert wanted.abs().max() > 1e-4, "the entry itself gives only zeros"
    return model, wanted


def compare(mesh: ParallelMesh, entry_id: str, tracked: bool) -> tuple[float, bool, dict[str, int], dict[str, int]]:
    """Error, whether remove() gives back the very bits, tokens, and operations that needed the whole."""
    from tests.sharding.zoo.all import ENTRIES

    warnings.simplefilter("ignore")
    entry = ENTRIES[entry_id]
    model, wanted = alone(entry_id)
    with torch.no_grad():
        plan = tracked_plan_for(model) if tracked else None
        handle = parallelize(model, mesh, plan=plan)
        for _ in range(2):
            sharded = first_tensor(model(**entry.inputs()))
        tokens, gathers = handle.tokens, handle.gathers
        handle.remove()
        again = first_tensor(model(**entry.inputs()))
    if not torch.equal(again, wanted):
        alone.cache_clear()
    return relative_error(sharded, wanted), torch.equal(again, wanted), tokens, gathers


def main() -> None:
    """Print a line for each entry and layout."""
    from tests.sharding.zoo.all import ENTRIES

    pool = RankPool()
    for entry_id in ENTRIES:
        if not any(word in entry_id for word in sys.argv[1:]):
            continue
        for ulysses, ring in LAYOUTS:
            try:
                error, restored, tokens, gathered = pool.run(compare, entry_id, True, ulysses=ulysses, ring=ring)[0]
            except RankError as failure:
                print(f"FAILED {entry_id} {ulysses}x{ring}\n{failure}")
                pool = RankPool()
                break
            state = "ok    " if error <= ENTRIES[entry_id].error and restored else "WRONG "
            print(f"{state}{entry_id} {ulysses}x{ring} error {error:.1e} restored {restored} {tokens} {gathered}")
    pool.close()


if __name__ == "__main__":
    main()
