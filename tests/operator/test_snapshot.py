"""The snapshot: newest wins, nothing that is written in an object stops the loop, and no text of a sample stays."""

from __future__ import annotations

import gc
import json
import tracemalloc
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from claas_crds.reasons import Reason
from claas_crds.request import Parent
from claas_operator import status
from claas_operator.actions import Commit, End, Retry, Say
from claas_operator.plan import plan
from claas_operator.references import References
from claas_operator.relist import relist
from claas_operator.snapshot import TOMBSTONE_LIFE, Kind, Snapshot
from operatorkit import (
    NOW,
    PREFIX,
    WORKER,
    MemoryApi,
    Raw,
    about,
    active,
    adapter,
    bound,
    claim,
    decide,
    ended,
    job,
    kind_of,
    later,
    lease,
    pod,
    request,
    result,
    settings,
    snapshot,
    workers,
)


def test_the_newest_wins_in_whatever_order_it_comes() -> None:
    seen = Snapshot()
    new, old = request("r", "", status=bound(WORKER, adapter=""), version=9), request("r", "", version=8)
    seen.put(Kind.REQUEST, new, NOW)
    seen.put(Kind.REQUEST, old, NOW)
    assert seen.requests["uid-r"].worker == WORKER
    assert [r.worker for r in seen.unended()] == [WORKER]


def test_what_was_deleted_does_not_come_back_by_a_late_answer() -> None:
    seen = snapshot(request("r"))
    seen.remove(Kind.REQUEST, "uid-r", NOW)
    assert seen.put(Kind.REQUEST, request("r", version=99), NOW) is None
    assert not list(seen.unended())
    seen.sweep(NOW + TOMBSTONE_LIFE)
    assert not seen.gone, "and memory stays bounded"


def test_a_namesake_is_another_one_and_the_late_news_of_the_first_s_end_does_not_hurt_it() -> None:
    seen = snapshot(adapter(), adapter(uid="uid-second"))
    seen.remove(Kind.ADAPTER, "uid-coder", NOW)
    found = seen.adapter("team", "coder")
    assert found is not None
    assert found.uid == "uid-second"


def test_no_text_of_a_sample_is_kept() -> None:
    seen = snapshot(request("r"), request("bad", spec={"training": {"alpha": 9}}))
    assert "secret" not in repr(seen)


@pytest.mark.parametrize(
    "when", ["garbage", "", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z", "2031-01-01T00:00:00Z"]
)
def test_times_that_a_worker_makes_up_neither_stop_the_loop_nor_stretch_a_deadline(when: str) -> None:
    held = adapter(status={"active": active("r")})
    claimed = request("r", status=bound(WORKER) | {"claim": {"worker": WORKER, "attempt": 1, "at": when}})
    assert about(decide(held, claimed, *workers(WORKER), at=600), End)
    made_up = result("Retryable")
    made_up["result"]["at"] = when
    failed = request("r", status=bound(WORKER) | claim(WORKER) | made_up)
    assert about(decide(held, failed, *workers(WORKER), at=6), Retry)


def test_a_version_name_that_no_status_takes_never_becomes_a_head() -> None:
    held = adapter(status={"active": active("r")})
    status_ = bound(WORKER) | claim(WORKER) | result(uri=f"{PREFIX}{'x' * 254}/")
    made = decide(held, request("r", status=status_), *workers(WORKER))
    assert not about(made, Commit)
    assert not made.skipped
    assert about(made, End)


def test_a_message_that_is_cut_is_not_written_again_and_again() -> None:
    waiting = {"state": {"waiting": {"reason": "CreateContainerError", "message": "y" * 5000}}}
    stuck = pod(WORKER, phase="Pending", status={"containerStatuses": [waiting], "startTime": None})
    objects = [job("claas-l40s-1"), stuck]
    (say,) = about(decide(request("r", ""), *objects, at=3), Say)
    assert isinstance(say, Say)
    told = request("r", "", status=say.status, version=2)
    assert not about(decide(told, *objects, at=4), Say)


def test_a_condition_keeps_its_transition_time_while_its_status_stays() -> None:
    seen = snapshot(request("r", ""))
    first = status.pending(seen.requests["uid-r"], status.Reason.NO_CAPACITY, "one", NOW)
    again = snapshot(request("r", "", status=first)).requests["uid-r"]
    second = status.pending(again, status.Reason.ADAPTER_BUSY, "two", later(9))
    times = {c["type"]: c["lastTransitionTime"] for c in second["conditions"]}
    assert set(times.values()) == {"2026-05-01T12:00:00.000000Z"}
    moved = status.bound(again, _parent(), WORKER, 1, later(9))
    assert {c["type"]: c["lastTransitionTime"] for c in moved["conditions"]}["Assigned"].startswith(
        "2026-05-01T12:00:09"
    )


def _parent() -> Any:

    return Parent(uri=f"{PREFIX}x/")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.text(max_size=6) | st.just("2026-05-01T12:00:00Z"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
WHOLE = [
    adapter(status={"active": active("r")}),
    request("r", status=bound(WORKER) | claim(WORKER) | result()),
    pod(WORKER),
    lease(WORKER, running="uid-r"),
    job("claas-l40s-1", end="Failed"),
]


def paths(value: object, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in an object."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return (
        [at, *(path for key, item in inner for path in paths(item, (*at, key)))]
        if at
        else [path for key, item in inner for path in paths(item, (key,))]
    )


def replaced(value: Any, path: tuple[Any, ...], junk: object) -> Any:
    if not path:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], junk)
    return copy


