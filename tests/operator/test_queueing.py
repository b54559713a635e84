"""The position in the queue and its estimate: the planner's own order, and nothing said that nobody can know."""

from __future__ import annotations

from datetime import timedelta

import pytest

from claas_crds.reasons import Reason
from claas_operator.actions import Bind
from claas_operator.plan import plan
from claas_operator.queueing import Place, place
from claas_operator.snapshot import Kind, Request, parse
from operatorkit import (
    NOW,
    WORKER,
    Raw,
    about,
    bound,
    claim,
    ended,
    later,
    request,
    result,
    settings,
    snapshot,
    workers,
)


def parsed(*raws: Raw) -> list[Request]:
    found = [parse(Kind.REQUEST, raw, NOW) for raw in raws]
    assert all(isinstance(entry, Request) for entry in found)
    return found  # type: ignore[return-value]


def done(name: str, seconds: float, at: float = -100) -> Raw:
    """A request that was bound at `at` and was Complete so many seconds later."""
    status = (
        bound(WORKER, at=later(at)) | claim(WORKER) | result() | ended("Complete", "Succeeded", later(at + seconds))
    )
    return request(name, created=later(at - 1), status=status)


def where(name: str, *raws: Raw, at: float = 0, slots: int | None = None) -> Place:
    requests = parsed(*raws)
    return place(next(r for r in requests if r.name == name), requests, later(at), slots)


def seconds(when: timedelta | None) -> float | None:
    return None if when is None else when.total_seconds()


def test_a_lone_request_is_next() -> None:
    found = where("r", request("r"))
    assert (found.position, found.ahead, found.steps) == (1, 0, 0)
    assert found.starts_in is found.ends_in is None, "nothing has completed: nobody knows"


def test_requests_on_one_adapter_follow_each_other_whatever_their_priority() -> None:
    queue = [request(f"r{i}", created=later(i), spec={"priority": i}) for i in range(4)]
    assert [where(f"r{i}", *queue).position for i in range(4)] == [1, 2, 3, 4]


def test_priority_counts_inside_a_namespace_and_namespaces_take_turns() -> None:
    ours = [request(f"r{i}", "", spec={"priority": i}) for i in range(3)]
    theirs = [request(f"t{i}", "", namespace="zoo", created=later(i), spec={"priority": 1000}) for i in range(2)]
    positions = {name: where(name, *ours, *theirs, at=9, slots=5).position for name in ("r0", "r1", "r2", "t0", "t1")}
    assert positions == {"r2": 1, "t0": 2, "r1": 3, "t1": 4, "r0": 5}


def test_the_order_is_the_planner_s() -> None:
    """One worker after the other is given to whoever the planner takes first; `place` has said it before."""
    queue = [
        request(f"{ns}{i}", "", namespace=ns, created=later(-i % 7), spec={"priority": i * 31 % 5, "loraUri": uri})
        for ns, count in (("team", 7), ("zoo", 3), ("ann", 2))
        for i in range(count)
        for uri in [f"s3://adapters/{ns}/x{i}/"]
    ]
    places = {raw["metadata"]["name"]: where(raw["metadata"]["name"], *queue, at=9, slots=99) for raw in queue}
    said = sorted(places, key=lambda name: places[name].position)
    seen = snapshot(*queue, *workers(*(f"claas-l40s-{i}-w" for i in range(1, 13))), now=later(9))
    bound_to = [a.request.name for a in about(plan(seen, settings(), later(9)), Bind) if isinstance(a, Bind)]
    assert bound_to == said


def test_what_a_worker_has_is_no_longer_in_the_queue_and_counts_as_ahead() -> None:
    running = request("r", status=bound(WORKER) | claim(WORKER))
    assert where("r", running, done("d", 10)).position == 0
    after = where("s", running, request("s", created=later(1)), request("t", created=later(2)))
    assert (after.position, after.ahead) == (1, 1)


def test_an_estimate_is_the_recent_steps_times_what_goes_before() -> None:
    history = [done("a", 8), done("b", 10), done("c", 30)]
    running = request("r0", status=bound(WORKER, at=later(0)) | claim(WORKER))
    queue = [running, *(request(f"r{i}", created=later(i)) for i in (1, 2))]
    assert seconds(where("r0", *history, *queue, at=4).ends_in) == 6
    first, second = where("r1", *history, *queue, at=4), where("r2", *history, *queue, at=4)
    assert (seconds(first.starts_in), seconds(first.ends_in), first.steps) == (6, 16, 3)
    assert seconds(second.starts_in) == 16
    assert seconds(where("r0", *history, *queue, at=99).ends_in) == 0, "overdue is not negative"


def test_more_workers_shorten_the_wait_of_other_adapters_and_not_of_the_same() -> None:
    queue = [done("a", 10), *(request(f"r{i}", created=later(i)) for i in range(3)), request("b", "", created=later(9))]
    assert seconds(where("b", *queue, at=9, slots=2).starts_in) == 0
    assert seconds(where("r2", *queue, at=9, slots=2).starts_in) == 20
    assert seconds(where("r2", *queue, at=9, slots=8).starts_in) == 20


@pytest.mark.parametrize("reason", [Reason.TEACHER_UNAVAILABLE, Reason.ADAPTER_NOT_FOUND])
def test_what_waits_for_something_else_gets_a_place_and_no_estimate(reason: Reason) -> None:
    found = where("r", done("a", 10), request("r", status={"reason": reason}))
    assert (found.position, found.starts_in, found.reason) == (1, None, reason)
    behind = request("s", created=later(1), status={"reason": Reason.ADAPTER_BUSY})
    queue = [done("a", 10), request("r", status={"reason": reason}), behind]
    assert where("s", *queue, at=2).starts_in is None, "nobody knows when its adapter is free"
    assert where("t", *queue, request("t", "", created=later(2)), at=3).starts_in is not None


def test_a_failed_step_is_no_measure_and_only_the_latest_are() -> None:
    failed = request("f", status=bound(WORKER) | ended("Failed", "InternalError", later(500)))
    assert where("r", failed, request("r"), at=600).steps == 0
    old = [done(f"o{i}", 1000, at=-90_000) for i in range(30)]
    new = [done(f"n{i}", 10, at=-5000) for i in range(20)]
    assert seconds(where("r", *old, *new, request("r")).ends_in) == 10


def test_what_has_ended_has_no_place() -> None:
    with pytest.raises(ValueError, match="has ended"):
        where("d", done("d", 10))
    with pytest.raises(ValueError, match="at least 1"):
        where("r", request("r"), slots=0)


def test_ten_thousand_requests_are_placed_in_a_moment() -> None:
    queue = parsed(*(request(f"r{i}", f"a{i % 500}", namespace=f"n{i % 40}") for i in range(10_000)))
    found = place(queue[-1], queue, NOW, 8)
    assert 1 <= found.position <= 10_000
