"""Counts of steps, by how they ran, and of drafts: rank 0 writes them to a small file, the main process reads them."""

from __future__ import annotations

import atexit
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_DRAFTS = {
    "drafts": "Drafts of next tokens, by what made them",
    "draft_tokens": "Tokens of these drafts",
    "accepted_tokens": "Tokens of these drafts that the model accepted",
}
_DRAFTERS = {"suffix": "", "head": "head_"}  # who drafts -> the beginning of its counts' names


class StepCounts(NamedTuple):
    """Steps and tokens since the start, by how the steps ran.

    Attributes:
        ulysses_steps: steps whose tokens were shared among the ranks.
        ulysses_tokens: tokens of these steps.
        tensor_steps: steps that ran by tensor parallelism.
        tensor_tokens: tokens of these steps.
        models: models that count here; 0 where vLLM's processes did not load the plugin.
        threshold: the most tokens of a step that runs by tensor parallelism; -1 where that is not measured yet, or
            shift parallelism is off.
        drafts: drafts that suffix decoding made.
        draft_tokens: tokens of these drafts.
        accepted_tokens: those that the model would have generated itself.
        head_drafts: drafts that a trained speculator made.
        head_draft_tokens: tokens of these drafts.
        head_accepted_tokens: those that the model would have generated itself.
        early_tokens: tokens that passed through the early layers of a SwiftKV model.
        late_tokens: those of them that passed through its late layers too.
    """

    ulysses_steps: int
    ulysses_tokens: int
    tensor_steps: int
    tensor_tokens: int
    models: int
    threshold: int
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    head_drafts: int = 0
    head_draft_tokens: int = 0
    head_accepted_tokens: int = 0
    early_tokens: int = 0
    late_tokens: int = 0


_FORMAT = struct.Struct(f"<{len(StepCounts._fields)}q")
_NUMBER = struct.Struct("<q")
_PLACES = {name: number * _NUMBER.size for number, name in enumerate(StepCounts._fields)}


class StepCounter:
    """Numbers in a small file that processes of one machine map into memory.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _FORMAT.size)

    @classmethod
    def create(cls) -> StepCounter:
        """A counter with a new file, for the main process."""
        handle, name = tempfile.mkstemp(prefix="omni-sp-steps-")
        with os.fdopen(handle, "wb") as file:
            file.write(_FORMAT.pack(*StepCounts(0, 0, 0, 0, models=0, threshold=-1)))
        return cls(Path(name))

    @classmethod
    def open(cls, path: str | None) -> StepCounter | None:
        """The main process's counter, for a rank; None where there is none on this machine."""
        return cls(Path(path)) if path is not None and Path(path).exists() else None

    def add_step(self, tokens: int, *, is_ulysses: bool) -> None:
        """Count a step."""
        mode = "ulysses" if is_ulysses else "tensor"
        self._add_to(f"{mode}_steps", 1)
        self._add_to(f"{mode}_tokens", tokens)

    def add_drafts(self, by: str, *, drafts: int = 0, tokens: int = 0, accepted: int = 0) -> None:
        """Count drafts by "suffix" or "head", their tokens, and accepted tokens of earlier ones."""
        prefix = _DRAFTERS[by]
        for name, increment in (("drafts", drafts), ("draft_tokens", tokens), ("accepted_tokens", accepted)):
            if increment:
                self._add_to(prefix + name, increment)

    def add_swiftkv(self, early_tokens: int, late_tokens: int) -> None:
        """Count the tokens of a SwiftKV model's step, by the layers that they passed through."""
        self._add_to("early_tokens", early_tokens)
        self._add_to("late_tokens", late_tokens)

    def _add_to(self, name: str, increment: int) -> None:
        place = _PLACES[name]
        _NUMBER.pack_into(self._memory, place, _NUMBER.unpack_from(self._memory, place)[0] + increment)

    def add_model(self) -> None:
        """Count a model that will count its steps here."""
        counts = self.read()
        self._memory[:] = _FORMAT.pack(*counts._replace(models=counts.models + 1, threshold=-1))

    def set_threshold(self, threshold: int) -> None:
        """Note the most tokens of a step that runs by tensor parallelism."""
        self._memory[:] = _FORMAT.pack(*self.read()._replace(threshold=threshold))

    def read(self) -> StepCounts:
        """The counts so far."""
        return StepCounts(*_FORMAT.unpack(self._memory[:]))

    def remove(self) -> None:
        """Delete the file. Idempotent."""
        self.path.unlink(missing_ok=True)


class _Collector:
    """The counts as Prometheus reads them, beside vLLM's own metrics."""

    counter: StepCounter | None = None

    def collect(self) -> Iterator[Any]:
        """Counters with a label for how a step ran or who drafted, and the threshold."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        assert self.counter is not None, "it is registered with a counter"
        counts = self.counter.read()
        steps = CounterMetricFamily("omni_sp_llm_steps", "Steps, by how they ran", labels=["mode"])
        tokens = CounterMetricFamily("omni_sp_llm_step_tokens", "Tokens of these steps", labels=["mode"])
        for mode in ("ulysses", "tensor"):
            steps.add_metric([mode], getattr(counts, f"{mode}_steps"))
            tokens.add_metric([mode], getattr(counts, f"{mode}_tokens"))
        yield steps
        yield tokens
        for name, text in _DRAFTS.items():
            counter = CounterMetricFamily(f"omni_sp_llm_{name}", text, labels=["by"])
            for by, prefix in _DRAFTERS.items():
                counter.add_metric([by], getattr(counts, f"{prefix}{name}"))
            yield counter
        layers = CounterMetricFamily(
            "omni_sp_llm_swiftkv_tokens", "Tokens through the layers of a SwiftKV model", labels=["layers"]
        )
        layers.add_metric(["early"], counts.early_tokens)
        layers.add_metric(["late"], counts.late_tokens)
        yield layers
        text = "The most tokens of a step that runs by tensor parallelism; -1: not known yet, or not asked for"
        yield GaugeMetricFamily("omni_sp_llm_shift_threshold_tokens", text, value=counts.threshold)


@cache
def _collector() -> _Collector:
    """This process's only collector: Prometheus refuses a second one with the same names."""
    return _Collector()


def start_step_counter() -> StepCounter:
    """A counter whose file is deleted when this process ends. This process's /metrics shows the newest counter."""
    from prometheus_client import REGISTRY

    counter, collector = StepCounter.create(), _collector()
    atexit.register(counter.remove)
    is_first = collector.counter is None
    collector.counter = counter
    if is_first:
        REGISTRY.register(collector)
    return counter
