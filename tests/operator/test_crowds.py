"""What one namespace has thousands of, what it leaves the others, and what must never become a hot loop."""

from __future__ import annotations

import asyncio
import math
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from kubernetes.aio.client.exceptions import ApiException

from claas_operator.actions import Bind, DeleteRequest, End, Lock, Note, Say, StartJob
from claas_operator.apply import Apply
from claas_operator.loop import COOL_CAP_SECONDS, Loop
from claas_operator.metrics import Metrics
from claas_operator.plan import MAX_PER_PLAN, plan
from claas_operator.snapshot import Kind, Snapshot
from operatorkit import (
    NOW,
    WORKER,
    MemoryApi,
    Raw,
    about,
    adapter,
    bound,
    decide,
    ended,
    kind_of,
    later,
    lease,
    pod,
    request,
    settings,
    snapshot,
    workers,
)

CROWD = 300


def ours(names: list[str]) -> list[int]:
    """The places of team's objects among others."""
    return [i for i, name in enumerate(names) if name.startswith("team/")]


def bare(name: str, namespace: str, **changes: Any) -> Raw:
    spec = {"loraUri": f"s3://adapters/{namespace}/bare/"} | changes.pop("spec", {})
    return request(name, "", namespace=namespace, uid=f"{namespace}-{name}", spec=spec, **changes)


@pytest.mark.parametrize("crowd", ["adapters to create", "requests to end"])
def test_who_has_a_worker_to_get_waits_for_no_crowd(crowd: str) -> None:
    """The loop writes 64 at a time, in the plan's order."""
    creating = {"namespace": "flood", "head": 0, "status": {"conditions": []}}
    uris = [{"storage": {"uri": f"s3://adapters/flood/a{i}/"}} for i in range(CROWD)]
    many = {
        "adapters to create": [adapter(f"a{i}", spec=uris[i], **creating) for i in range(CROWD)],
        "requests to end": [bare(f"x{i}", "flood", spec={"cancel": True}) for i in range(CROWD)],
    }[crowd]
    made = decide(*many, adapter(), request("r"), *workers(WORKER), at=5)
    assert len(made.actions) > MAX_PER_PLAN
    assert isinstance(made.actions[0], Lock)


def test_a_crowd_that_is_to_be_told_leaves_room_for_another_namespace_s_one_request() -> None:
    many = [request(f"x{i}", "absent", namespace="flood") for i in range(CROWD)]
    told = [action.about for action in about(decide(*many, request("r", "typo"), at=5), Say)]
    assert "team/r" in told


def test_a_crowd_that_is_to_end_or_to_go_leaves_room_for_another_namespace_s_one_request() -> None:
    many = [bare(f"x{i}", "flood", spec={"cancel": True}) for i in range(CROWD)]
    ends = [action.about for action in about(decide(*many, bare("r", "team", spec={"cancel": True})), End)]
    assert ours(ends) == [0]
    over = bound(WORKER, adapter="") | ended("Complete", "Succeeded")
    gone = [bare(f"x{i}", "flood", spec={"ttlSecondsAfterFinished": 0}, status=over) for i in range(CROWD)]
    mine = bare("r", "team", spec={"ttlSecondsAfterFinished": 1}, status=over)
    assert ours([action.about for action in about(decide(*gone, mine, at=9), DeleteRequest)]) == [0]


def test_an_adapter_waits_for_no_crowd_of_another_namespace_s() -> None:
    creating = {"namespace": "flood", "head": 0}
    many = [adapter(f"a{i}", spec={"storage": {"uri": f"s3://adapters/flood/a{i}/"}}, **creating) for i in range(CROWD)]
    started = [
        action.manifest["metadata"]["labels"]["claas.dev/adapter-uid"]  # type: ignore[attr-defined]
        for action in about(decide(*many, adapter("mine", head=0)), StartJob)
    ]
    assert started[0] == "uid-mine"


def test_what_cannot_be_ended_leaves_room_for_what_can() -> None:
    """A webhook refuses every write to one namespace's requests, say."""
    many = [bare(f"x{i}", "team", spec={"cancel": True}) for i in range(MAX_PER_PLAN + 1)]
    seen = snapshot(*many)
    refused = {action.key for action in plan(seen, settings(), NOW).actions}
    seen.cooling = refused
    (other,) = plan(seen, settings(), NOW).actions
    assert other.key not in refused


@pytest.mark.parametrize("tenants", [[], [{"maxPendingRequests": 5}]], ids=["no quota", "quota"])
def test_a_plan_s_cost_grows_with_the_namespaces_and_not_with_their_square(tenants: list[Raw]) -> None:
    def seconds(namespaces: int) -> float:
        over = bound(WORKER, adapter="") | {"gpuMs": 1000} | ended("Complete", "Succeeded")
        seen = snapshot(*workers(WORKER))
        for i in range(namespaces):
            for raw in (bare("r", f"n{i}"), bare("e", f"n{i}", status=over)):
                seen.put(Kind.REQUEST, raw, NOW)
        using, took = settings(tenants=tenants), []
        for _ in range(3):
            started = time.process_time()
            plan(seen, using, later(1))
            took.append(time.process_time() - started)
        return min(took)

    assert seconds(1600) < 8 * seconds(400), "four times as many; their square would be sixteen times as much"


def test_a_request_that_somebody_s_finalizer_keeps_is_deleted_once() -> None:
    """Anybody may put a finalizer on an object of their own; to delete it again is answered 200 and changes nothing."""
    over = bound(WORKER, adapter="") | ended("Complete", "Succeeded")
    kept = bare("r", "team", spec={"ttlSecondsAfterFinished": 0}, status=over)
    assert about(decide(kept, at=9), DeleteRequest)
    kept["metadata"] |= {"deletionTimestamp": "2026-05-01T12:00:05Z", "finalizers": ["example.com/hold"]}
    assert not decide(kept, at=9).actions


