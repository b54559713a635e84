"""A pool that is lowered, changed or taken away: who leaves, when, and that nothing which is bound is touched."""

from __future__ import annotations

import json
from typing import Any

import pytest

from claas_crds import names
from claas_operator.actions import Bind, StartJob, StopJob, Tell
from claas_operator.apply import Apply, Lost
from claas_operator.jobs import NEVER_SECONDS
from claas_operator.plan import Plan, plan
from claas_operator.settings import Settings
from claas_operator.snapshot import Kind
from operatorkit import (
    HOME,
    NOW,
    MemoryApi,
    Raw,
    about,
    bound,
    claim,
    decide,
    job,
    lease,
    pod,
    request,
    settings,
    snapshot,
)
from simulation import World

FOUR = settings(pool={"minWorkers": 4, "maxWorkers": 4})
NONE = settings(pool={"maxWorkers": 4})
STEP = 2.0


def pod_of(counter: int) -> str:
    return f"claas-l40s-{counter}-p"


def worker(
    counter: int,
    *,
    linger: float = NEVER_SECONDS,
    state: str = "Ready",
    of: Settings = FOUR,
    told: str = "",
    namespace: str = HOME,
) -> list[Raw]:
    """A worker as the operator with the settings `of` has started it; state "": not even a Lease."""
    on_job = job(f"claas-l40s-{counter}", namespace=namespace)
    on_pod = pod(pod_of(counter), job=f"claas-l40s-{counter}", namespace=namespace)
    on_lease = lease(pod_of(counter), state or "Starting", namespace=namespace)
    annotations = {names.LINGER_SECONDS: str(int(linger)), names.EDITION: of.pools[0].edition}
    for raw in (on_job, on_pod):
        raw["metadata"]["annotations"] = annotations
    if told:
        on_lease["metadata"]["annotations"][names.LINGER_SECONDS] = told
    return [on_job, on_pod, *([on_lease] if state else [])]


def kept(count: int, **how: Any) -> list[Raw]:
    return [raw for counter in range(1, count + 1) for raw in worker(counter, **how)]


def told(made: Plan) -> dict[str, float]:
    """By Pod: what workers are told about lingering."""
    return {tell.pod.name: tell.linger_seconds for tell in about(made, Tell)}  # type: ignore[attr-defined]


def stopped(made: Plan) -> list[str]:
    return [stop.job.name for stop in about(made, StopJob)]  # type: ignore[attr-defined]


def at_work(counter: int, name: str = "r") -> Raw:
    return request(name, "", status=bound(pod_of(counter), adapter="") | claim(pod_of(counter)))


# Lowered


def test_what_is_kept_beyond_min_workers_lingers_like_others_from_now_on() -> None:
    assert not decide(*kept(4), using=FOUR).actions
    lowered = settings(pool={"minWorkers": 1, "maxWorkers": 4})
    assert told(decide(*kept(4), using=lowered)) == {pod_of(4): 300, pod_of(3): 300, pod_of(2): 300}
    # Who has nothing to do goes first.
    busy = decide(*kept(4), at_work(4), using=lowered)
    assert told(busy) == {pod_of(3): 300, pod_of(2): 300, pod_of(1): 300}
    assert not busy.actions[3:], "nothing else happens to any of them"


def test_a_worker_is_told_once() -> None:
    assert not decide(*kept(4, told="300"), using=NONE).actions


def test_of_those_that_start_only_the_ready_are_told() -> None:
    made = decide(*worker(1), *worker(2, state="Starting"), using=NONE)
    assert told(made) == {pod_of(1): 300}
    assert not stopped(made)


def test_a_shorter_linger_is_told_to_those_who_know_a_longer_one() -> None:
    shorter = settings(pool={"maxWorkers": 4, "lingerSeconds": 20})
    assert told(decide(*worker(1, linger=300), using=shorter)) == {pod_of(1): 20}
    assert not decide(*worker(1, linger=10), using=shorter).actions


