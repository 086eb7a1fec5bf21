"""Counts and times for Prometheus, in a registry of its own for each application."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from omni_sp.async_omni import AsyncOmni
from omni_sp.events import RequestDone, RequestEvent, RequestProgress, RequestQueued
from omni_sp.outputs import OmniRequestOutput

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)
_STAGES = {"text_encoder": "text_encoder_s", "denoise": "denoise_s", "vae": "vae_s", "total": "total_s"}


_MOST_UNDER_WAY = 10_000


class Metrics:
    """The metrics of one server, which observes every request of its ``omni``."""

    def __init__(self, omni: AsyncOmni) -> None:
        omni.add_observer(self.on_event)
        # Request id -> when it was queued; None once its wait is counted. No event says that a client has left, so the
        # oldest entries go when there are too many.
        self._queued_at: dict[str, float | None] = {}
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(omni))
        self._stage = Histogram(
            "omni_sp_stage_seconds", "Seconds of a stage of one request", ["stage"], buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._step = Histogram(
            "omni_sp_step_seconds", "Seconds of a denoising step, the average of one request", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._wait = Histogram(
            "omni_sp_queue_seconds", "Seconds that a request waited", buckets=_SECONDS, registry=self._registry
        )
        self._answers = Counter(
            "omni_sp_http_requests", "Answers over HTTP", ["method", "route", "status"], registry=self._registry
        )
        self._outputs = Counter("omni_sp_outputs", "Results drawn", ["kind"], registry=self._registry)

    def on_event(self, event: RequestEvent) -> None:
        """Count an event of a request, and time the wait before its first step."""
        name = event.request_id
        if isinstance(event, RequestQueued):
            self._queued_at.setdefault(name, time.monotonic())
            if len(self._queued_at) > _MOST_UNDER_WAY:
                del self._queued_at[next(iter(self._queued_at))]
        elif isinstance(event, RequestProgress):
            queued_at = self._queued_at.get(name)
            if queued_at is not None:
                self._wait.observe(time.monotonic() - queued_at)
                self._queued_at[name] = None
        else:
            self._queued_at.pop(name, None)
            if isinstance(event, RequestDone):
                self._count_output(event.output)

    def on_answer(self, method: str, route: str, status: int) -> None:
        """Count an answer. ``route`` is a pattern, never a path that the client made up."""
        self._answers.labels(method, route, str(status)).inc()

    def _count_output(self, output: OmniRequestOutput) -> None:
        for stage, name in _STAGES.items():
            if name in output.metrics:
                self._stage.labels(stage).observe(output.metrics[name])
        if output.metrics.get("num_steps"):
            self._step.observe(output.metrics["denoise_step_s"])
        for kind, made in (("picture", output.images), ("video", output.videos), ("sound", output.audios)):
            if made:
                self._outputs.labels(kind).inc(len(made))

    def page(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's own counts whenever Prometheus asks."""

    def __init__(self, omni: AsyncOmni) -> None:
        self._omni = omni

    def describe(self) -> Iterator[Metric]:
        """Nothing beforehand: the names are those of collect()."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The counts as they are now."""
        stats, status = self._omni.stats, self._omni.status
        yield GaugeMetricFamily("omni_sp_requests_waiting", "Requests in the queue", stats.queued)
        yield GaugeMetricFamily("omni_sp_requests_running", "Requests that are being drawn", stats.running)
        requests = CounterMetricFamily("omni_sp_requests", "Requests by how they ended", labels=["outcome"])
        for outcome in ("done", "failed", "aborted"):
            requests.add_metric([outcome], getattr(stats, outcome))
        yield requests
        yield CounterMetricFamily("omni_sp_calls", "Calls of the pipeline, each for a request or a batch", stats.calls)
        yield CounterMetricFamily("omni_sp_steps", "Denoising steps", stats.steps)
        yield CounterMetricFamily("omni_sp_restarts", "Restarts of the ranks", stats.restarts)
        yield GaugeMetricFamily("omni_sp_ready", "1 if requests are drawn", float(status == "ready"))
        ready = GaugeMetricFamily("omni_sp_replica_ready", "1 if this replica draws", labels=["replica"])
        running = GaugeMetricFamily("omni_sp_replica_running", "Requests that this replica draws", labels=["replica"])
        calls = CounterMetricFamily("omni_sp_replica_calls", "Calls that this replica has finished", labels=["replica"])
        restarts = CounterMetricFamily(
            "omni_sp_replica_restarts", "Restarts of this replica's ranks", labels=["replica"]
        )
        for number, replica in enumerate(self._omni.replicas):
            ready.add_metric([str(number)], float(replica.status == "ready"))
            running.add_metric([str(number)], replica.running)
            calls.add_metric([str(number)], replica.calls)
            restarts.add_metric([str(number)], replica.restarts)
        yield from (ready, running, calls, restarts)
        for phase, seconds in stats.start_s.items():
            yield GaugeMetricFamily(f"omni_sp_start_{phase}_seconds", "Seconds of the last start", seconds)
        memory = GaugeMetricFamily("omni_sp_resident_memory_bytes", "Memory of a process", labels=["process"])
        for name, size in _memory().items():
            memory.add_metric([name], size)
        yield memory


def _memory() -> dict[str, int]:
    """Resident bytes of this process, and of the processes below it, the ranks."""
    server = psutil.Process()
    ranks = 0
    for child in server.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            ranks += child.memory_info().rss
    return {"server": server.memory_info().rss, "ranks": ranks}