async def test_a_pod_that_somebody_s_finalizer_keeps_is_forced_again_less_and_less_often() -> None:
    api = MemoryApi()
    stuck = pod(WORKER)
    stuck["metadata"] |= {"deletionTimestamp": "2026-05-01T12:00:05Z", "finalizers": ["example.com/hold"]}
    api.add(stuck)
    deletions = 0

    async def keep(*_: object, **__: object) -> None:
        nonlocal deletions
        deletions += 1

    api.delete = keep  # type: ignore[method-assign]
    loop = Loop(settings(), api, Metrics())  # type: ignore[arg-type]
    loop.leader._leads_until, loop._synced = math.inf, True
    loop.observe(Kind.POD, {"object": api.objects[Kind.POD, stuck["metadata"]["namespace"], WORKER]})
    turns = asyncio.create_task(loop._turns())
    try:
        await asyncio.sleep(1)
    finally:
        turns.cancel()
    assert 1 <= deletions <= 4, "at once, at once, after 0.4 s, after 0.8 s"


async def test_what_is_refused_for_hours_is_never_tried_in_a_hot_loop() -> None:
    """A quota may refuse a Job all night: the wait stays at its cap, however often it was doubled."""
    loop = Loop(settings(), MemoryApi(), Metrics())  # type: ignore[arg-type]
    (start,) = about(decide(request("r", "")), StartJob)
    for _ in range(1100):
        loop._cool(start)
    left = loop._cooling[start.key].until - asyncio.get_running_loop().time()
    assert COOL_CAP_SECONDS - 1 < left <= COOL_CAP_SECONDS


async def test_what_the_api_server_refuses_again_and_again_is_told() -> None:
    api = MemoryApi()

    async def refuse(path: str, body: Raw) -> Raw:
        raise ApiException(status=403, reason="Forbidden")

    told, patch_status = asyncio.Event(), api.patch_status

    async def hear(kind: Kind, namespace: str, name: str, version: int, status: Raw) -> Raw:
        if "cannot be created: HTTP 403 Forbidden" in status["conditions"][-1]["message"]:
            told.set()
        return await patch_status(kind, namespace, name, version, status)

    api.create, api.patch_status = refuse, hear  # type: ignore[method-assign]
    waits = api.add(request("r", "", created=datetime.now(UTC) - timedelta(seconds=9)))
    loop = Loop(settings(), api, Metrics())  # type: ignore[arg-type]
    loop.leader._leads_until, loop._synced = math.inf, True
    loop.observe(Kind.REQUEST, {"object": waits})
    turns = asyncio.create_task(loop._turns())
    try:
        async with asyncio.timeout(10):
            await told.wait()
    finally:
        turns.cancel()


@pytest.mark.parametrize("ahead", [timedelta(days=30), timedelta(days=3000)])
def test_times_of_a_clock_that_was_ahead_neither_stop_the_loop_nor_use_up_a_quota_for_good(ahead: timedelta) -> None:
    """A node's clock may be years ahead until it has asked for the time."""
    over = {"gpuMs": 9000} | bound(WORKER, adapter="") | ended("Complete", "Succeeded", NOW + ahead)
    seen = Snapshot()
    for raw in (bare("e", "team", status=over), bare("r", "team"), *workers(WORKER)):
        seen.put(kind_of(raw), raw, NOW)
    assert about(plan(seen, settings(), NOW), Bind)
    limited = settings(tenants=[{"maxGpuSecondsPerDay": 5}])
    assert not about(plan(seen, limited, NOW), Bind)
    day_later = NOW + timedelta(days=1, minutes=2)
    again = Snapshot()
    for raw in (bare("r", "team"), pod(WORKER), lease(WORKER, renewed=day_later)):
        again.put(kind_of(raw), raw, day_later)
    again.usage = seen.usage
    assert about(plan(again, limited, day_later), Bind)


def test_our_own_clock_may_go_back() -> None:
    over = {"gpuMs": 9000} | bound(WORKER, adapter="") | ended("Complete", "Succeeded", NOW)
    seen = snapshot(bare("e", "team", status=over), bare("r", "team"), *workers(WORKER))
    assert about(plan(seen, settings(), NOW - timedelta(days=30)), Bind)


def test_late_news_of_a_deleted_namesake_hides_nobody() -> None:
    seen = Snapshot()
    for uid, version in (("uid-first", 5), ("uid-second", 9), ("uid-first", 7)):
        seen.put(Kind.ADAPTER, adapter(uid=uid, version=version), NOW)
    seen.remove(Kind.ADAPTER, "uid-first", NOW)
    found = seen.adapter("team", "coder")
    assert found is not None and found.uid == "uid-second"


async def test_an_event_is_one_that_the_api_server_takes() -> None:
    """Its note is counted in bytes, and its name must not have a label that ends in a dash."""
    api, name = MemoryApi(), "a" * 199 + "-" + "b" * 20
    (entry,) = snapshot(request(name)).requests.values()
    note = Note(entry, "Reason", "é" * 900)
    await Apply(api, Snapshot(), settings(), lambda: True)._post(note)  # type: ignore[arg-type]
    (event,) = api.events
    assert len(event["note"].encode()) <= 1024
    assert not event["metadata"]["name"].partition(".")[0].endswith("-")


def test_an_adapter_without_a_home_is_forgotten_with_it() -> None:
    seen = snapshot(adapter())
    seen.homeless.update({"uid-coder", "uid-of-one-that-is-gone"})
    seen.sweep(NOW)
    assert seen.homeless == {"uid-coder"}
