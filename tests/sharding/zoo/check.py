"""Run entries of the zoo on several ranks against one process, and print the errors and what had to be gathered.

python -m tests.sharding.zoo.check SD3            # every entry whose id contains the word
"""

from __future__ import annotations

import sys
import warnings
from functools import cache, lru_cache
from typing import Any

import torch

from omni_sp import parallelize
from omni_sp.mesh import ParallelMesh
from omni_sp.testing.ranks import RankError, RankPool
from omni_sp.testing.reference import randomise, relative_error

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
def build(entry_id: str) -> torch.nn.Module:
    """The model of an entry; a rank keeps it for the next layout, as remove() leaves it as it was."""
    from tests.sharding.zoo.all import ENTRIES

    model: torch.nn.Module = randomise(ENTRIES[entry_id].build())
    return model


def run_unsharded(mesh: ParallelMesh, entry_id: str) -> torch.Tensor:
    """What the model gives on one process."""
    from tests.sharding.zoo.all import ENTRIES

    warnings.simplefilter("ignore")
    with torch.no_grad():
        output = first_tensor(build(entry_id)(**ENTRIES[entry_id].inputs()))
    assert output.isfinite().all(), "the entry itself gives no finite numbers"
    assert output.abs().max() > 1e-4, "the entry itself gives only zeros"
    return output


@cache
def expected_output(ranks: RankPool, entry_id: str) -> torch.Tensor:
    """What one process gives, computed by one rank and once for all layouts."""
    output: torch.Tensor = ranks.run(run_unsharded, entry_id)[0]
    return output


def compare(
    mesh: ParallelMesh, entry_id: str, expected: torch.Tensor, run_after_removal: bool = True
) -> tuple[float, bool, dict[str, int], dict[str, int]]:
    """Run an entry on this mesh.

    Returns:
        The relative error, whether the model gives the very bits of one process after remove() (True where that is not
        run), the tokens of each stream, and the operations that needed whole tensors.
    """
    from tests.sharding.zoo.all import ENTRIES

    warnings.simplefilter("ignore")
    entry, model = ENTRIES[entry_id], build(entry_id)
    with torch.no_grad():
        handle = parallelize(model, mesh)
        for _ in range(2):
            sharded = first_tensor(model(**entry.inputs()))
        tokens, gathers = handle.tokens, handle.gathers
        handle.remove()
        restored = not run_after_removal or torch.equal(first_tensor(model(**entry.inputs())), expected)
    if not restored:
        build.cache_clear()
    return relative_error(sharded, expected), restored, tokens, gathers


def main() -> None:
    """Print a line for each entry and layout."""
    from tests.sharding.zoo.all import ENTRIES

    pool = RankPool()
    for entry_id in ENTRIES:
        if not any(word in entry_id for word in sys.argv[1:]):
            continue
        for ulysses, ring in LAYOUTS:
            try:
                error, restored, tokens, gathered = pool.run(
                    compare, entry_id, expected_output(pool, entry_id), ulysses=ulysses, ring=ring
                )[0]
            except RankError as failure:
                print(f"FAILED {entry_id} {ulysses}x{ring}\n{failure}")
                pool = RankPool()
                break
            state = "ok    " if error <= ENTRIES[entry_id].error and restored else "WRONG "
            print(f"{state}{entry_id} {ulysses}x{ring} error {error:.1e} restored {restored} {tokens} {gathered}")
    pool.close()


if __name__ == "__main__":
    main()
