"""Counts for Prometheus: of the front, and of each replica."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from omni_sp.llm.embedding.dispatch import Dispatcher
from omni_sp.llm.embedding.replicas import READY, Replicas

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAUGES = {"inputs": "Texts under way on this replica", "tokens": "Tokens under way there, by estimate"}
_COUNTERS = {
    "parts": "Requests that this replica has answered, each with a part of a client's or the whole of it",
    "answered_inputs": "Texts in these",
    "lost": "Requests that were lost with this replica, and sent to another",
    "restarts": "Restarts of this replica",
}


class EmbeddingMetrics:
    """The metrics of one embedding server."""

    def __init__(self, replicas: Replicas, dispatcher: Dispatcher) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(replicas, dispatcher))
        ProcessCollector(registry=self._registry)
        self._answers = Counter(
            "omni_sp_http_requests", "Answers over HTTP", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "omni_sp_embedding_seconds", "Seconds of an answered request for embeddings", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._inputs = Counter("omni_sp_embedding_inputs", "Texts that were embedded", registry=self._registry)

    def on_answer(self, method: str, route: str, status: int) -> None:
        """Count an answer. ``route`` is a pattern, never a path that the client made up."""
        self._answers.labels(method, route, str(status)).inc()

    def on_embedded(self, inputs: int, seconds: float) -> None:
        """Count a request whose inputs were embedded."""
        self._seconds.observe(seconds)
        self._inputs.inc(inputs)

    def page(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _Collector(Collector):
    """Reads the replicas' own counts whenever Prometheus asks."""

    def __init__(self, replicas: Replicas, dispatcher: Dispatcher) -> None:
        self._replicas, self._dispatcher = replicas, dispatcher

    def describe(self) -> Iterator[Metric]:
        """Nothing beforehand: the names are those of collect()."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The counts as they are now."""
        yield GaugeMetricFamily("omni_sp_ready", "1 if texts are embedded", float(self._replicas.status == READY))
        yield GaugeMetricFamily("omni_sp_requests_running", "Requests under way", self._dispatcher.requests)
        yield GaugeMetricFamily("omni_sp_inputs_running", "Texts under way", self._dispatcher.inputs)
        ready = GaugeMetricFamily("omni_sp_replica_ready", "1 if this replica embeds", labels=["replica"])
        for replica in self._replicas.all:
            ready.add_metric([str(replica.number)], float(replica.status == READY))
        yield ready
        for family, texts in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text in texts.items():
                metric = family(f"omni_sp_replica_{name}", text, labels=["replica"])
                for replica in self._replicas.all:
                    metric.add_metric([str(replica.number)], getattr(replica, name))
                yield metric
