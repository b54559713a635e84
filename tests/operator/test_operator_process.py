"""The operator's process on the real API server: the protocol from creation to Complete, and what dies on the way.

It runs with the rights that the chart grants, and not one more (`operatorstage.grant`).
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from pathlib import Path

import httpx
import pytest

import collector
from claas_crds import names
from claas_crds.reasons import Reason
from cluster.process import wait_for
from operatorstage import GROUP, OPERATOR, Stage, TeacherServer

pytestmark = pytest.mark.controlplane

WRITES_ON_AN_ADAPTER = 7
LATENCY_REQUESTS = 20


def test_a_request_goes_through_and_the_head_moves_before_it_is_complete(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter()
    stage.request("r")
    worker = stage.worker()
    uri = stage.run("r")
    status = stage.complete("r")
    head = stage.see_adapter()["status"]
    assert (status["worker"], status["attempt"], status["loraUri"]) == (worker, 1, uri)
    assert (head["uri"], head["headSeq"], head.get("active")) == (uri, 2, None)
    assert status["metadata"]["tokensProcessed"] == 64
    assert set(status["timings"]) >= {"queueMs", "claimMs", "stepMs"}
    assert {c["type"]: c["status"] for c in head["conditions"]} == {"Updating": "False", "Ready": "True"}

    uid = stage.api("GET", stage.request_path("r"))["metadata"]["uid"]
    stage.wait("the last line", lambda: any(line.get("action") == "Complete" for line in stage.lines()))
    decisions = {line["action"]: line for line in stage.lines() if line.get("uid") == uid and line["message"] == "done"}
    assert {"Lock", "Bind", "Commit", "Complete"} <= decisions.keys()
    assert all(line["ms"] > 0 for line in decisions.values())
    assert decisions["Bind"]["worker"] == worker and decisions["Complete"]["state"] == "Complete"


def test_the_collector_leaves_alone_what_stays_and_looks_rarely_at_the_rest(stage: Stage, tmp_path: Path) -> None:
    """By default it was a third of the CPU that a start among 20,000 objects took."""
    environment = {"KUBECONFIG": str(stage.control_plane.kubeconfig_of(OPERATOR))}
    arguments = ["operator", "run", "--config", str(stage.settings())]
    with collector.watched(tmp_path, environment, "claas_operator.cli", arguments) as (log, told):
        wait_for("the operator to lead", lambda: '"synced"' in log.read_text(), 30, logs=[log])
    assert told["frozen"] > 50_000
    assert told["threshold"][0] >= 10_000 > gc.get_threshold()[0]


def test_a_warm_worker_has_a_request_at_once_and_each_costs_few_writes(
    stage: Stage, record_property: pytest.RecordProperty
) -> None:
    # However slow this machine is just now: a wait that is told costs a write.
    stage.start_operator(stage.settings(timings={"reasonDelaySeconds": 60}))
    stage.adapter()
    stage.request("first")
    stage.worker()
    stage.run("first")
    stage.complete("first")
    waits = []
    before = stage.writes()
    for i in range(LATENCY_REQUESTS):
        name = f"r{i}"
        created = time.monotonic()
        stage.request(name)
        stage.wait(f"{name} to be bound", lambda name=name: stage.see(name).get("worker"), every=0.002)
        waits.append((time.monotonic() - created) * 1000)
        stage.run(name)
        stage.complete(name)
    writes = (stage.writes() - before) / LATENCY_REQUESTS
    median, worst = statistics.median(waits), max(waits)
    record_property("created_to_assigned_ms", {"p50": round(median, 1), "max": round(worst, 1)})
    record_property("writes_per_request", writes)
    print(f"created -> assigned: p50 {median:.0f} ms, max {worst:.0f} ms; {writes:.2f} writes per request")
    assert writes <= WRITES_ON_AN_ADAPTER
    assert median <= 250, waits


def test_a_request_completes_once_wherever_the_operator_is_killed(stage: Stage) -> None:
    config = stage.settings()
    stage.adapter()
    stage.start_operator(config)
    stage.wait_to_lead()
    stage.request("first")
    stage.sigkill()  # before the Job, or just after it
    stage.start_operator(config)
    stage.worker()
    stage.bound("first")
    stage.sigkill()  # after it was bound; it is claimed and done while there is no operator
    stage.claim("first")
    uri = stage.report("first")
    stage.request("second")
    stage.start_operator(config)
    assert stage.complete("first")["loraUri"] == uri
    stage.run("second")
    stage.sigkill()  # during the commit, or close to it
    stage.start_operator(config)
    stage.complete("second")
    status = stage.see_adapter()["status"]
    assert status["headSeq"] == 3
    uids = [entry["requestUid"] for entry in status["history"]]
    assert len(uids) == len(set(uids)) == 3
    assert [stage.see(name)["attempt"] for name in ("first", "second")] == [1, 1]
    assert len(stage.jobs()) == 1, "no worker was started twice"


def test_a_request_whose_worker_dies_runs_again_and_moves_the_head_once(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter()
    stage.request("r")
    lost = stage.worker()
    stage.bound("r")
    stage.claim("r")
    stage.kill_worker(lost)
    second = stage.worker()
    stage.wait("the second attempt", lambda: stage.see("r").get("attempt") == 2)
    assert stage.see("r")["worker"] == second
    uri = stage.run("r")
    stage.complete("r")
    head = stage.see_adapter()["status"]
    assert (head["headSeq"], head["uri"]) == (2, uri)


def test_a_silent_worker_loses_its_pod_and_its_request_runs_again(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter()
    stage.request("r")
    silent = stage.worker()
    stage.bound("r")
    stage.claim("r")
    stage.wedge(silent)
    stage.wait("the Pod to go", lambda: silent not in [pod["metadata"]["name"] for pod in stage.pods()])
    stage.worker()
    stage.wait("the second attempt", lambda: stage.see("r").get("attempt") == 2)
    stage.run("r")
    stage.complete("r")
    assert stage.see_adapter()["status"]["headSeq"] == 2


def test_of_two_operators_one_acts_and_the_other_takes_over(stage: Stage) -> None:
    config = stage.settings()
    stage.start_operator(config)
    stage.wait_to_lead(0)
    stage.start_operator(config)
    stage.wait_to_stand_by(1)
    stage.adapter()
    stage.request("r")
    stage.worker()
    stage.run("r")
    stage.complete("r")
    assert not [line for line in stage.lines(1) if line["message"] == "done"], "the standby only watches"
    stage.sigkill(0)
    died = time.monotonic()
    stage.wait_to_lead(1)
    assert time.monotonic() - died < 3 + 2, "the Lease's three seconds, and a little"
    stage.request("s")
    stage.run("s")
    stage.complete("s")
    stage.start_operator(config)
    stage.wait_to_stand_by(2)
    stage.operators[1].terminate()
    told = time.monotonic()
    stage.wait_to_lead(2)
    assert stage.operators[1].wait(timeout=10) == 0
    assert time.monotonic() - told < 3, "a leader that is told to go gives its Lease back"


def test_the_leaders_lease_goes_with_the_deployment(stage: Stage) -> None:
    deployments = f"/apis/apps/v1/namespaces/{stage.home}/deployments"
    labels = {"app": "operator"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "operator", "image": "none"}]}}
    spec = {"replicas": 0, "selector": {"matchLabels": labels}, "template": pod}
    owner = stage.api("POST", deployments, {"metadata": {"name": "claas-operator"}, "spec": spec})["metadata"]["uid"]
    stage.start_operator(stage.settings(owner={"deployment": "claas-operator"}))
    lease = f"/apis/coordination.k8s.io/v1/namespaces/{stage.home}/leases/{stage.instance}-operator"

    def owners() -> list[str]:
        found = stage.api.get(lease) or {"metadata": {}}
        return [reference["uid"] for reference in found["metadata"].get("ownerReferences", [])]

    stage.wait("the Lease to be the Deployment's", lambda: owners() == [owner])


def test_a_request_waits_for_the_teacher_and_goes_on(stage: Stage) -> None:
    with TeacherServer() as teacher:
        stage.start_operator(stage.settings(teacher={"url": teacher.url}))
        stage.adapter()
        stage.request("r")
        stage.wait("the reason", lambda: stage.see("r").get("reason") == Reason.TEACHER_UNAVAILABLE)
        assert stage.see("r")["state"] == "Pending"
        assert not stage.jobs(), "no GPU is taken for a request that cannot run"
        teacher.ready = True
        stage.worker()
        stage.bound("r")
        stage.claim("r")
        teacher.ready = False
        stage.report("r", "Retryable", Reason.TEACHER_UNAVAILABLE)
        stage.wait("the outage to show", lambda: stage.see("r").get("reason") == Reason.TEACHER_UNAVAILABLE)
        teacher.ready = True
        stage.wait("the second attempt", lambda: stage.see("r").get("attempt") == 2)
        stage.run("r")
        stage.complete("r")
        asked = teacher.asked
        time.sleep(1.5)  # five probe periods in which nothing needs the teacher
        assert teacher.asked <= asked + 1


def test_an_adapter_is_created_by_a_job_and_its_answer(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter(ready=False)
    stage.request("r")
    stage.wait("the Job's Pod", lambda: stage.pods("operation"))
    stage.wait("the reason", lambda: stage.see("r").get("reason") == Reason.ADAPTER_NOT_READY)
    pod = stage.pods("operation")[0]["metadata"]["name"]
    uri = stage.see_adapter()["spec"]["storage"]["uri"]
    answer = {"ok": True, "uri": uri, "version": "coder", "sha256": "0" * 64}
    stage.end_pod(pod, "operation", json.dumps(answer))
    stage.wait("the head", lambda: stage.see_adapter()["status"].get("headSeq") == 1)
    ready = next(c for c in stage.see_adapter()["status"]["conditions"] if c["type"] == "Ready")
    assert (ready["status"], ready["reason"]) == ("True", Reason.CREATED)
    stage.worker()
    stage.run("r")
    stage.complete("r")


def test_cancel_deletion_and_time_to_live(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter()
    stage.request("r", ttlSecondsAfterFinished=1)
    worker = stage.worker()
    stage.bound("r")
    stage.claim("r")
    stage.request("next")
    stage.api("PATCH", stage.request_path("r"), {"spec": {"cancel": True}})
    stage.wait("the cancellation", lambda: stage.see("r").get("state") in ("Cancelled", None))
    time.sleep(0.5)
    assert stage.see_adapter()["status"]["active"]["requestName"] == "r", "the worker still lists it"
    stage.wait("its deletion", lambda: stage.api.get(stage.request_path("r")) is None)
    stage.lease(worker, "Ready")
    stage.bound("next")
    stage.claim("next")
    stage.api("DELETE", f"{GROUP}/namespaces/{stage.team}/{names.ADAPTER_PLURAL}/coder")
    stage.adapter()
    stage.wait("the end", lambda: stage.see("next").get("reason") == Reason.ADAPTER_GONE)
    stage.lease(worker, "Ready")
    stage.request("third")
    stage.bound("third")
    stage.claim("third")
    stage.report("third", "NoSignal")
    assert stage.complete("third")["reason"] == Reason.NO_SIGNAL
    stage.wait("the lock to go", lambda: "active" not in stage.see_adapter()["status"])
    assert stage.see_adapter()["status"]["headSeq"] == 1


def test_one_job_per_request_where_that_is_wanted(stage: Stage) -> None:
    stage.start_operator(stage.settings(pool={"maxRequests": 1, "lingerSeconds": 0}))
    stage.adapter()
    stage.request("r")
    stage.request("s")
    first = stage.worker()
    stage.run("r")
    stage.complete("r")
    stage.lease(first, "Draining")
    second = stage.worker()
    stage.run("s")
    assert stage.complete("s")["worker"] == second
    assert len(stage.jobs()) == 2


def test_the_liveness_probe_answers_and_bad_settings_are_told(stage: Stage, unused_port: int) -> None:
    url = f"http://127.0.0.1:{unused_port}/healthz"
    stage.start_operator(None, "--liveness", url)
    stage.wait_to_lead()
    body = httpx.get(url, trust_env=False).json()
    assert body["loop"]["leading"] is True
    stage.operators[-1].terminate()
    assert stage.operators[-1].wait(timeout=10) == 0
    bad = stage.start_operator(stage.settings(defaultPool="h100"))
    assert bad.wait(timeout=20) == 1
    assert "defaultPool 'h100' names no entry of pools (l40s)" in stage.logs[-1].read_text()
