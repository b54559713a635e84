"""`plan(snapshot, settings, now)`: every decision of the operator, pure. No I/O, no clock, no memory of its own.

It may be run at any moment, on any snapshot, by any number of leaders at once: each action carries the precondition
under which it is right (the table of the protocol), and `apply` drops what has become wrong. The order of the actions
is deterministic: what ends work first, then what starts work in fair order, then what only tells.

Reads top to bottom: one request, then who gets a worker, then adapters and Pods.
"""

from __future__ import annotations

import contextlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

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
from claas_operator.adapters import plan_adapter, refuses
from claas_operator.operations import Registry, pool_of
from claas_operator.permissions import may_read, not_permitted, permitted
from claas_operator.references import References
from claas_operator.retention import sweep_soon
from claas_operator.settings import Pool, Settings
from claas_operator.snapshot import Adapter, Entry, Request, Snapshot, succeeded
from claas_operator.workers import Fleet, Scope, backoff, fences, lost, pod_of, start_workers, survey
from claas_store.errors import StoreError
from claas_store.uris import is_beside, parent_folder, version_name

# A look at the teacher counts for so many probe periods; an older one is taken again before anything is bound.
FRESH_PROBES: Final = 5
# Of an adapter or a bare request that no waiting can mend: the request ends.
_LASTING: Final = (Reason.UNKNOWN_POOL, Reason.BASE_MODEL_MISMATCH, Reason.STORAGE_DENIED)

_REASONS: Final = frozenset(Reason)
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
    retry: bool = False
    lost: bool = False
    but: str = ""  # the worker it is taken from
    since: datetime | None = None  # waits since, when that is later than its creation
    why: str = ""  # what became of the attempt before


def plan(snapshot: Snapshot, settings: Settings, now: datetime) -> Plan:
    """What to do about `snapshot` at `now`."""
    return _Planner(snapshot, settings, now).run()


