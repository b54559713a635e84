"""Decisions about workers and adapters: how many to start, whom to fence, what to free, and a first version."""

from __future__ import annotations

from datetime import timedelta

import pytest

from claas_crds import names
from claas_crds.reasons import Reason
from claas_operator.actions import Bind, Describe, Fault, Fence, Fold, Free, Lock, Retry, Say, StartJob
from claas_operator.plan import plan
from claas_operator.snapshot import Kind
from operatorkit import (
    HOME,
    MODEL,
    NOW,
    OTHER,
    PREFIX,
    WORKER,
    Raw,
    about,
    active,
    adapter,
    answer_pod,
    bound,
    claim,
    decide,
    ended,
    format_time,
    job,
    later,
    lease,
    only,
    operation_labels,
    pod,
    request,
    result,
    settings,
    snapshot,
    template,
    workers,
)

# Workers are started for work that nobody has room for


def started(*objects: Raw, at: float = 0, **changes: Raw) -> list[StartJob]:
    return about(decide(*objects, at=at, using=settings(**changes)), StartJob)  # type: ignore[return-value]


def bares(count: int) -> list[Raw]:
    return [request(f"r{i}", "") for i in range(count)]


def test_as_many_as_there_is_work_and_no_more_than_allowed() -> None:
    assert [j.name for j in started(*bares(1))] == ["claas-l40s-1"]
    assert [j.name for j in started(*bares(9))] == ["claas-l40s-1", "claas-l40s-2"]
    assert len(started(*bares(9), pool={"batch": 8, "maxWorkers": 5})) == 2
    assert not started()


def test_a_worker_that_is_on_its_way_counts() -> None:
    assert not started(request("r", ""), job("claas-l40s-1"))
    assert not started(request("r", ""), job("claas-l40s-1"), pod(WORKER))
    assert not started(request("r", ""), job("claas-l40s-1"), pod(WORKER), lease(WORKER, "Starting"))
    assert not started(*bares(15), job("claas-l40s-1")), "it will have them done in a moment"
    assert [j.name for j in started(*bares(16), job("claas-l40s-1"))] == ["claas-l40s-2"]
    assert not started(request("r", ""), *workers(WORKER)), "and so does one with room"


def test_a_draining_worker_holds_its_gpu_but_takes_nothing() -> None:
    draining = [job("claas-l40s-1"), pod(WORKER), lease(WORKER, "Draining")]
    assert [j.name for j in started(request("r", ""), *draining)] == ["claas-l40s-2"]
    assert not started(request("r", ""), *draining, pool={"maxWorkers": 1})


def test_an_adapter_s_queue_is_served_by_one_worker() -> None:
    queue = [request(f"r{i}", created=later(i)) for i in range(5)]
    assert len(started(adapter(), *queue, at=9)) == 1


def test_a_finished_job_blocks_nothing_and_its_number_is_not_used_again() -> None:
    assert [j.name for j in started(request("r", ""), job("claas-l40s-7", end="Complete"))] == ["claas-l40s-8"]


def test_a_name_that_somebody_else_has_is_skipped() -> None:
    seen = snapshot(request("r", ""))
    seen.taken_counters[HOME, "claas-l40s"] = 4
    assert [a.about for a in about(plan(seen, settings(), NOW), StartJob)] == [f"{HOME}/claas-l40s-5"]


def test_a_job_that_is_being_created_is_not_created_again() -> None:
    seen = snapshot(request("r", ""))
    (start,) = about(plan(seen, settings(), NOW), StartJob)
    seen.in_flight[start.key] = start
    assert not about(plan(seen, settings(), NOW), StartJob)


def test_workers_that_fail_at_start_are_not_started_in_a_hot_loop() -> None:
    failed = [job(f"claas-l40s-{i}", end="Failed", at=later(10 * i)) for i in (1, 2, 3)]
    early = decide(request("r", ""), *failed, at=49)
    assert not about(early, StartJob)
    assert early.wake_at == later(50), "the third failure in a row, at 30 s, waits for 20 s"
    (say,) = about(early, Say)
    assert isinstance(say, Say)
    assert "claas-l40s-3 failed: Some: why" in say.status["conditions"][-1]["message"]
    assert [j.name for j in started(request("r", ""), *failed, at=50)] == ["claas-l40s-4"]


