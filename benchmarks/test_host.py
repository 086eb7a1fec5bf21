"""The host's cost of a block: every way is timed, blocks are replayed, and the table holds finite numbers."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import host
from benchmarks.interleaved import Timing, add_output_options, save
from omni_sp.mesh import ParallelMesh
from omni_sp.testing.components import transformer


@pytest.fixture
def mesh() -> Iterator[ParallelMesh]:
    with torch.no_grad(), host.one_rank_of_two() as mesh:
        yield mesh
    assert not dist.is_initialized()


def test_one_class_is_timed(mesh: ParallelMesh) -> None:
    found = host.measure("SD3Transformer2DModel", mesh, repeats=2)
    assert {host.PLAIN, host.FOLLOWED, host.REPLAYED} <= found.ways.keys()
    assert all(math.isfinite(figure) for figure in (*found.ways.values(), found.core, found.gain, found.of_bound))
    assert found.core_calls == 1
    assert found.blocks["replayed"] > found.blocks["recorded"] > 0
    assert not found.blocks["followed"]
    names = {f"SD3Transformer2DModel, {way}" for way in (*found.ways, host.CORE)}
    assert host.timings({"SD3Transformer2DModel": found}).keys() == names
    text = host.table({"SD3Transformer2DModel": found})
    assert "SD3Transformer2DModel" in text
    assert "nan" not in text


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for one in float32
@pytest.mark.parametrize("name", host.CASES)
def test_every_class_has_inputs_that_fit(name: str) -> None:
    case = host.CASES[name]
    with torch.no_grad():
        result = transformer(name, **case.changes, **dict.fromkeys(case.depth, 1))(**case.inputs())
    first = result[0][0] if isinstance(result[0], (list, tuple)) else result[0]
    assert first.numel() > 1
    assert first.isfinite().all()


def test_classes_are_chosen_by_a_part_of_their_names() -> None:
    assert host.chosen(["Flux", "Wan"]) == [
        "FluxTransformer2DModel",
        "Flux2Transformer2DModel",
        "WanTransformer3DModel",
    ]
    assert len(host.chosen([])) == len(host.CASES) >= 12


def test_results_that_are_committed_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every benchmark writes to a folder that is ignored unless another is named, and nothing with --no-save."""
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    add_output_options(parser)
    for words, names in (([], ["results/x.json"]), (["--no-save"], []), (["--output", "a/b"], ["a/b/x.json"])):
        output = parser.parse_args(words).output
        path = save(output, "x", {"output": output, "rounds": 3}, {"ours": Timing([1.0])})
        assert [str(path)] == (names or ["None"])
        written = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert [str(file.relative_to(tmp_path)) for file in written] == names
        for file in written:
            assert json.loads(file.read_text())["settings"] == {"rounds": 3}
            file.unlink()