@dataclass
class _Planner:
    snapshot: Snapshot
    settings: Settings
    now: datetime
    first: list[Action] = field(default_factory=list)  # what ends work
    then: list[Action] = field(default_factory=list)  # what starts work
    last: list[Action] = field(default_factory=list)  # what only tells, and what can wait
    wants: list[_Want] = field(default_factory=list)
    unplaced: list[_Want] = field(default_factory=list)
    waiting: Counter[Scope] = field(default_factory=Counter)
    refusals: dict[str, tuple[Reason, str] | None] = field(default_factory=dict)
    wake_at: datetime | None = None
    teacher_wanted: bool = False
    skipped: list[tuple[Entry, Exception]] = field(default_factory=list)

    def run(self) -> Plan:
        for (namespace, name), queue in self.snapshot.queues.items():
            adapter = self.snapshot.adapter(namespace, name) if name else None
            if adapter is not None and adapter.uid in self.snapshot.in_flight:
                continue  # a lock or a commit is on its way: what follows from it is decided after it
            for request in queue:
                if request.uid in self.snapshot.in_flight:
                    continue
                if request.says_busy and request is not queue[0] and self._still_busy(request, adapter):
                    continue  # the long tail of a queue: nothing has changed for it
                with self._apart(request):
                    self._request(request, adapter, not name or request is queue[0])
        for request in self.snapshot.expiring.values():
            self._expire(request)
        fleet = survey(self.snapshot, self.settings, self.now, self.wake)
        self._assign(fleet)
        self.then += start_workers(self.snapshot, self.settings, fleet, self.waiting, self.now, self.wake)
        self._say_no_capacity(fleet)
        operations = Registry(self.snapshot.jobs.values(), self.snapshot.pods.values())
        references = References(self.snapshot.named, self.settings)
        for adapter in self.snapshot.adapters.values():
            if adapter.uid in self.snapshot.in_flight:
                continue
            with self._apart(adapter):
                desk = operations.desk(adapter, self.snapshot, self.settings, self.now, self.wake)
                self.first += plan_adapter(desk, references)
        self.first += fences(self.snapshot, self.settings, self.now, self.wake)
        actions = [a for a in (*self.first, *self.then, *self.last) if a.key not in self.snapshot.in_flight]
        return Plan(actions, self.wake_at, self.teacher_wanted, self.skipped)

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

    def _still_busy(self, request: Request, adapter: Adapter | None) -> bool:
        """Whether a request that waits for others on its adapter goes on waiting for them."""
        return (
            adapter is not None
            and adapter.active != request.uid
            and adapter.status.head_seq > 0
            and adapter.deleting is None
            and self._refusal(adapter) is None
        )

    def _is_ours(self, request: Request, result: Result) -> bool:
        """Whether a successful result names a version that its namespace may have, beside its parent."""
        if result.outcome is Outcome.NO_SIGNAL:
            return request.status.parent is not None
        parent = request.status.parent
        if parent is None or not permitted(result.lora_uri, self.settings, request.namespace):
            return False
        beside = parent_folder(result.lora_uri) == parent_folder(parent.uri)
        return beside and is_beside(parent.uri, version_name(result.lora_uri))

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
        elif adapter.status.head_seq != parent.head_seq:
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
        for other in self._queue(request):
            if other.uid == request.uid or other.uid in adapter.committed:
                continue
            parent = other.status.parent
            bound_here = parent is None or parent.adapter_uid == adapter.uid
            if bound_here and not other.cancel and (other.problem is None or other.status.attempt):
                return other
        return None

    def _end(
        self, request: Request, reason: str, message: str, *, lost: bool = False, adapter_gone: bool = False
    ) -> None:
        patch = status.ended(request, reason, message, self.now)
        note = None if reason == Reason.CANCELLED else Note(request, reason, message)
        self.first.append(
            End(request=request, reason=reason, status=patch, lost=lost, adapter_gone=adapter_gone, note=note)
        )

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
        if not self._teacher_is_ready(request, since):
            return
        assert pool is not None  # an unknown pool was refused above
        self.wants.append(_Want(request, adapter, pool, attempt, retry, lost, but, since, why))

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
        known = Reason(reason) if reason in _REASONS else Reason.PENDING
        begun = max(request.created, since) if since else request.created
        if not status.says(request, known, message) and self._due(begun + self._delay):
            self.last.append(Say(request=request, status=status.pending(request, known, message, self.now)))

    def _expire(self, request: Request) -> None:
        ended, ttl = request.ended_at, request.ttl
        if ended is not None and ttl is not None and self._due(ended + ttl):
            self.last.append(DeleteRequest(request=request))

    # Who gets a worker

    def _assign(self, fleet: Fleet) -> None:
        """Workers to wants: namespaces in turns, priority inside a namespace, then age."""
        line: dict[str, list[_Want]] = defaultdict(list)
        for want in sorted(self.wants, key=lambda want: (-want.request.priority, want.request.order), reverse=True):
            line[want.request.namespace].append(want)  # the next is the last: popped from the end
        used = self._usage()
        turns = [(used[namespace], namespace) for namespace in line]
        heapq.heapify(turns)
        while turns:
            usage, namespace = heapq.heappop(turns)
            want = line[namespace].pop()
            if self._place(want, fleet):
                usage += 1
            if line[namespace]:
                heapq.heappush(turns, (usage, namespace))

    def _usage(self) -> Counter[str]:
        """What each namespace uses now: workers at its requests. (Weights and GPU time past will go in here.)"""
        wanting = {want.request.uid for want in self.wants}
        return Counter(
            r.namespace for r in self.snapshot.unended() if r.worker and r.result is None and r.uid not in wanting
        )

    def _place(self, want: _Want, fleet: Fleet) -> bool:
        """Whether a worker had room for it."""
        request, adapter = want.request, want.adapter
        scope = self._scope(want)
        worker = fleet.take(scope, want.but)
        if worker is None:
            self.waiting[scope] += 1
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

    def _scope(self, want: _Want) -> Scope:
        shared = want.pool.isolation == "Shared"
        return (want.pool.name, self.settings.namespace if shared else want.request.namespace)

    def _say_no_capacity(self, fleet: Fleet) -> None:
        for want in self.unplaced:
            pool, trouble = want.pool.name, fleet.trouble.get(self._scope(want))
            message = f"no worker of pool {pool} starts: {trouble}" if trouble else describe(Reason.NO_CAPACITY)
            if want.why:
                message = f"{want.why}; {message}"
            reason = Reason.WORKER_LOST if want.lost else Reason.NO_CAPACITY
            self._say(want.request, reason, message, None if want.lost else want.since)
