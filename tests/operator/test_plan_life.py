"""Decisions about an adapter's life: where it starts, where its head goes back to, what of it is collected, its end."""

from __future__ import annotations

import json

import pytest

from claas_crds import names
from claas_crds.reasons import Cause, Reason
from claas_operator import status
from claas_operator.actions import (
    Action,
    Bind,
    Collect,
    Commit,
    Describe,
    End,
    Finalize,
    Fold,
    Forget,
    Lock,
    Rollback,
    Say,
    StartDeletion,
    StartJob,
    StopJob,
)
from claas_operator.jobs import OPERATION_STEMS
from claas_operator.plan import Plan
from claas_operator.snapshot import Kind, Snapshot
from operatorkit import (
    HOME,
    NOW,
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
    workers,
)

OTHERS = {"prefixes": [{"uri": "s3://adapters/{namespace}/"}]}


def uri(version: str) -> str:
    return f"{PREFIX}{version}/"


def entry(seq: int, version: str, by: str = "") -> Raw:
    return {"seq": seq, "version": version, "uri": uri(version), "requestUid": by, "at": format_time(NOW)}


def trained(*versions: str, spec: Raw | None = None, generation: int = 1, **status: object) -> Raw:
    """An adapter whose head went through `versions`; the last of them is the head."""
    history = [entry(seq, version) for seq, version in enumerate(versions, 1)]
    has = {"uri": uri(versions[-1]), "version": versions[-1], "headSeq": len(versions), "history": history}
    raw = adapter(head=1, spec=spec, status=has | status)
    raw["metadata"]["generation"] = generation
    return raw


def after(before: Raw, action: Action) -> Raw:
    """The adapter once the action was applied."""
    status = before["status"] | getattr(action, "status")  # noqa: B009 (of every action on an adapter)
    return before | {"status": {key: value for key, value in status.items() if value is not None}}


def condition(status: Raw, kind: str) -> Raw:
    return next(c for c in status["conditions"] if c["type"] == kind)


# Rollback

BACK = {"rollbackTo": "coder"}


def test_a_rollback_is_one_more_move_to_an_old_version_and_rewrites_nothing() -> None:
    before = trained("coder", "v2", "v3", spec=BACK, generation=2)
    move = only(decide(before), Rollback)
    assert isinstance(move, Rollback)
    assert (move.status["headSeq"], move.status["version"], move.status["uri"]) == (4, "coder", uri("coder"))
    *old, new = move.status["history"]
    assert [(e["seq"], e["version"]) for e in old] == [(1, "coder"), (2, "v2"), (3, "v3")]
    assert (new["seq"], new["cause"], new["requestUid"]) == (4, Cause.ROLLED_BACK, "")
    assert move.status["rolledBackGeneration"] == 2
    assert (condition(move.status, "RolledBack")["status"], condition(move.status, "Ready")["status"]) == (
        "True",
        "True",
    )
    assert "totals" not in move.status
    assert not decide(after(before, move), at=9).actions, "once"


def test_another_field_s_change_never_rolls_back_again() -> None:
    rolled = only(decide(trained("coder", "v2", spec=BACK, generation=2)), Rollback)
    onwards = after(trained("coder", "v2", spec=BACK | {"retention": {"keepLast": 3}}, generation=3), rolled)
    onwards["status"]["history"].append(entry(4, "v4"))
    onwards["status"] |= {"headSeq": 4, "version": "v4", "uri": uri("v4")}
    seen = only(decide(onwards), Describe)
    assert isinstance(seen, Describe)
    assert (seen.status["observedGeneration"], seen.status.get("headSeq")) == (3, None)


def test_the_same_version_can_be_asked_for_again_once_the_field_was_removed() -> None:
    rolled = after(
        trained("coder", "v2", generation=3), only(decide(trained("coder", "v2", spec=BACK, generation=2)), Rollback)
    )
    forgotten = only(decide(rolled), Describe)
    again = after(rolled, forgotten)
    again["spec"] = again["spec"] | {"rollbackTo": "v2"}
    again["metadata"]["generation"] = 4
    assert about(decide(again), Rollback)


def test_a_rollback_waits_for_what_holds_the_adapter_and_nothing_new_gets_ahead_of_it() -> None:
    held = trained("coder", "v2", spec=BACK, generation=2, active=active("r"))
    running = request("r", status=bound(WORKER, head=2) | claim(WORKER))
    made = decide(held, running, request("next", created=later(1)), *workers(WORKER), at=1)
    wait = only(made, Describe)
    assert isinstance(wait, Describe)
    said = condition(wait.status, "RolledBack")
    assert (said["status"], said["reason"]) == ("False", Reason.ADAPTER_BUSY)
    assert "request r holds the adapter" in said["message"]
    told = after(held, wait)
    assert not decide(told, running, *workers(WORKER)).actions, "said once"

    reported = request("r", status=bound(WORKER, head=2) | claim(WORKER) | result())
    commit = about(decide(told, reported, request("next", created=later(1)), *workers(WORKER), at=2), Commit)[0]
    assert isinstance(commit, Commit)
    assert commit.heir is None
    free = after(told, commit)
    assert [type(a) for a in decide(free, request("next", created=later(1)), *workers(WORKER), at=2).actions] == [
        Rollback
    ]


def test_what_already_holds_the_adapter_is_still_bound_or_the_rollback_would_wait_for_ever() -> None:
    held = trained("coder", "v2", spec=BACK, generation=2, active=active("r"))
    assert about(decide(held, request("r"), *workers(WORKER)), Bind)
    waiting = trained("coder", "v2", spec=BACK, generation=2)
    assert not about(decide(waiting, request("r"), *workers(WORKER)), Lock)


