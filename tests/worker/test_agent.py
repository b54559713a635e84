"""The agent's process against the real API server: a worker's writes of protocol.md, and what they require."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import models
from claas_crds import names
from claas_crds.request import Result
from cluster.controlplane import ControlPlane
from operatorstage import apply_crds
from workerstage import REAL, WAIT_SECONDS, Gate, WorkerStage

pytestmark = pytest.mark.controlplane

SECRET = "the wombat sings at dawn"


@pytest.fixture
def stage(control_plane: ControlPlane, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[WorkerStage]:
    apply_crds(control_plane)
    with WorkerStage(control_plane, tmp_path, request.node.name) as made:
        yield made


def ready(stage: WorkerStage, **environment: str) -> subprocess.Popen[bytes]:
    process = stage.start(**environment)
    stage.wait_state(names.STATE_READY)
    return process


def test_a_bound_request_is_claimed_and_reported(stage: WorkerStage) -> None:
    ready(stage)
    name = stage.bound()
    result = Result.model_validate(stage.wait_result(name))
    status = stage.status(name)
    assert status["claim"] == {"worker": stage.pod, "attempt": 1, "at": status["claim"]["at"]}
    assert (result.attempt, result.outcome, result.reason) == (1, "Succeeded", "Succeeded")
    assert result.lora_uri.startswith("s3://adapters/somebody/a-") and result.metadata is not None
    assert status["claim"]["at"] < result.at
    stage.wait("the uid to leave the Lease", lambda: not stage.running())


def test_what_was_bound_before_the_worker_watched_is_run(stage: WorkerStage) -> None:
    names_ = [stage.bound() for _ in range(3)]
    stage.start()
    for name in names_:
        assert stage.wait_result(name)["outcome"] == "Succeeded"


def test_the_lease_is_the_pods_and_is_renewed(stage: WorkerStage) -> None:
    ready(stage)
    lease = stage.lease()
    assert lease is not None
    assert lease["metadata"]["labels"] == {
        names.COMPONENT_LABEL: names.COMPONENT_WORKER,
        names.POOL_LABEL: "l40s",
        names.INSTANCE_LABEL: "claas",
    }
    (owner,) = lease["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Pod", stage.pod, stage.pod_uid)
    assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseDurationSeconds"]) == (stage.pod_uid, 15)

    def renewed() -> bool:
        now = stage.lease()
        return now is not None and now["spec"]["renewTime"] > lease["spec"]["renewTime"]

    stage.wait("a renewal", renewed, 8)


def test_the_lease_is_renewed_as_often_as_the_operator_wants(stage: WorkerStage) -> None:
    ready(stage, LEASE_SECONDS="1.5")
    lease = stage.lease()
    assert lease is not None and lease["spec"]["leaseDurationSeconds"] == 2

    def renewed() -> bool:
        now = stage.lease()
        return now is not None and now["spec"]["renewTime"] > lease["spec"]["renewTime"]

    stage.wait("a renewal", renewed, 3)  # by default it would come after 5


def test_the_lease_says_starting_before_the_model_is_loaded(stage: WorkerStage) -> None:
    """An empty folder is no model: the real worker fails there, after its Lease was seen."""
    process = stage.start(REAL)
    stage.wait_state(names.STATE_STARTING)
    assert stage.wait_exit(process, 60) != 0
    assert stage.state() == names.STATE_STARTING


def test_the_uid_is_in_the_lease_from_before_the_claim_until_after_the_result(stage: WorkerStage) -> None:
    gate = Gate(stage.folder)
    ready(stage)
    name = stage.request("hold")
    uid = stage.uid(name)
    assert stage.running() == set()
    stage.bind(name)
    stage.wait("the claim", lambda: "claim" in stage.status(name))
    assert stage.running() == {uid}
    gate.open()
    stage.wait_result(name)
    stage.wait("the uid to leave", lambda: stage.running() == set())


def test_a_busy_worker_writes_its_lease_once_per_request(stage: WorkerStage) -> None:
    """What is over leaves with the announcement of what comes next."""
    gate = Gate(stage.folder)
    ready(stage)
    first = stage.bound("hold")
    stage.wait("the claim", lambda: "claim" in stage.status(first))
    others = [stage.bound() for _ in range(20)]
    lease = stage.lease()
    assert lease is not None
    before, began = _writes(stage), time.monotonic()
    gate.open()
    for name in others:
        stage.wait_result(name)
    stage.wait("the last uid to leave", lambda: not stage.running())
    renewals = 2 + (time.monotonic() - began) / 5  # and the API server has a Lease of its own
    assert _writes(stage) - before <= len(others) + 1 + renewals


def _writes(stage: WorkerStage) -> int:
    """Of Leases, by anybody, as the API server counts them; here nobody else has one."""
    counts = [line for line in stage.api("GET", "/metrics").splitlines() if line.startswith("apiserver_request_total{")]
    put = [line for line in counts if 'resource="leases"' in line and 'verb="PUT"' in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in put)


def test_a_request_that_moved_on_is_not_claimed(stage: WorkerStage) -> None:
    """While the worker is busy, its next request is bound elsewhere, and a third ends."""
    gate = Gate(stage.folder)
    ready(stage)
    busy = stage.bound("hold")
    stage.wait("the claim", lambda: "claim" in stage.status(busy))
    moved, ended, later = stage.bound(), stage.bound(), stage.bound()
    stage.bind(moved, worker="another")
    condition = {
        "type": "Failed",
        "status": "True",
        "reason": "Cancelled",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    stage.write_status(ended, conditions=[condition])
    gate.open()
    assert stage.wait_result(later)["outcome"] == "Succeeded"
    for name in (moved, ended):
        assert not {"claim", "result", "progress"} & stage.status(name).keys()


def test_a_request_of_another_pool_is_not_claimed(stage: WorkerStage) -> None:
    ready(stage, CLAAS_POOL="l40s")
    other, own = stage.bound(pool="a100"), stage.bound(pool="l40s")
    assert stage.wait_result(own)["outcome"] == "Succeeded"
    assert stage.wait_result(stage.bound())["outcome"] == "Succeeded", "one that names none is whose it is bound to"
    assert not {"claim", "result", "progress"} & stage.status(other).keys()
    told = {line["why"] for line in stage.lines() if line.get("uid") == stage.uid(other)}
    assert told == {"spec.pool is a100, and this worker is of pool l40s"}


def test_a_request_that_was_moved_away_and_back_is_run(stage: WorkerStage) -> None:
    """The same attempt, bound a second time here after the first claim was refused."""
    gate = Gate(stage.folder)
    ready(stage)
    busy = stage.bound("hold")
    stage.wait("the claim", lambda: "claim" in stage.status(busy))
    name = stage.bound()
    stage.bind(name, worker="another")
    gate.open()
    stage.wait_result(stage.bound())  # by now the claim of the moved one was refused
    stage.bind(name)
    assert stage.wait_result(name)["attempt"] == 1


def test_sigterm_while_the_model_loads_ends_the_worker(stage: WorkerStage) -> None:
    process = stage.start(REAL, MODEL_PATH=str(models.tiny_qwen_dir()))
    stage.wait_state(names.STATE_STARTING)
    process.send_signal(signal.SIGTERM)
    assert stage.wait_exit(process, 10) == 0


def test_a_result_of_an_attempt_that_moved_on_is_not_written(stage: WorkerStage) -> None:
    gate = Gate(stage.folder)
    ready(stage)
    name = stage.bound("hold")
    stage.wait("the claim", lambda: "claim" in stage.status(name))
    stage.bind(name, attempt=2, worker="another")
    gate.open()
    stage.wait("the worker to give up", lambda: any("not wanted" in line["message"] for line in stage.lines()))
    assert "result" not in stage.status(name)
    assert stage.status(name)["attempt"] == 2
    assert stage.wait_result(stage.bound())["outcome"] == "Succeeded"


def test_the_next_attempt_runs_on_the_same_worker(stage: WorkerStage) -> None:
    ready(stage)
    name = stage.bound("unavailable")
    first = stage.wait_result(name)
    assert (first["outcome"], first["reason"], first["attempt"]) == ("Retryable", "TeacherUnavailable", 1)
    stage.bind(name, attempt=2)
    assert stage.wait_result(name)["attempt"] == 2


def test_an_attempt_with_a_result_is_not_run_again(stage: WorkerStage) -> None:
    ready(stage)
    name = stage.bound()
    first = stage.wait_result(name)
    stage.write_status(name, reason="touched")
    stage.wait_result(stage.bound())  # a later request is through: the touched one was seen and left alone
    assert stage.status(name)["result"] == first


def test_bad_input_is_a_result_and_the_worker_serves_on(stage: WorkerStage) -> None:
    process = ready(stage)
    bad, crash = stage.wait_result(stage.bound("bad")), stage.wait_result(stage.bound(f"crash {SECRET}"))
    assert (bad["outcome"], bad["reason"], bad["message"]) == (
        "Failed",
        "EmptyResponse",
        "samples[0].response is empty",
    )
    assert (crash["outcome"], crash["reason"]) == ("Failed", "InternalError")
    assert stage.wait_result(stage.bound())["outcome"] == "Succeeded"
    assert process.poll() is None


def test_no_text_of_a_sample_is_logged_or_reported(stage: WorkerStage) -> None:
    ready(stage)
    sample = {"prompt": f"crash {SECRET}", "response": SECRET, "feedback": SECRET}
    name = stage.request(samples=[sample])
    stage.bind(name)
    result = stage.wait_result(name)
    assert "(KeyError at " in result["message"]
    assert SECRET not in json.dumps(stage.status(name)) + json.dumps(stage.lease())
    text = stage.log.read_text()
    assert SECRET not in text and stage.uid(name) in text


def test_out_of_memory_is_retryable_and_ends_the_worker(stage: WorkerStage) -> None:
    process = ready(stage)
    name = stage.bound("memory")
    assert stage.wait_exit(process) == 0
    result = stage.status(name)["result"]
    assert (result["outcome"], result["reason"]) == ("Retryable", "InternalError")
    assert (stage.state(), stage.running()) == (names.STATE_DRAINING, set())


def test_progress_is_written_at_most_once_a_second(stage: WorkerStage) -> None:
    gate = Gate(stage.folder)
    ready(stage)
    name = stage.bound("hold")
    stage.wait("the step's phase", lambda: stage.status(name).get("progress", {}).get("phase") == "Stepping")
    status = stage.status(name)
    assert status["progress"]["at"] > status["claim"]["at"]
    claimed, shown = status["claim"]["at"], status["progress"]["at"]
    assert _seconds(shown) - _seconds(claimed) >= 1.0
    gate.open()
    stage.wait_result(name)


def _seconds(at: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(at).timestamp()


def test_an_idle_worker_lingers_then_ends(stage: WorkerStage) -> None:
    process = ready(stage, LINGER_SECONDS="1", FIRST_REQUEST_SECONDS="30")
    stage.wait_result(stage.bound())
    done = time.monotonic()
    assert stage.wait_exit(process) == 0
    assert 0.5 < time.monotonic() - done < 8
    assert stage.state() == names.STATE_DRAINING


def test_a_worker_that_never_gets_a_request_ends(stage: WorkerStage) -> None:
    process = ready(stage, LINGER_SECONDS="0", FIRST_REQUEST_SECONDS="1")
    assert stage.wait_exit(process) == 0


def tell(stage: WorkerStage, linger_seconds: str) -> None:
    """As the operator does."""
    path = f"/apis/coordination.k8s.io/v1/namespaces/{stage.namespace}/leases/{stage.pod}"
    stage.api("PATCH", path, {"metadata": {"annotations": {names.LINGER_SECONDS: linger_seconds}}})


def told(stage: WorkerStage) -> str:
    """What the Lease says of it."""
    lease = stage.lease()
    assert lease is not None
    return str(lease["metadata"]["annotations"].get(names.LINGER_SECONDS, ""))


def test_a_worker_that_is_told_not_to_linger_any_more_leaves(stage: WorkerStage) -> None:
    """Also one that has never had a request: it was started for none in particular."""
    process = ready(stage, LINGER_SECONDS="31536000", LEASE_SECONDS="1.5")
    began = time.monotonic()
    tell(stage, "1.5")
    assert stage.wait_exit(process) == 0
    assert time.monotonic() - began < 5
    assert (stage.state(), told(stage)) == (names.STATE_DRAINING, "1.5")


def test_what_is_bound_to_a_worker_that_was_told_to_leave_is_run(stage: WorkerStage) -> None:
    """While it runs something, and in the moment in which it is told."""
    gate = Gate(stage.folder)
    process = ready(stage, LINGER_SECONDS="31536000", LEASE_SECONDS="1.5")
    first = stage.bound("hold")
    stage.wait("the claim", lambda: "claim" in stage.status(first))
    tell(stage, "0")
    stage.wait("the word to be heard", lambda: any(line["message"] == "told" for line in stage.lines()))
    second = stage.bound()
    assert (stage.state(), process.poll()) == (names.STATE_READY, None)
    gate.open()
    assert stage.wait_exit(process) == 0
    for name in (first, second):
        status = stage.status(name)
        assert (status["result"]["outcome"], status["attempt"]) == ("Succeeded", 1)


def test_a_word_that_is_no_duration_changes_nothing(stage: WorkerStage) -> None:
    process = ready(stage, LINGER_SECONDS="31536000", LEASE_SECONDS="1.5")
    tell(stage, "soon")
    stage.wait("the word to be read", lambda: any("not a number" in line["message"] for line in stage.lines()))
    assert stage.wait_result(stage.bound())["outcome"] == "Succeeded"
    tell(stage, "0")
    assert stage.wait_exit(process) == 0


def test_linger_0_and_max_requests_1_is_one_job_per_request(stage: WorkerStage) -> None:
    """It waits for its first request, shows Draining while that runs, and leaves the next one alone."""
    gate = Gate(stage.folder)
    process = ready(stage, LINGER_SECONDS="0", MAX_REQUESTS="1")
    name = stage.bound("hold")
    stage.wait_state(names.STATE_DRAINING)
    assert "result" not in stage.status(name)
    gate.open()
    assert stage.wait_exit(process) == 0
    assert stage.status(name)["result"]["outcome"] == "Succeeded"


def test_what_was_bound_before_draining_was_seen_is_still_run(stage: WorkerStage) -> None:
    gate = Gate(stage.folder)
    process = ready(stage, MAX_REQUESTS="1")
    first = stage.bound("hold")
    stage.wait_state(names.STATE_DRAINING)
    second = stage.bound()
    gate.open()
    assert stage.wait_exit(process) == 0
    assert [stage.status(name)["result"]["outcome"] for name in (first, second)] == ["Succeeded"] * 2


def test_sigterm_while_idle_ends_within_two_seconds(stage: WorkerStage) -> None:
    process = ready(stage)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert stage.wait_exit(process, 2) == 0
    assert time.monotonic() - started < 2
    assert stage.state() == names.STATE_DRAINING


def test_sigterm_in_mid_step_finishes_it_and_starts_nothing_else(stage: WorkerStage) -> None:
    gate = Gate(stage.folder)
    process = ready(stage)
    name = stage.bound("hold")
    stage.wait("the claim", lambda: "claim" in stage.status(name))
    waiting = stage.bound()
    process.send_signal(signal.SIGTERM)
    stage.wait_state(names.STATE_DRAINING)  # while the step still runs
    assert stage.running() == {stage.uid(name)}
    gate.open()
    assert stage.wait_exit(process) == 0
    assert stage.status(name)["result"]["outcome"] == "Succeeded"
    assert "claim" not in stage.status(waiting)


def test_a_deleted_request_is_given_up(stage: WorkerStage) -> None:
    gate = Gate(stage.folder)
    process = ready(stage)
    name = stage.bound("hold")
    stage.wait("the claim", lambda: "claim" in stage.status(name))
    stage.api("DELETE", stage._path(name))
    gate.open()
    assert stage.wait_result(stage.bound())["outcome"] == "Succeeded"
    assert process.poll() is None


def test_what_is_bound_together_runs_together_each_with_its_own_end(stage: WorkerStage) -> None:
    """The first is alone and waits for nobody; those that come while it runs are one batch, up to its size."""
    gate = Gate(stage.folder)
    ready(stage, BATCH="3")
    alone = stage.bound("hold")
    stage.wait("the claim", lambda: "claim" in stage.status(alone))
    company = [stage.bound(prompt) for prompt in ("takes 0.6 s", "bad", "hello")]
    later = stage.bound("takes 0.2 s")
    gate.open()
    results = [stage.wait_result(name) for name in (*company, later)]
    assert [result["outcome"] for result in results] == ["Succeeded", "Failed", "Succeeded", "Succeeded"]
    assert results[1]["reason"] == "EmptyResponse"
    claims = [stage.status(name)["claim"]["at"] for name in (*company, later)]
    assert max(claims[:3]) < min(result["at"] for result in results[:3]), "all were claimed before any had run"
    assert claims[3] > max(result["at"] for result in results[:3]), "a fourth has to wait"
    assert len({result["gpuMs"] for result in results[:3]}) == 1, "each has its share of the time"
    assert 200 <= results[0]["gpuMs"] <= 400
    assert results[3]["gpuMs"] >= 200
    stage.wait("the uids to leave the Lease", lambda: not stage.running())


def test_a_request_of_a_batch_that_moved_on_is_dropped_and_the_others_are_not(stage: WorkerStage) -> None:
    gate = Gate(stage.folder)
    ready(stage, BATCH="2")
    first = stage.bound("hold")
    stage.wait("the claim", lambda: "claim" in stage.status(first))
    moved, stays = stage.bound("hold"), stage.bound()
    gate.open()
    stage.wait("the second claim", lambda: "claim" in stage.status(stays))
    stage.bind(moved, attempt=2, worker="another")
    gate.open()
    assert stage.wait_result(stays)["outcome"] == "Succeeded"
    assert "result" not in stage.status(moved)


def test_out_of_memory_in_a_batch_ends_the_worker_after_the_reports(stage: WorkerStage) -> None:
    gate = Gate(stage.folder)
    process = ready(stage, BATCH="2")
    first = stage.bound("hold")
    stage.wait("the claim", lambda: "claim" in stage.status(first))
    fat, thin = stage.bound("memory"), stage.bound()
    gate.open()
    assert stage.wait_result(fat)["outcome"] == "Retryable"
    assert stage.wait_result(thin)["outcome"] == "Succeeded"
    assert stage.wait_exit(process) == 0


def test_a_spec_that_this_release_cannot_read_is_a_result(stage: WorkerStage) -> None:
    ready(stage)
    name = stage.request()
    stage.write_status(name, worker=stage.pod, attempt=1)  # no parent
    result = stage.wait_result(name)
    assert (result["outcome"], result["reason"]) == ("Failed", "InvalidSpec")


def test_the_api_server_goes_away_and_comes_back(control_plane: ControlPlane, tmp_path: Path) -> None:
    """Its own control plane, killed in mid-step: the result arrives when it is back, and the next request is seen."""
    with ControlPlane(tmp_path / "own", controllers=False) as own:
        apply_crds(own)
        stage = WorkerStage(own, tmp_path, "restart")
        own.api("POST", "/api/v1/namespaces", {"metadata": {"name": stage.namespace}})
        stage.pod_uid = "0b6c7d6e-0000-4000-8000-000000000000"
        gate = Gate(tmp_path)
        process = stage.start()
        try:
            stage.wait_state(names.STATE_READY)
            name = stage.bound("hold")
            stage.wait("the claim", lambda: "claim" in stage.status(name))
            own.stop()
            gate.open()
            stage.wait("a failed try", lambda: any(line.get("what") == "report" for line in stage.lines()))
            own.start()
            assert stage.wait_result(name, 60)["outcome"] == "Succeeded"
            assert stage.wait_result(stage.bound(), WAIT_SECONDS * 2)["outcome"] == "Succeeded"
            assert process.poll() is None
        finally:
            process.kill()
            process.wait(timeout=10)
