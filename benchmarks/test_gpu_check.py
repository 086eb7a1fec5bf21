"""`make gpu-check`: its steps, its report, and that a step that hangs is ended with all that it has started."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Outcome, Step

ROOT = Path(__file__).resolve().parent.parent
HANGS = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("num_gpus", [0, 1, 8])
def test_every_step_runs_a_program_that_is_there(num_gpus: int) -> None:
    for step in gpu_check.steps(num_gpus):
        assert step.words[0] == "-m"
        for path in (word for word in step.words if "/" in word):
            assert (ROOT / path).exists(), path
    named = " ".join(word for step in gpu_check.steps(1) for word in step.words)
    for what in ("tests/gpu", "omni_sp doctor", "--device cuda:0", "benchmarks.host", "qwen-image", "flux", "wan"):
        assert what in named


def test_a_step_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_END_S", 5.0)
    outcome = gpu_check.run(Step("hangs", ("-S", "-c", HANGS), 1.5))
    assert outcome.result == "stopped after 1.5 s"
    child = int(outcome.output.split()[0])
    until = time.monotonic() + 5.0
    while is_alive(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_alive(child)


def test_the_report() -> None:
    good, bad = Step("doctor", ("-m", "omni_sp", "doctor")), Step("host", ("-m", "benchmarks.host"))
    outcomes = [Outcome(good, "passed", 12.4, f"in {ROOT}/omni_sp"), Outcome(bad, "failed (exit code 2)", 1.0, "no")]
    text = gpu_check.as_markdown(outcomes, [])
    assert text.startswith("# GPU check: no GPU\n")
    assert gpu_check.NO_GPU in text
    assert "| doctor | passed | 12 |\n| host | failed (exit code 2) | 1 |" in text
    assert "```text\nin omni_sp\n```" in text
    assert gpu_check.as_markdown([], ["H200", "H200"]).startswith("# GPU check: 2 x H200\n")