@pytest.mark.parametrize(
    ("asked", "collecting", "reason", "said"),
    [
        ("v9", [], Reason.VERSION_UNKNOWN, "the latest are v2, coder"),
        ("coder", ["coder"], Reason.VERSION_COLLECTED, "is being deleted"),
    ],
)
def test_a_rollback_to_what_is_not_there_is_refused_once_and_stops_nothing(
    asked: str, collecting: list[str], reason: Reason, said: str
) -> None:
    before = trained("coder", "v2", spec={"rollbackTo": asked}, generation=2, collecting=collecting)
    refusal = about(decide(before), Describe)[0]
    assert isinstance(refusal, Describe)
    told = condition(refusal.status, "RolledBack")
    assert (told["status"], told["reason"]) == ("False", reason)
    assert said in told["message"]
    assert refusal.note is not None
    assert refusal.note.warning
    assert "headSeq" not in refusal.status
    assert about(decide(after(before, refusal), request("r"), *workers(WORKER)), Lock)


def test_ready_is_of_the_generation_that_a_refused_rollback_made() -> None:
    """Whoever waits for Ready of what they have just applied, as kstatus and GitOps controllers do, hears of it."""
    ready = {"type": "Ready", "status": "True", "reason": "Created", "message": "", "observedGeneration": 1}
    before = trained(
        "coder",
        spec={"rollbackTo": "v9"},
        generation=2,
        conditions=[ready | {"lastTransitionTime": format_time(NOW)}],
        observedGeneration=1,
    )
    told = after(before, about(decide(before), Describe)[0])
    assert (told["status"]["observedGeneration"], condition(told["status"], "Ready")["observedGeneration"]) == (2, 1)
    after_that = after(told, only(decide(told), Describe))
    found = condition(after_that["status"], "Ready")
    assert (found["status"], found["observedGeneration"], found["lastTransitionTime"]) == ("True", 2, format_time(NOW))
    assert not decide(after_that).actions


def test_a_rollback_to_the_head_moves_nothing() -> None:
    before = trained("coder", "v2", spec={"rollbackTo": "v2"}, generation=2)
    done = only(decide(before), Rollback)
    assert isinstance(done, Rollback)
    assert "headSeq" not in done.status
    assert condition(done.status, "RolledBack")["status"] == "True"
    assert not decide(after(before, done)).actions


def test_going_back_and_forth_never_drops_another_version_from_a_history_that_is_full() -> None:
    versions = [f"v{i}" for i in range(10)] + ["v8", "v9"] * 60
    before = trained(*versions, spec={"rollbackTo": "v8"}, generation=2)
    move = about(decide(before), Rollback)[0]
    assert isinstance(move, Rollback)
    kept = [e["version"] for e in move.status["history"]]
    assert len(kept) == 100
    assert set(kept) == {f"v{i}" for i in range(10)}


# Adopt and fork


def create_job(operation: str = "create", counter: int = 1, **more: str) -> Raw:
    stem = OPERATION_STEMS[operation]
    return job(
        f"claas-{stem}-uidcoder-{counter}",
        labels=operation_labels("uid-coder", operation),
        **more,  # type: ignore[arg-type]
    )


def answered(operation: str, answer: Raw, counter: int = 1) -> list[Raw]:
    """A Job that has ended, and its Pod's answer."""
    made = create_job(operation, counter, end="Complete" if answer["ok"] else "Failed")
    return [made, answer_pod(made["metadata"]["name"], answer, "Succeeded" if answer["ok"] else "Failed")]


