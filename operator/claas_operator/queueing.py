"""Where a request stands in the queue and when it may be done, computed where it is read and never written.

Pure functions over plain lists of parsed requests (`snapshot.parse(Kind.REQUEST, raw, now)`): the REST shim and the
`claas` command call them with what they have just listed. The order is the planner's: the namespace that has used least
of the workers for its weight comes first, priority and then age count inside a namespace, and requests on one adapter
follow one another, by age. Who sees its own namespace alone sees the order inside it.

The estimate replays that order on as many workers, each step as long as the recent ones took. It is honest in what it
leaves out: it knows no step to come later, no failure and no worker that has yet to start, and where nothing has
completed lately there is none.
"""

from __future__ import annotations

import heapq
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from claas_crds.reasons import Reason
from claas_operator.snapshot import Request
from claas_operator.usage import Usage, shares

# The estimate is the median of so many of the latest steps.
RECENT_STEPS: Final = 20
# Of a request that waits for one of these, and of those behind it on its adapter, nobody knows when they may go on.
_OPEN_ENDED: Final = frozenset(
    {Reason.ADAPTER_NOT_FOUND, Reason.ADAPTER_NOT_READY, Reason.TEACHER_UNAVAILABLE, Reason.STORAGE_UNAVAILABLE}
)


@dataclass(frozen=True)
class Place:
    """Where an unended request stands.

    Attributes:
        position: 1 is the next to be given to a worker; 0: a worker has it.
        ahead: requests that begin before it and have not ended, the running ones included.
        starts_in, ends_in: from now; None where nothing is known to judge by. At the earliest, not a promise.
        steps: how many recent steps the estimate rests on.
        reason: what it waits for, if its status says.
    """

    position: int
    ahead: int
    starts_in: timedelta | None
    ends_in: timedelta | None
    steps: int
    reason: str


def place(
    request: Request,
    requests: Iterable[Request],
    now: datetime,
    workers: int | None = None,
    weight: Callable[[str], float] = lambda _: 1.0,
    usage: Usage | None = None,
) -> Place:
    """Where `request` stands among `requests`, which may hold it and ended ones too.

    Args:
        requests: of one pool, of all namespaces, or the position is among fewer than there are.
        workers: requests that may run at a time; None: as many as are running now, and at least one.
        weight: of a namespace, by `tenants` in the chart's values; by default all are alike.
        usage: of all namespaces, where `requests` lack ended ones that count; by default it is taken from them.

    Raises:
        ValueError: `request` has ended, or workers is below 1.
    """
    if request.ended is not None:
        raise ValueError(f"{request} has ended: it has no place in a queue")
    if workers is not None and workers < 1:
        raise ValueError("workers must be at least 1")
    everyone = {other.uid: other for other in requests} | {request.uid: request}
    unended = sorted((r for r in everyone.values() if r.ended is None), key=lambda r: r.order)
    running = [r for r in unended if _is_running(r)]
    step, steps = recent_step(everyone.values())
    if usage is None:
        usage = Usage()
        for other in everyone.values():
            usage.put(other, now)
    queue = _Queue(unended, running, usage, weight)
    slots = max(1, len(running)) if workers is None else workers
    if _is_running(request):
        left = None if step is None else _left(request, step, now)
        return Place(0, 0, timedelta(0) if left is not None else None, left, steps, request.status.reason)
    order, starts = queue.replay(slots, step or timedelta(seconds=1), now)
    position = order.index(request.uid) + 1
    chain = [r for r in unended if _chain(r) == _chain(request) and r.order <= request.order]
    known = step is not None and not any(r.status.reason in _OPEN_ENDED for r in chain)
    starts_in = starts[request.uid] if known else None
    ends_in = starts_in + step if starts_in is not None and step is not None else None
    return Place(position, position - 1 + len(running), starts_in, ends_in, steps, request.status.reason)


def recent_step(requests: Iterable[Request]) -> tuple[timedelta | None, int]:
    """The median time from bound to Complete of the latest steps, and how many these are; None when there are none."""
    done = [(r.ended_at, r.assigned_at) for r in requests if r.complete and r.ended_at and r.assigned_at > r.created]
    latest = heapq.nlargest(RECENT_STEPS, done)
    took = [max(0.0, (ended - assigned).total_seconds()) for ended, assigned in latest]
    return (timedelta(seconds=statistics.median(took)) if took else None), len(took)


Chain = tuple[str, str]


def _chain(request: Request) -> Chain:
    """What is done one after the other. A bare request waits for nobody: it is a chain of its own."""
    return (request.namespace, request.adapter_name or f"/{request.uid}")


def _is_running(request: Request) -> bool:
    """Whether a worker has it, and has not reported."""
    return request.worker != "" and request.result is None


def _left(request: Request, step: timedelta, now: datetime) -> timedelta:
    return max(timedelta(0), request.assigned_at + step - now)


# Of a namespace: the first request of each chain that may go next, best first.
Line = list[tuple[int, tuple[datetime, str, str], Chain]]


class _Queue:
    """The planner's order, replayed."""

    def __init__(
        self, unended: Sequence[Request], running: Sequence[Request], usage: Usage, weight: Callable[[str], float]
    ) -> None:
        self._running, taken = running, {request.uid for request in running}
        self._usage, self._weight = usage, weight
        self._chains: dict[Chain, deque[Request]] = defaultdict(deque)
        for request in unended:
            if request.uid not in taken:
                self._chains[_chain(request)].append(request)

    def replay(self, slots: int, step: timedelta, now: datetime) -> tuple[list[str], dict[str, timedelta]]:
        """The uids of what waits in the order in which workers would take them, and from now until when."""
        ends = [(_left(r, step, now), r.uid, r) for r in self._running]
        heapq.heapify(ends)
        cost = self._usage.typical_ms(now)
        used = shares({namespace for namespace, _ in self._chains}, self._usage, self._running, now, cost)
        used = {namespace: taken / self._weight(namespace) for namespace, taken in used.items()}
        held = {(r.namespace, r.adapter_name) for r in self._running if r.adapter_name}
        lines: dict[str, Line] = defaultdict(list)
        for chain in self._chains:
            if chain not in held:
                self._offer(lines, chain)
        at, order, starts = timedelta(0), list[str](), dict[str, timedelta]()
        while any(lines.values()) or ends:
            while len(ends) < slots and any(lines.values()):
                namespace = min((n for n, line in lines.items() if line), key=lambda n: (used[n], n))
                _, _, chain = heapq.heappop(lines[namespace])
                request = self._chains[chain].popleft()
                order.append(request.uid)
                starts[request.uid] = at
                used[namespace] += cost / self._weight(namespace)
                heapq.heappush(ends, (at + step, request.uid, request))
            at, _, ended = heapq.heappop(ends)
            self._offer(lines, (ended.namespace, ended.adapter_name))
        return order, starts

    def _offer(self, lines: dict[str, Line], chain: Chain) -> None:
        """The first of a chain may go next."""
        if self._chains.get(chain):
            first = self._chains[chain][0]
            heapq.heappush(lines[chain[0]], (-first.priority, first.order, chain))