def test_a_worker_that_served_and_died_is_replaced_at_once() -> None:
    held = adapter(status={"active": active("r")})
    claimed = request("r", status=bound(WORKER) | claim(WORKER))
    assert started(held, claimed, job("claas-l40s-1", end="Failed"))


def test_a_pod_that_cannot_start_shows_in_the_waiting_request() -> None:
    waiting = {"state": {"waiting": {"reason": "ErrImagePull"}}, "image": "example/claas:1"}
    stuck = pod(WORKER, phase="Pending", status={"containerStatuses": [waiting], "startTime": None})
    (say,) = about(decide(request("r", ""), job("claas-l40s-1"), stuck, at=3), Say)
    assert isinstance(say, Say)
    assert say.status["reason"] == Reason.NO_CAPACITY
    assert "cannot pull image example/claas:1" in say.status["conditions"][-1]["message"]
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}
    stuck = pod(WORKER, phase="Pending", status={"conditions": [unscheduled], "startTime": None})
    (say,) = about(decide(request("r", ""), job("claas-l40s-1"), stuck, at=3), Say)
    assert isinstance(say, Say)
    assert "Unschedulable: no GPU" in say.status["conditions"][-1]["message"]


def environment(start: StartJob) -> dict[str, str | None]:
    container = start.manifest["spec"]["template"]["spec"]["containers"][0]
    return {variable["name"]: variable.get("value") for variable in container["env"]}


def test_a_job_that_gets_no_pod_shows_in_the_waiting_request() -> None:
    early = decide(request("r", ""), job("claas-l40s-1"), at=19)
    assert early.wake_at == later(20)
    (say,) = about(decide(request("r", ""), job("claas-l40s-1"), at=20), Say)
    assert isinstance(say, Say)
    assert "Job claas-l40s-1 has no Pod" in say.status["conditions"][-1]["message"]


def test_a_job_that_is_refused_shows_in_what_waits_for_it() -> None:
    """A ResourceQuota or a webhook may refuse Jobs: while one is tried again, too, or the message would flip."""
    seen = snapshot(request("r", ""), adapter("new", head=0))
    starts = about(plan(seen, settings(), later(3)), StartJob)
    seen.failing = {start.key: "HTTP 403 Forbidden" for start in starts}
    for in_flight in ([], starts):
        seen.in_flight = {start.key: start for start in in_flight}
        made = plan(seen, settings(), later(3))
        (say,) = about(made, Say)
        assert isinstance(say, Say)
        message = say.status["conditions"][-1]["message"]
        assert "Job claas-l40s-1 cannot be created: HTTP 403 Forbidden" in message
        (describe,) = about(made, Describe)
        assert isinstance(describe, Describe)
        assert "cannot be created: HTTP 403 Forbidden" in describe.status["conditions"][-1]["message"]


def test_min_workers_are_kept_and_never_leave_for_want_of_work() -> None:
    (start,) = started(pool={"minWorkers": 1})
    assert environment(start)["CLAAS_LINGER_SECONDS"] == "31536000"
    (second,) = started(*bares(20), job("claas-l40s-1"), pool={"minWorkers": 1})
    assert environment(second)["CLAAS_LINGER_SECONDS"] == "300"


def test_a_worker_is_told_how_soon_its_lease_counts_as_stale() -> None:
    (start,) = started(request("r", ""), timings={"leaseSeconds": 4.5})
    assert environment(start)["CLAAS_LEASE_SECONDS"] == "4.5"


def test_a_namespace_pool_starts_its_workers_beside_the_requests() -> None:
    two = [request("r", ""), request("s", "", namespace="other", spec={"loraUri": "s3://adapters/other/x/"})]
    jobs = started(*two, pool={"isolation": "Namespace", "maxWorkers": 1})
    assert sorted(j.about for j in jobs) == ["other/claas-l40s-1", "team/claas-l40s-1"]
    assert all("ownerReferences" not in j.manifest["metadata"] for j in jobs)


def test_a_request_that_waits_for_the_teacher_starts_no_worker() -> None:
    assert not about(decide(request("r", ""), using=settings(teacher={"url": "http://teacher:8000"})), StartJob)