@hypothesis_settings(deadline=None)  # other processes may want the cores too
@given(data=st.data())
def test_whatever_an_object_holds_the_others_go_on(data: st.DataObject) -> None:
    victim = data.draw(st.sampled_from(WHOLE))
    raw: Raw = replaced(victim, data.draw(st.sampled_from(paths(victim))), data.draw(JUNK))
    seen = snapshot(request("good", ""), *workers("claas-l40s-2-good"))
    for other in WHOLE:
        seen.put(kind_of(other), other if other is not victim else raw, NOW)
    for at in (0, 3, 100, 10_000):
        seen.contact_since = NOW + timedelta(seconds=at)
        made = plan(seen, settings(), later(at))
        assert not made.skipped, made.skipped
    assert any(a.about == "team/good" for a in plan(seen, settings(), NOW).actions)


async def test_a_relist_finds_lost_deletions_and_lost_arrivals() -> None:
    api = MemoryApi()
    api.add(request("there"))
    api.add(request("new"))
    seen = snapshot(request("there"), request("deleted"), pod(WORKER))
    await relist(api, seen, {})  # type: ignore[arg-type]
    assert sorted(r.name for r in seen.requests.values()) == ["new", "there"]
    assert not seen.pods


async def test_a_relist_finds_changes_that_no_watch_told() -> None:
    """A watch may be dead without saying so."""
    api = MemoryApi()
    api.add(request("r"))
    seen = snapshot(request("r"))
    api.change(Kind.REQUEST, "team", "r", {"status": bound(WORKER)})
    await relist(api, seen, {})  # type: ignore[arg-type]
    assert seen.requests["uid-r"].worker == WORKER


def test_who_names_which_version_is_kept_as_objects_come_change_and_go() -> None:
    """The same as from a snapshot that never saw anything else, and nothing is left of what is gone."""
    seen, root = snapshot(adapter("mine")), f"{PREFIX}mine/"
    mine = seen.adapters["uid-mine"]

    def needed(name: str) -> bool:
        return References(seen.named, settings()).needed(f"{PREFIX}{name}/", mine)

    fork = adapter("fork", spec={"initFrom": {"uri": f"{PREFIX}mine-20260101-000000-0123abcd/"}})
    seen.put(Kind.ADAPTER, fork, NOW)
    bare = request("bare", "", spec={"loraUri": root})
    seen.put(Kind.REQUEST, bare, NOW)
    assert (needed("mine-20260101-000000-0123abcd"), needed("mine")) == (True, True)
    assert References(seen.named, settings()).siblings(root, mine) == {"mine", "mine-20260101-000000-0123abcd"}
    bare["metadata"]["resourceVersion"], bare["status"] = "2", ended("Complete", "Succeeded")
    seen.put(Kind.REQUEST, bare, NOW)
    assert not needed("mine")
    seen.remove(Kind.ADAPTER, "uid-fork", NOW)
    assert not needed("mine-20260101-000000-0123abcd")
    assert seen.named == snapshot(adapter("mine")).named


def _kept_bytes(count: int, raw: Raw) -> float:
    """What the snapshot keeps of each of so many objects like `raw`, each decoded anew as from a list."""
    seen = Snapshot()
    tracemalloc.start()
    for i in range(count):
        text = json.dumps(raw | {"metadata": raw["metadata"] | {"name": f"r{i}", "uid": f"{i:036}"}})
        seen.put(Kind.REQUEST, json.loads(text), NOW)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(seen.requests) == count
    return kept / count


@given(data=st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_who_was_not_told_that_it_waits_is_kept_as_requests_come_change_and_go(data: st.DataObject) -> None:
    """The same as looking through every queue, in the same order, whatever happened before."""
    told = status.pending(snapshot(request("r")).requests["uid-r"], Reason.ADAPTER_BUSY, "it waits", NOW)
    worlds = ({}, told, told | {"observedGeneration": 0}, bound(WORKER), ended("Complete", "Succeeded"))
    seen = Snapshot()
    for version in range(1, data.draw(st.integers(5, 25))):
        name = data.draw(st.sampled_from(("r0", "r1", "r2", "r3")))
        if data.draw(st.integers(0, 5)) == 0:
            seen.remove(Kind.REQUEST, f"uid-{name}", NOW)
            continue
        said, created = data.draw(st.sampled_from(worlds)), later(data.draw(st.integers(0, 2)))
        known = seen.requests.get(f"uid-{name}")
        created = known.created if known is not None else created
        seen.put(Kind.REQUEST, request(name, status=said, created=created, version=version), NOW)
        waiting = {line: [r for r in queue if r.says != Reason.ADAPTER_BUSY] for line, queue in seen.queues.items()}
        assert seen.untold == {line: queue for line, queue in waiting.items() if queue}


def test_ten_thousand_ended_requests_are_few_bytes_and_so_are_those_that_nothing_was_said_of() -> None:
    over = bound(WORKER) | claim(WORKER) | result() | {"gpuMs": 1500} | ended("Complete", "Succeeded")
    done = request("r", spec={"samples": [{"prompt": "q" * 1024, "response": "a"}]}, status=over)
    assert _kept_bytes(3_000, done) < 1_200
    assert _kept_bytes(3_000, request("r")) < 1_000
