"""Run pipelines of the zoo on several ranks against one process, and print the errors.

python -m tests.pipelines.zoo.check Mochi            # every entry whose id contains the word
"""

from __future__ import annotations

import sys
import time
import warnings
from functools import cache, lru_cache
from typing import Any

import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.testing.ranks import RankError, RankPool
from omni_sp.testing.reference import relative_error

LAYOUTS = [(2, 2), (3, 1)]


def tensors(output: Any) -> torch.Tensor:
    """Every picture, frame and sound of a result, as one flat row."""
    if isinstance(output, torch.Tensor):
        return output.float().flatten()
    if hasattr(output, "__array__"):
        return torch.as_tensor(output).float().flatten()
    if hasattr(output, "values"):
        output = tuple(output.values())
    return torch.cat([tensors(part) for part in output if part is not None])


def draw(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """Run a few steps from a fixed seed."""
    call = {"num_inference_steps": 3, "output_type": "pt"} | arguments
    return tensors(pipe(**call, generator=torch.Generator().manual_seed(7), return_dict=False))


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with all real numbers in this dtype."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


@lru_cache(maxsize=1)
def build(entry_id: str, dtype: torch.dtype) -> Any:
    """The pipeline of an entry; a rank keeps it for the next layout, as remove() leaves it as it was."""
    from tests.pipelines.zoo.all import ENTRIES

    warnings.simplefilter("ignore")
    pipe = ENTRIES[entry_id].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def draw_unsharded(mesh: ParallelMesh, entry_id: str, dtype: torch.dtype) -> torch.Tensor:
    """What the pipeline draws on one process."""
    from tests.pipelines.zoo.all import ENTRIES

    output = draw(build(entry_id, dtype), in_dtype(ENTRIES[entry_id].arguments(), dtype))
    assert output.isfinite().all(), "the entry itself gives no finite numbers"
    assert output.std() > 0.01, "a picture of one colour would prove nothing"
    return output


@cache
def expected_output(ranks: RankPool, entry_id: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What one process draws, computed by one rank and once for all layouts."""
    output: torch.Tensor = ranks.run(draw_unsharded, entry_id, dtype)[0]
    return output


def draw_sharded(
    mesh: ParallelMesh, entry_id: str, dtype: torch.dtype, expected: torch.Tensor | None
) -> tuple[torch.Tensor, bool, dict[str, int]]:
    """Run an entry on this mesh.

    Returns:
        What it draws, whether it draws the very bits of ``expected`` after remove() (True where that is None, and not
        drawn), and the tokens of each stream.
    """
    from tests.pipelines.zoo.all import ENTRIES

    pipe, entry = build(entry_id, dtype), ENTRIES[entry_id]
    handle = parallelize(pipe, mesh)
    sharded = draw(pipe, in_dtype(entry.arguments(), dtype))
    tokens = handle.tokens
    handle.remove()
    restored = expected is None or torch.equal(draw(pipe, in_dtype(entry.arguments(), dtype)), expected)
    if not restored:
        build.cache_clear()
    return sharded, restored, tokens


def main() -> None:
    """Print a line for each entry and layout."""
    from tests.pipelines.zoo.all import ENTRIES

    pool = RankPool()
    for entry_id in ENTRIES:
        if not any(word in entry_id for word in sys.argv[1:]):
            continue
        for ulysses, ring in LAYOUTS:
            began = time.perf_counter()
            try:
                expected = expected_output(pool, entry_id)
                answers = pool.run(draw_sharded, entry_id, torch.float32, expected, ulysses=ulysses, ring=ring)
            except RankError as failure:
                print(f"FAILED {entry_id} {ulysses}x{ring}\n{failure}")
                pool = RankPool()
                break
            sharded, restored, tokens = answers[0]
            error = relative_error(sharded, expected)
            state = "ok    " if error <= ENTRIES[entry_id].error and restored else "WRONG "
            seconds = time.perf_counter() - began
            print(f"{state}{entry_id} {ulysses}x{ring} error {error:.1e} restored {restored} {tokens} {seconds:.1f} s")
    pool.close()


if __name__ == "__main__":
    main()