# Fencing


def fence(*objects: Raw, at: float, heard: float = 0) -> list[Fence]:
    """What is fenced `at` seconds after NOW, when the objects were seen `heard` seconds after it."""
    seen = snapshot(*objects, now=later(heard))
    return about(plan(seen, settings(), later(at)), Fence)  # type: ignore[return-value]


def test_a_silent_worker_loses_its_pod_after_its_lease_s_time() -> None:
    assert not fence(pod(WORKER), lease(WORKER), at=14)
    (act,) = fence(pod(WORKER), lease(WORKER), at=15)
    assert act.fault is Fault.STALE


def test_a_worker_whose_clock_is_wrong_is_judged_by_ours() -> None:
    wrong = lease(WORKER, renewed=later(-86400))
    assert not fence(pod(WORKER), wrong, at=14)


def test_nobody_is_fenced_for_a_silence_that_was_ours() -> None:
    seen = snapshot(pod(WORKER), lease(WORKER))
    seen.contact_since = later(100)
    assert not about(plan(seen, settings(), later(114)), Fence)
    assert about(plan(seen, settings(), later(115)), Fence)


def test_a_worker_that_never_gets_ready_loses_its_pod() -> None:
    assert not fence(pod(WORKER), at=899, heard=899)
    assert fence(pod(WORKER), at=900, heard=900)[0].fault is Fault.NO_LEASE
    assert fence(pod(WORKER), lease(WORKER, "Starting"), at=900, heard=900)[0].fault is Fault.SLOW_START
    assert not fence(pod(WORKER), lease(WORKER), at=900, heard=900)
    unscheduled = pod(WORKER, phase="Pending", status={"startTime": None})
    assert not fence(unscheduled, at=9000, heard=9000), "what waits for a node runs nothing"


@pytest.mark.parametrize("status", [ended("Failed", "Cancelled"), None])
def test_a_wedged_step_loses_its_worker(status: Raw | None) -> None:
    objects = [pod(WORKER), lease(WORKER, running="uid-r")] + ([request("r", "", status=status)] if status else [])
    seen = snapshot(*objects)
    for at, expected in ((29, []), (30, [Fault.OVERRUN])):
        renewed = lease(WORKER, running="uid-r", renewed=later(at), version=2 + at)
        seen.put(Kind.LEASE, renewed, later(at))
        assert [a.fault for a in about(plan(seen, settings(), later(at)), Fence)] == expected  # type: ignore[attr-defined]


def test_a_pod_that_does_not_go_is_forced_when_its_node_is_silent_too() -> None:
    going = pod(WORKER)
    going["metadata"]["deletionTimestamp"] = format_time(later(30))
    assert not fence(going, lease(WORKER), at=59)
    assert fence(going, lease(WORKER), at=60)[0].fault is Fault.STUCK
    assert not fence(going, lease(WORKER), at=60, heard=59), "it still renews: it is only slow"


def test_a_namesake_s_lease_is_not_the_pod_s() -> None:
    before = lease(WORKER)
    before["spec"]["holderIdentity"] = "uid-of-another"
    made = decide(request("r", ""), job("claas-l40s-1"), pod(WORKER), before)
    assert not about(made, Bind)


# Free


@pytest.mark.parametrize("gone", [[], [request("r", status=ended("Failed", "Cancelled"))]])
def test_a_lock_whose_holder_has_ended_is_freed(gone: list[Raw]) -> None:
    held = adapter(status={"active": active("r")})
    free = only(decide(held, *gone, *workers(WORKER)), Free)
    assert isinstance(free, Free)
    assert free.status["active"] is None
    assert free.holder_name == "r"


def test_a_lock_is_kept_while_a_living_worker_lists_its_holder() -> None:
    held = adapter(status={"active": active("r")})
    listing = lease(WORKER, running="uid-r")
    assert not about(decide(held, pod(WORKER), listing), Free)
    assert about(decide(held, listing), Free), "its Pod is gone"
    assert about(decide(held, pod(WORKER, phase="Failed"), listing), Free), "its Pod has ended"


