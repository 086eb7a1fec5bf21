"""Which pipelines share their transformer calls among groups of ranks, as measured, and the page that lists them.

python -m tests.pipelines.zoo.branches --write        # branch_counts.json beside this file, and docs/guidance.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.testing.ranks import RankPool

COUNTS_FILE = Path(__file__).with_name("branch_counts.json")
PAGE = Path(__file__).resolve().parents[3] / "docs" / "guidance.md"
COUNTS: dict[str, list[int]] = json.loads(COUNTS_FILE.read_text())
"""Entry -> transformer calls in three steps, and how many of them come one after the other on two groups."""

_HEAD = """# Pipelines whose guidance is shared

`cfg_parallel_size=2` shares the transformer calls of a denoising step between two groups of ranks
([how](use.md#from-python)). A call is a branch of guidance; where both branches are one batch, a step makes one call,
and there is nothing to share. The table has what tiny models of the zoo do in three steps, once the shapes are known.
`python -m tests.pipelines.zoo.branches --write` writes it, and `pytest tests/pipelines/test_branches.py` holds every
line of it with `OMNI_SP_THOROUGH=1`.

| pipeline | calls | one after the other | |
|---|---|---|---|
"""


def page() -> str:
    """The page with the table of all entries."""
    lines = [
        f"| {name} | {calls} | {rounds} | {'shared' if rounds < calls else 'not shared'} |"
        for name, (calls, rounds) in sorted(COUNTS.items())
    ]
    return _HEAD + "\n".join(lines) + "\n"


def draw_twice(mesh: ParallelMesh, name: str) -> tuple[list[torch.Tensor], dict[str, Any], bool]:
    """Draw an entry while its shapes are learned, and again.

    Returns:
        What it draws each time, the counts of the second time, and whether the pipeline is as it was after remove().
    """
    from tests.pipelines.zoo.all import ENTRIES
    from tests.pipelines.zoo.check import build, draw

    pipe, entry = build(name, torch.float32), ENTRIES[name]
    handle = parallelize(pipe, mesh)
    assert handle.branches is not None
    results = [draw(pipe, entry.arguments())]
    handle.reset_counts()
    results.append(draw(pipe, entry.arguments()))
    counts = handle.branches.counts.as_dict(mesh.cfg.size)
    handle.remove()
    restored = "step" not in vars(pipe.scheduler) and "maybe_free_model_hooks" not in vars(pipe)
    return results, counts, restored and pipe.transformer._compiled_call_impl is None


def main() -> None:
    """Measure every entry, and write both files."""
    from tests.pipelines.zoo.all import ENTRIES

    pool = RankPool(2)
    for name, entry in ENTRIES.items():
        if entry.runs_here:
            counts = pool.run(draw_twice, name, cfg=2, vae_parallel=False)[0][1]
            COUNTS[name] = [counts["units"], counts["rounds"]]
    pool.close()
    COUNTS_FILE.write_text(json.dumps(COUNTS, indent=1) + "\n")
    PAGE.write_text(page())


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    main()
