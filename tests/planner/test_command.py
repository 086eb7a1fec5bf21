"""``omni-sp plan``: a table, an object, a picture, and one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_sp.cli import main

FLUX = ("plan", "black-forest-labs/FLUX.1-dev", "--gpus", "4", "--height", "512", "--width", "512")


def test_a_table_says_what_to_take_and_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "plan.svg"
    assert main([*FLUX, "--gpu", "l20", "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "FLUX.1-dev, 512 x 512, 28 steps, on 4 x L20" in text
    assert "why not the others:" in text
    assert "take: " in text
    assert plot.read_text().startswith("<svg ")


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLUX, "--link", "pcie4", "--throughput", "--consider-all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["link"]["gb_per_s"] == 31.5
    assert found["choices"][0]["degrees"]["data_parallel_size"] == 4
    assert len(found["reasons"]) == len(found["choices"]) - 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "FLUX.1-dev", "--gpu", "h1000"], "did you mean H100"),
        (["plan", "no/such-model"], "no/such-model"),
        (["plan", "FLUX.1-dev", "--gpus", "0"], "gpus"),
        (["plan", "Wan2.2", "--num-frames", "0"], "num_frames=0"),
        (["plan", "FLUX.1-dev", "--plot", "/nowhere/plan.svg"], "there is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
