"""Timing several contenders in one run, in turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Timing:
    """What one contender took.

    Attributes:
        seconds: of each round, the slowest rank's. error: relative to float64, where it was looked at.
        memory: bytes at its peak beyond what was there before, the greediest rank's.
        exchange: part of its time that exchanges take, of the rank where it is least: the others wait for that one.
        refused: why it did not run. facts: what else was measured.
    """

    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    memory: int | None = None
    exchange: float | None = None
    refused: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds; nan where it did not run."""
        return statistics.median(self.seconds) if self.seconds else float("nan")


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender in each round, on this rank. All ranks call this with the same contenders.

    Every turn starts at a barrier. The order is drawn anew for every round, alike on all ranks: a contender that always
    followed the same other one would pay for the state that this one leaves caches and heap in.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for name in random.Random(number).sample(names, len(names)):
            if dist.is_initialized():
                dist.barrier()
            began = time.perf_counter()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


@dataclass
class Answer:
    """What one rank tells, each by contender: seconds of the rounds, errors, memory, exchanges, why it did not run."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    exchange: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def summary(answers: Sequence[Answer]) -> dict[str, Timing]:
    """All ranks' answers as one: of each round the slowest rank's seconds, since nobody is done before all are."""
    timings = {
        name: Timing([max(answer.seconds[name][i] for answer in answers) for i in range(len(seconds))])
        for name, seconds in answers[0].seconds.items()
    }
    for name, why in answers[0].refused.items():
        timings[name] = Timing(refused=why)
    for name, timing in timings.items():
        timing.error = max((answer.errors[name] for answer in answers if name in answer.errors), default=None)
        timing.memory = max((size for answer in answers if (size := answer.memory.get(name)) is not None), default=None)
        timing.exchange = min((answer.exchange[name] for answer in answers if name in answer.exchange), default=None)
    return timings


def paired(timings: dict[str, Timing], name: str, other: str) -> float:
    """How many times as long as ``other`` it takes: the median over the rounds of their ratio in the same round.

    What slows the machine for a while slows both, so this is steadier than the ratio of two medians.
    """
    pairs = zip(timings[name].seconds, timings[other].seconds, strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


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


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--output FOLDER`` and ``--no-save``, which makes ``output`` None. The default holds nothing committed."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="where JSON and plots are written; benchmarks/results holds what is committed (default: results)",
    )
    parser.add_argument("--no-save", dest="output", action="store_const", const=None, help="print only")


def save(output: Path | None, name: str, settings: dict[str, Any], timings: dict[str, Timing]) -> Path | None:
    """Write a result as JSON to the folder ``output``, with the command that made it; None writes nothing."""
    results = {key: {**asdict(value), "median": value.median} for key, value in timings.items()}
    return write(output, name, settings, {"timings": results})


def write(output: Path | None, name: str, settings: dict[str, Any], results: dict[str, Any]) -> Path | None:
    """What save() does, for results of any form."""
    if output is None:
        return None
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.json"
    content = {
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": machine(),
        "settings": {key: value for key, value in settings.items() if key != "output"},
        **results,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def report(*files: Path | None) -> None:
    """Say what was written."""
    if any(files):
        print("saved", ", ".join(str(file) for file in files if file is not None), flush=True)


def plot_growth(output: Path | None, name: str, lines: dict[str, dict[int, float]], across: str) -> Path | None:
    """Speed-up over one process, a line a contender, over a size that grows; None without matplotlib."""
    drawing = pyplot(output)
    if output is None or drawing is None:
        return None
    figure, axes = drawing.subplots(figsize=(7, 4), layout="constrained")
    for label, points in lines.items():
        style = {"linewidth": 2.5} if label.startswith("ours") else {"linestyle": "--"}
        axes.plot(list(points), list(points.values()), marker="o", label=label, **style)
    axes.set_xscale("log", base=2)
    ticks = sorted({size for points in lines.values() for size in points})
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.set_xlabel(across)
    axes.set_ylabel("speed-up over one process")
    axes.legend(fontsize=8)
    target = output / f"{name}.png"
    figure.savefig(target, dpi=120)
    drawing.close(figure)
    return target


def pyplot(output: Path | None) -> Any:
    """Matplotlib's pyplot, drawing to files; None where it is not installed or nothing is saved."""
    if output is None:
        return None
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install '.[bench]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(path: Path | None, title: str, timings: dict[str, Timing]) -> Path | None:
    """A bar for every contender's median, with the spread of its rounds, beside the JSON; None without matplotlib."""
    drawing = pyplot(path)
    if path is None or drawing is None:
        return None
    ran = {name: timing for name, timing in timings.items() if timing.seconds}
    medians = [timing.median * 1e3 for timing in ran.values()]
    spread = [
        [median - min(timing.seconds) * 1e3 for median, timing in zip(medians, ran.values(), strict=True)],
        [max(timing.seconds) * 1e3 - median for median, timing in zip(medians, ran.values(), strict=True)],
    ]
    figure, axes = drawing.subplots(figsize=(8, 0.5 * len(ran) + 1.2), layout="constrained")
    colours = ["tab:orange" if name.startswith("ours") else "tab:gray" for name in ran]
    axes.barh(list(ran), medians, xerr=spread, color=colours, ecolor="black", capsize=2)
    axes.invert_yaxis()
    axes.set_xlabel("ms, median of the rounds; the line is their range")
    axes.set_title(title, fontsize=10)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    drawing.close(figure)
    return target


def table(timings: dict[str, Timing], base: str, ours: str, num_ranks: int) -> str:
    """Medians, ratios and efficiencies, as text. ``base``: the contender that is one process."""
    lines = [
        f"{'':26}{'median ms':>10}{'/ ours':>8}{'efficiency':>12}{'exchange':>10}{'memory MiB':>12}{'error':>8}",
    ]
    for name, timing in timings.items():
        if timing.refused:
            lines.append(f"{name:26}{'-':>10}   {timing.refused}")
            continue
        efficiency = "" if name == base else f"{paired(timings, base, name) / num_ranks:.2f}"
        exchange = "" if timing.exchange is None else f"{timing.exchange:.1%}"
        memory = "" if timing.memory is None else f"{timing.memory / 2**20:.0f}"
        error = "" if timing.error is None else f"{timing.error:.0e}"
        lines.append(
            f"{name:26}{timing.median * 1e3:>10.1f}{paired(timings, name, ours):>8.3f}{efficiency:>12}{exchange:>10}"
            f"{memory:>12}{error:>8}"
        )
    return "\n".join(lines)
