"""A type checker and an editor know the options of Omni and AsyncOmni."""

from __future__ import annotations

from pathlib import Path

from mypy import api

ROOT = Path(__file__).resolve().parent.parent
SNIPPET = """
from omni_sp import AsyncOmni, DiffusionParallelConfig, Omni

config = DiffusionParallelConfig(ulysses_degree=2)
Omni(model="x", parallel_config=config, device="cpu", show_progress=False)
AsyncOmni(model="x", parallel_config=config, max_batch_size=4, warmup=[(64, 64)])
Omni(model="x", uslyses=2)
AsyncOmni(model="x", uslyses=2)
Omni(model="x", device=1)
AsyncOmni(model="x", max_batch_size="4")
"""


def test_a_misspelt_option_is_a_type_error(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    # Another text each time: of an equal one, mypy repeats from its cache what it said of the file of an earlier run.
    program.write_text(f"{SNIPPET}# {tmp_path}\n")
    # The cache of `make lint` makes this quick; without it mypy reads torch first.
    shown, problem, _ = api.run(
        [str(program), "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    )
    assert not problem
    lines = [line.split(": ", 2)[-1] for line in shown.splitlines() if line.startswith(str(program))]
    numbers = [int(line.split(":")[1]) for line in shown.splitlines() if line.startswith(str(program))]
    assert numbers == [7, 8, 9, 10]
    assert lines[0].startswith('Argument "uslyses" to "Omni" has incompatible type "int"; expected "Never"')
    assert lines[1].startswith('Argument "uslyses" to "AsyncOmni" has incompatible type "int"; expected "Never"')
    assert lines[2].startswith('Argument "device" to "Omni" has incompatible type "int"')
    assert lines[3].startswith('Argument "max_batch_size" to "AsyncOmni" has incompatible type "str"')
