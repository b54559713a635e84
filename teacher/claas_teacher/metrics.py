"""What Prometheus sees of the scorings, beside vLLM's own on /metrics. No label holds anything of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from claas_teacher.admission import Admission

SECONDS_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """The teacher's collectors in one registry (the process's own, unless a test brings another)."""

    def __init__(self, admission: Admission, registry: CollectorRegistry | None = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        registry = registry or REGISTRY
        self.seconds = Histogram(
            "claas_teacher_seconds",
            "From a scoring request's last byte to its answer's first",
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self.requests = Counter(
            "claas_teacher_requests",
            "Scoring requests by HTTP status and reason",
            ["code", "reason"],
            registry=registry,
        )
        self.tokens = Counter("claas_teacher_tokens", "Prompt and response tokens read", registry=registry)
        self.rows = Counter("claas_teacher_rows", "Response tokens scored", registry=registry)
        queue = Gauge("claas_teacher_queue_tokens", "Tokens admitted and not yet scored", registry=registry)
        queue.set_function(lambda: admission.queued_tokens)
        engine = Gauge("claas_teacher_engine_tokens", "Of those, tokens given to the engine", registry=registry)
        engine.set_function(lambda: admission.engine_tokens)
