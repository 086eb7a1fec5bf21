"""Everything that needs a GPU, in one run with one report: tests, the doctor, what the host and a rank's program take.

python -m benchmarks.gpu_check                 # `make gpu-check`, which sets up first
python -m benchmarks.gpu_check --no-save       # print only

Without a GPU it says so, and runs what it can: the CUDA paths on fake tensors, and the doctor on the CPU. Each step is
a program of its own with a bound; one that fails does not stop the next. The exit code is 1 where a step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from omni_sp.testing.watcher import Watcher

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_TAIL = 6000
_END_S = 10.0
NO_GPU = (
    "There is no GPU here: the CUDA paths ran on fake tensors, which have shapes and no numbers, and the doctor on the "
    "CPU. Kernels, streams, CUDA graphs and NCCL were not run."
)


@dataclass(frozen=True)
class Step:
    """One program.

    Attributes:
        name: for people.
        words: its arguments for Python.
        timeout_s: the longest that it may take, in seconds.
    """

    name: str
    words: tuple[str, ...]
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        step: the step.
        result: "passed", "failed (exit code N)", or "stopped after N s".
        seconds: that it took.
        output: the end of what it printed.
    """

    step: Step
    result: str
    seconds: float
    output: str

    @property
    def is_good(self) -> bool:
        """Whether it passed."""
        return self.result == "passed"


def steps(num_gpus: int) -> list[Step]:
    """What is run with so many GPUs.

    Args:
        num_gpus: as many as torch can use.
    """
    if num_gpus == 0:
        fake = (
            "tests/attention/test_cuda_paths.py",
            "tests/sharding/test_cuda_paths.py",
            "tests/sharding/test_graphs.py",
        )
        return [
            Step("CUDA paths on fake tensors", ("-m", "pytest", "-q", *fake), 1200.0),
            Step("doctor, on the CPU", ("-m", "omni_sp", "doctor", "--device", "cpu"), 300.0),
            Step("host, two classes", ("-m", "benchmarks.host", "--classes", "Flux", "--repeats", "3", "--no-save")),
            Step("one rank's program, tiny", _rank_program("tiny", 2, "--dtype", "float32", "--rounds", "3")),
        ]
    found = [
        Step("tests on GPUs", ("-m", "pytest", "-q", "tests/gpu"), 1800.0),
        Step("doctor", ("-m", "omni_sp", "doctor")),
        Step("doctor, two ranks on one GPU", ("-m", "omni_sp", "doctor", "--device", "cuda:0", "--ranks", "2")),
        Step("host", ("-m", "benchmarks.host", "--no-save"), 1200.0),
    ]
    models = ("qwen-image-2048", "flux-dev-2048", "wan-14b-720p")
    return found + [Step(f"one rank's program of 8, {model}", _rank_program(model, 8)) for model in models]


def _rank_program(model: str, ulysses: int, *more: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.rank_program", "--model", model, "--ulysses", str(ulysses), "--no-save", *more)


def run(step: Step) -> Outcome:
    """Run one step in a session of its own, of which nothing is left when its time is over.

    Args:
        step: the step.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *step.words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    watcher = Watcher(process, signal.SIGKILL, is_group=True)
    try:
        output, _ = process.communicate(timeout=step.timeout_s)
        result = "passed" if process.returncode == 0 else f"failed (exit code {process.returncode})"
    except subprocess.TimeoutExpired:
        result = f"stopped after {step.timeout_s:g} s"
        output = _end(process)
    except BaseException:
        _end(process)
        raise
    finally:
        watcher.close()
    return Outcome(step, result, time.monotonic() - began, output[-_TAIL:])


def _end(process: subprocess.Popen[str]) -> str:
    """End a program and what it has started, and return what it has printed."""
    output = ""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            output = process.communicate(timeout=_END_S)[0] or output
    return output


def devices() -> list[str]:
    """The names of the GPUs that torch can use."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(index) for index in range(count)]


def as_markdown(outcomes: Sequence[Outcome], names: Sequence[str]) -> str:
    """The report.

    Args:
        outcomes: of all steps.
        names: of the GPUs.
    """
    import torch

    kinds = " and ".join(sorted({f"{names.count(name)} x {name}" for name in names})) or "no GPU"
    lines = [
        f"# GPU check: {kinds}",
        "",
        f"{datetime.now(timezone.utc):%Y-%m-%d}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.machine()}. Written by `make gpu-check`.",
        "",
    ]
    if not names:
        lines += [NO_GPU, ""]
    lines += ["| step | result | seconds |", "|---|---|---|"]
    lines += [f"| {one.step.name} | {one.result} | {one.seconds:.0f} |" for one in outcomes]
    for one in outcomes:
        text = one.output.replace(f"{ROOT}/", "").replace(f"{sys.prefix}/", "").replace(str(Path.home()), "~").strip()
        lines += ["", f"## {one.step.name}", "", f"`python {' '.join(one.step.words)}`", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run every step, and write the report. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the report (default: %(default)s)")
    parser.add_argument("--no-save", dest="output", action="store_const", const=None, help="print only")
    options = parser.parse_args()
    names = devices()
    if not names:
        driver = " (nvidia-smi is here: `omni-sp doctor --quick` says why)" if shutil.which("nvidia-smi") else ""
        print(f"{NO_GPU.replace(' ran ', ' run ').replace('were not run', 'are not run')}{driver}", flush=True)
    planned, outcomes = steps(len(names)), []
    for number, step in enumerate(planned, 1):
        print(f"[{number}/{len(planned)}] {step.name} ...", end=" ", flush=True)
        outcomes.append(run(step))
        print(f"{outcomes[-1].result}, {outcomes[-1].seconds:.0f} s", flush=True)
    text = as_markdown(outcomes, names)
    if options.output is None:
        print(text)
    else:
        kind = re.sub(r"[^a-z0-9]+", "-", (names[0] if names else "no GPU").lower()).strip("-")
        path = options.output / f"gpu-check-{kind}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"report: {path}")
    return 0 if all(one.is_good for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