def test_a_stranger_s_lease_or_job_means_nothing() -> None:
    """Another tenant may label what it likes in its own namespace."""
    held = adapter(status={"active": active("r")})
    theirs = [pod(WORKER, namespace="mallory"), lease(WORKER, running="uid-r", namespace="mallory")]
    assert about(decide(held, *theirs), Free)
    answer = answer_pod(CREATE, GOOD)
    answer["metadata"]["namespace"] = "mallory"
    made = decide(adapter(head=0), create_job(namespace="mallory"), answer)
    assert not about(made, Fold)
    assert about(made, StartJob)


def test_a_lock_is_kept_for_an_object_that_only_cannot_be_read() -> None:
    held = adapter(status={"active": active("r")})
    seen = snapshot(held)
    seen.put(Kind.REQUEST, request("r", status={"attempt": "x"}), NOW)
    assert not about(plan(seen, settings(), NOW), Free)


# An adapter's first version


def test_a_new_adapter_gets_a_job_with_a_name_of_its_own() -> None:
    made = decide(adapter(head=0, uid="0f8c2a5e-1111-2222-3333-444455556666"))
    (start,) = about(made, StartJob)
    assert isinstance(start, StartJob)
    assert start.about == f"{HOME}/claas-create-0f8c2a5e11112222-1"
    container = start.manifest["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][:5] == ["create", "--uri", f"{PREFIX}coder/", "--base-model", MODEL]
    (say,) = about(made, Describe)
    assert isinstance(say, Describe)
    assert say.status["conditions"][0]["reason"] == Reason.CREATING


CREATE = "claas-create-uidcoder-1"


def create_job(name: str = CREATE, **more: str) -> Raw:
    return job(name, labels=operation_labels("uid-coder"), **more)  # type: ignore[arg-type]


GOOD = {"ok": True, "uri": f"{PREFIX}coder/", "version": "coder", "sha256": "0"}


def test_the_answer_of_the_job_becomes_the_head_at_once() -> None:
    fold = only(decide(adapter(head=0), create_job(), answer_pod(CREATE, GOOD)), Fold)
    assert isinstance(fold, Fold)
    assert (fold.status["headSeq"], fold.status["uri"]) == (1, f"{PREFIX}coder/")
    assert fold.status["history"][0]["requestUid"] == ""
    assert {c["type"]: c["status"] for c in fold.status["conditions"]} == {"Ready": "True", "Updating": "False"}


def test_a_lasting_failure_is_told_and_not_tried_again() -> None:
    answer = {"ok": False, "reason": "AdapterInvalid", "message": "no module matches x_proj", "retryable": False}
    objects = [create_job(end="Failed"), answer_pod(CREATE, answer, "Failed")]
    say = only(decide(adapter(head=0), *objects), Describe)
    assert isinstance(say, Describe)
    ready = say.status["conditions"][0]
    assert (ready["reason"], "no module matches x_proj" in ready["message"]) == (Reason.CREATE_FAILED, True)
    told = adapter(head=0, status=say.status)
    assert not decide(told, *objects, at=1000).actions
    assert not decide(told, at=1000).actions, "also when the Job's time to live has passed"


@pytest.mark.parametrize(
    "answer", [{"ok": False, "reason": "StorageUnavailable", "message": "503", "retryable": True}, ""]
)
def test_a_passing_failure_is_tried_again_under_the_next_name(answer: Raw | str) -> None:
    objects = [create_job(end="Failed"), answer_pod(CREATE, answer, "Failed")]
    early = decide(adapter(head=0), *objects, at=4)
    assert not about(early, StartJob)
    assert early.wake_at is not None
    (start,) = about(decide(adapter(head=0), *objects, at=5), StartJob)
    assert start.about == f"{HOME}/claas-create-uidcoder-2"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"baseModel": "org/other"}, Reason.BASE_MODEL_MISMATCH),
        ({"pool": "h100"}, Reason.UNKNOWN_POOL),
        ({"storage": {"uri": "s3://adapters/other-team/x/"}}, Reason.STORAGE_DENIED),
        ({"initFrom": {"uri": "s3://adapters/other-team/x/"}}, Reason.STORAGE_DENIED),
        ({"lora": {"r": -1}}, Reason.INVALID_SPEC),
    ],
)
def test_what_can_never_be_created_is_told_and_costs_no_job(spec: Raw, reason: Reason) -> None:
    say = only(decide(adapter(head=0, spec=spec)), Describe)
    assert isinstance(say, Describe)
    assert say.status["conditions"][0]["reason"] == reason
    told = adapter(head=0, spec=spec, status=say.status)
    assert not decide(told).actions, "and only once"