def test_beyond_max_workers_the_least_useful_leave_at_once() -> None:
    two = settings(pool={"minWorkers": 1, "maxWorkers": 2})
    there = [*worker(1), *worker(2, linger=300), *worker(3), *worker(4, state="")]
    made = decide(*there, at_work(1), using=two)
    assert stopped(made) == ["claas-l40s-4"], "it was never Ready, so nothing was ever bound to it"
    assert told(made) == {pod_of(2): 0, pod_of(3): 300}
    again = [*worker(1), *worker(2, linger=300, told="0"), *worker(3, told="300")]
    assert not decide(*again, at_work(1), using=two).actions


# Taken away


def test_the_workers_of_a_pool_that_is_no_more_leave_and_end_what_they_have() -> None:
    other = settings(pool={"name": "h100"}, defaultPool="h100")
    made = decide(*kept(2), *worker(3, linger=300), *worker(4, state="Starting"), using=other)
    assert told(made) == {pod_of(1): 0, pod_of(2): 0, pod_of(3): 0}
    assert stopped(made) == ["claas-l40s-4"]


# Changed


CHANGED = settings(pool={"minWorkers": 1, "maxWorkers": 2, "batch": 2})


def test_workers_of_other_settings_take_nothing_more_and_are_replaced() -> None:
    made = decide(*worker(1), request("r", ""), using=CHANGED)
    assert told(made) == {pod_of(1): 0}
    assert not about(made, Bind)
    (start,) = about(made, StartJob)
    assert isinstance(start, StartJob) and start.name == "claas-l40s-2"
    assert start.manifest["metadata"]["annotations"][names.EDITION] == CHANGED.pools[0].edition
    assert start.manifest["spec"]["template"]["metadata"]["annotations"][names.LINGER_SECONDS] == str(NEVER_SECONDS)


def test_what_a_worker_of_other_settings_runs_it_runs_to_its_end() -> None:
    made = decide(*worker(1), at_work(1), using=CHANGED)
    assert told(made) == {pod_of(1): 0}
    assert not stopped(made)


def test_a_worker_that_could_not_start_is_replaced_once_the_pool_was_mended() -> None:
    """No node would ever take its Pod: it would have held the pool's only place for ever."""
    one = settings(pool={"maxWorkers": 1, "template": {"spec": {"containers": [{"name": "worker", "image": "b"}]}}})
    assert stopped(decide(*worker(1, state=""), request("r", ""), using=one)) == ["claas-l40s-1"]
    suspended = worker(1)[0] | {"spec": {"suspend": True}}
    assert stopped(decide(suspended, request("r", ""), using=one)) == ["claas-l40s-1"]


@pytest.mark.parametrize("key", ["minWorkers", "maxWorkers", "scaleUpSeconds", "startLimitSeconds", "queueName"])
def test_what_a_worker_need_not_know_replaces_none(key: str) -> None:
    value: Any = {"queueName": "gpus", "minWorkers": 1}.get(key, 7)
    assert settings(pool={key: value}).pools[0].edition == settings().pools[0].edition


# Others'


def test_workers_that_are_not_ours_to_tell_are_left_alone() -> None:
    unknown = [job("claas-l40s-1"), pod(pod_of(1)), lease(pod_of(1))]
    assert not decide(*unknown, using=NONE).actions
    elsewhere = worker(2, namespace="another-release")
    assert not decide(*elsewhere, using=NONE).actions
    assert not decide(*elsewhere, using=settings(pool={"name": "h100"}, defaultPool="h100")).actions


def test_a_tenant_s_workers_are_told_where_they_run() -> None:
    before = settings(pool={"isolation": "Namespace", "maxWorkers": 2})
    after = settings(pool={"isolation": "Namespace", "maxWorkers": 2, "batch": 2})
    made = decide(*worker(1, of=before, linger=300, namespace="team"), using=after)
    assert told(made) == {pod_of(1): 0}


