"""`plan(snapshot, settings, now)`: every decision of the operator, pure. No I/O, no clock, no memory of its own.

It may be run at any moment, on any snapshot, by any number of leaders at once: each action carries the precondition
under which it is right (the table of the protocol), and `apply` drops what has become wrong. The order of the actions
is deterministic: what workers have done first, then what starts work in fair order, then what a crowd may ask for,
namespaces in turn: to end, to be created, to be deleted, and last to be told.

Reads top to bottom: one request, then who gets a worker, then adapters and Pods.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, TypeVar

from claas_crds.reasons import ConditionType, Outcome, Reason, describe
from claas_crds.request import Parent, Result
from claas_operator import status
from claas_operator.actions import (
    Action,
    Bind,
    Commit,
    Complete,
    DeleteRequest,
    End,
    Lock,
    Note,
    Retry,
    Say,
)
from claas_operator.adapters import FAR, may_be_freed, plan_adapter, refuses, rests_until
from claas_operator.operations import Registry, pool_of
from claas_operator.permissions import may_read, not_permitted, permitted
from claas_operator.references import References
from claas_operator.retention import sweep_soon
from claas_operator.settings import Pool, Settings
from claas_operator.snapshot import Adapter, Entry, Request, Snapshot, succeeded
from claas_operator.usage import day_after, shares
from claas_operator.workers import Demand, Fleet, Scope, backoff, fences, let_go, lost, pod_of, start_workers, survey
from claas_store.errors import StoreError, UriInvalid
from claas_store.uris import is_beside, parent_folder, version_name

# One plan ends and deletes at most so many each: the loop writes no more at a time, and building ten thousand patches
# would hold up whoever waits for a worker. Fewer at a time only tell: nobody's step may wait behind them.
MAX_PER_PLAN: Final = 64
MAX_TELLING: Final = 8
_MOST: Final[Mapping[type[Action], int]] = {End: MAX_PER_PLAN, DeleteRequest: MAX_PER_PLAN, Say: MAX_TELLING}
# A look at the teacher counts for so many probe periods; an older one is taken again before anything is bound.
FRESH_PROBES: Final = 5
# Of an adapter or a bare request that no waiting can mend: the request ends.
_LASTING: Final = (Reason.UNKNOWN_POOL, Reason.BASE_MODEL_MISMATCH, Reason.STORAGE_DENIED)

_REASONS: Final = frozenset(Reason)
# In a long queue every request waits for its adapter, then for a worker. Who was told of one of them is told of the
# other so much later than of anything else: each such request would cost one more write.
_PASSING: Final = frozenset({Reason.ADAPTER_BUSY, Reason.NO_CAPACITY})
PASSING_FACTOR: Final = 10
# Begins the message of a request that an outage of the teacher has delayed, until it is bound again.
_TEACHER_IS_BACK: Final = "the teacher is back"


@dataclass
class Plan:
    """What to do now, and when to think again if nothing happens before."""

    actions: list[Action]
    wake_at: datetime | None
    teacher_wanted: bool  # something waits for the teacher, or uses it
    skipped: list[tuple[Entry, Exception]]  # objects that nothing could be decided about: bugs, or corrupt objects


@dataclass(frozen=True)
class _Want:
    """A request that could run now if a worker had room."""

    request: Request
    adapter: Adapter | None
    pool: Pool
    attempt: int
    begun: datetime  # it could run since
    retry: bool = False
    lost: bool = False
    but: str = ""  # the worker it is taken from
    since: datetime | None = None  # waits since, when that is later than its creation
    why: str = ""  # what became of the attempt before


@dataclass
class _Quota:
    """What of a namespace may not begin; each why, and until when."""

    used_up: tuple[str, str] | None = None  # nothing may
    too_many: tuple[str, str] | None = None  # nothing that is younger than the `last`
    last: tuple[datetime, str, str] | None = None


T = TypeVar("T")


def in_turn(crowds: Mapping[str, Sequence[T]]) -> Iterator[T]:
    """The first of each crowd, then the second of each, and so on; the smaller crowd's before the larger one's."""
    waiting = deque(iter(crowd) for crowd in sorted(crowds.values(), key=len))
    while waiting:
        crowd = waiting.popleft()
        for one in crowd:
            yield one
            waiting.append(crowd)
            break


def plan(snapshot: Snapshot, settings: Settings, now: datetime) -> Plan:
    """What to do about `snapshot` at `now`."""
    return _Planner(snapshot, settings, now).run()


@dataclass
class _Planner:
    snapshot: Snapshot
    settings: Settings
    now: datetime
    first: list[Action] = field(default_factory=list)  # what workers have done
    then: list[Action] = field(default_factory=list)  # what starts work: never more than there are workers for
    last: list[Action] = field(default_factory=list)  # what only tells of what runs
    # By what is done and by namespace: those it is to be done to, with what makes the action.
    crowds: dict[type[Action], dict[str, list[tuple[Request, Callable[[], Action]]]]] = field(
        default_factory=lambda: {kind: defaultdict(list) for kind in _MOST}
    )
    wants: list[_Want] = field(default_factory=list)
    unplaced: list[_Want] = field(default_factory=list)
    demands: dict[Scope, Demand] = field(default_factory=lambda: defaultdict(Demand))
    refusals: dict[str, tuple[Reason, str] | None] = field(default_factory=dict)
    quotas: dict[str, _Quota] = field(default_factory=dict)
    wake_at: datetime | None = None
    teacher_wanted: bool = False
    skipped: list[tuple[Entry, Exception]] = field(default_factory=list)

    def run(self) -> Plan:
        fleet = survey(self.snapshot, self.settings, self.now, self.wake)
        # More than these could not run, whatever is decided.
        places = sum(worker.slots for workers in fleet.ready.values() for worker in workers if worker.slots > 0)
        places += sum(pool.max_workers * pool.batch for pool in self.settings.pools)
        for line, queue in self.snapshot.queues.items():
            if not self.snapshot.serves(line[0]):
                continue
            at_work = self.snapshot.at_work.get(line, {})
            with self._apart(queue[0]):
                if queue[0].bare:
                    self._bare(queue, at_work, places)
                else:
                    self._line(self.snapshot.adapter(*line), queue, at_work)
        self._expire()
        self._assign(fleet)
        self.then += start_workers(self.snapshot, self.settings, fleet, self.demands, self.now, self.wake)
        self.then += let_go(self.settings, fleet)
        self._say_no_capacity(fleet)
        operations = Registry(self.snapshot.jobs.values(), self.snapshot.pods.values())
        references = References(self.snapshot.named, self.settings)
        on_adapters = defaultdict[str, list[Action]](list)
        for adapter in self.snapshot.adapters.values():
            if adapter.uid in self.snapshot.in_flight or not self.snapshot.serves(adapter.namespace):
                continue
            with self._apart(adapter):
                if self._rests(adapter):
                    continue
                desk = operations.desk(adapter, self.snapshot, self.settings, self.now, self.wake)
                on_adapters[adapter.namespace] += plan_adapter(desk, references)
        self.then += fences(self.snapshot, self.settings, self.now, self.wake)
        crowd = (*self._some(End), *in_turn(on_adapters), *self._some(DeleteRequest), *self._some(Say))
        actions = [a for a in (*self.first, *self.then, *crowd, *self.last) if a.key not in self.snapshot.in_flight]
        return Plan(actions, self.wake_at, self.teacher_wanted, self.skipped)

    def _rests(self, adapter: Adapter) -> bool:
        """Whether there is nothing to do about an adapter before a time that is still to come."""
        known = self.snapshot.rests.get(adapter.uid)
        if known is None or known[0] is not adapter or known[1] is not self.settings:
            known = self.snapshot.rests[adapter.uid] = (adapter, self.settings, rests_until(adapter, self.settings))
        until = known[2]
        if until is None or until <= self.now or may_be_freed(adapter, self.snapshot, self.settings):
            return False
        if until < FAR:
            self.wake(until)
        return True

    @contextlib.contextmanager
    def _apart(self, entry: Entry) -> Iterator[None]:
        """One object about which nothing can be decided never stops the others."""
        try:
            yield
        except (ValueError, OverflowError, StoreError) as error:  # pydantic's ValidationError is a ValueError
            self.skipped.append((entry, error))

    def wake(self, at: datetime) -> None:
        """Think again at `at`, or before."""
        if self.wake_at is None or at < self.wake_at:
            self.wake_at = at

    def _due(self, at: datetime) -> bool:
        """Whether `at` has come; if not, think again then."""
        if self.now >= at:
            return True
        self.wake(at)
        return False

    # Queues

    def _line(self, adapter: Adapter | None, queue: list[Request], at_work: dict[str, Request]) -> None:
        """Requests on one adapter. Most only wait for the first, and cost next to nothing."""
        if adapter is not None and adapter.uid in self.snapshot.in_flight:
            return  # a lock or a commit is on its way: what follows from it is decided after it
        first, chosen = queue[0], queue
        if adapter is not None and adapter.status.head_seq and not adapter.deleting and not self._refusal(adapter):
            holder = self.snapshot.requests.get(adapter.active)
            some = {request.uid: request for request in (first, holder, *at_work.values()) if request is not None}
            self._tell_busy(self.snapshot.untold.get((adapter.namespace, adapter.name), []), some)
            chosen = sorted((request for request in some.values() if request.ended is None), key=lambda r: r.order)
        for request in chosen:
            if request.uid not in self.snapshot.in_flight:
                with self._apart(request):
                    self._request(request, adapter, request is first)

    def _tell_busy(self, untold: list[Request], but: dict[str, Request]) -> None:
        """Those that wait for others on their adapter, oldest first, are told so."""
        for request in untold:
            if request.uid in but:
                continue
            if self._is_full(Say, request) or not self._due(request.created + self._delay):
                break  # the younger ones have not waited for long either
            if request.uid not in self.snapshot.in_flight:
                self._say(request, Reason.ADAPTER_BUSY, describe(Reason.ADAPTER_BUSY))

    def _bare(self, queue: list[Request], at_work: dict[str, Request], room: int) -> None:
        """Bare requests of a kind. None waits for another: the first of them, as many as could run, stand for all."""
        waiting, crowd = [request for request in queue if request.waits], 0
        for request in (*at_work.values(), *waiting):
            if request.uid in self.snapshot.in_flight:
                continue
            over = self._over_quota(request) if request.waits else None
            if over is None and room > 0:
                room -= request.waits
                with self._apart(request):
                    self._request(request, None, True)
            elif over is not None:
                self._say_quota(request, over)
            elif self._teacher_is_ready(request, None):
                crowd += 1
                if request.says != Reason.NO_CAPACITY:
                    self._say(request, Reason.NO_CAPACITY, describe(Reason.NO_CAPACITY))
        pool = self.settings.pool(queue[0].pool or self.settings.default_pool)
        if crowd and pool is not None:
            self._demand(self._scope(pool, queue[0].namespace), crowd, crowd)

    def _demand(self, scope: Scope, requests: int, steps: int) -> Demand:
        """So many requests have no worker; with those behind them, there are so many steps to make."""
        demand = self.demands[scope]
        demand.requests += requests
        demand.work_seconds += steps * self._typical_ms / 1000
        return demand

    @functools.cached_property
    def _typical_ms(self) -> float:
        """What a request costs; the sum over all namespaces is made once."""
        return self.snapshot.usage.typical_ms(self.now)

    # One request

    def _request(self, request: Request, adapter: Adapter | None, is_first: bool) -> None:
        """What to do about one request that has not ended. `is_first`: nothing on its adapter came before it."""
        parent = request.status.parent
        if not request.bare:
            if adapter is not None and request.uid in adapter.committed:
                self._complete_committed(request, adapter)
                return
            if parent is not None and (adapter is None or adapter.uid != parent.adapter_uid):
                # Even with a successful result: nothing can be committed to an adapter that is no more.
                self._end(request, Reason.ADAPTER_GONE, describe(Reason.ADAPTER_GONE), adapter_gone=True)
                return
        result = request.result
        if result is not None and succeeded(result) and self._is_ours(request, result):
            self._finish(request, adapter, result, is_first)
        elif request.cancel:
            self._end(request, Reason.CANCELLED, describe(Reason.CANCELLED))
        elif request.problem is not None and request.status.attempt == 0:
            self._end(request, *request.problem)
        elif result is not None and succeeded(result):
            self._end(request, Reason.INTERNAL_ERROR, "the worker reported a version that is not beside its parent")
        elif result is not None and result.outcome is Outcome.FAILED:
            self._end(request, result.reason, result.message)
        elif request.first_claim and self._due(request.first_claim + request.deadline):
            limit = f"spec.activeDeadlineSeconds: {request.deadline.total_seconds():.0f} s"
            self._end(request, Reason.DEADLINE_EXCEEDED, f"{limit} have passed since the first claim")
        elif result is not None:
            self._retry(request, adapter, is_first, result.reason, result.message, request.result_at)
        elif request.claimed:
            self._claimed(request, adapter, is_first)
        elif request.worker:
            self._bound(request, adapter, is_first)
        else:
            self._want(request, adapter, is_first, attempt=max(1, request.status.attempt))

    def _is_ours(self, request: Request, result: Result) -> bool:
        """Whether a successful result names a version that its namespace may have, beside its parent."""
        if result.outcome is Outcome.NO_SIGNAL:
            return request.status.parent is not None
        parent = request.status.parent
        if parent is None or not permitted(result.lora_uri, self.settings, request.namespace):
            return False
        try:
            beside = parent_folder(result.lora_uri) == parent_folder(parent.uri)
            return beside and is_beside(parent.uri, version_name(result.lora_uri))
        except UriInvalid:
            return False

    def _complete_committed(self, request: Request, adapter: Adapter) -> None:
        entry = next(e for e in reversed(adapter.status.history) if e.request_uid == request.uid)
        done = status.completed(request, entry.uri, entry.version, Reason.SUCCEEDED, self.now)
        self.first.append(Complete(request=request, status=done))

    def _finish(self, request: Request, adapter: Adapter | None, result: Result, is_first: bool) -> None:
        """A successful result of the current attempt: commit it, or complete what needs no commit."""
        parent = request.status.parent
        if result.outcome is Outcome.NO_SIGNAL:
            stands = parent.uri if parent else request.lora_uri
            done = status.completed(request, stands, "", Reason.NO_SIGNAL, self.now)
            self.first.append(Complete(request=request, status=done))
        elif request.bare:
            done = status.completed(request, result.lora_uri, version_name(result.lora_uri), Reason.SUCCEEDED, self.now)
            self.first.append(Complete(request=request, status=done))
        elif adapter is None or parent is None:
            return  # never bound by us: nothing it could be committed to
        elif adapter.active == request.uid and adapter.status.head_seq == parent.head_seq:
            heir = self._heir(request, adapter)
            unended = frozenset(r.uid for r in self._queue(request))
            grace = self.settings.timings.orphan_grace_seconds
            sweep_at = sweep_soon(adapter, grace, self.now) if request.status.attempt > 1 else None
            name = version_name(result.lora_uri)
            moved = status.committed(adapter, request, result.lora_uri, name, unended, heir, self.now, sweep_at)
            self.first.append(Commit(adapter=adapter, request=request, heir=heir, status=moved))
        elif adapter.status.head_seq > parent.head_seq:
            # And no entry of this request: it can be committed no more. An adapter from before its binding, as a late
            # watch has it, says nothing about that.
            message = "the head had moved; the result was not used"
            self._retry(request, adapter, is_first, Reason.PENDING, message, request.result_at)
        elif not adapter.active and not adapter.blocked and is_first:
            self._lock(request, adapter, worker="")  # its lock was taken away; the commit needs it

    def _queue(self, request: Request) -> list[Request]:
        return self.snapshot.queues.get((request.namespace, request.adapter_name), [])

    def _heir(self, request: Request, adapter: Adapter) -> Request | None:
        """The next request on the adapter, which may have the lock in the same write."""
        if adapter.blocked or self._refusal(adapter):
            return None
        # With a quota that is used up, the lock would keep a rollback waiting for as long.
        for other in self._queue(request):
            if other.uid == request.uid or other.uid in adapter.committed:
                continue
            parent = other.status.parent
            bound_here = parent is None or parent.adapter_uid == adapter.uid
            if bound_here and not other.cancel and (other.problem is None or other.status.attempt):
                return None if other.waits and self._over_quota(other) else other
        return None

    def _end(
        self, request: Request, reason: str, message: str, *, lost: bool = False, adapter_gone: bool = False
    ) -> None:
        def end() -> End:
            patch = status.ended(request, reason, message, self.now)
            note = None if reason == Reason.CANCELLED else Note(request, reason, message)
            return End(request=request, reason=reason, status=patch, lost=lost, adapter_gone=adapter_gone, note=note)

        self._join(End, request, end)

    def _claimed(self, request: Request, adapter: Adapter | None, is_first: bool) -> None:
        if self._uses_teacher(request):
            self.teacher_wanted = True
        if lost(pod_of(request, self.snapshot, self.settings)):
            self._retry(request, adapter, is_first, Reason.WORKER_LOST, f"worker {request.worker} is gone", None)
            return
        assigned = request.condition(ConditionType.ASSIGNED)
        at = request.claimed_at
        if at and (assigned is None or assigned.reason != Reason.CLAIMED) and self._due(at + self._delay):
            self.last.append(Say(request=request, status=status.running(request, self.now)))

    def _bound(self, request: Request, adapter: Adapter | None, is_first: bool) -> None:
        """Bound and not claimed: after a while, or when its worker goes, it is moved; no attempt is burnt."""
        if self._uses_teacher(request):
            self.teacher_wanted = True
        pod = pod_of(request, self.snapshot, self.settings)
        moves_at = request.assigned_at + timedelta(seconds=self.settings.timings.claim_grace_seconds)
        if lost(pod) or (pod and pod.deleting) or self._due(moves_at):
            attempt = request.status.attempt
            self._want(request, adapter, is_first, attempt=attempt, but=request.worker, since=min(moves_at, self.now))

    def _retry(
        self, request: Request, adapter: Adapter | None, is_first: bool, reason: str, message: str, at: datetime | None
    ) -> None:
        """The attempt failed at `at` in a way that another one may mend; None: its worker was lost, just now."""
        if self._goes_with(adapter, request, lost=at is None):
            return
        attempt = request.status.attempt
        excused = False
        if at is not None:
            retry_at = at + backoff(self.settings, attempt)
            if not self._due(retry_at):
                self._say(request, reason, f"attempt {attempt} failed and is tried again: {message}")
                return
            if reason == Reason.TEACHER_UNAVAILABLE and self.settings.teacher is not None:
                # An outage is nobody's fault and may last: no request ends by it. Whether it was one is seen from a
                # look at the teacher that is younger than the failure, and kept in status (nothing else remembers).
                self.teacher_wanted = True
                health = self.snapshot.teacher
                if health is None or health.at <= at:
                    return  # the look is on its way
                if not health.ready:
                    self._say(request, Reason.TEACHER_UNAVAILABLE, describe(Reason.TEACHER_UNAVAILABLE))
                    return
                excused = self._outlasted_the_teacher(request)
        if attempt > request.backoff_limit and not excused:
            what = f"attempt {attempt} was the last of {request.backoff_limit + 1}: {reason}: {message}"
            self._end(request, Reason.BACKOFF_LIMIT_EXCEEDED, what, lost=at is None)
            return
        why = _TEACHER_IS_BACK if excused else message
        self._want(request, adapter, is_first, attempt=attempt + 1, retry=True, lost=at is None, since=at, why=why)

    def _goes_with(self, adapter: Adapter | None, request: Request, *, lost: bool) -> bool:
        """Ends a request that holds an adapter which is being deleted, and that no worker is running.

        A deletion with `deletionPolicy: Delete` waits for the lock; what is not running might never give it back.
        """
        if adapter is None or adapter.deleting is None or adapter.active != request.uid:
            return False
        self._end(request, Reason.ADAPTER_GONE, describe(Reason.DELETING), lost=lost)
        return True

    def _outlasted_the_teacher(self, request: Request) -> bool:
        """Whether its status says that the teacher was down after the attempt had failed, whatever it waits for now."""
        assigned = request.condition(ConditionType.ASSIGNED)
        since_then = assigned is not None and assigned.message.startswith(_TEACHER_IS_BACK)
        return since_then or status.says(request, Reason.TEACHER_UNAVAILABLE, describe(Reason.TEACHER_UNAVAILABLE))

    # Who could run

    def _want(
        self,
        request: Request,
        adapter: Adapter | None,
        is_first: bool,
        *,
        attempt: int,
        retry: bool = False,
        lost: bool = False,
        but: str = "",
        since: datetime | None = None,
        why: str = "",
    ) -> None:
        """It runs as soon as adapter, teacher and a worker allow; until then it says what it waits for."""
        if request.bare:
            refusal = self._refuses_bare(request)
            pool = self.settings.pool(request.pool or self.settings.default_pool)
        else:
            if adapter is None:
                self._say(request, Reason.ADAPTER_NOT_FOUND, describe(Reason.ADAPTER_NOT_FOUND))
                return
            refusal = self._refusal(adapter)
            pool = pool_of(adapter, self.settings)
        refusal = refusal or self._refuses_payload(request)
        if refusal is not None and refusal[0] in _LASTING:
            self._end(request, *refusal, lost=lost)
            return
        if adapter is not None:
            if self._goes_with(adapter, request, lost=lost):
                return
            if adapter.deleting or adapter.status.head_seq == 0 or refusal is not None:
                self._say(request, Reason.ADAPTER_NOT_READY, self._unready(adapter))
                return
            # A rollback waits until nothing holds the adapter: what holds it goes on, and nothing new begins.
            if adapter.active != request.uid and (adapter.active or not is_first or adapter.rollback):
                self._say(request, Reason.ADAPTER_BUSY, describe(Reason.ADAPTER_BUSY))
                return
            if adapter.active == request.uid and adapter.active_since:
                since = max(adapter.active_since, since) if since else adapter.active_since
        # What has begun goes on, and so does what its adapter already waits for.
        begins = request.waits and (adapter is None or adapter.active != request.uid)
        if begins and (over := self._over_quota(request)):
            self._say_quota(request, over)
            return
        if not self._teacher_is_ready(request, since):
            return
        assert pool is not None  # an unknown pool was refused above
        begun = max(request.created, since) if since else request.created
        self.wants.append(_Want(request, adapter, pool, attempt, begun, retry, lost, but, since, why))

    def _refusal(self, adapter: Adapter) -> tuple[Reason, str] | None:
        """Why nothing can run on the adapter, however long it waits; None when something can."""
        if adapter.uid not in self.refusals:
            self.refusals[adapter.uid] = refuses(adapter, self.settings)
        return self.refusals[adapter.uid]

    def _refuses_bare(self, request: Request) -> tuple[Reason, str] | None:
        pool_name = request.pool or self.settings.default_pool
        pool = self.settings.pool(pool_name)
        if pool is None:
            known = ", ".join(pool.name for pool in self.settings.pools)
            return Reason.UNKNOWN_POOL, f"spec.pool {pool_name!r} names no pool; there are {known}"
        model = request.base_model or self.settings.default_base_model
        if model != pool.base_model:
            message = f"spec.baseModel is {model}, but the workers of pool {pool.name} hold {pool.base_model}"
            return Reason.BASE_MODEL_MISMATCH, message
        if not permitted(request.lora_uri, self.settings, request.namespace):
            return Reason.STORAGE_DENIED, not_permitted("spec.loraUri", self.settings, request.namespace)
        return None

    def _refuses_payload(self, request: Request) -> tuple[Reason, str] | None:
        """A Shared pool's workers could read everybody's objects: only the operator stands between."""
        if not request.payload_uri or may_read(request.payload_uri, self.settings, request.namespace):
            return None
        return Reason.STORAGE_DENIED, not_permitted("spec.payloadRef.uri", self.settings, request.namespace)

    def _unready(self, adapter: Adapter) -> str:
        if adapter.deleting:
            return describe(Reason.DELETING)
        ready = adapter.condition(ConditionType.READY)
        if adapter.status.head_seq == 0 and ready is not None and ready.reason != Reason.CREATING:
            return f"the adapter has no version: {ready.reason}: {ready.message}"
        return describe(Reason.ADAPTER_NOT_READY)

    def _uses_teacher(self, request: Request) -> bool:
        return request.needs_teacher and self.settings.teacher is not None

    def _teacher_is_ready(self, request: Request, since: datetime | None) -> bool:
        if not self._uses_teacher(request):
            return True
        self.teacher_wanted = True
        health = self.snapshot.teacher
        life = timedelta(seconds=FRESH_PROBES * self.settings.timings.teacher_probe_seconds)
        if health is None or self.now - health.at > life:
            return False  # nobody has looked lately; the look is on its way
        if not health.ready:
            self._say(request, Reason.TEACHER_UNAVAILABLE, describe(Reason.TEACHER_UNAVAILABLE), since)
        return health.ready

    @property
    def _delay(self) -> timedelta:
        return timedelta(seconds=self.settings.timings.reason_delay_seconds)

    def _say(self, request: Request, reason: str, message: str, since: datetime | None = None) -> None:
        """It waits. Short waits are not worth a write."""
        if self._is_full(Say, request):
            return
        known = Reason(reason) if reason in _REASONS else Reason.PENDING
        begun = max(request.created, since) if since else request.created
        in_passing = {request.says, known} <= _PASSING and message == describe(known)
        delay = self._delay * (PASSING_FACTOR if in_passing else 1)
        if not status.says(request, known, message) and self._due(begun + delay):
            say = functools.partial(status.pending, request, known, message, self.now)
            self._join(Say, request, lambda: Say(request=request, status=say()))

    # What there may be thousands of: a plan takes some of each namespace, the next one takes the rest

    def _is_full(self, kind: type[Action], request: Request) -> bool:
        """Whether more of the request's namespace would not be taken now."""
        return len(self.crowds[kind][request.namespace]) >= _MOST[kind]

    def _join(self, kind: type[Action], request: Request, make: Callable[[], Action]) -> None:
        if request.uid not in self.snapshot.cooling and not self._is_full(kind, request):
            self.crowds[kind][request.namespace].append((request, make))

    def _some(self, kind: type[Action]) -> Iterator[Action]:
        """As many as there is room for, whoever has the crowd."""
        room = _MOST[kind]
        if kind is Say:
            room -= sum(isinstance(action, Say) for action in self.snapshot.in_flight.values())
        for request, make in itertools.islice(in_turn(self.crowds[kind]), max(0, room)):
            with self._apart(request):
                yield make()

    def _expire(self) -> None:
        """Times to live that have passed. Where a quota counts what was used, a request stays for its day."""
        for at, uid in self.snapshot.expiring:
            if not self._due(at):
                break
            request = self.snapshot.requests[uid]
            if request.used_ms and self.settings.tenant(request.namespace).max_gpu_seconds_per_day:
                at = day_after(request.used_at)
            ours = self.snapshot.serves(request.namespace) and uid not in self.snapshot.in_flight
            if ours and self._due(at):
                self._join(DeleteRequest, request, functools.partial(DeleteRequest, request=request))

    # Quotas

    def _over_quota(self, request: Request) -> tuple[str, str] | None:
        """Why the namespace may not begin this request now, and when it may; None when it may."""
        if request.namespace not in self.quotas:
            self.quotas[request.namespace] = self._quota(request.namespace)
        quota = self.quotas[request.namespace]
        if quota.used_up is not None:
            return quota.used_up
        return quota.too_many if quota.last is not None and request.order > quota.last else None

    def _quota(self, namespace: str) -> _Quota:
        tenant, usage, quota = self.settings.tenant(namespace), self.snapshot.usage, _Quota()
        if (seconds := tenant.max_gpu_seconds_per_day) and usage.day_ms(namespace, self.now) >= seconds * 1000:
            frees_at = usage.below_at(namespace, seconds * 1000, self.now)
            self.wake(frees_at)
            used = usage.day_ms(namespace, self.now) / 1000
            what = f"the namespace has used {used:.0f} of {seconds:.0f} GPU-seconds in the last 24 hours"
            quota.used_up = (what, f"the next request may begin at {frees_at:%Y-%m-%dT%H:%M:%SZ}")
        if limit := tenant.max_pending_requests:
            orders = [request.order for queue in self._queues_of[namespace] for request in queue]
            if len(orders) > limit:
                quota.last = sorted(orders)[limit - 1]
                what = f"the namespace has {len(orders)} requests that have not ended, and its limit is {limit}"
                quota.too_many = (what, "the oldest go first, this one when so many of them have ended")
        return quota

    @functools.cached_property
    def _queues_of(self) -> dict[str, list[list[Request]]]:
        """The queues of each namespace."""
        found = defaultdict[str, list[list[Request]]](list)
        for (namespace, _), queue in self.snapshot.queues.items():
            found[namespace].append(queue)
        return found

    def _say_quota(self, request: Request, over: tuple[str, str]) -> None:
        """Told again only when the time has changed: the numbers do so all the time."""
        what, when = over
        assigned = request.condition(ConditionType.ASSIGNED)
        told = request.says == Reason.QUOTA_EXCEEDED and assigned is not None and assigned.message.endswith(when)
        if not told:
            self._say(request, Reason.QUOTA_EXCEEDED, f"{what}; {when}")

    # Who gets a worker

    def _assign(self, fleet: Fleet) -> None:
        """Workers to wants: to the namespace that has used least for its weight, by priority inside it, then by age."""
        line: dict[str, list[_Want]] = defaultdict(list)
        for want in sorted(self.wants, key=lambda want: (-want.request.priority, want.request.order), reverse=True):
            line[want.request.namespace].append(want)  # the next is the last: popped from the end
        cost = self._typical_ms
        used = shares(line, self.snapshot.usage, self._holders(), self.now, cost)
        weights = {namespace: self.settings.tenant(namespace).weight for namespace in line}
        turns = [(used[namespace] / weights[namespace], namespace) for namespace in line]
        heapq.heapify(turns)
        while turns:
            taken, namespace = heapq.heappop(turns)
            want = line[namespace].pop()
            if self._place(want, fleet):
                taken += cost / weights[namespace]
            if line[namespace]:
                heapq.heappush(turns, (taken, namespace))

    def _holders(self) -> Iterator[Request]:
        """What workers have or are about to have; without what is taken from them."""
        wanting = {want.request.uid for want in self.wants}
        yield from (r for r in self.snapshot.running.values() if r.uid not in wanting)
        for action in self.snapshot.in_flight.values():
            if isinstance(action, (Bind, Lock)) and action.worker and action.request.uid not in self.snapshot.running:
                yield action.request

    def _place(self, want: _Want, fleet: Fleet) -> bool:
        """Whether a worker had room for it."""
        request, adapter = want.request, want.adapter
        scope = self._scope(want.pool, request.namespace)
        worker = fleet.take(scope, want.but)
        if worker is None:
            demand = self._demand(scope, 1, 1 if request.bare else len(self._queue(request)))
            moved = max(want.begun, fleet.latest.get(scope, want.begun))
            demand.late += self._due(moved + timedelta(seconds=want.pool.scale_up_seconds))
            self.unplaced.append(want)
            return False
        if adapter is not None and adapter.active != request.uid:
            self._lock(request, adapter, worker)
            return True
        if adapter is not None:
            parent = Parent(adapter_uid=adapter.uid, uri=adapter.status.uri, head_seq=adapter.status.head_seq)
        else:
            parent = Parent(uri=request.lora_uri)
        patch = status.bound(request, parent, worker, want.attempt, self.now)
        if want.retry:
            note = Note(request, Reason.WORKER_LOST, f"{want.why}; attempt {want.attempt} runs") if want.lost else None
            self.then.append(
                Retry(request=request, worker=worker, attempt=want.attempt, status=patch, lost=want.lost, note=note)
            )
        else:
            self.then.append(Bind(request=request, worker=worker, attempt=want.attempt, status=patch))
        return True

    def _lock(self, request: Request, adapter: Adapter, worker: str) -> None:
        patch = status.locked(adapter, request, self.now)
        self.then.append(Lock(adapter=adapter, request=request, status=patch, worker=worker))

    def _scope(self, pool: Pool, namespace: str) -> Scope:
        return pool.name, self.settings.namespace if pool.isolation == "Shared" else namespace

    def _say_no_capacity(self, fleet: Fleet) -> None:
        for want in self.unplaced:
            pool, trouble = want.pool.name, fleet.trouble.get(self._scope(want.pool, want.request.namespace))
            message = f"no worker of pool {pool} starts: {trouble}" if trouble else describe(Reason.NO_CAPACITY)
            if want.why:
                message = f"{want.why}; {message}"
            reason = Reason.WORKER_LOST if want.lost else Reason.NO_CAPACITY
            self._say(want.request, reason, message, None if want.lost else want.since)
