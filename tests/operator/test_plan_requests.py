"""Each row of the protocol's table as a decision: what `plan` does about a request, and what it must not do."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from claas_crds.reasons import Reason
from claas_operator.actions import Bind, Commit, Complete, DeleteRequest, End, Lock, Retry, Say
from claas_operator.plan import plan
from claas_operator.snapshot import Kind, Snapshot, TeacherHealth
from operatorkit import (
    HOME,
    NOW,
    NUMBERS,
    OTHER,
    PREFIX,
    WORKER,
    Raw,
    about,
    active,
    adapter,
    bound,
    claim,
    decide,
    ended,
    job,
    later,
    lease,
    only,
    pod,
    request,
    result,
    settings,
    snapshot,
    workers,
)


def condition(status: Raw, kind: str) -> Raw:
    return next(c for c in status["conditions"] if c["type"] == kind)


def test_a_new_request_locks_its_adapter_and_is_bound_next() -> None:
    first = only(decide(adapter(), request("r"), *workers(WORKER)), Lock)
    assert isinstance(first, Lock)
    assert first.status["active"]["requestUid"] == "uid-r"
    locked = adapter(status={"active": active("r")})
    second = only(decide(locked, request("r"), *workers(WORKER)), Bind)
    assert isinstance(second, Bind)
    status = second.status
    assert (status["worker"], status["attempt"]) == (WORKER, 1)
    assert status["parent"] == {"adapterUid": "uid-coder", "uri": f"{PREFIX}coder/", "headSeq": 1}
    assert status["claim"] is None
    assert status["result"] is None
    assert condition(status, "Accepted")["status"] == "True", "accepted and bound in one write"


def test_a_bare_request_is_bound_without_a_lock() -> None:
    bind = only(decide(request("r", ""), *workers(WORKER)), Bind)
    assert isinstance(bind, Bind)
    assert bind.status["parent"] == {"adapterUid": "", "uri": f"{PREFIX}bare/", "headSeq": 0}


@pytest.mark.parametrize("state", ["Starting", "Draining", ""])
def test_nothing_is_bound_to_a_worker_that_is_not_ready(state: str) -> None:
    objects = [adapter(), request("r"), job("claas-l40s-1"), pod(WORKER), lease(WORKER, state)]
    made = decide(*objects, at=1)
    assert not about(made, Lock)
    assert not about(made, Bind)


def test_nothing_is_bound_to_a_silent_or_a_leaving_worker() -> None:
    seen = snapshot(adapter(), request("r"), *workers(WORKER))
    made = plan(seen, settings(), later(16))
    assert not about(made, Lock)
    leaving = pod(OTHER)
    leaving["metadata"]["deletionTimestamp"] = "2026-05-01T12:00:00Z"
    assert not about(decide(adapter(), request("r"), job("claas-l40s-1"), leaving, lease(OTHER)), Lock)


def test_requests_on_one_adapter_keep_their_order_whatever_their_priority() -> None:
    young = request("a-young", created=later(5), spec={"priority": 100})
    old = request("z-old")
    first = only(decide(adapter(), young, old, *workers(WORKER), at=6), Lock)
    assert isinstance(first, Lock)
    assert first.request.name == "z-old"


def test_the_younger_one_says_that_the_adapter_is_busy() -> None:
    locked = adapter(status={"active": active("old")})
    old = request("old", status=bound(WORKER) | claim(WORKER))
    made = decide(locked, old, request("young", created=later(1)), *workers(WORKER), at=60)
    said = [a for a in about(made, Say) if isinstance(a, Say) and a.request.name == "young"]
    assert said[0].status["reason"] == Reason.ADAPTER_BUSY
    assert said[0].status["state"] == "Pending"


def test_a_reason_is_written_once() -> None:
    locked = adapter(status={"active": active("old")})
    old = request("old", status=bound(WORKER))
    made = decide(locked, old, request("young", created=later(1)), *workers(WORKER), at=10)
    (say,) = [a for a in about(made, Say) if isinstance(a, Say) and a.request.name == "young"]
    told = request("young", created=later(1), status=say.status, version=2)
    assert not [a for a in decide(locked, old, told, *workers(WORKER), at=20).actions if a.about == "team/young"]


def test_of_the_two_waits_of_a_long_queue_the_second_is_told_late() -> None:
    """Every request behind others waits for its adapter, then for a worker: two writes each would be one too many."""
    held, first = adapter(status={"active": active("first")}), request("first", status=bound(WORKER))
    behind = request("r", created=later(1))
    told = only(decide(held, first, behind, *workers(WORKER), at=4), Say)
    assert isinstance(told, Say) and told.status["reason"] == Reason.ADAPTER_BUSY
    has_it = adapter(status={"active": active("r", later(60))})
    busy = request("r", created=later(1), status=told.status)
    starting = (pod(WORKER, phase="Pending"), job("claas-l40s-1"))
    assert not about(decide(has_it, busy, *starting, at=63), Say)
    late = only(decide(has_it, busy, *starting, at=81), Say)
    assert isinstance(late, Say) and late.status["reason"] == Reason.NO_CAPACITY
    no_node = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no node"}
    stuck = pod(WORKER, phase="Pending", status={"conditions": [no_node]})
    soon = only(decide(has_it, busy, stuck, job("claas-l40s-1"), at=63), Say)
    assert isinstance(soon, Say)
    assert "Unschedulable" in condition(soon.status, "Assigned")["message"], "a wait without an end is told at once"


def test_a_short_wait_is_not_written_and_is_looked_at_again() -> None:
    made = decide(adapter(head=0, status={"conditions": []}), request("r"), at=1)
    assert not about(made, Say)
    assert made.wake_at == later(2)


def test_one_worker_takes_one_request_at_a_time_and_batch_more() -> None:
    many = [request(f"r{i}", "") for i in range(3)]
    assert len(about(decide(*many, *workers(WORKER)), Bind)) == 1
    assert len(about(decide(*many, *workers(WORKER), using=settings(pool={"batch": 2})), Bind)) == 2


def test_a_reported_request_leaves_room_for_the_next() -> None:
    held = adapter(status={"active": active("old")})
    old = request("old", status=bound(WORKER) | claim(WORKER) | result())
    made = decide(held, old, request("bare", ""), *workers(WORKER))
    assert [type(a) for a in made.actions] == [Commit, Bind]


def test_a_worker_that_has_had_its_share_of_requests_gets_no_more() -> None:
    done = request("done", "", status=bound(WORKER, adapter="") | ended("Complete", "Succeeded"))
    once = settings(pool={"maxRequests": 1})
    assert not about(decide(done, request("r", ""), *workers(WORKER), using=once), Bind)
    assert about(decide(done, request("r", ""), *workers(WORKER)), Bind)


def test_namespaces_take_turns() -> None:
    flood = [request(f"f{i}", "", namespace="flood", spec={"loraUri": "s3://adapters/flood/x/"}) for i in range(5)]
    running = request(
        "running", "", namespace="flood", status=bound(OTHER, adapter=""), spec={"loraUri": "s3://adapters/flood/x/"}
    )
    single = request("zzz", "", created=later(9))
    made = decide(*flood, running, single, *workers(WORKER, OTHER), at=10)
    (bind,) = about(made, Bind)
    assert bind.about == "team/zzz"


def test_priority_counts_inside_a_namespace() -> None:
    low, high = request("low", ""), request("high", "", created=later(3), spec={"priority": 5})
    (bind,) = about(decide(low, high, *workers(WORKER), at=4), Bind)
    assert bind.about == "team/high"


def test_claimed_work_is_left_alone() -> None:
    held = adapter(status={"active": active("r")})
    made = decide(held, request("r", status=bound(WORKER) | claim(WORKER)), *workers(WORKER), at=1)
    assert not made.actions


def test_a_long_step_says_that_it_runs() -> None:
    held = adapter(status={"active": active("r")})
    say = only(decide(held, request("r", status=bound(WORKER) | claim(WORKER)), *workers(WORKER), at=5), Say)
    assert isinstance(say, Say)
    assert say.status["state"] == "Running"


# Commit and Complete


def test_a_success_moves_the_head_once_and_only_then_completes() -> None:
    held = adapter(status={"active": active("r")})
    reported = request("r", status=bound(WORKER) | claim(WORKER, at=later(1)) | result())
    commit = only(decide(held, reported, *workers(WORKER)), Commit)
    assert isinstance(commit, Commit)
    assert (commit.status["headSeq"], commit.status["uri"]) == (2, f"{PREFIX}coder-20260501-120000-0badcafe/")
    assert commit.status["active"] is None
    assert commit.status["history"][-1]["requestUid"] == "uid-r"
    assert commit.status["totals"] == {"steps": 1, "tokens": 64}
    moved = adapter(status=held["status"] | commit.status | {"active": None})
    moved["status"].pop("active")
    done = only(decide(moved, reported, *workers(WORKER)), Complete)
    assert isinstance(done, Complete)
    assert done.status["state"] == "Complete"
    assert done.status["metadata"] == NUMBERS
    assert done.status["timings"] == {"queueMs": 0, "claimMs": 1000, "stepMs": 7}
    assert done.status["version"] == "coder-20260501-120000-0badcafe"
    assert condition(done.status, "Complete")["reason"] == Reason.SUCCEEDED


def test_a_commit_hands_the_lock_to_the_next() -> None:
    held = adapter(status={"active": active("r")})
    reported = request("r", status=bound(WORKER) | claim(WORKER) | result())
    cancelled = request("s", created=later(1), spec={"cancel": True})
    commit = about(decide(held, reported, cancelled, request("t", created=later(2)), at=3), Commit)[0]
    assert isinstance(commit, Commit)
    assert commit.status["active"]["requestUid"] == "uid-t"


def test_a_commit_on_an_adapter_that_is_being_deleted_hands_nothing_on() -> None:
    held = adapter(status={"active": active("r")})
    held["metadata"]["deletionTimestamp"] = "2026-05-01T12:00:00Z"
    reported = request("r", status=bound(WORKER) | claim(WORKER) | result())
    commit = about(decide(held, reported, request("t", created=later(2)), at=3), Commit)[0]
    assert isinstance(commit, Commit)
    assert commit.heir is None


def test_history_keeps_what_has_not_ended_and_stays_bounded() -> None:
    history = [
        {"seq": i, "version": f"v{i}", "uri": f"{PREFIX}v{i}/", "requestUid": f"uid-q{i}", "at": "2026-05-01T12:00:00Z"}
        for i in range(1, 151)
    ]
    held = adapter(head=150, status={"active": active("r"), "history": history})
    waiting = request("q3", status=bound(WORKER, head=2) | claim(WORKER) | result())
    reported = request("r", created=later(1), status=bound(WORKER, head=150) | claim(WORKER) | result())
    commit = about(decide(held, waiting, reported, at=2), Commit)[0]
    assert isinstance(commit, Commit)
    kept = commit.status["history"]
    assert len(kept) == 101
    assert [kept[0]["seq"], kept[1]["seq"], kept[-1]["seq"]] == [3, 52, 151]


def test_a_committed_request_only_completes_whatever_else_is_said() -> None:
    entry = {"seq": 2, "version": "v", "uri": f"{PREFIX}v/", "requestUid": "uid-r", "at": "2026-05-01T12:00:00Z"}
    moved = adapter(head=2, status={"history": [entry]})
    for status in ({}, bound(WORKER) | claim(WORKER), bound(WORKER, 2) | result("Failed", 2)):
        cancelled = request("r", spec={"cancel": True}, status=status)
        assert isinstance(decide(moved, cancelled).actions[0], Complete)


def test_a_result_on_another_head_is_run_again() -> None:
    held = adapter(head=5, status={"active": active("r")})
    reported = request("r", status=bound(WORKER, head=4) | claim(WORKER) | result())
    made = decide(held, reported, *workers(WORKER), at=30)
    assert not about(made, Commit)
    retry = about(made, Retry)[0]
    assert isinstance(retry, Retry)
    assert (retry.attempt, retry.status["parent"]["headSeq"]) == (2, 5)


def test_an_adapter_seen_as_it_was_before_the_binding_refuses_no_result() -> None:
    """The watch of adapters is late: by now the head may have moved to this very result."""
    reported = request("a", spec={"backoffLimit": 0}, status=bound(WORKER, head=3) | claim(WORKER) | result())
    for held in ({}, {"active": active("a")}):
        made = decide(adapter(head=2, status=held), reported, *workers(WORKER), at=60)
        assert not about(made, End) + about(made, Retry), "it may have moved the head by now"


def test_nothing_to_learn_completes_without_a_commit_and_frees() -> None:
    held = adapter(status={"active": active("r")})
    reported = request("r", status=bound(WORKER) | claim(WORKER) | result("NoSignal"))
    done = only(decide(held, reported, *workers(WORKER)), Complete)
    assert isinstance(done, Complete)
    assert (done.status["loraUri"], done.status["version"], done.status["reason"]) == (
        f"{PREFIX}coder/",
        "",
        "NoSignal",
    )
    complete = request("r", status=done.status)
    assert [type(a).__name__ for a in decide(held, complete, *workers(WORKER)).actions] == ["Free"]


def test_a_bare_success_is_its_own_commit() -> None:
    status = bound(WORKER, adapter="") | claim(WORKER) | result(uri=f"{PREFIX}bare-20260501-120000-0bad0bad/")
    done = only(decide(request("r", "", status=status), *workers(WORKER)), Complete)
    assert isinstance(done, Complete)
    assert (done.status["loraUri"], done.status["version"]) == (
        f"{PREFIX}bare-20260501-120000-0bad0bad/",
        "bare-20260501-120000-0bad0bad",
    )


def test_a_version_outside_the_namespaces_prefixes_never_becomes_a_head() -> None:
    held = adapter(status={"active": active("r")})
    status = bound(WORKER) | claim(WORKER) | result(uri="s3://adapters/elsewhere/x/")
    end = about(decide(held, request("r", status=status), *workers(WORKER)), End)[0]
    assert isinstance(end, End)
    assert end.reason == Reason.INTERNAL_ERROR


# End otherwise


def test_cancel_ends_what_waits_and_what_runs_but_loses_to_a_success() -> None:
    held = adapter(status={"active": active("r")})
    for status in ({}, bound(WORKER), bound(WORKER) | claim(WORKER), bound(WORKER) | result("Retryable")):
        end = about(decide(held, request("r", spec={"cancel": True}, status=status), *workers(WORKER)), End)[0]
        assert isinstance(end, End)
        assert (end.reason, end.status["state"]) == (Reason.CANCELLED, "Cancelled")
    reported = request("r", spec={"cancel": True}, status=bound(WORKER) | claim(WORKER) | result())
    assert about(decide(held, reported, *workers(WORKER)), Commit)


def test_bad_input_is_not_tried_again() -> None:
    held = adapter(status={"active": active("r")})
    status = bound(WORKER) | claim(WORKER) | result("Failed", reason="EmptyResponse")
    end = only(decide(held, request("r", status=status), *workers(WORKER)), End)
    assert isinstance(end, End)
    assert (end.reason, end.status["state"]) == ("EmptyResponse", "Failed")


def test_the_deadline_counts_from_the_first_claim_over_all_attempts() -> None:
    held = adapter(status={"active": active("r")})
    spec = {"activeDeadlineSeconds": 100}
    status = bound(WORKER, 2, at=later(90)) | {"firstClaimAt": "2026-05-01T12:00:00.000000Z"}
    unclaimed = request("r", spec=spec, status=status)
    made = decide(held, unclaimed, *workers(WORKER), at=99)
    assert not about(made, End)
    assert made.wake_at is not None
    assert made.wake_at <= later(100)
    end = only(decide(held, unclaimed, *workers(WORKER), at=100), End)
    assert isinstance(end, End)
    assert end.reason == Reason.DEADLINE_EXCEEDED
    succeeded = request("r", spec=spec, status=status | result(attempt=2))
    assert about(decide(held, succeeded, *workers(WORKER), at=200), Commit), "a success in time is not thrown away"


@pytest.mark.parametrize("again", [[], [adapter(uid="uid-second")]])
def test_a_deleted_or_recreated_adapter_ends_what_was_bound_to_it(again: list[Raw]) -> None:
    for status in (bound(WORKER), bound(WORKER) | claim(WORKER), bound(WORKER) | claim(WORKER) | result()):
        end = about(decide(*again, request("r", status=status), *workers(WORKER)), End)[0]
        assert isinstance(end, End)
        assert (end.reason, end.adapter_gone) == (Reason.ADAPTER_GONE, True)


def test_an_unbound_request_waits_for_its_adapter() -> None:
    say = only(decide(request("r"), at=5), Say)
    assert isinstance(say, Say)
    assert say.status["reason"] == Reason.ADAPTER_NOT_FOUND
    creating = adapter(head=0)
    says = about(decide(creating, request("r"), at=5), Say)
    assert isinstance(says[0], Say)
    assert says[0].status["reason"] == Reason.ADAPTER_NOT_READY


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"pool": "h100"}, Reason.UNKNOWN_POOL),
        ({"baseModel": "org/other"}, Reason.BASE_MODEL_MISMATCH),
        ({"loraUri": "s3://adapters/team2/x/"}, Reason.STORAGE_DENIED),
        ({"loraUri": "s3://adapters/team/"}, Reason.STORAGE_DENIED),
    ],
)
def test_what_no_waiting_can_mend_ends(spec: Raw, reason: Reason) -> None:
    end = only(decide(request("r", "", spec=spec), *workers(WORKER)), End)
    assert isinstance(end, End)
    assert end.reason == reason
    assert condition(end.status, "Accepted")["status"] == "False"


@pytest.mark.parametrize("on", ["", "coder"])
@pytest.mark.parametrize("uri", ["s3://adapters/alice/x.json", "s3://adapters/team-two/x.json", "file:///etc/passwd"])
def test_samples_in_the_store_are_read_below_the_namespace_s_prefixes_only(on: str, uri: str) -> None:
    payload = {"samples": None, "payloadRef": {"uri": uri, "sha256": "0" * 64}}
    end = only(decide(adapter(), request("r", on, spec=payload), *workers(WORKER)), End)
    assert isinstance(end, End)
    assert end.reason == Reason.STORAGE_DENIED
    assert "spec.payloadRef.uri must lie below" in condition(end.status, "Failed")["message"]
    payload["payloadRef"] = {"uri": f"{PREFIX}private/x.json", "sha256": "0" * 64}
    assert not about(decide(adapter(), request("r", on, spec=payload), *workers(WORKER)), End)


def test_a_stored_spec_that_this_release_cannot_read_ends_and_names_the_field() -> None:
    end = only(decide(adapter(), request("r", spec={"training": {"alpha": 7}}), *workers(WORKER)), End)
    assert isinstance(end, End)
    assert end.reason == Reason.INVALID_SPEC
    message = condition(end.status, "Failed")["message"]
    assert "spec.training.alpha" in message
    assert "secret" not in message


# Move and Retry


def test_an_unclaimed_request_is_moved_after_a_while_and_burns_no_attempt() -> None:
    held = adapter(status={"active": active("r")})
    waits = request("r", status=bound(WORKER))
    assert not decide(held, waits, *workers(WORKER, OTHER), at=29).actions
    move = only(decide(held, waits, *workers(WORKER, OTHER), at=30), Bind)
    assert isinstance(move, Bind)
    assert (move.worker, move.attempt) == (OTHER, 1)


def test_an_unclaimed_request_is_moved_at_once_when_its_worker_goes() -> None:
    held = adapter(status={"active": active("r")})
    move = only(decide(held, request("r", status=bound("claas-l40s-9-gone")), *workers(WORKER), at=1), Bind)
    assert isinstance(move, Bind)
    assert move.attempt == 1


def test_a_claimed_request_is_never_moved_while_its_pod_is_there() -> None:
    held = adapter(status={"active": active("r")})
    claimed = request("r", status=bound(WORKER) | claim(WORKER))
    seen = snapshot(held, claimed, pod(WORKER), pod(OTHER), lease(OTHER), now=later(300))  # no Lease of WORKER at all
    made = plan(seen, settings(), later(300))
    assert not about(made, Bind)


@pytest.mark.parametrize("gone", [[], [pod(WORKER, phase="Failed")], [pod(WORKER, phase="Succeeded")]])
def test_a_lost_worker_s_request_runs_again(gone: list[Raw]) -> None:
    held = adapter(status={"active": active("r")})
    claimed = request("r", status=bound(WORKER) | claim(WORKER))
    others = [job("claas-l40s-2"), pod(OTHER, job="claas-l40s-2"), lease(OTHER)]
    retry = only(decide(held, claimed, *gone, *others), Retry)
    assert isinstance(retry, Retry)
    assert (retry.attempt, retry.lost, retry.worker) == (2, True, OTHER)
    assert retry.status["firstClaimAt"] == "2026-05-01T12:00:00.000000Z"


def test_attempts_are_bounded() -> None:
    held = adapter(status={"active": active("r")})
    claimed = request("r", spec={"backoffLimit": 1}, status=bound("gone", 2) | claim("gone", 2))
    end = about(decide(held, claimed, *workers(WORKER)), End)[0]
    assert isinstance(end, End)
    assert (end.reason, end.lost) == (Reason.BACKOFF_LIMIT_EXCEEDED, True)


def test_a_retryable_failure_waits_longer_each_time() -> None:
    held = adapter(status={"active": active("r")})
    for attempt, seconds in ((1, 5), (2, 10), (3, 20)):
        failed = request(
            "r",
            status=bound(WORKER, attempt)
            | claim(WORKER, attempt)
            | result("Retryable", attempt, reason="StorageUnavailable"),
        )
        early = decide(held, failed, *workers(WORKER), at=seconds - 0.5)
        assert not about(early, Retry)
        retry = about(decide(held, failed, *workers(WORKER), at=seconds), Retry)[0]
        assert isinstance(retry, Retry)
        assert (retry.attempt, retry.lost) == (attempt + 1, False)


# The teacher

TEACHER = {"teacher": {"url": "http://teacher:8000"}}


def up(at: float) -> TeacherHealth:
    return TeacherHealth(True, later(at))


def down(at: float) -> TeacherHealth:
    return TeacherHealth(False, later(at))


def test_nothing_that_needs_the_teacher_is_bound_before_it_was_seen_ready() -> None:
    using = settings(**TEACHER)
    objects = [adapter(), request("r"), *workers(WORKER)]
    unknown = decide(*objects, using=using)
    assert unknown.teacher_wanted
    assert not unknown.actions
    assert about(decide(*objects, using=using, teacher=up(0)), Lock)
    assert not decide(*objects, at=11, using=using, teacher=up(0)).actions, "an old look does not count"
    says = decide(*objects, at=11, using=using, teacher=down(10))
    assert isinstance(says.actions[0], Say)
    assert says.actions[0].status["reason"] == Reason.TEACHER_UNAVAILABLE


@pytest.mark.parametrize("mode", ["Self"])
def test_what_needs_no_teacher_does_not_wait_for_it(mode: str) -> None:
    objects = [adapter(), request("r", spec={"teacher": {"mode": mode}}), *workers(WORKER)]
    made = decide(*objects, using=settings(**TEACHER), teacher=down(0))
    assert about(made, Lock)
    assert not made.teacher_wanted


def test_an_outage_of_the_teacher_burns_no_attempt_however_long_it_lasts() -> None:
    using = settings(**TEACHER)
    held = adapter(status={"active": active("r")})
    status = bound(WORKER) | claim(WORKER) | result("Retryable", reason="TeacherUnavailable")
    spec = {"backoffLimit": 0, "activeDeadlineSeconds": 86400}
    failed = request("r", spec=spec, status=status)
    objects = [held, *workers(WORKER)]
    assert not decide(*objects, failed, at=6, using=using, teacher=up(-1)).actions, "a look from before says nothing"
    say = only(decide(*objects, failed, at=6, using=using, teacher=down(5)), Say)
    assert isinstance(say, Say)
    waiting = request("r", spec=spec, status=status | say.status, version=2)
    assert not decide(*objects, waiting, at=3000, using=using, teacher=down(2999)).actions
    assert about(decide(*objects, waiting, at=3600, using=using, teacher=up(3599)), Retry)


def test_an_outage_is_remembered_while_the_request_waits_for_a_worker() -> None:
    """The workers have left during the outage: the wait for a new one must not make the request forget its excuse."""
    using = settings(**TEACHER)
    held = adapter(status={"active": active("r")})
    status = bound("gone") | claim("gone") | result("Retryable", reason="TeacherUnavailable")
    spec = {"backoffLimit": 0, "activeDeadlineSeconds": 86400}
    (say,) = about(decide(held, request("r", spec=spec, status=status), at=6, using=using, teacher=down(5)), Say)
    assert isinstance(say, Say)
    waiting = request("r", spec=spec, status=status | say.status, version=2)
    (say,) = about(decide(held, waiting, at=60, using=using, teacher=up(59)), Say)
    assert isinstance(say, Say)
    assert say.status["reason"] == Reason.NO_CAPACITY
    waiting = request("r", spec=spec, status=status | say.status, version=3)
    assert about(decide(held, waiting, *workers(WORKER), at=90, using=using, teacher=up(89)), Retry)


def test_the_lock_goes_to_the_next_even_while_something_is_written_to_it() -> None:
    held = adapter(status={"active": active("r")})
    reported = request("r", status=bound(WORKER) | claim(WORKER) | result())
    seen = snapshot(held, reported, request("s", created=later(1)), request("t", created=later(2)))
    said = plan(seen, settings(), later(9)).actions
    seen.in_flight["uid-s"] = next(a for a in said if isinstance(a, Say) and a.request.name == "s")
    commit = about(plan(seen, settings(), later(9)), Commit)[0]
    assert isinstance(commit, Commit)
    assert commit.heir is not None
    assert commit.heir.name == "s"


def test_a_teacher_that_looks_healthy_and_fails_does_burn_attempts() -> None:
    using = settings(**TEACHER)
    held = adapter(status={"active": active("r")})
    status = bound(WORKER) | claim(WORKER) | result("Retryable", reason="TeacherUnavailable")
    failed = request("r", spec={"backoffLimit": 0}, status=status)
    end = about(decide(held, failed, *workers(WORKER), at=6, using=using, teacher=up(5)), End)[0]
    assert isinstance(end, End)
    assert end.reason == Reason.BACKOFF_LIMIT_EXCEEDED


# Time to live, and what is on its way


def test_an_ended_request_is_deleted_when_its_time_has_come_and_never_without_one() -> None:
    spec = {"ttlSecondsAfterFinished": 60}
    done = request("r", "", spec=spec, status=ended("Complete", "Succeeded"))
    early = decide(done, at=59)
    assert not early.actions
    assert early.wake_at == later(60)
    assert about(decide(done, at=60), DeleteRequest)
    assert not decide(request("r", "", status=ended("Failed", "Cancelled")), at=10**7).actions


def test_what_is_on_its_way_is_not_decided_again_and_takes_its_worker() -> None:
    seen: Snapshot = snapshot(request("a", ""), request("b", "", created=later(1)), *workers(WORKER))
    first = plan(seen, settings(), later(1))
    (bind,) = about(first, Bind)
    seen.in_flight[bind.key] = bind
    assert not about(plan(seen, settings(), later(1)), Bind)


def test_the_same_snapshot_gives_the_same_plan() -> None:
    objects: Iterable[Raw] = [*(request(f"r{i}", "") for i in range(9)), *workers(WORKER, OTHER)]
    first = [(type(a), a.about) for a in decide(*objects).actions]
    again = [(type(a), a.about) for a in decide(*reversed(list(objects))).actions]
    assert first == again


def test_one_bad_object_does_not_stop_the_rest() -> None:
    seen = snapshot(request("good", ""), *workers(WORKER))
    bad = request("bad", "", status={"attempt": "many"})
    seen.put(Kind.REQUEST, bad, NOW)
    seen.put(Kind.REQUEST, {"metadata": {"uid": "x", "resourceVersion": "z"}}, NOW)
    seen.put(Kind.LEASE, {"metadata": {"uid": "y", "resourceVersion": "5", "annotations": 3}}, NOW)
    assert set(seen.broken) == {"uid-bad", "x", "y"}
    assert "many" not in str(seen.broken)
    assert [a.about for a in about(plan(seen, settings(), NOW), Bind)] == ["team/good"]


def test_a_namespace_pool_binds_to_workers_of_the_requests_namespace_only() -> None:
    own = settings(pool={"isolation": "Namespace"})
    assert not about(decide(request("r", ""), *workers(WORKER), using=own), Bind)
    beside = [pod(WORKER, namespace="team"), lease(WORKER, namespace="team"), job("claas-l40s-1", namespace="team")]
    assert about(decide(request("r", ""), *beside, using=own), Bind)
    assert HOME != "team"


@pytest.mark.parametrize("where", ["elsewhere/x", "other-20260501-120000-0badcafe", "coder-next", "a/coder"])
def test_a_version_that_is_not_beside_its_parent_is_not_used(where: str) -> None:
    held = adapter(status={"active": active("r")})
    reported = request("r", status=bound(WORKER) | claim(WORKER) | result(uri=f"{PREFIX}{where}/"))
    made = decide(held, reported, *workers(WORKER))
    assert not about(made, Commit)
    (end,) = about(made, End)
    assert isinstance(end, End)
    assert end.reason == Reason.INTERNAL_ERROR
