"""Run pipelines of the zoo on several ranks against one process, and print the errors.

python -m tests.pipelines.zoo.check Mochi            # every entry whose id contains the word
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import torch

from omni_sp import ParallelMesh, parallelize
from testing.ranks import RankError, RankPool
from testing.reference import relative_error

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


def compare(
    mesh: ParallelMesh, entry_id: str, dtype: torch.dtype = torch.float32, looks_again: bool = True
) -> tuple[float, float, bool, dict[str, int]]:
    """Error sharded, error of this dtype itself, whether remove() gives back the very bits, tokens.

    Without ``looks_again`` nothing is drawn after remove(), and the bits are taken to be right.
    """
    from tests.pipelines.zoo.all import ENTRIES

    warnings.simplefilter("ignore")
    entry = ENTRIES[entry_id]
    pipe = entry.build()
    pipe.set_progress_bar_config(disable=True)
    wanted = draw(pipe, entry.arguments())
    assert wanted.isfinite().all(), "the entry itself gives no finite numbers"
    assert wanted.std() > 0.01, "a picture of one colour would prove nothing"
    pipe.to(dtype)
    alone = wanted if dtype == torch.float32 else draw(pipe, in_dtype(entry.arguments(), dtype))
    handle = parallelize(pipe, mesh)
    sharded = draw(pipe, in_dtype(entry.arguments(), dtype))
    tokens = handle.tokens
    handle.remove()
    restored = not looks_again or torch.equal(draw(pipe, in_dtype(entry.arguments(), dtype)), alone)
    return relative_error(sharded, wanted), relative_error(alone, wanted), restored, tokens


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
                error, _, restored, tokens = pool.run(compare, entry_id, ulysses=ulysses, ring=ring)[0]
            except RankError as failure:
                print(f"FAILED {entry_id} {ulysses}x{ring}\n{failure}")
                pool = RankPool()
                break
            state = "ok    " if error <= ENTRIES[entry_id].error and restored else "WRONG "
            seconds = time.perf_counter() - began
            print(f"{state}{entry_id} {ulysses}x{ring} error {error:.1e} restored {restored} {tokens} {seconds:.1f} s")
    pool.close()


if __name__ == "__main__":
    main()