@pytest.mark.parametrize(
    ("source", "cause"), [(f"{PREFIX}coder/", Cause.ADOPTED), (f"{PREFIX}writer-v7/", Cause.FORKED)]
)
def test_an_adapter_starts_from_another_version_and_its_history_says_where(source: str, cause: Cause) -> None:
    new = adapter(head=0, spec={"initFrom": {"uri": source}})
    (start,) = about(decide(new), StartJob)
    assert isinstance(start, StartJob)
    arguments = start.manifest["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[-2:] == ["--init-from", source]
    good = {"ok": True, "uri": f"{PREFIX}coder/", "version": "coder"}
    fold = only(decide(new, *answered("create", good)), Fold)
    assert isinstance(fold, Fold)
    (first,) = fold.status["history"]
    assert (first["cause"], first["origin"], first["seq"]) == (cause, source, 1)


def test_a_fresh_adapter_s_first_entry_names_no_origin() -> None:
    good = {"ok": True, "uri": f"{PREFIX}coder/", "version": "coder"}
    fold = only(decide(adapter(head=0), *answered("create", good)), Fold)
    assert isinstance(fold, Fold)
    assert (fold.status["history"][0]["cause"], fold.status["history"][0]["origin"]) == (Cause.CREATED, "")


def refused_from(source: str, fork_prefixes: list[Raw]) -> list[Action]:
    storage = OTHERS | {"forkPrefixes": fork_prefixes}
    return decide(adapter(head=0, spec={"initFrom": {"uri": source}}), using=settings(storage=storage)).actions


def test_another_namespace_s_version_is_forked_only_where_that_is_allowed() -> None:
    theirs = "s3://adapters/alice/coder-v1/"
    (say,) = refused_from(theirs, [])
    assert isinstance(say, Describe)
    ready = condition(say.status, "Ready")
    assert ready["reason"] == Reason.STORAGE_DENIED
    assert (
        "spec.initFrom.uri must lie below a storage prefix of namespace team: s3://adapters/team/" in ready["message"]
    )
    for allowed in ({"namespace": "team", "uri": "s3://adapters/alice/"}, {"uri": "s3://adapters/alice/"}):
        assert about(Plan(refused_from(theirs, [allowed]), None, False, []), StartJob)
    assert not about(
        Plan(refused_from(theirs, [{"namespace": "bob", "uri": "s3://adapters/alice/"}]), None, False, []), StartJob
    )


@pytest.mark.parametrize(
    "trick",
    [
        "s3://adapters/team/../alice/coder/",
        "s3://adapters/team//alice/",
        "s3://adapters/team-two/coder/",
        "s3://adapters/team/",
        "s3://adapters/team%2f..%2falice/coder/",
        "file:///etc/passwd/",
    ],
)
def test_no_spelling_of_a_uri_reaches_another_namespace(trick: str) -> None:
    actions = refused_from(trick, [])
    assert not about(Plan(actions, None, False, []), StartJob), trick


def test_a_fork_that_was_made_is_trained_also_when_forking_is_no_longer_allowed() -> None:
    forked = adapter(spec={"initFrom": {"uri": "s3://adapters/alice/coder/"}})
    assert about(decide(forked, request("r"), *workers(WORKER)), Lock)


@pytest.mark.parametrize("reason", [Reason.ADAPTER_INVALID, Reason.VERSION_COLLECTED])
def test_what_is_wrong_with_a_source_has_its_own_reason_and_requests_say_it(reason: Reason) -> None:
    new = adapter(head=0, spec={"initFrom": {"uri": f"{PREFIX}theirs/"}})
    bad = {"ok": False, "reason": reason.value, "message": "key x.lora_A.weight is missing", "retryable": False}
    say = only(decide(new, *answered("create", bad)), Describe)
    assert isinstance(say, Describe)
    ready = condition(say.status, "Ready")
    assert (ready["reason"], ready["message"]) == (reason, "key x.lora_A.weight is missing")
    assert say.note is not None
    assert not decide(after(new, say), *answered("create", bad)).actions, "nothing is tried again"
    waiting = about(decide(after(new, say), request("r"), at=60), Say)[0]
    assert isinstance(waiting, Say)
    assert f"{reason}: key x.lora_A.weight is missing" in waiting.status["conditions"][-1]["message"]


NOTHING_THERE = {"ok": False, "reason": "AdapterInvalid", "message": "nothing there", "retryable": False}
MADE = {"ok": True, "uri": f"{PREFIX}coder/", "version": "coder"}


def test_what_the_store_refused_is_tried_again_once_the_adapter_was_changed() -> None:
    new = adapter(head=0, spec={"initFrom": {"uri": uri("src")}})
    (start,) = about(decide(new), StartJob)
    assert isinstance(start, StartJob)
    assert start.manifest["metadata"]["labels"][names.GENERATION_LABEL] == "1"
    told = after(new, only(decide(new, *answered("create", NOTHING_THERE)), Describe))
    assert not decide(told, *answered("create", NOTHING_THERE)).actions
    told["metadata"]["generation"] = 2
    (again,) = about(decide(told, *answered("create", NOTHING_THERE), at=60), StartJob)
    assert again.about.endswith("-create-uidcoder-2")
    assert isinstance(again, StartJob)
    assert again.manifest["metadata"]["labels"][names.GENERATION_LABEL] == "2"
    second = answered("create", NOTHING_THERE, 2)
    second[0]["metadata"]["labels"][names.GENERATION_LABEL] = "2"
    (say,) = about(decide(told, *answered("create", NOTHING_THERE), *second, at=60), Describe)
    assert isinstance(say, Describe)
    assert condition(say.status, "Ready")["message"] == "nothing there"


def test_a_version_that_was_made_counts_whatever_failed_before_it() -> None:
    new = adapter(head=0, spec={"initFrom": {"uri": uri("src")}})
    bad, good = answered("create", NOTHING_THERE), answered("create", MADE, 2)
    told = after(new, only(decide(new, *bad), Describe))
    assert only(decide(new, *bad, *good), Fold)
    assert only(decide(told, *bad, *good), Fold), "also when the failure was told already"
    other = answer_pod("claas-create-uidcoder-1", MADE)
    other["metadata"] |= {"name": "later", "uid": "uid-later"}
    assert only(decide(told, *bad, other), Fold), "another Pod of the same Job"


def test_operations_of_a_tenant_s_pool_run_as_the_tenant() -> None:
    theirs = {"spec": {"serviceAccountName": "tenant", "containers": [{"name": "operation", "image": "x"}]}}
    using = settings(pool={"isolation": "Namespace", "operationTemplate": theirs})
    (start,) = about(decide(adapter(head=0), using=using), StartJob)
    assert isinstance(start, StartJob)
    assert start.namespace == "team"
    assert start.manifest["spec"]["template"]["spec"]["serviceAccountName"] == "tenant"


# Deletion

DELETE = {"deletionPolicy": "Delete"}


def held_back(*versions: str, deleted: bool = False, spec: Raw | None = None, **status: object) -> Raw:
    """An adapter with `deletionPolicy: Delete` and our finalizer."""
    raw = trained(*(versions or ("coder", "v2")), spec=DELETE | (spec or {}), **status)
    raw["metadata"]["finalizers"] = [names.FINALIZER]
    if deleted:
        raw["metadata"]["deletionTimestamp"] = format_time(NOW)
    return raw


def finalizers(made: Plan) -> tuple[str, ...]:
    (change,) = about(made, Finalize)
    assert isinstance(change, Finalize)
    return change.finalizers


def test_the_finalizer_is_there_before_the_first_version_and_follows_the_policy() -> None:
    new = adapter(head=0, spec=DELETE)
    assert [type(a) for a in decide(new).actions] == [Finalize]
    assert finalizers(decide(new)) == (names.FINALIZER,)
    new["metadata"]["finalizers"] = ["example.com/theirs", names.FINALIZER]
    assert about(decide(new), StartJob)
    new["spec"] = new["spec"] | {"deletionPolicy": "Retain"}
    assert finalizers(decide(new)) == ("example.com/theirs",), "and others' stay"
    assert not about(decide(adapter(head=0)), Finalize)


def test_a_deleted_adapter_s_versions_go_by_a_job_and_then_it_goes() -> None:
    deleted = held_back(deleted=True)
    made = decide(deleted)
    (start,) = about(made, StartJob)
    assert isinstance(start, StartDeletion)
    assert start.about == f"{HOME}/claas-destroy-uidcoder-1"
    arguments = start.manifest["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[:3] == ["destroy", "--root", uri("coder")]
    assert arguments[3:] == ["--adapter-uid", "uid-coder", "--grace-seconds", "86400"]
    (say,) = about(made, Describe)
    assert isinstance(say, Describe)
    assert condition(say.status, "Ready")["reason"] == Reason.DELETING
    assert not about(decide(deleted, create_job("destroy")), StartJob), "while it runs"
    assert finalizers(decide(deleted, *answered("destroy", {"ok": True}))) == ()


def test_a_create_job_that_nobody_waits_for_is_stopped_before_the_versions_are_deleted() -> None:
    deleted = held_back(deleted=True)
    stop = about(decide(deleted, create_job()), StopJob)[0]
    assert isinstance(stop, StopJob)
    assert not about(decide(deleted, create_job()), StartJob)
    assert not about(decide(deleted, answer_pod("claas-create-uidcoder-1", "", "Running")), StartJob)
    assert about(decide(deleted, answer_pod("claas-create-uidcoder-1", "", "Failed")), StartDeletion)


def test_a_destroy_job_that_fails_is_tried_again_and_its_trouble_shows() -> None:
    failed = answered("destroy", {"ok": False, "reason": "StorageUnavailable", "message": "503", "retryable": True})
    made = decide(held_back(deleted=True), *failed, at=4)
    assert not about(made, StartJob)
    (say,) = about(made, Describe)
    assert isinstance(say, Describe)
    assert "StorageUnavailable: 503" in condition(say.status, "Ready")["message"]
    (again,) = about(decide(held_back(deleted=True), *failed, at=5), StartJob)
    assert again.about.endswith("-2")


def test_an_adapter_goes_after_the_limit_whatever_is_left_and_says_what() -> None:
    failed = answered("destroy", {"ok": False, "reason": "StorageDenied", "message": "403", "retryable": False})
    assert not about(decide(held_back(deleted=True), *failed, at=899), Finalize)
    deleted = held_back(deleted=True)
    told = after(deleted, about(decide(deleted, *failed, at=5), Describe)[0])
    (change,) = about(decide(told, at=900), Finalize)
    assert isinstance(change, Finalize)
    assert change.note is not None
    assert (change.finalizers, change.left) == ((), uri("v2"))
    assert change.note.reason == Reason.VERSIONS_LEFT
    assert uri("coder") in change.note.message
    assert "StorageDenied: 403" in change.note.message
    early = decide(held_back(deleted=True), create_job("destroy"))
    assert early.wake_at == later(900)


def test_the_way_out_is_to_retain() -> None:
    kept = held_back(deleted=True)
    kept["spec"] = kept["spec"] | {"deletionPolicy": "Retain"}
    assert [type(a) for a in decide(kept).actions] == [Finalize]
    assert finalizers(decide(kept)) == ()


def test_an_adapter_whose_spec_nobody_here_can_read_goes_and_says_so() -> None:
    """An object of a later release, after a downgrade: what it wanted is not guessed at."""
    stored = held_back(deleted=True)
    stored["spec"] = stored["spec"] | {"baseModel": ""}
    change = only(decide(stored), Finalize)
    assert change.note is not None
    assert change.note.reason == Reason.VERSIONS_LEFT
    assert "its stored spec does not fit this release (baseModel" in change.note.message.replace("spec.", "")


def test_a_deletion_that_is_called_off_stops_its_job_first() -> None:
    """Or it would go on deleting what the next adapter at that uri has made by then."""
    kept = held_back(deleted=True)
    kept["spec"] = kept["spec"] | {"deletionPolicy": "Retain"}
    running, at_it = create_job("destroy"), answer_pod("claas-destroy-uidcoder-1", "", "Running")
    stop = only(decide(kept, running, at_it), StopJob)
    assert isinstance(stop, StopJob)
    assert stop.about == f"{HOME}/claas-destroy-uidcoder-1"
    assert not decide(kept, at_it).actions, "its Pod is still there"
    assert about(decide(kept), Finalize)
    assert about(decide(kept, at_it, at=960), Finalize), "on a node that is gone, for ever"
    late = decide(held_back(deleted=True), running, at_it, at=900)
    assert [type(action) for action in late.actions] == [StopJob]


def test_what_lies_at_the_uri_of_an_adapter_that_was_never_created_is_not_touched() -> None:
    new = adapter(head=0, spec=DELETE)
    new["metadata"] |= {"finalizers": [names.FINALIZER], "deletionTimestamp": format_time(NOW)}
    occupied = {"ok": False, "reason": "VersionConflict", "message": "already another's", "retryable": False}
    made = decide(new, *answered("create", occupied))
    assert not about(made, StartJob)
    assert finalizers(made) == ()
    assert not decide(new, create_job()).actions[1:], "a create Job that runs is waited for"
    good = {"ok": True, "uri": f"{PREFIX}coder/", "version": "coder"}
    assert about(decide(new, *answered("create", good)), StartDeletion), "and what it made goes"


def test_a_deletion_lets_the_running_step_end_and_nothing_else_begin() -> None:
    deleted = held_back(deleted=True, active=active("r"))
    running = request("r", status=bound(WORKER, head=2) | claim(WORKER))
    made = decide(deleted, running, request("s", created=later(1)), *workers(WORKER), at=9)
    assert not about(made, StartJob)
    assert not about(made, Lock)
    (say,) = about(made, Describe)
    assert isinstance(say, Describe)
    assert "request r still runs" in condition(say.status, "Ready")["message"]
    reported = request("r", status=bound(WORKER, head=2) | claim(WORKER) | result())
    assert about(decide(deleted, reported, *workers(WORKER)), Commit)


@pytest.mark.parametrize(
    "status",
    [
        {},
        bound("gone-worker", head=2),
        bound("gone-worker", head=2) | claim("gone-worker"),
        bound(WORKER, head=2) | claim(WORKER) | result("Retryable", reason="TeacherUnavailable"),
    ],
)
def test_what_holds_a_deleted_adapter_and_does_not_run_ends(status: Raw) -> None:
    deleted = held_back(deleted=True, active=active("r"))
    using = settings(teacher={"url": "http://teacher:8000"})
    (end,) = about(decide(deleted, request("r", status=status), at=1, using=using), End)
    assert isinstance(end, End)
    assert end.reason == Reason.ADAPTER_GONE


def test_others_keep_what_they_need_of_a_deleted_adapter() -> None:
    fork = adapter("fork", spec={"initFrom": {"uri": uri("coder-20260101-000000-0123abcd")}})
    other = adapter("coder-two")
    (start,) = about(decide(held_back(deleted=True), fork, other), StartDeletion)
    assert isinstance(start, StartDeletion)
    arguments = start.manifest["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[3:5] == ["--keep-version", "coder-20260101-000000-0123abcd"], "a namesake's are none of its own"


LATER_ONE = "coder-20260101-000000-0123abcd"


@pytest.mark.parametrize(
    "bare",
    [
        request("b", "", spec={"loraUri": uri(LATER_ONE)}),
        request(
            "b",
            "",
            spec={"loraUri": uri(LATER_ONE)},
            status=bound(WORKER, adapter="") | {"parent": {"uri": uri(LATER_ONE)}} | claim(WORKER),
        ),
    ],
)
def test_a_deletion_waits_for_requests_that_train_a_version_without_the_adapter(bare: Raw) -> None:
    deleted = held_back(deleted=True)
    made = decide(deleted, bare, *workers(WORKER), at=1)
    assert not about(made, StartJob)
    (say,) = about(made, Describe)
    assert isinstance(say, Describe)
    assert "without an adapter still train" in condition(say.status, "Ready")["message"]
    (left,) = about(decide(after(deleted, say), bare, *workers(WORKER), at=900), Finalize)
    assert left.note is not None
    assert "without an adapter still train" in left.note.message
    elsewhere = request("b", "", namespace="mallory", spec={"loraUri": uri(LATER_ONE)})
    assert about(decide(deleted, elsewhere), StartDeletion), "a request that is refused holds nothing up"


def test_what_a_deletion_left_to_others_is_told() -> None:
    (change,) = about(
        decide(held_back(deleted=True), *answered("destroy", {"ok": True, "kept": [LATER_ONE]})), Finalize
    )
    assert isinstance(change, Finalize)
    assert change.finalizers == ()
    assert change.note is not None
    assert change.note.reason == Reason.VERSIONS_LEFT
    assert LATER_ONE in change.note.message
    (silent,) = about(decide(held_back(deleted=True), *answered("destroy", {"ok": True, "kept": []})), Finalize)
    assert silent.note is None


def test_an_adapter_that_began_inside_another_s_versions_takes_none_of_them_along() -> None:
    inside, later_one = uri("coder-20260101-000000-0123abcd"), "coder-20260102-000000-0123abcd"
    deleted = held_back(deleted=True, spec={"storage": {"uri": inside}, "initFrom": {"uri": inside}})
    lender = adapter("lender", spec={"storage": {"uri": uri("coder")}}, status={"uri": uri(later_one)})
    (start,) = about(decide(deleted, lender), StartDeletion)
    assert isinstance(start, StartDeletion)
    assert start.kept == {later_one}


def test_nothing_is_deleted_outside_the_namespace_s_prefixes() -> None:
    moved = settings(storage={"prefixes": [{"uri": "s3://elsewhere/{namespace}/"}]})
    made = decide(held_back(deleted=True), using=moved)
    assert not about(made, StartJob)
    assert finalizers(made) == ()


# Retention

KEEP_TWO = {"retention": {"keepLast": 2}}


def test_versions_beyond_retention_begin_to_go_when_the_adapter_is_idle() -> None:
    four = trained("coder", "v2", "v3", "v4", spec=KEEP_TWO)
    early = decide(four, at=59)
    assert not early.actions
    assert early.wake_at == later(60)
    collect = only(decide(four, at=60), Collect)
    assert isinstance(collect, Collect)
    assert collect.status["collecting"] == ["coder", "v2"]
    assert condition(collect.status, "Collected")["status"] == "False"


def test_many_versions_are_not_left_until_the_adapter_is_idle() -> None:
    assert not about(decide(trained(*(f"v{i}" for i in range(51)), spec=KEEP_TWO)), Collect)
    assert about(decide(trained(*(f"v{i}" for i in range(52)), spec=KEEP_TWO)), Collect)


def test_a_version_that_was_head_again_lately_counts_as_new() -> None:
    back = trained("coder", "v2", "v3", "v4", "coder", spec=KEEP_TWO)
    collect = only(decide(back, at=60), Collect)
    assert isinstance(collect, Collect)
    assert collect.versions == ("v2", "v3")


@pytest.mark.parametrize(
    ("needs", "kept"),
    [
        (adapter("fork", spec={"initFrom": {"uri": uri("v1")}}), "v1"),
        (adapter("fork", namespace="other", spec={"initFrom": {"uri": uri("v1").rstrip("/")}}), "v1"),
        (adapter("fork", head=0, spec={"initFrom": {"uri": uri("v1")}, "baseModel": ""}), "v1"),
        (adapter("fork", status={"history": [entry(1, "fork") | {"origin": uri("v1")}]}), "v1"),
        (adapter("twin", spec={"storage": {"uri": uri("v1")}}), "v1"),
        (request("r", "", spec={"loraUri": uri("v1")}), "v1"),
        (request("r", "", spec={"loraUri": uri("v1")}, status=bound(WORKER, adapter="")), "v1"),
        (request("r", "other", status=bound(WORKER) | {"parent": {"uri": uri("v1"), "headSeq": 1}}), "v1"),
        (request("q2"), "v2"),
    ],
)
def test_what_anybody_needs_is_not_collected(needs: Raw, kept: str) -> None:
    many = trained("v0", "v1", "v2", "v3", "v4", spec=KEEP_TWO)
    many["status"]["history"][2]["requestUid"] = "uid-q2"
    (collect,) = about(decide(many, needs, at=60), Collect)
    assert isinstance(collect, Collect)
    assert set(collect.versions) == {"v0", "v1", "v2"} - {kept}


def mallory(spec: Raw) -> Raw:
    """An object of another tenant, which may not read what is ours; `spec` names it all the same."""
    return adapter("mallory", namespace="mallory", head=0, spec=spec)


@pytest.mark.parametrize(
    "refused",
    [
        mallory({"initFrom": {"uri": uri("v1")}}),
        mallory({"storage": {"uri": uri("v1")}}),
        request("r", "", namespace="mallory", spec={"loraUri": uri("v1")}),
    ],
)
def test_nobody_holds_another_tenant_s_versions_by_an_object_that_is_refused(refused: Raw) -> None:
    many = trained("v0", "v1", "v2", "v3", "v4", spec=KEEP_TWO)
    (collect,) = about(decide(many, refused, at=60), Collect)
    assert isinstance(collect, Collect)
    assert collect.versions == ("v0", "v1", "v2")


def test_nobody_keeps_another_tenant_s_versions_from_being_deleted_with_their_adapter() -> None:
    (start,) = about(decide(held_back(deleted=True), mallory({"storage": {"uri": uri("coder")}})), StartDeletion)
    assert isinstance(start, StartDeletion)
    assert not start.kept


def test_a_fork_that_is_allowed_holds_its_source_before_it_was_made() -> None:
    many = trained("v0", "v1", "v2", "v3", "v4", spec=KEEP_TWO)
    lent = settings(storage=OTHERS | {"forkPrefixes": [{"namespace": "mallory", "uri": PREFIX}]})
    (collect,) = about(decide(many, mallory({"initFrom": {"uri": uri("v1")}}), at=60, using=lent), Collect)
    assert isinstance(collect, Collect)
    assert collect.versions == ("v0", "v2")


def test_the_target_of_a_rollback_that_waits_is_not_collected() -> None:
    waiting = trained("v0", "v1", "v2", "v3", spec=KEEP_TWO | {"rollbackTo": "v0"}, generation=2, active=active("r"))
    told = after(waiting, about(decide(waiting, request("r"), at=60), Describe)[0])
    (collect,) = about(decide(told, request("r"), at=60), Collect)
    assert isinstance(collect, Collect)
    assert collect.versions == ("v1",)


def test_a_collection_marks_then_looks_again_then_deletes_then_forgets() -> None:
    going = trained("v0", "v1", "v2", "v3", spec=KEEP_TWO, collecting=["v0", "v1"])
    (mark,) = about(decide(going), StartJob)
    assert isinstance(mark, StartJob)
    assert not isinstance(mark, StartDeletion)
    arguments = mark.manifest["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments == ["tombstone", "--root", uri("coder"), "--collection", "0", "--version", "v0", "--version", "v1"]
    marked = answered("tombstone", {"ok": True, "done": ["v0", "v1"]})
    (delete,) = about(decide(going, *marked), StartJob)
    assert isinstance(delete, StartDeletion), "after a live look at who needs what"
    assert delete.versions == {"v0", "v1"}
    deleted = answered("delete", {"ok": True, "done": ["v0", "v1"]})
    forget = only(decide(going, *marked, *deleted), Forget)
    assert isinstance(forget, Forget)
    assert forget.status["collecting"] == []
    assert [e["version"] for e in forget.status["history"]] == ["v2", "v3"]
    assert condition(forget.status, "Collected")["status"] == "True"
    assert not decide(after(going, forget), *marked, *deleted, at=60).actions


def test_what_was_needed_at_the_last_look_is_given_back_and_the_rest_goes() -> None:
    going = trained("v0", "v1", "v2", "v3", spec=KEEP_TWO, collecting=["v0", "v1"])
    marked = answered("tombstone", {"ok": True, "done": ["v0", "v1"]})
    bare = request("r", "", spec={"loraUri": uri("v0")}, status=bound(WORKER, adapter="") | claim(WORKER))
    others = [bare, *marked, *workers(WORKER)]
    starts = {start.about: start for start in about(decide(going, *others), StartJob)}
    delete, restore = starts[f"{HOME}/claas-delete-uidcoder-1"], starts[f"{HOME}/claas-restore-uidcoder-1"]
    assert isinstance(delete, StartDeletion)
    assert delete.versions == {"v1"}
    assert isinstance(restore, StartJob)
    arguments = restore.manifest["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments == ["restore", "--root", uri("coder"), "--collection", "0", "--version", "v0"]
    deleted, restored = (answered(what, {"ok": True, "done": [v]}) for what, v in (("delete", "v1"), ("restore", "v0")))
    left = after(going, about(decide(going, *others, *deleted, *restored), Forget)[0])
    back = only(decide(left, *others, *deleted, *restored), Describe)
    assert isinstance(back, Describe)
    assert back.status["collecting"] == []
    kept = after(left, back)
    assert [e["version"] for e in kept["status"]["history"]] == ["v0", "v2", "v3"]
    assert not decide(kept, *others, *deleted, *restored, at=1).actions
    again = only(decide(kept, *marked, *deleted, *restored, at=60), Collect)
    (mark,) = about(decide(after(kept, again), *marked, *deleted, *restored, at=60), StartJob)
    assert mark.about.endswith("-mark-uidcoder-2"), "the tombstone of the first time is gone"


def at_it(operation: str, counter: int = 1) -> Raw:
    """A Pod that still runs, whatever became of its Job."""
    return answer_pod(create_job(operation, counter)["metadata"]["name"], "", "Running")


@pytest.mark.parametrize("busy", [[create_job("restore")], [at_it("restore")]])
@pytest.mark.parametrize("marked", [True, False])
def test_nothing_is_marked_or_deleted_while_tombstones_may_still_be_taken_off(busy: list[Raw], marked: bool) -> None:
    """Or a fork that came and went would leave a version half deleted that says it is alive."""
    going = trained("v0", "v1", "v2", "v3", spec=KEEP_TWO, collecting=["v0"])
    before = answered("tombstone", {"ok": True, "done": ["v0"]}) if marked else []
    assert not about(decide(going, *before, *busy, at=5), StartJob)
    assert about(decide(going, *before, at=5), StartJob)


@pytest.mark.parametrize("operation", ["tombstone", "delete"])
def test_nothing_is_given_back_while_a_pod_may_still_mark_or_delete_it(operation: str) -> None:
    going = trained("v0", "v1", "v2", "v3", spec=KEEP_TWO, collecting=["v0"])
    fork = adapter("fork", spec={"initFrom": {"uri": uri("v0")}})
    assert not about(decide(going, fork, at_it(operation)), StartJob)
    (restore,) = about(decide(going, fork), StartJob)
    assert restore.about.endswith("-restore-uidcoder-1")


def test_what_cannot_come_back_is_forgotten_and_holds_nothing_up() -> None:
    going = trained("v0", "v1", "v2", "v3", spec=KEEP_TWO, collecting=["v0", "v1"])
    forks = [adapter(f"fork-{v}", spec={"initFrom": {"uri": uri(v)}}) for v in ("v0", "v1")]
    restored = answered("restore", {"ok": True, "done": ["v1"], "dead": ["v0"]})
    forget = only(decide(going, *forks, *restored), Forget)
    assert isinstance(forget, Forget)
    assert forget.versions == ("v0",)
    back = only(decide(after(going, forget), *forks, *restored), Describe)
    assert isinstance(back, Describe)
    assert back.status["collecting"] == []


def test_two_operations_in_trouble_are_told_once() -> None:
    down = {"ok": False, "reason": "StorageUnavailable", "message": "no answer", "retryable": True}
    going = trained("v0", "v1", "v2", "v3", spec=KEEP_TWO, collecting=["v0", "v1"])
    fork = adapter("fork", spec={"initFrom": {"uri": uri("v0")}})
    world = [fork, *answered("tombstone", down), *answered("restore", down)]
    say = only(decide(going, *world, at=10), Describe)
    assert isinstance(say, Describe)
    message = condition(say.status, "Collected")["message"]
    assert "claas-mark-uidcoder-1 failed" in message
    assert "claas-restore-uidcoder-1 failed" in message
    assert not decide(after(going, say), *world, at=10).actions


@pytest.mark.parametrize(
    ("root", "kept"),
    [(f"{PREFIX}coder/", 500), (PREFIX + "/".join(["ä" * 100] * 9) + "/", 200), (PREFIX + "&" * 200 + "/", 250)],
    ids=["short", "long", "escaped"],
)
def test_the_longest_history_fits_into_etcd(root: str, kept: int) -> None:
    """`keepLast: 500` holds where there is room for it; with long uris fewer are kept, and it stays writable."""
    given = {"storage": {"uri": root}, "retention": {"keepLast": 500}}
    name = root.split("/")[-2]
    history = []
    for seq in range(1, 601):
        version = f"{name}-20260101-000000-{seq:08x}-a11"
        at = format_time(NOW)
        where = f"{root.removesuffix(f'{name}/')}{version}/"
        history.append(
            {"seq": seq, "version": version, "uri": where, "requestUid": "u" * 36, "at": at, "cause": "Trained"}
        )
    head = {"uri": history[-1]["uri"], "version": history[-1]["version"], "headSeq": 600, "history": history}
    seen = Snapshot()
    seen.put(Kind.ADAPTER, adapter(spec=given, status=head), NOW)
    (read,) = seen.adapters.values()
    assert read.spec is not None, read.problem
    assert status.keep_last(read) >= kept
    left = status.rolled_back(read, read.status.history[-2], frozenset(), NOW)["history"]
    assert len(left) >= kept
    text = json.dumps(left, ensure_ascii=False, separators=(",", ":")).replace("&", "\\u0026")  # as Go writes it
    assert len(text.encode()) < 1_000_000


def test_a_store_that_refuses_deletions_is_not_asked_in_a_hot_loop() -> None:
    going = trained("v0", "v1", "v2", spec=KEEP_TWO, collecting=["v0"])
    denied = answered("tombstone", {"ok": False, "reason": "StorageDenied", "message": "403", "retryable": False})
    made = decide(going, *denied, at=49)
    assert not about(made, StartJob)
    (say,) = about(made, Describe)
    assert isinstance(say, Describe)
    assert "StorageDenied: 403" in condition(say.status, "Collected")["message"]
    assert about(decide(going, *denied, at=50), StartJob)


def test_names_of_a_batch_fit_into_an_answer() -> None:
    long = [f"{'x' * 200}-{i}" for i in range(40)]
    (collect,) = about(decide(trained(*long, spec=KEEP_TWO), at=60), Collect)
    assert isinstance(collect, Collect)
    assert 1 < len(",".join(collect.versions)) < 3000


# Orphans


def test_orphans_are_looked_for_once_a_day_with_every_name_that_anybody_knows() -> None:
    day = 86_400.0
    history = ("coder", "coder-20260101-000000-0123abcd")
    two = trained(*history, spec={"retention": {"keepLast": 5}}, sweepAt=format_time(later(day)))
    bare = request("r", "", spec={"loraUri": uri("coder-20260202-000000-0123abcd"), "priority": 1})
    assert not about(decide(two, at=day - 1), StartJob)
    starts = [a for a in about(decide(two, bare, at=day), StartJob) if "sweep" in a.about]
    assert isinstance(starts[0], StartJob)
    arguments = starts[0].manifest["spec"]["template"]["spec"]["containers"][0]["args"]
    known = [*history, "coder-20260202-000000-0123abcd"]
    named = [word for name in known for word in ("--known-version", name)]
    given = ["--root", uri("coder"), *named, "--grace-seconds", "86400", "--adapter-uid", "uid-coder"]
    assert arguments == ["sweep", *given, "--unended", "uid-r"]
    done = answered("sweep", {"ok": True, "interrupted": 2, "orphans": 0, "uploads": 1, "kept": 5})
    for raw in done:
        raw["metadata"]["creationTimestamp"] = format_time(later(day))
    swept = only(decide(two, *done, at=day), Describe)
    assert isinstance(swept, Describe)
    assert swept.status["sweepAt"] == format_time(later(2 * day))
    assert swept.note is not None
    assert swept.note.message == "3 interrupted uploads deleted"
    rested = after(two, swept)
    assert not decide(rested, *done, at=2 * day - 1).actions
    assert about(decide(rested, *done, at=2 * day), StartJob)


def test_a_sweep_leaves_alone_what_unended_requests_have_made() -> None:
    """Their version is in no history yet, and older than the grace perhaps: the operator was away for a day."""
    held = adapter(status={"active": active("gone"), "sweepAt": format_time(later(86_400))})
    waiting, others = request("q"), request("other", "someone-else")
    bare = request("b", "", spec={"loraUri": uri("coder-20260202-000000-0123abcd")})
    world = [held, waiting, others, bare, lease("w", running="uid-gone"), pod("w")]
    (sweep,) = [a for a in about(decide(*world, at=86_400), StartJob) if "sweep" in a.about]
    assert isinstance(sweep, StartJob)
    arguments = sweep.manifest["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[-2:] == ["--unended", "uid-b,uid-gone,uid-q"]


def test_the_first_sweeps_of_many_adapters_are_spread_over_an_interval() -> None:
    made = decide(*(adapter(f"a{i}", uid=f"{i:08x}-1111") for i in range(300)), at=90_000)
    assert not about(made, StartJob)
    times = sorted(say.status["sweepAt"] for say in about(made, Describe) if isinstance(say, Describe))
    assert len(times) == 300
    assert format_time(later(90_000)) <= times[0] < times[75] < format_time(later(90_000 + 43_200)) < times[225]
    assert times[-1] < format_time(later(90_000 + 86_400))


def test_orphans_are_looked_for_sooner_after_an_attempt_was_lost() -> None:
    held = adapter(status={"active": active("r"), "sweepAt": format_time(later(10**6))})
    again = request("r", status=bound(WORKER, 2) | claim(WORKER, 2) | result(attempt=2))
    (commit,) = about(decide(held, again, *workers(WORKER)), Commit)
    assert isinstance(commit, Commit)
    assert commit.status["sweepAt"] == format_time(later(86_400))
    first = request("r", status=bound(WORKER) | claim(WORKER) | result())
    (commit,) = about(decide(held, first, *workers(WORKER)), Commit)
    assert isinstance(commit, Commit)
    assert "sweepAt" not in commit.status


def test_orphans_are_not_looked_for_where_that_is_switched_off() -> None:
    assert not decide(adapter(), at=10**7, using=settings(timings={"sweepSeconds": 0})).actions


# What a changed spec means for an adapter that has a head


def test_a_pool_that_is_not_there_shows_and_its_return_too() -> None:
    ready = {"type": "Ready", "status": "True", "reason": "Created", "message": "", "lastTransitionTime": "t"}
    moved = trained("coder", spec={"pool": "h100"}, generation=2, conditions=[ready], observedGeneration=1)
    say = only(decide(moved), Describe)
    assert isinstance(say, Describe)
    assert condition(say.status, "Ready")["reason"] == Reason.UNKNOWN_POOL
    assert say.status["observedGeneration"] == 2
    told = after(moved, say)
    assert not decide(told).actions
    told["spec"] = told["spec"] | {"pool": "l40s"}
    told["metadata"]["generation"] = 3
    back = only(decide(told), Describe)
    assert isinstance(back, Describe)
    assert (condition(back.status, "Ready")["status"], back.status["observedGeneration"]) == ("True", 3)
