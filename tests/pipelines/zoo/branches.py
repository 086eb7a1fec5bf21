"""Which pipelines share their transformer calls among groups of ranks, as measured, and the page that lists them.

python -m tests.pipelines.zoo.branches --write            # branch_counts.json beside this file, and docs/guidance.md
python -m tests.pipelines.zoo.branches --write NAME ...   # the same, of these entries alone
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.testing.ranks import RankPool

COUNTS_FILE = Path(__file__).with_name("branch_counts.json")
PAGE = Path(__file__).resolve().parents[3] / "docs" / "guidance.md"
_MEASURED: dict[str, list[Any]] = json.loads(COUNTS_FILE.read_text())
COUNTS: dict[str, list[int]] = {name: measured[:2] for name, measured in _MEASURED.items()}
"""Entry -> transformer calls, or rows of them, in three steps, and how many come one after the other on two groups."""

_HEAD = """# Pipelines whose guidance is shared

`cfg_parallel_size=2` shares the transformer calls of a denoising step between two groups of ranks
([how](use.md#from-python)). A call is a branch of guidance. Where the branches, or several prompts, are one batch, a
step makes one call, and the groups share its rows, which are then counted one by one: where following them through the
model's own code has shown that they are computed apart, and a trial that a smaller batch gives the same numbers.

The table has what tiny models of the zoo do in three steps, most of them with two prompts, once the shapes are known;
where nothing is shared, it has the reason as `metrics["branches"]["note"]` tells it.
`python -m tests.pipelines.zoo.branches --write` writes it, and `pytest tests/pipelines/test_branches.py` holds every
line of it with `OMNI_SP_THOROUGH=1`.

| pipeline | calls or rows | one after the other | |
|---|---|---|---|
"""


def page() -> str:
    """The page with the table of all entries."""
    lines = [
        f"| {name} | {calls} | {rounds} | {'shared' if rounds < calls else f'not shared: {reason}'} |"
        for name, (calls, rounds, reason) in sorted(_MEASURED.items())
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


def main(names: Sequence[str]) -> None:
    """Measure these entries, or every one where none is named, and write both files."""
    from tests.pipelines.zoo.all import ENTRIES

    if unknown := {*names} - {*ENTRIES}:
        sys.exit(f"no such entries: {', '.join(sorted(unknown))}; there are {', '.join(ENTRIES)}")
    pool = RankPool(2)
    for name in names or ENTRIES:
        if ENTRIES[name].runs_here:
            counts = pool.run(draw_twice, name, cfg=2, vae_parallel=False)[0][1]
            reason = (counts["note"] or "").rpartition("found nothing to share: ")[2]
            _MEASURED[name] = [counts["units"], counts["rounds"], reason]
    pool.close()
    lines = [f" {json.dumps(name)}: {json.dumps(measured)}" for name, measured in _MEASURED.items()]
    COUNTS_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    PAGE.write_text(page())


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit(__doc__)
    main(sys.argv[2:])