def test_workers_of_a_shared_pool_leave_when_it_becomes_the_tenants() -> None:
    tenants = settings(pool={"isolation": "Namespace"})
    assert told(decide(*worker(1, of=NONE, linger=300), using=tenants)) == {pod_of(1): 0}


# The writes


def applied(api: MemoryApi, action: Any) -> None:
    """The action's writes, against what the API server holds by now."""
    seen = snapshot()
    with pytest.raises(StopIteration):
        Apply(api, seen, NONE, lambda: True, lambda: NOW)(action).send(None)  # type: ignore[arg-type]


def test_a_lease_that_has_changed_since_is_decided_about_anew() -> None:
    api = MemoryApi()
    objects = [api.add(raw) for raw in worker(1)]
    (tell,) = about(plan(snapshot(*objects), NONE, NOW), Tell)
    api.change(Kind.LEASE, HOME, pod_of(1), {"metadata": {"annotations": {names.LEASE_RUNNING: "uid-r"}}})
    with pytest.raises(Lost):
        applied(api, tell)
    objects = list(api.objects.values())
    (tell,) = about(plan(snapshot(*objects), NONE, NOW), Tell)
    applied(api, tell)
    said = api.objects[Kind.LEASE, HOME, pod_of(1)]["metadata"]["annotations"]
    assert said == {names.LEASE_STATE: "Ready", names.LEASE_RUNNING: "uid-r", names.LINGER_SECONDS: "300"}
    assert not plan(snapshot(*api.objects.values()), NONE, NOW).actions


def test_a_worker_that_is_ready_by_now_is_not_stopped() -> None:
    api = MemoryApi()
    objects = [api.add(raw) for raw in worker(1, state="Starting")]
    (stop,) = about(plan(snapshot(*objects), CHANGED, NOW), StopJob)
    api.change(Kind.LEASE, HOME, pod_of(1), {"metadata": {"annotations": {names.LEASE_STATE: "Ready"}}})
    with pytest.raises(Lost):
        applied(api, stop)
    assert (Kind.JOB, HOME, "claas-l40s-1") in api.objects


def test_the_name_of_a_stopped_job_is_not_given_again_at_once() -> None:
    """Its Pod may still be there, and would be taken for the new one's."""
    api = MemoryApi()
    seen = snapshot(*[api.add(raw) for raw in worker(1, state="")])
    (stop,) = about(plan(seen, CHANGED, NOW), StopJob)
    with pytest.raises(StopIteration):
        Apply(api, seen, CHANGED, lambda: True, lambda: NOW)(stop).send(None)  # type: ignore[arg-type]
    assert [start.name for start in about(plan(seen, CHANGED, NOW), StartJob)] == ["claas-l40s-2"]  # type: ignore[attr-defined]


# In simulated time


@pytest.mark.parametrize("change", ["lowered", "changed"])
def test_gpus_are_free_once_nothing_needs_them_and_every_request_runs_once(change: str) -> None:
    world = World(FOUR, step=lambda _: STEP, start=3)
    world.run(5)
    for i in range(12):
        world.create(f"r{i}", "team")
    world.run(7)
    pool: Raw = {"maxWorkers": 4, "lingerSeconds": 30} | ({"batch": 2} if change == "changed" else {})
    world.restart(settings(pool=pool))
    for i in range(12, 20):
        world.create(f"r{i}", "team")
        world.run(world.now + STEP / 2)
    world.run(world.now + 60)
    assert len(world.done) == 20
    attempts = {raw["status"]["attempt"] for (kind, *_), raw in world.api.objects.items() if kind is Kind.REQUEST}
    assert attempts == {1}
    phases = [raw["status"]["phase"] for (kind, *_), raw in world.api.objects.items() if kind is Kind.POD]
    assert phases and set(phases) == {"Succeeded"}, json.dumps(phases)