def test_an_answer_for_another_place_is_not_taken_over() -> None:
    elsewhere = GOOD | {"uri": f"{PREFIX}elsewhere/"}
    say = only(decide(adapter(head=0), create_job(), answer_pod(CREATE, elsewhere)), Describe)
    assert isinstance(say, Describe)
    assert say.status["conditions"][0]["reason"] == Reason.CREATE_FAILED


def test_requests_of_an_adapter_without_a_version_start_no_worker() -> None:
    made = decide(adapter(head=0), request("r"), create_job(), at=5)
    assert not about(made, StartJob)
    assert not about(made, Lock)


# Where the time goes


def test_the_next_moment_that_matters_is_named() -> None:
    held = adapter(status={"active": active("r")})
    claimed = request("r", status=bound(WORKER) | claim(WORKER) | result("Retryable", at=NOW))
    made = decide(held, claimed, job("claas-l40s-1"), pod(WORKER), lease(WORKER), at=3)
    assert made.wake_at == later(5), "the end of the backoff comes before the Lease's"
    idle = decide(pod(OTHER), lease(OTHER))
    assert idle.wake_at == NOW + timedelta(seconds=15)
    assert decide().wake_at is None


# Pods in a tenant's namespace that have a Shared worker's name

MIXED = settings(
    pools=[
        {"name": "l40s", "baseModel": MODEL, "maxWorkers": 2, "template": template("worker")},
        {
            "name": "own",
            "isolation": "Namespace",
            "baseModel": MODEL,
            "maxWorkers": 2,
            "template": template("worker"),
            "operationTemplate": template("operation"),
        },
    ]
)
THEIRS = {"loraUri": "s3://adapters/mallory/x/", "pool": "own"}


def namesake() -> list[Raw]:
    """A tenant's Ready worker, called as a Shared one is."""
    its_pod, its_lease = pod(WORKER, namespace="mallory", uid="uid-evil"), lease(WORKER, namespace="mallory", uid="l")
    its_pod["metadata"]["labels"][names.POOL_LABEL] = "own"
    its_lease["spec"]["holderIdentity"] = "uid-evil"
    return [its_pod, its_lease]


def test_a_tenant_s_request_takes_no_room_of_the_shared_worker_with_its_worker_s_name() -> None:
    theirs = request("evil", "", namespace="mallory", spec=THEIRS, status=bound(WORKER, adapter="") | claim(WORKER))
    ours = request("ours", "")
    made = decide(*workers(WORKER), theirs, *namesake(), ours, using=MIXED)
    assert [a.about for a in about(made, Bind)] == ["team/ours"]
    last = [dict(pool.model_dump(by_alias=True), maxRequests=1) for pool in MIXED.pools]
    assert about(decide(*workers(WORKER), theirs, ours, using=settings(pools=last)), Bind), "nor counts as served by it"


def test_nothing_is_bound_to_a_tenant_s_pod_with_a_shared_worker_s_name() -> None:
    theirs = request("evil", "", namespace="mallory", spec=THEIRS)
    assert not about(decide(*workers(WORKER), *namesake(), theirs, using=MIXED), Bind)
    assert about(decide(*namesake(), theirs, using=MIXED), Bind)


def test_a_shared_worker_is_lost_whatever_is_called_like_it_elsewhere() -> None:
    theirs = request("r", "", namespace="mallory", spec={"loraUri": "s3://adapters/mallory/x/"})
    theirs["status"] = bound(WORKER, adapter="") | claim(WORKER)
    (retry,) = about(decide(theirs, pod(WORKER, namespace="mallory", uid="u"), *workers(OTHER), at=9), Retry)
    assert isinstance(retry, Retry)
    assert (retry.lost, retry.worker) == (True, OTHER)
