"""`omni-sp check` and `omni-sp models`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from omni_sp.cli import main
from omni_sp.omni import Omni
from omni_sp.outputs import CheckReport
from omni_sp.testing.models import save_wan_i2v
from tests.engine.processes import becomes_true, descendants
from tests.thorough import thorough_only

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = descendants()
    yield
    assert becomes_true(lambda: descendants() <= before, 5.0)


def test_the_demo_model_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "omni-sp/shapes", "--usp", "2", "--ring", "2", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "2 × ring_degree 2 = 4 ranks" in output
    for stage in ("text", "transformer, call 1", "result", "gathered: none"):
        assert stage in output
    assert output.rstrip().endswith("exact: what is left is the rounding of float32")


def test_what_is_not_exact_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    errors = {"text": 0.0, "transformer, call 1": 0.01, "result": 0.1}
    blocks = {"replayed": 4, "recorded": 2, "compiled": 1, "followed": {"autocast is on": 1}}
    blocks |= {"in_graphs": 3, "not_in_graphs": {"an argument lies on the cpu": 1}}
    report = CheckReport(errors, gathers={"aten.sort.default": 4, "mask": 2}, blocks=blocks)
    monkeypatch.setattr(Omni, "check_report", lambda *_: report)
    assert main(["check", "omni-sp/shapes", "--usp", "2", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "NOT exact" in shown
    assert "gathered: aten.sort.default (4x), mask (2x)" in shown
    assert "blocks: 4 replayed, 2 recorded (1 compiled), 1 followed (autocast is on)" in shown
    assert "CUDA graphs: 3 forwards, 1 not (an argument lies on the cpu)" in shown


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["omni-sp/shapes"], "nothing to check on one rank"),
        (["omni-sp/shapes", "--usp", "2", "--image", "nothing.png"], "--image nothing.png cannot be read"),
        (["no such model", "--usp", "2"], "unknown model 'no such model'"),
    ],
)
def test_bad_input_is_one_line(words: list[str], output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 2
    error = capsys.readouterr().err
    assert output in error
    assert error.count("\n") == 1


@thorough_only
def test_a_pipeline_that_makes_videos_of_a_picture_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_wan_i2v(tmp_path / "wan")
    Image.linear_gradient("L").save(tmp_path / "grey.png")
    words = ["check", str(tmp_path / "wan"), "--image", "grey.png", "--num-frames", "5"]
    assert main([*words, "--usp", "2", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "WanImageToVideoPipeline, float32 on cpu" in output
    for stage in ("text", "transformer, call 1", "transformer_2, call 1", "result"):
        assert stage in output
    assert output.rstrip().endswith("exact: what is left is the rounding of float32")


def test_models_lists_every_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["SanaTransformer2DModel", "exact"] for line in lines)
    assert lines[-1].startswith(f"{len(lines) - 1} classes: ")
    assert main(["models", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "models.md").read_text()
