"""Who gets a worker, and how many workers there are: in simulated time, by the real `plan` and the real writes."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from claas_crds import names
from claas_crds.reasons import Reason
from claas_operator.actions import Bind, DeleteRequest, Lock, Say, StartJob
from claas_operator.plan import MAX_PER_PLAN, MAX_TELLING, plan
from claas_operator.queueing import place
from claas_operator.settings import Settings
from claas_operator.shim.places import Places
from claas_operator.snapshot import Kind, Request, Snapshot, parse
from claas_operator.usage import UNKNOWN_MS, Usage
from operatorkit import (
    NOW,
    WORKER,
    Raw,
    about,
    active,
    adapter,
    bound,
    claim,
    decide,
    ended,
    format_time,
    job,
    kind_of,
    later,
    request,
    result,
    settings,
    snapshot,
    workers,
)
from simulation import World

STEP = 2.0


def tenants(*entries: Raw, **changes: Raw) -> Settings:
    return settings(tenants=list(entries), **changes)


# Fair shares


@pytest.mark.parametrize("slots", [1, 2])
def test_a_flood_of_one_namespace_delays_another_s_single_request_by_one_request_s_time(slots: int) -> None:
    world = World(settings(pool={"maxWorkers": slots, "minWorkers": slots}), step=lambda _: STEP)
    for i in range(5000):
        world.create(f"f{i}", "flood")
    world.run(20)
    assert len(world.done) >= 8 * slots
    world.create("single", "team")
    world.run(20 + STEP + world.tick)
    assert world.bound["single"] - 20 <= STEP


def test_namespaces_that_both_wait_get_workers_by_their_weights() -> None:
    using = tenants({"namespace": "big", "weight": 3}, pool={"maxWorkers": 2, "minWorkers": 2})
    # What counts is time, not requests: those of `big` take twice as long.
    world = World(using, step=lambda raw: 4.0 if raw["metadata"]["namespace"] == "big" else 2.0)
    for i in range(150):
        world.create(f"b{i}", "big")
        world.create(f"s{i}", "small")
    world.run(240)
    used: Counter[str] = Counter()
    for name in world.done:
        used[name[0]] += 4 if name[0] == "b" else 2
    assert 2.5 <= used["b"] / used["s"] <= 3.5, used


def test_what_was_used_long_ago_counts_little_and_nobody_starves() -> None:
    """One that had all workers for half an hour waits for the others at most a half-life, then shares with them."""
    world = World(settings(pool={"maxWorkers": 1, "minWorkers": 1}), step=lambda _: 10.0, tick=2.0)
    for i in range(180):
        world.create(f"old{i}", "first")
    world.run(1800)
    for i in range(200):
        world.create(f"new{i}", "second")
        world.create(f"more{i}", "first")
    world.run(1800 + 1200)
    waited = min(at for name, at in world.bound.items() if name.startswith("more")) - 1800
    assert 60 <= waited <= 610
    in_the_end = Counter(name[:3] for name, at in world.bound.items() if at >= 1800 + 700)
    assert abs(in_the_end["new"] - in_the_end["mor"]) <= 2, in_the_end


def used(name: str, namespace: str, ms: int, at: float = -30, **more: Raw) -> Raw:
    """A request that ended `at`, having used so much."""
    status = bound(WORKER, adapter="") | {"gpuMs": ms} | ended("Complete", "Succeeded", later(at))
    return request(name, "", namespace=namespace, uid=f"uid-{namespace}-{name}", status=status, **more)  # type: ignore[arg-type]


def waiting(name: str, namespace: str, **more: Raw) -> Raw:
    spec = {"loraUri": f"s3://adapters/{namespace}/{name}/"} | more.pop("spec", {})
    return request(name, "", namespace=namespace, uid=f"uid-{namespace}-{name}", spec=spec, **more)  # type: ignore[arg-type]


def order(seen: Snapshot, using: Settings, at: float = 0) -> list[str]:
    """Who gets a worker, in this order."""
    made = plan(seen, using, later(at))
    return [action.request.name for action in made.actions if isinstance(action, Bind | Lock)]


def test_whoever_has_the_same_objects_has_the_same_order() -> None:
    """Another leader, a restarted one, and one that saw everything in another order."""
    dice = random.Random(7)
    world = [used(f"u{i}", f"n{i % 7}", dice.randrange(1, 90_000), at=-dice.randrange(3000)) for i in range(200)]
    world += [waiting(f"w{i}", f"n{i % 7}", created=later(-i)) for i in range(40)]
    world += workers(*(f"claas-l40s-{i}-w" for i in range(1, 9)))
    using = tenants({"namespace": "n3", "weight": 4})
    first = order(snapshot(*world), using)
    assert len(first) == 8
    for _ in range(5):
        dice.shuffle(world)
        again = Snapshot()
        for raw in world:
            before = raw | {"status": {}} if kind_of(raw) is Kind.REQUEST else raw
            again.put(kind_of(raw), before, NOW)
        for raw in reversed(world):
            again.put(kind_of(raw), raw | {"metadata": raw["metadata"] | {"resourceVersion": "2"}}, NOW)
        assert order(again, using) == first


def test_the_place_in_the_queue_is_the_planner_s_with_usage_and_weights() -> None:
    dice = random.Random(3)
    history = [used(f"u{i}", f"n{i % 5}", dice.randrange(1, 60_000), at=-dice.randrange(1500)) for i in range(60)]
    queue = [waiting(f"w{i}", f"n{i % 5}", created=later(-i % 11), spec={"priority": i % 3}) for i in range(24)]
    running = request("busy", "", namespace="n1", uid="uid-busy", status=bound(WORKER, adapter="") | claim(WORKER))
    using = tenants({"namespace": "n0", "weight": 0.5}, {"namespace": "*", "weight": 2}, pool={"maxWorkers": 30})
    seen = snapshot(
        *history, *queue, running, *workers(WORKER, *(f"claas-l40s-{i}-w" for i in range(2, 26))), now=later(12)
    )
    everyone = list(seen.requests.values())
    places = {
        r.name: place(r, everyone, later(12), 99, lambda n: using.tenant(n).weight).position
        for r in everyone
        if r.ended is None and not r.worker
    }
    assert sorted(places, key=lambda name: places[name]) == order(seen, using, 12)


async def test_the_rest_api_s_place_counts_what_ended_requests_used() -> None:
    history = [used(f"u{i}", f"n{i % 3}", 1000 * (i + 1), at=-60 * i) for i in range(40)]
    queue = [waiting(f"w{i}", f"n{i % 3}", created=later(-i)) for i in range(12)]
    gone = used("gone", "n0", 10_000_000)
    here = datetime.now(UTC) - NOW  # the shim looks at the clock
    places = Places(lambda namespace: 3 if namespace == "n2" else 1)
    moved = [at_present(raw, here) for raw in (*history, gone, *queue)]
    for raw in (*moved, *moved):
        places.seen(raw)
    places.lost("uid-n0-gone")
    known = [parse(Kind.REQUEST, raw, NOW + here) for raw in moved if raw["metadata"]["name"] != "gone"]
    everyone = [found for found in known if isinstance(found, Request)]
    for waits in (found for found in everyone if found.ended is None):
        told = await places.of(waits.uid)
        assert told is not None
        expected = place(waits, everyone, NOW + here, None, lambda n: 3 if n == "n2" else 1)
        assert told.position == expected.position


def at_present(raw: Raw, by: timedelta) -> Raw:
    """The same with all its times later."""
    moved = re.sub(
        r"2026-0[45]-\d\dT[0-9:.]+Z", lambda m: format_time(datetime.fromisoformat(m[0]) + by), json.dumps(raw)
    )
    found: Raw = json.loads(moved)
    return found


def test_what_a_request_used_is_written_at_its_end_and_kept_over_attempts() -> None:
    lost = request("r", "", status=bound(WORKER, adapter="") | claim(WORKER, at=later(1)))
    (retry,) = about(decide(lost, *workers("claas-l40s-2-w"), at=4), Bind)
    assert isinstance(retry, Bind)
    assert retry.status["gpuMs"] == 3000, "the worker was seen gone three seconds after its claim"
    second = retry.status | claim("claas-l40s-1-w", 2, at=later(10)) | result(attempt=2, at=later(11.5))
    second["result"] |= {"loraUri": "s3://adapters/team/bare-20260501-120000-0badcafe/"}
    whole = decide(request("r", "", status=second), *workers("claas-l40s-1-w"), at=12).actions[0]
    assert whole.status["gpuMs"] == 4500  # type: ignore[attr-defined]
    shared = second | {"result": second["result"] | {"gpuMs": 500}}
    part = decide(request("r", "", status=shared), *workers("claas-l40s-1-w"), at=12).actions[0]
    assert part.status["gpuMs"] == 3500, "one of three in a batched step"  # type: ignore[attr-defined]
    boast = second | {"result": second["result"] | {"gpuMs": -10_000_000}}
    less = decide(request("r", "", status=boast), *workers("claas-l40s-1-w"), at=12).actions[0]
    assert less.status["gpuMs"] == 3000, "nobody earns time"  # type: ignore[attr-defined]


def test_usage_forgets_what_is_older_than_a_day() -> None:
    usage, seen = Usage(), snapshot(used("a", "n", 5000), used("b", "n", 7000, at=-90_000))
    for entry in seen.requests.values():
        usage.put(entry, NOW)
    assert usage.day_ms("n", NOW) == 5000
    assert usage.typical_ms(NOW) == 5000
    half = usage.decayed_ms("n", NOW + timedelta(minutes=10)) / usage.decayed_ms("n", NOW)
    assert half == pytest.approx(0.5)
    usage.trim(NOW + timedelta(days=2))
    assert usage.typical_ms(NOW) == UNKNOWN_MS
    for entry in seen.requests.values():
        usage.remove(entry)
    assert usage.day_ms("n", NOW) == 0


# Quotas


def quota_says(made: object, name: str) -> str:
    (say,) = [a for a in about(made, Say) if isinstance(a, Say) and a.request.name == name]  # type: ignore[arg-type]
    assert say.status["reason"] == Reason.QUOTA_EXCEEDED
    return str(say.status["conditions"][-1]["message"])


DAY = {"namespace": "team", "maxGpuSecondsPerDay": 60}


def test_a_namespace_that_has_used_up_its_day_waits_and_knows_until_when() -> None:
    history = [used("a", "team", 20_000, at=-80_000), used("b", "team", 45_000, at=-600)]
    world = [*history, waiting("r", "team"), waiting("o", "zoo"), *workers(WORKER)]
    made = decide(*world, using=tenants(DAY, pool={"batch": 9}), at=3)
    assert [a.request.name for a in about(made, Bind)] == ["o"]  # type: ignore[attr-defined]
    message = quota_says(made, "r")
    assert "65 of 60 GPU-seconds in the last 24 hours" in message
    frees = later(-80_000 + 86_400).replace(second=0)
    assert message.endswith(f"may begin at {frees:%Y-%m-%dT%H:%M:%SZ}")
    assert made.wake_at is not None
    assert made.wake_at <= frees
    seen = snapshot(*world, now=frees)
    assert "r" in order(seen, tenants(DAY, pool={"batch": 9}), (frees - NOW).total_seconds())
    assert not about(decide(*world, using=tenants(DAY, pool={"maxWorkers": 1}), at=3), StartJob), "and no GPU is taken"


def test_a_quota_is_told_once_and_again_when_its_end_has_moved() -> None:
    world = [used("b", "team", 65_000, at=-600), *workers(WORKER)]
    (say,) = about(decide(*world, waiting("r", "team"), using=tenants(DAY), at=3), Say)
    told = waiting("r", "team", status=say.status)  # type: ignore[attr-defined]
    assert not about(decide(*world, told, using=tenants(DAY), at=400), Say)
    less = used("c", "team", 1000, at=-7200)
    assert not about(decide(*world, less, told, using=tenants(DAY), at=400), Say), "other numbers, the same end"
    assert about(decide(*world, used("d", "team", 61_000, at=100), told, using=tenants(DAY), at=400), Say)


def test_what_has_begun_goes_on_and_a_used_up_quota_holds_no_lock() -> None:
    spent = used("b", "team", 65_000)
    held = adapter(status={"active": active("r")})
    locked = decide(held, request("r"), spent, *workers(WORKER), using=tenants(DAY))
    assert [a.request.name for a in about(locked, Bind)] == ["r"]  # type: ignore[attr-defined]
    reported = request("r", status=bound(WORKER) | claim(WORKER) | result())
    commit = decide(
        held, reported, request("s", created=later(1)), spent, *workers(WORKER), using=tenants(DAY)
    ).actions[0]
    assert commit.status["active"] is None  # type: ignore[attr-defined]
    lost = request("r", status=bound("claas-l40s-9-w") | claim("claas-l40s-9-w"))
    assert about(decide(held, lost, spent, *workers(WORKER), using=tenants(DAY), at=9), Bind), "an attempt was lost"


def test_only_the_oldest_pending_requests_are_served() -> None:
    limit = tenants({"namespace": "*", "maxPendingRequests": 2}, pool={"batch": 9})
    queue = [waiting(f"r{i}", "team", created=later(i), spec={"priority": i}) for i in range(5)]
    made = decide(*queue, waiting("z", "zoo"), *workers(WORKER), at=8, using=limit)
    assert {a.request.name for a in about(made, Bind)} == {"r0", "r1", "z"}  # type: ignore[attr-defined]
    message = quota_says(made, "r4")
    assert "5 requests that have not ended" in message
    assert "its limit is 2" in message
    assert {a.request.name for a in about(made, Say)} == {"r2", "r3", "r4"}  # type: ignore[attr-defined]


def test_with_a_quota_a_request_stays_until_its_day_is_over() -> None:
    short = {"spec": {"ttlSecondsAfterFinished": 1, "loraUri": "s3://adapters/team/x/"}}
    done = [used("a", "team", 5000, at=-60, **short), used("b", "zoo", 5000, at=-60, **short)]
    gone = about(decide(*done, using=tenants(DAY)), DeleteRequest)
    assert [a.request.name for a in gone] == ["b"]  # type: ignore[attr-defined]
    assert len(about(decide(*done, using=tenants(DAY), at=86_400 + 61), DeleteRequest)) == 2


# How many workers


def demand(seed: int, seconds: int, every: float) -> list[float]:
    """Times at which requests come, at random, one in so many seconds."""
    dice, at, times = random.Random(seed), 0.0, list[float]()
    while (at := at + dice.expovariate(1 / every)) < seconds:
        times.append(at)
    return times


def serve(world: World, times: list[float], until: float) -> None:
    for i, at in enumerate(times):
        world.run(at)
        world.create(f"r{i}-{at:.0f}", "team")
    world.run(until)


def test_a_light_load_whose_requests_overlap_now_and_then_keeps_one_worker() -> None:
    """An hour, a request in 6 s, 1.5 s each: without patience every overlap would start a worker."""
    pool = {"maxWorkers": 4, "lingerSeconds": 60}
    world = World(settings(pool=pool), step=lambda _: 1.5, start=30, tick=0.5)
    times = demand(1, 1200, 6.0)
    serve(world, times, 1300)
    assert len(world.jobs) <= 3, world.jobs
    assert len(world.done) == len(times)
    impatient = World(settings(pool=pool | {"scaleUpSeconds": 0}), step=lambda _: 1.5, start=30, tick=0.5)
    serve(impatient, times, 1300)
    assert len(impatient.jobs) >= 2 * len(world.jobs), "else the trace shows nothing"


def test_workers_follow_demand_up_and_down_to_none_without_a_saw() -> None:
    pool = {"maxWorkers": 4, "lingerSeconds": 60}
    world = World(settings(pool=pool), step=lambda _: 4.0, start=30, tick=0.5)
    busy = demand(2, 600, 1.25)  # three workers' worth, in the mean
    serve(world, [*busy, *(900 + at for at in demand(3, 100, 20.0))], 1200)
    first = [at for at in world.jobs if at < 900]
    assert 3 <= len(first) <= 4, first
    assert max(first) < 120, "all of them at the beginning: nobody leaves who is needed"
    assert len(world.jobs) - len(first) == 1, "after an idle time the next request starts one"
    alive = [
        raw for key, raw in world.api.objects.items() if key[0] is Kind.JOB and not raw["status"].get("conditions")
    ]
    assert not alive, "and in the end there is none"


def test_the_same_demand_under_a_restarted_operator_starts_no_more() -> None:
    world = World(settings(pool={"maxWorkers": 3}), step=lambda _: 4.0, start=30)
    for i in range(40):
        world.create(f"r{i}", "team")
    while world.now < 100:
        world.run(world.now + 5)
        world.restart()
    assert len(world.jobs) == 3


# Kueue


def suspended(name: str, **more: Raw) -> Raw:
    raw = job(name, labels={names.KUEUE_QUEUE_LABEL: "gpus"} | job(name)["metadata"]["labels"], **more)  # type: ignore[arg-type]
    return raw | {"spec": {"suspend": True}}


def test_a_job_goes_into_the_pool_s_queue_and_its_pods_do_not() -> None:
    (start,) = about(decide(waiting("r", "team"), using=settings(pool={"queueName": "gpus"})), StartJob)
    assert isinstance(start, StartJob)
    assert start.manifest["metadata"]["labels"][names.KUEUE_QUEUE_LABEL] == "gpus"
    assert names.KUEUE_QUEUE_LABEL not in start.manifest["spec"]["template"]["metadata"]["labels"]
    assert "suspend" not in start.manifest["spec"], "that is Kueue's to set"
    (plain,) = about(decide(waiting("r", "team")), StartJob)
    assert names.KUEUE_QUEUE_LABEL not in plain.manifest["metadata"]["labels"]  # type: ignore[attr-defined]


def test_a_suspended_job_is_capacity_to_come_and_says_so() -> None:
    made = decide(waiting("r", "team"), suspended("claas-l40s-1"), at=3600)
    assert not about(made, StartJob), "it is not dead"
    (say,) = about(made, Say)
    message = say.status["conditions"][-1]["message"]  # type: ignore[attr-defined]
    assert "Job claas-l40s-1 is suspended" in message
    assert "gpus" in message


def test_a_job_that_was_let_go_has_the_usual_time_for_its_pod() -> None:
    resumed = job("claas-l40s-1") | {"status": {"startTime": later(3600).isoformat()}}
    made = decide(waiting("r", "team"), resumed, at=3605)
    assert "has no Pod" not in str(about(made, Say))
    assert "has no Pod" in str(about(decide(waiting("r", "team"), resumed, at=3620), Say))


def test_a_preempted_worker_s_request_waits_for_the_same_job() -> None:
    held = request("r", "", status=bound(WORKER, adapter="") | claim(WORKER))
    made = decide(held, suspended("claas-l40s-1"), at=9)
    assert not about(made, StartJob)
    assert not about(made, Bind)


# Batches


def test_a_batch_is_bound_at_once_and_nothing_joins_what_has_begun() -> None:
    four = settings(pool={"batch": 4})
    queue = [waiting(f"r{i}", "team") for i in range(6)]
    assert len(about(decide(*queue, *workers(WORKER), using=four), Bind)) == 4
    bound_only = request("b", "", status=bound(WORKER, adapter=""))
    assert len(about(decide(bound_only, *queue, *workers(WORKER), using=four), Bind)) == 3
    begun = request("b", "", status=bound(WORKER, adapter="") | claim(WORKER))
    assert not about(decide(begun, *queue, *workers(WORKER), using=four), Bind), "it would wait for the step's end"


def test_two_requests_on_one_adapter_are_never_in_one_batch() -> None:
    queue = [request(f"r{i}", created=later(i)) for i in range(3)]
    held = adapter(status={"active": active("r0")})
    made = decide(held, *queue, *workers(WORKER), using=settings(pool={"batch": 4}), at=5)
    assert [a.request.name for a in about(made, Bind)] == ["r0"]  # type: ignore[attr-defined]


# One plan's work is bounded


def test_ten_thousand_wait_and_one_plan_tells_some_of_them() -> None:
    queue = [request(f"r{i:04}", created=later(i // 100)) for i in range(3000)]
    made = decide(adapter(status={"active": active("r0000")}), *queue, *workers(WORKER), at=200)
    assert len(about(made, Say)) == MAX_TELLING
    assert [a.request.name for a in about(made, Say)][:2] == ["r0001", "r0002"], "the oldest first"  # type: ignore[attr-defined]
    assert len(about(made, Bind)) == 1


def test_the_many_bare_requests_are_all_told_why_they_wait() -> None:
    seen = snapshot(*(waiting(f"r{i}", "team") for i in range(600)), *workers(WORKER), now=later(3))
    told = set[str]()
    for _ in range(1 + 600 // MAX_TELLING):
        for i, action in enumerate(plan(seen, settings(pool={"maxWorkers": 1}), later(3)).actions):
            if isinstance(action, Say):
                told.add(action.request.name)
                raw = waiting(action.request.name, "team", status=action.status, version=10 + i)
                seen.put(Kind.REQUEST, raw, later(3))
    assert len(told) == 599


def test_bare_requests_that_need_the_teacher_do_not_hold_up_those_that_do_not() -> None:
    """More of the former than there are places, and all of them older and of a higher priority."""
    needy = [waiting(f"t{i}", "team", spec={"priority": 9}) for i in range(50)]
    alone = waiting("s", "team", created=later(1), spec={"teacher": {"mode": "Self"}})
    using = settings(teacher={"url": "http://teacher:8000"})
    made = decide(*needy, alone, *workers(WORKER), using=using, at=2)
    assert [a.request.name for a in about(made, Bind)] == ["s"]  # type: ignore[attr-defined]


def test_many_cancellations_end_in_several_plans() -> None:
    seen = snapshot(*(waiting(f"r{i}", "team", spec={"cancel": True}) for i in range(MAX_PER_PLAN + 5)))
    ends = plan(seen, settings(), NOW).actions
    assert len(ends) == MAX_PER_PLAN
    for action in ends:
        assert isinstance(action.request, Request)  # type: ignore[attr-defined]
        seen.remove(Kind.REQUEST, action.key, NOW)
    assert len(plan(seen, settings(), NOW).actions) == 5
