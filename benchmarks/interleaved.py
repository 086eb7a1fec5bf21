"""Timing several contenders in one run, in turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Timing:
    """What one contender took.

    Attributes:
        seconds: of each round, the slowest rank's. error: relative to float64, where it was looked at.
        refused: why it did not run. facts: whatever else is told of it.
    """

    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    refused: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds; nan where it did not run."""
        return statistics.median(self.seconds) if self.seconds else float("nan")


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender in each round, on this rank. All ranks call this with the same contenders.

    Every turn starts at a barrier. The order is rotated from round to round.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if dist.is_initialized():
                dist.barrier()
            began = time.perf_counter()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


Answer = tuple[dict[str, list[float]], dict[str, Any], dict[str, str]]
"""What one rank tells: seconds of each contender's rounds, errors, and why somebody did not run."""


def summary(answers: Sequence[Answer]) -> dict[str, Timing]:
    """All ranks' answers as one: of each round the slowest rank's seconds, since nobody is done before all are."""
    timings = {
        name: Timing([max(answer[0][name][i] for answer in answers) for i in range(len(seconds))])
        for name, seconds in answers[0][0].items()
    }
    for name, why in answers[0][2].items():
        timings[name] = Timing(refused=why)
    for name, timing in timings.items():
        found = [answer[1][name] for answer in answers if name in answer[1]]
        timing.error = max(found) if found else None
    return timings


def machine() -> dict[str, str]:
    """What it ran on."""
    import diffusers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def save(name: str, settings: dict[str, Any], timings: dict[str, Timing]) -> Path:
    """Write a result as JSON, with the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": machine(),
        "settings": settings,
        "timings": {key: {**asdict(value), "median": value.median} for key, value in timings.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def plot(path: Path, title: str, timings: dict[str, Timing]) -> Path | None:
    """A bar for every contender's median, with the spread of its rounds, beside the JSON; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install 'omni-sp[bench]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ran = {name: timing for name, timing in timings.items() if timing.seconds}
    medians = [timing.median * 1e3 for timing in ran.values()]
    spread = [
        [median - min(timing.seconds) * 1e3 for median, timing in zip(medians, ran.values(), strict=True)],
        [max(timing.seconds) * 1e3 - median for median, timing in zip(medians, ran.values(), strict=True)],
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(ran) + 1.2), layout="constrained")
    colours = ["tab:orange" if name.startswith("ours") else "tab:gray" for name in ran]
    axes.barh(list(ran), medians, xerr=spread, color=colours, ecolor="black", capsize=2)
    axes.invert_yaxis()
    axes.set_xlabel("ms, median of the rounds; the line is their range")
    axes.set_title(title, fontsize=10)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def table(timings: dict[str, Timing], base: str, num_ranks: int) -> str:
    """Medians, ratios and efficiencies, as text. ``base``: the contender that is one process."""
    alone = timings[base].median
    lines = [f"{'':28}{'median ms':>10}{'speed-up':>10}{'efficiency':>12}{'error':>10}"]
    for name, timing in timings.items():
        if timing.refused:
            lines.append(f"{name:28}{'-':>10}   {timing.refused}")
            continue
        speedup = alone / timing.median
        efficiency = "" if name == base else f"{speedup / num_ranks:.2f}"
        error = "" if timing.error is None else f"{timing.error:.0e}"
        lines.append(f"{name:28}{timing.median * 1e3:>10.1f}{speedup:>10.2f}{efficiency:>12}{error:>10}")
    return "\n".join(lines)
