"""What is measured, kept and said; and ranks that fail, which leave no process."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omni_sp import ConfigError, RankFailedError
from omni_sp.cli import main
from omni_sp.doctor import examine, together
from omni_sp.doctor import examine as examination
from omni_sp.doctor.examine import options_for
from omni_sp.doctor.measure import QWEN_IMAGE, SIZES, Speed, Transfers, transfers
from omni_sp.doctor.ranks import DoctorRanks, Rank
from omni_sp.planner import machine
from omni_sp.planner.measured import Measured, Transfer, latency_and_bandwidth, load_measured, save_measured
from tests.engine.processes import becomes_true, children
from tests.thorough import thorough_only

KERNELS = {"cuda_flash": (0.002, 350.0), "cuda_cudnn": (0.001, 600.0)}
SLOW = Speed(
    "NVIDIA H100 80GB HBM3", 7017, 12, "bfloat16", KERNELS, "cuda_cudnn", 600.0, 85.0, 2500.0, 50.0
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
NVLINK = Transfers("nccl", ((1 << 10, 2e-5), (1 << 27, 5e-4)), ((1 << 10, 2e-5), (1 << 27, 4e-4)))


@pytest.fixture(autouse=True)
def _kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMNI_SP_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(ROOT))  # ranks import what they run
    before = children()
    yield
    assert becomes_true(lambda: children() <= before, 5.0)


def measured(*speeds: Speed, found: Transfers = NVLINK) -> Measured:
    options = replace(options_for("cpu", 2), device="cuda")
    return together.as_measured(options, QWEN_IMAGE, [found, found], speeds or (SLOW, SLOW))


def one_word(rank: Rank, hangs: bool) -> str:
    """Rank 1 raises, or says nothing for a while."""
    if rank.mesh.rank == 1:
        if hangs:
            time.sleep(30)
        raise RuntimeError("of its own")
    return "rank 0"


def test_ranks_measure_and_fail_within_bounds() -> None:
    with DoctorRanks(options_for("cpu", 2), 60.0) as ranks:
        answers = ranks.run(transfers)
        for answer in answers:
            assert [size for size, _ in answer.exchange] == list(SIZES["cpu"])
            assert all(seconds > 0 for _, seconds in (*answer.exchange, *answer.ring))
        with pytest.raises(RankFailedError, match="rank 1 of 2 raised RuntimeError: of its own"):
            ranks.run(one_word, False)
        ranks._timeout_s = 1.0
        with pytest.raises(RankFailedError, match="no word from rank 1 for 1 s"):
            ranks.run(one_word, True)


def test_a_step_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RankFailedError("rank 1 of 2 ended with exit code 1", rank=1)

    monkeypatch.setattr(together, "DoctorRanks", refuse)
    steps: list[str] = []
    found, kept = together.examine_ranks(options_for("cpu", 2), QWEN_IMAGE, 1.0, lambda text, done: steps.append(text))
    assert kept is None
    assert steps == ["starting 2 ranks"]
    assert (found[-1].level, found[-1].subject) == ("error", "start of the ranks")
    assert found[-1].what == "rank 1 of 2 ended with exit code 1"


def test_what_was_measured_is_kept_and_planned_with() -> None:
    assert load_measured() is None
    with pytest.raises(ConfigError, match="run `omni-sp doctor` first"):
        machine("here")
    once = measured(SLOW, replace(SLOW, linear_tflops=500.0))
    path = save_measured(once)
    assert load_measured() == once
    here = machine("Here", host_us=100.0)
    assert (here.name, here.memory_gb, here.host_us) == (SLOW.device, 85.0, 100.0)
    assert 500 < here.tflops < 600, "of the slower rank's layers and the fastest kernel"
    assert here.link.gb_per_s == pytest.approx((1 << 27) / 4.8e-4 / 1e9)
    assert here.link.latency_us == pytest.approx(20)
    assert here.source.startswith("measured on ")
    path.write_text(path.read_text().replace('"format": 1', '"format": 0'))
    assert load_measured() is None
    path.write_text("{")
    assert load_measured() is None


def test_more_bandwidth_is_never_slower_in_the_fit() -> None:
    slow = (Transfer(1 << 10, 1e-3), Transfer(1 << 23, 1e-2))
    latency, bandwidth = latency_and_bandwidth(slow)
    assert latency == 1e-3
    assert bandwidth == pytest.approx((1 << 23) / 9e-3)
    flat = (Transfer(1 << 10, 1e-3), Transfer(1 << 23, 9e-4))
    assert math.isfinite(latency_and_bandwidth(flat)[1])


def test_plan_here_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "FLUX.1-dev", "--here", "--height", "512", "--width", "512"]
    assert main(words) == 2
    assert "nothing was measured on this machine" in capsys.readouterr().err
    save_measured(measured())
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "on 2 x NVIDIA H100 80GB HBM3" in text
    assert "Predicted from what was measured on " in text


def test_what_measurements_mean() -> None:
    (fast,) = together.transfer_findings(measured())
    assert fast.level == "ok"
    crawling = Transfers("nccl", ((1 << 10, 2e-5), (1 << 27, 2e-2)), NVLINK.ring)
    (slow,) = together.transfer_findings(measured(found=crawling))
    assert slow.level == "warning"
    assert slow.what.endswith("450 GB/s are published for NVIDIA H100 80GB HBM3")
    sockets = replace(measured(found=replace(NVLINK, transport="gloo")), device_type="cpu")
    (note,) = together.transfer_findings(sockets)
    assert note.level == "note"
    assert together.transfer_findings(replace(measured(), exchange=(), ring=())) == []
    (right,) = together.speed_findings([SLOW, SLOW], QWEN_IMAGE)
    assert right.meaning == "'auto' takes cuda_cudnn; 600 TFLOPS, linear layers 600"
    note, warning = together.speed_findings([replace(SLOW, auto="cuda_flash"), replace(SLOW, linear_tflops=300.0)],
                                            QWEN_IMAGE)  # fmt: skip
    assert note.meaning == "'auto' takes cuda_flash, and cuda_cudnn takes 50% of its time here"
    assert warning.what == "rank 1's GPU computes 300 TFLOPS, the fastest 600"


def test_a_report_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command without its ranks: findings with what they mean, a table, where it is kept, the exit code."""
    monkeypatch.setattr(together, "examine_ranks", lambda *_: ([], replace(measured(), device_type="cpu")))
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert main(["doctor", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "WARNING  environment: CUDA_LAUNCH_BLOCKING=1\n           means: the host waits for every kernel" in text
    assert "           do:    unset CUDA_LAUNCH_BLOCKING\n" in text
    (row,) = [line.split("  ") for line in text.splitlines() if "128 MiB" in line]
    assert [cell.strip() for cell in row if cell] == ["128 MiB", "500 us, 268.44 GB/s", "400 us, 335.54 GB/s"]
    assert "1 warning: see above" in text
    assert "measured-" in text.splitlines()[-1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    assert main(["doctor", "--device", "cpu", "--quick", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["errors"] == 1
    assert {"level", "subject", "what", "meaning", "remedy"} == set(report["findings"][0])
    assert all(one["meaning"] and one["remedy"] for one in report["findings"])


def test_what_cannot_be_kept_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OMNI_SP_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(together, "examine_ranks", lambda *_: ([], measured()))
    report = examination(device="cpu")
    assert report.kept == ""
    assert report.findings[-1].what.startswith("they cannot be kept: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "ranks=0: give a whole number of at least 1"),
        (["--device", "gpu"], "device='gpu': give"),
        (["--timeout", "0"], "timeout_s=0.0: give a number above 0"),
        (["--model", "no/such-model"], "no/such-model"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_gpus_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="need 2 GPUs, one each, and this machine has 0"):
        examine(device="cuda", ranks=2)


@thorough_only
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_whole_examination(ranks: int) -> None:
    report = examine(device="cpu", ranks=ranks)
    assert report.num_errors == 0
    assert load_measured("cpu") == report.measured
    subjects = [finding.subject for finding in report.findings]
    assert {"ranks", "kernels", "attention over ranks", "demo model"} <= set(subjects)
