"""What Prometheus sees: the right numbers, under names that its linter accepts, and nothing of anybody's adapter."""

from __future__ import annotations

import asyncio
import subprocess
from datetime import timedelta

import httpx
import prometheus_client
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from claas_operator.actions import Bind, Complete, End, Retry
from claas_operator.loop import Loop
from claas_operator.metrics import Metrics
from claas_operator.plan import plan
from claas_operator.snapshot import Kind, Request, Snapshot
from claas_teacher.admission import Admission
from claas_teacher.metrics import Metrics as TeacherMetrics
from cluster import programs
from operatorkit import (
    NOW,
    PREFIX,
    MemoryApi,
    adapter,
    bound,
    claim,
    decide,
    later,
    lease,
    pod,
    request,
    result,
    settings,
    snapshot,
)
from operatorstage import Stage

WORKER = "claas-l40s-1-aaaaa"
NAMES = {
    "claas_request_phase_seconds",
    "claas_queue_depth",
    "claas_queue_oldest_seconds",
    "claas_workers",
    "claas_adapter_cache_hits",
    "claas_bindings_lost",
    "claas_steps",
    "claas_gpu_seconds",
    "claas_reconcile_seconds",
    "claas_workqueue_depth",
    "claas_api_requests",
    "claas_is_leader",
}


def scraped(registry: CollectorRegistry) -> str:
    return prometheus_client.generate_latest(registry).decode()


def series(text: str) -> dict[str, float]:
    """`name{label="value"}`, as people write it, to its value; buckets left out."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            if not sample.name.endswith("_bucket"):
                found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def lint(text: str) -> str:
    """What Prometheus' linter has against it."""
    command = [programs.ensure_promlint()]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def watched(known: Snapshot, *, leads: bool = True) -> Metrics:
    metrics = Metrics()
    metrics.watch(known, settings(), lambda: leads)
    return metrics


def parsed(raw: dict[str, object]) -> Request:
    (found,) = snapshot(raw).requests.values()
    return found


def test_the_linter_finds_what_is_wrong() -> None:
    assert "counter metrics should have" in lint("# HELP lost Lost\n# TYPE lost counter\nlost 1\n")


def test_every_metric_of_ours_keeps_to_the_conventions() -> None:
    known = snapshot(adapter(), request("r"), pod(WORKER), lease(WORKER))
    metrics = watched(known)
    claimed = parsed(request("r", status=bound(WORKER) | claim(WORKER) | result()))
    done = {"state": "Complete", "reason": "", "timings": {"queueMs": 5}}
    metrics.done(Complete(request=claimed, status=done))
    metrics.called("PATCH", 200)
    text = scraped(metrics.registry)
    assert lint(text) == ""
    assert {family.name for family in text_string_to_metric_families(text) if family.name.startswith("claas")} == NAMES

    registry = CollectorRegistry()
    teacher = TeacherMetrics(Admission(1000, 1000), registry)
    teacher.requests.labels("200", "").inc()
    assert lint(scraped(registry)) == ""
    assert "claas_teacher_seconds" in scraped(registry)


def test_the_queue_and_the_workers_are_those_of_the_snapshot() -> None:
    old = request("old", created=NOW - timedelta(seconds=90))
    taken = request("taken", "two", status=bound(WORKER, adapter="two"))
    alien = pod("somebodys", namespace="team", uid="uid-alien")
    alien["metadata"]["labels"]["claas.dev/pool"] = "invented"
    known = snapshot(
        *(adapter(), adapter("two"), old, request("new"), request("bare", ""), taken),
        *(pod(WORKER), lease(WORKER), pod("claas-l40s-2-bbbbb"), alien),
    )
    found = series(scraped(watched(known).registry))
    assert found['claas_queue_depth{namespace="team",pool="l40s"}'] == 3
    assert found["claas_queue_oldest_seconds"] >= 90
    assert found['claas_workers{pool="l40s",state="Ready"}'] == 1
    assert found['claas_workers{pool="l40s",state="Starting"}'] == 1
    assert not [name for name in found if "invented" in name]
    for word in ("old", "coder", "uid-old", WORKER):
        assert not [name for name in found if f'"{word}"' in name], "never a label per adapter or request"


def test_who_only_watches_has_no_queue() -> None:
    found = series(scraped(watched(snapshot(adapter(), request("r")), leads=False).registry))
    assert found["claas_is_leader"] == 0
    assert not [name for name in found if name.startswith(("claas_queue", "claas_workers"))]


def test_ends_are_counted_by_what_they_were() -> None:
    metrics = Metrics()
    ran = parsed(request("r", status=bound(WORKER) | claim(WORKER) | result(at=later(4))))
    timings = {"queueMs": 1500, "stepMs": 70}
    metrics.done(Complete(request=ran, status={"state": "Complete", "reason": "", "timings": timings, "gpuMs": 4000}))
    metrics.done(Complete(request=ran, status={"state": "Complete", "reason": "NoSignal"}))
    metrics.done(End(request=ran, status={"state": "Failed"}, reason="EmptyResponse"))
    metrics.done(End(request=ran, status={"state": "Failed"}, reason="Whatever a worker says"))
    waits = parsed(request("w"))
    metrics.done(End(request=waits, status={"state": "Cancelled"}, reason="Cancelled"))
    found = series(scraped(metrics.registry))
    steps = {name: value for name, value in found.items() if name.startswith("claas_steps")}
    assert steps == {
        'claas_steps_total{reason="Succeeded",result="Complete"}': 1,
        'claas_steps_total{reason="NoSignal",result="Complete"}': 1,
        'claas_steps_total{reason="EmptyResponse",result="Failed"}': 1,
        'claas_steps_total{reason="Other",result="Failed"}': 1,
        'claas_steps_total{reason="Cancelled",result="Cancelled"}': 1,
    }
    assert found['claas_gpu_seconds_total{namespace="team"}'] == 4
    assert found['claas_request_phase_seconds_sum{phase="queue"}'] == 1.5
    assert found['claas_request_phase_seconds_sum{phase="step"}'] == 0.07


