"""How many steps ran in which way, counted by rank 0's process and read by the front's."""

from __future__ import annotations

import atexit
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_FILE = "OMNI_SP_LLM_STEPS"
_FORM = struct.Struct("<6q")


class StepCounts(NamedTuple):
    """Steps and tokens since the start, by how they ran.

    ``models``: how many were made to count here. ``threshold``: the most tokens of a step that runs by tensor
    parallelism; -1 where that is not measured yet, or not asked for.
    """

    ulysses_steps: int
    ulysses_tokens: int
    tensor_steps: int
    tensor_tokens: int
    models: int
    threshold: int


class StepCounter:
    """A few numbers in a small file that processes of one machine map into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _FORM.size)

    @classmethod
    def create(cls) -> StepCounter:
        """For the front: its children find it by the environment."""
        handle, name = tempfile.mkstemp(prefix="omni-sp-steps-")
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(_FORM.size))
        os.environ[_FILE] = name
        return cls(Path(name))

    @classmethod
    def of_this_process(cls) -> StepCounter | None:
        """For a rank; None where no front counts."""
        name = os.environ.get(_FILE)
        return cls(Path(name)) if name and Path(name).exists() else None

    def add(self, tokens: int, *, is_ulysses: bool) -> None:
        """Count a step."""
        counts = list(self.read())
        place = 0 if is_ulysses else 2
        counts[place] += 1
        counts[place + 1] += tokens
        self._memory[:] = _FORM.pack(*counts)

    def begin(self) -> None:
        """A model is made that will count here."""
        counts = self.read()
        self._memory[:] = _FORM.pack(*counts._replace(models=counts.models + 1, threshold=-1))

    def tell(self, threshold: int) -> None:
        """Note up to how many tokens a step runs by tensor parallelism."""
        self._memory[:] = _FORM.pack(*self.read()._replace(threshold=threshold))

    def read(self) -> StepCounts:
        """What was counted so far."""
        return StepCounts(*_FORM.unpack(self._memory[:]))

    def remove(self) -> None:
        """Take the file away. Idempotent."""
        self._path.unlink(missing_ok=True)


class _Collector:
    """The counts as Prometheus reads them, beside vLLM's own metrics."""

    def __init__(self, counter: StepCounter) -> None:
        self._counter = counter

    def collect(self) -> Iterator[Any]:
        """Two counters with a label for how a step ran, and where the ways part."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counts = self._counter.read()
        steps = CounterMetricFamily("omni_sp_llm_steps", "Steps, by how they ran", labels=["mode"])
        tokens = CounterMetricFamily("omni_sp_llm_step_tokens", "Tokens of these steps", labels=["mode"])
        for mode in ("ulysses", "tensor"):
            steps.add_metric([mode], getattr(counts, f"{mode}_steps"))
            tokens.add_metric([mode], getattr(counts, f"{mode}_tokens"))
        yield steps
        yield tokens
        what = "The most tokens of a step that runs by tensor parallelism; -1: not known yet, or not asked for"
        yield GaugeMetricFamily("omni_sp_llm_shift_threshold_tokens", what, value=counts.threshold)


def start_step_counter() -> StepCounter:
    """Make this process a front that counts, and shows the counts on its /metrics. The file goes with the process."""
    from prometheus_client import REGISTRY

    counter = StepCounter.create()
    atexit.register(counter.remove)
    REGISTRY.register(_Collector(counter))
    return counter
