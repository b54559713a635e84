"""What Prometheus sees of the operator. Labels are namespaces, pools, states, reasons: never an adapter or a request.

Counters and histograms move as writes succeed. The gauges of the queue and the workers are read from the snapshot when
somebody asks, and only a leader has them, so that a sum over the replicas is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import prometheus_client
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from claas_crds import names
from claas_crds.reasons import Reason
from claas_operator.actions import Action, Bind, Complete, End, OnRequest, Retry
from claas_operator.settings import Settings
from claas_operator.snapshot import Request, Snapshot
from claas_operator.workers import works_for

# A warm request takes tenths of a second, a cold one minutes, one in a long queue hours.
PHASE_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
RECONCILE_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# A worker writes a reason too, and could invent as many as it likes.
_OTHER: Final = "Other"
_REASONS: Final = frozenset(Reason)
_STATES: Final = (names.STATE_STARTING, names.STATE_READY, names.STATE_DRAINING)


class Metrics:
    """The operator's collectors in a registry of their own, with the process' memory and CPU time."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        prometheus_client.ProcessCollector(registry=self.registry)
        self._phase = prometheus_client.Histogram(
            "claas_request_phase_seconds",
            "How long completed requests took, by phase",
            ["phase"],
            registry=self.registry,
            buckets=PHASE_BUCKETS,
        )
        self._steps = prometheus_client.Counter(
            "claas_steps_total",
            "Requests that have ended, by how and why",
            ["result", "reason"],
            registry=self.registry,
        )
        self._cache_hits = prometheus_client.Counter(
            "claas_adapter_cache_hits_total",
            "Completed requests whose adapter their worker still had in memory",
            registry=self.registry,
        )
        self._bindings_lost = prometheus_client.Counter(
            "claas_bindings_lost_total",
            "Requests taken from a worker that was gone, or did not begin",
            registry=self.registry,
        )
        self._gpu_seconds = prometheus_client.Counter(
            "claas_gpu_seconds_total",
            "Workers' time that requests took",
            ["namespace"],
            registry=self.registry,
        )
        self.reconcile_seconds = prometheus_client.Histogram(
            "claas_reconcile_seconds",
            "How long it took to decide what to do",
            registry=self.registry,
            buckets=RECONCILE_BUCKETS,
        )
        self.workqueue_depth = prometheus_client.Gauge(
            "claas_workqueue_depth", "Writes that are decided and not done", registry=self.registry
        )
        self._api_requests = prometheus_client.Counter(
            "claas_api_requests_total",
            "Calls of the API server, watches apart; without an answer their code is 0",
            ["verb", "code"],
            registry=self.registry,
        )

    def watch(self, snapshot: Snapshot, settings: Settings, leading: Callable[[], bool]) -> None:
        """From now on what the snapshot holds is shown, while we lead."""
        self.registry.register(_Gauges(snapshot, settings, leading))

    def called(self, verb: str, code: int) -> None:
        """An API server was called."""
        self._api_requests.labels(verb, str(code)).inc()

    def done(self, action: Action) -> None:
        """A write has succeeded."""
        if isinstance(action, Complete | End | Retry) and (seconds := _used_seconds(action)):
            self._gpu_seconds.labels(action.request.namespace).inc(seconds)
        if isinstance(action, Complete):
            reason = action.status.get("reason") or Reason.SUCCEEDED
            self._steps.labels("Complete", reason).inc()
            if (result := action.request.result) is not None and result.adapter_cached:
                self._cache_hits.inc()
            for phase, seconds in _phases(action.status.get("timings") or {}):
                self._phase.labels(phase).observe(seconds)
        elif isinstance(action, End):
            self._steps.labels(action.status["state"], action.reason if action.reason in _REASONS else _OTHER).inc()
        if (isinstance(action, Retry | End) and action.lost) or (type(action) is Bind and action.request.worker):
            self._bindings_lost.inc()


def _used_seconds(action: OnRequest) -> float:
    """What the attempt that a write ends has used of a worker: by how much it moves `status.gpuMs`."""
    return max(0, (action.status.get("gpuMs") or 0) - action.request.used_ms) / 1000


def _phases(timings: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`stepMs: 70` is phase "step", 0.07 s."""
    for name, milliseconds in timings.items():
        yield name.removesuffix("Ms"), milliseconds / 1000


class _Gauges(Collector):
    """What is read from the snapshot at each scrape, in the loop's own thread."""

    def __init__(self, snapshot: Snapshot, settings: Settings, leading: Callable[[], bool]) -> None:
        self._snapshot, self._settings, self._leading = snapshot, settings, leading

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges now."""
        yield GaugeMetricFamily(
            "claas_is_leader", "Whether this replica acts; the others watch", value=float(self._leading())
        )
        if not self._leading():
            return
        waiting = [request for request in self._snapshot.unended() if not request.worker]
        depth = GaugeMetricFamily("claas_queue_depth", "Requests that wait for a worker", labels=["namespace", "pool"])
        for key, count in sorted(Counter((request.namespace, self._pool(request)) for request in waiting).items()):
            depth.add_metric(key, count)
        yield depth
        oldest = min((request.created for request in waiting), default=None)
        seconds = max(0.0, (datetime.now(UTC) - oldest).total_seconds()) if oldest else 0.0
        yield GaugeMetricFamily(
            "claas_queue_oldest_seconds", "Age of the oldest request that waits for a worker", value=seconds
        )
        workers = GaugeMetricFamily("claas_workers", "Workers by what their Leases say", labels=["pool", "state"])
        for key, count in sorted(Counter(self._workers()).items()):
            workers.add_metric(key, count)
        yield workers

    def _workers(self) -> Iterator[tuple[str, str]]:
        """Pool and state of each. Tenants write labels and Leases too, and could invent as many as they like."""
        for pod in self._snapshot.pods.values():
            if pod.over or not works_for(pod, self._settings):
                continue
            lease = self._snapshot.lease_of(pod)
            state = lease.state if lease else names.STATE_STARTING
            yield self._known(pod.pool), state if state in _STATES else _OTHER

    def _known(self, pool: str) -> str:
        return pool if self._settings.pool(pool) else _OTHER

    def _pool(self, request: Request) -> str:
        """By its adapter's spec, or its own."""
        adapter = self._snapshot.adapter(request.namespace, request.adapter_name) if request.adapter_name else None
        chosen = request.pool if request.bare else adapter.spec.pool if adapter and adapter.spec else ""
        return self._known(chosen or self._settings.default_pool)