def test_whatever_a_worker_says_of_its_phases_the_sums_only_grow_and_stay_of_use() -> None:
    metrics, report = Metrics(), result(uri=f"{PREFIX}bare-20260501-120000-0badcafe/")
    report["result"]["timings"] = {"stepMs": -(10**15), "loadMs": 10**18, "saveMs": 7}
    (complete,) = decide(request("r", "", status=bound(WORKER, adapter="") | claim(WORKER) | report)).actions
    metrics.done(complete)
    found = series(scraped(metrics.registry))
    sums = {phase: found[f'claas_request_phase_seconds_sum{{phase="{phase}"}}'] for phase in ("step", "load", "save")}
    assert sums == {"step": 0, "load": 600, "save": 0.007}, "at most spec.activeDeadlineSeconds"


def test_who_no_longer_leads_has_no_writes_to_do() -> None:
    async def found() -> float:
        metrics = Metrics()
        loop = Loop(settings(), MemoryApi(), metrics)  # type: ignore[arg-type]
        metrics.workqueue_depth.set(9)
        turns = asyncio.create_task(loop._turns())
        loop._wake.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        turns.cancel()
        return series(scraped(metrics.registry))["claas_workqueue_depth"]

    assert asyncio.run(found()) == 0


def test_a_step_is_a_cache_hit_where_its_worker_says_so() -> None:
    metrics = Metrics()
    for cached in (True, False, None, True):
        status = bound(WORKER) | claim(WORKER) | result()
        status["result"] |= {} if cached is None else {"adapterCached": cached}
        metrics.done(Complete(request=parsed(request("r", status=status)), status={"state": "Complete", "reason": ""}))
    found = series(scraped(metrics.registry))
    assert found["claas_adapter_cache_hits_total"] == 2
    assert found['claas_steps_total{reason="Succeeded",result="Complete"}'] == 4


def test_a_binding_is_lost_with_its_worker_or_when_it_is_moved() -> None:
    metrics = Metrics()
    unbound, first = parsed(request("r")), parsed(request("r", status=bound(WORKER)))
    claimed = parsed(request("r", status=bound(WORKER) | claim(WORKER)))
    metrics.done(Bind(request=unbound, worker=WORKER, attempt=1, status={}))
    assert series(scraped(metrics.registry))["claas_bindings_lost_total"] == 0
    metrics.done(Bind(request=first, worker="another", attempt=1, status={}))
    metrics.done(Retry(request=claimed, worker="another", attempt=2, status={"gpuMs": 3000}, lost=True))
    reported = parsed(request("r", status=bound(WORKER) | claim(WORKER) | result("Retryable", at=later(2))))
    metrics.done(Retry(request=reported, worker="another", attempt=2, status={}, lost=False))
    metrics.done(End(request=claimed, status={"state": "Failed"}, reason="BackoffLimitExceeded", lost=True))
    found = series(scraped(metrics.registry))
    assert found["claas_bindings_lost_total"] == 3
    assert found['claas_gpu_seconds_total{namespace="team"}'] == 3


def test_plans_are_as_the_metrics_think() -> None:
    """The fields that `done` looks at are those that `plan` writes."""
    known = snapshot(adapter(status={"headSeq": 1}), request("r", "", status=bound(WORKER, adapter="") | claim(WORKER)))
    (waiting,) = known.requests.values()
    raw = request("r", "", status=bound(WORKER, adapter="") | claim(WORKER) | result("NoSignal"), version=2)
    known.put(Kind.REQUEST, raw, NOW)
    (action,) = [a for a in plan(known, settings(), NOW).actions if isinstance(a, Complete)]
    assert (action.status["state"], action.status["reason"]) == ("Complete", "NoSignal")
    assert set(action.status["timings"]) >= {"queueMs", "claimMs"} and "gpuMs" in action.status
    assert waiting.uid == action.request.uid


@pytest.mark.controlplane
def test_a_running_operator_is_scraped(stage: Stage, unused_port: int) -> None:
    url = f"http://127.0.0.1:{unused_port}/metrics"
    stage.start_operator(None, "--metrics", url)
    stage.adapter()
    stage.request("r")
    stage.worker()
    stage.run("r")
    stage.complete("r")
    stage.request("waits", "nobody")
    stage.wait("the queue", lambda: series(httpx.get(url, trust_env=False).text).get("claas_queue_oldest_seconds"))
    text = httpx.get(url, trust_env=False).text
    found = series(text)
    assert lint(text) == ""
    assert found["claas_is_leader"] == 1
    assert found['claas_steps_total{reason="Succeeded",result="Complete"}'] == 1
    assert found['claas_request_phase_seconds_count{phase="step"}'] == 1
    assert found['claas_workers{pool="l40s",state="Ready"}'] == 1
    assert found[f'claas_queue_depth{{namespace="{stage.team}",pool="l40s"}}'] == 1
    assert found['claas_api_requests_total{code="200",verb="PATCH"}'] >= 4
    assert found["claas_reconcile_seconds_count"] > 0 and found["process_resident_memory_bytes"] > 1e7
    assert "SECRET" not in text
