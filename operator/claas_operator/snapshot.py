"""What the operator knows of the cluster: small frozen records, parsed leniently, and the indexes that `plan` reads.

Events, relists and the answers to our own writes all arrive through `Snapshot.put` and `Snapshot.remove`; the newer
resourceVersion wins, so the order in which they arrive does not matter. An object that cannot be parsed is set aside
with a note and never stops the rest. Prompts and responses are dropped while parsing: nothing here holds their text.
"""

from __future__ import annotations

import bisect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from claas_crds import names
from claas_crds.adapter import LoraAdapterSpec, LoraAdapterStatus
from claas_crds.model import Condition, explain, refusal
from claas_crds.reasons import ConditionType, Outcome, Reason
from claas_crds.request import DistillRequestSpec, DistillRequestStatus, Result
from claas_operator.references import Index
from claas_operator.settings import Settings
from claas_operator.usage import Usage

Raw = Mapping[str, Any]
# A queue: a namespace, and the name of its adapter or a kind of bare requests.
Line = tuple[str, str]

# A deleted object's uid is remembered this long: an answer to one of our writes may arrive after its DELETED event.
TOMBSTONE_LIFE = timedelta(minutes=10)
EPOCH = datetime.fromtimestamp(0, UTC)
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
# Why a container waits when all is well.
_USUAL_WAITS = frozenset({"", "ContainerCreating", "PodInitializing"})
# These two take turns while an image cannot be pulled; a message that flips between them would be written each time.
_PULL_WAITS = frozenset({"ErrImagePull", "ImagePullBackOff"})


class Kind(StrEnum):
    """The five kinds that the operator watches."""

    REQUEST = "DistillRequest"
    ADAPTER = "LoraAdapter"
    JOB = "Job"
    POD = "Pod"
    LEASE = "Lease"


def parse_time(text: object) -> datetime | None:
    """An RFC 3339 time, in UTC; None for an absent one.

    Raises:
        ValueError: it is no time, or so far away that adding a duration to it would overflow.
    """
    if text is None or text == "":
        return None
    if not isinstance(text, str):
        raise ValueError("a time must be a string")
    when = datetime.fromisoformat(text)
    if not 1970 <= when.year < 9000:
        raise ValueError("a time must be one that a clock could show")
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def format_time(when: datetime) -> str:
    """RFC 3339, UTC, microseconds."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What every object has."""

    uid: str
    name: str
    namespace: str
    version: int  # metadata.resourceVersion; comparable, by KEP-5504
    created: datetime
    deleting: datetime | None  # metadata.deletionTimestamp
    generation: int

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request(Entry):
    """A DistillRequest without its samples. An ended one keeps only what TTL, history and served counts need."""

    adapter_name: str  # empty: a bare loraUri
    lora_uri: str
    payload_uri: str  # empty: the samples are inline
    base_model: str
    pool: str
    needs_teacher: bool
    priority: int
    backoff_limit: int
    deadline: timedelta
    ttl: timedelta | None
    cancel: bool
    problem: tuple[Reason, str] | None  # why the stored spec cannot be used
    worker: str
    ended: ConditionType | None  # Complete or Failed
    ended_at: datetime | None
    assigned_at: datetime  # of the current attempt; the creation, before any
    claimed_at: datetime | None  # of the current attempt
    first_claim: datetime | None  # `activeDeadlineSeconds` counts from here, over all attempts
    result_at: datetime | None
    waits: bool  # never bound, not cancelled, not refused: all it needs is its turn, and to be told why it waits
    says: str  # the reason that its status gives for that, if it was told of this generation
    used_ms: int  # time of workers that it has used so far, in attempts that are over
    used_at: datetime  # when that was told
    status: DistillRequestStatus

    @property
    def bare(self) -> bool:
        """Whether it has no adapter, hence no lock and no commit."""
        return not self.adapter_name

    @property
    def complete(self) -> bool:
        """Whether it ended well."""
        return self.ended == ConditionType.COMPLETE

    @property
    def result(self) -> Result | None:
        """The report of the current attempt."""
        result = self.status.result
        return result if result is not None and result.attempt == self.status.attempt else None

    @property
    def claimed(self) -> bool:
        """Whether the bound worker claimed the current attempt."""
        claim = self.status.claim
        return claim is not None and claim.worker == self.worker and claim.attempt == self.status.attempt

    @property
    def expires_at(self) -> datetime | None:
        """When its time to live is over; None: never, or it was deleted and only somebody's finalizer keeps it."""
        if self.ended_at is None or self.ttl is None or self.deleting is not None:
            return None
        return self.ended_at + self.ttl

    @property
    def order(self) -> tuple[datetime, str, str]:
        """FIFO: creation time, then name."""
        return (self.created, self.name, self.uid)

    def condition(self, kind: ConditionType) -> Condition | None:
        """Its condition of that type."""
        return next((c for c in self.status.conditions if c.type == kind), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter(Entry):
    """A LoraAdapter."""

    spec: LoraAdapterSpec | None  # None: see `problem`
    problem: str
    init_from: str  # spec.initFrom.uri, also of a spec that does not validate: what it names is never collected
    status: LoraAdapterStatus
    active_since: datetime | None
    sweep_at: datetime | None
    committed: frozenset[str]  # uids of requests in its history
    finalizers: tuple[str, ...]

    @property
    def active(self) -> str:
        """Uid of the request that holds the lock; empty when none does."""
        return self.status.active.request_uid if self.status.active else ""

    @property
    def rollback(self) -> str:
        """The version that spec.rollbackTo asks for and that was not answered yet; empty when there is none.

        Once per change of the field, not per generation: another field's change must never move a head back.
        """
        asked = self.spec.rollback_to if self.spec else None
        answered = asked == self.status.rollback_answered or self.generation <= self.status.rolled_back_generation
        return asked if asked and self.status.head_seq and not answered else ""

    @property
    def blocked(self) -> bool:
        """Whether nothing new may lock it: a deletion or a rollback waits."""
        return self.deleting is not None or self.rollback != ""

    @property
    def held_back(self) -> bool:
        """Whether it holds our finalizer: its versions are deleted before it goes."""
        return names.FINALIZER in self.finalizers

    def condition(self, kind: ConditionType) -> Condition | None:
        """Its condition of that type."""
        return next((c for c in self.status.conditions if c.type == kind), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod(Entry):
    """A Pod of a worker Job or an operation Job."""

    component: str
    pool: str
    job: str
    edition: str  # of its pool's settings, those that it was started with
    linger_seconds: float  # without work, as it was started; zero where it does not say
    phase: str
    started: datetime | None  # a kubelet has taken it
    trouble: str  # why it does not start, if it does not
    answer: str  # termination message of the operation's container

    @property
    def over(self) -> bool:
        """Whether none of its containers will run again."""
        return self.phase in ("Succeeded", "Failed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(Entry):
    """A worker Job or an operation Job."""

    component: str
    pool: str
    edition: str  # of its pool's settings, those that it was made with
    operation: str
    adapter_uid: str
    made_for: int  # generation of the adapter that it was made for
    begun: datetime  # it may have Pods since; a Job that was suspended begins anew
    suspended: bool  # it may have none
    queue: str  # of Kueue, which suspends what has to wait
    finished: datetime | None
    failed: bool
    message: str

    @property
    def counter(self) -> int:
        """The number that its name ends in."""
        return counter_of(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease(Entry):
    """A worker's Lease, named after its Pod."""

    holder: str  # uid of the Pod
    state: str
    running: frozenset[str]
    told: float | None  # what it was told of lingerSeconds since its Pod was started
    renewed: str  # as the worker wrote it; never compared with our clock
    observed: datetime  # when we saw `renewed` change: no clock of another machine matters


@dataclass(frozen=True)
class TeacherHealth:
    """What the last probe of the teacher found."""

    ready: bool
    at: datetime
    message: str = ""


AnyEntry = Request | Adapter | Pod | Job | Lease


@dataclass
class Snapshot:
    """All that is known, with the indexes `plan` needs. Written by the loop alone, read by `plan`."""

    requests: dict[str, Request] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    teacher: TeacherHealth | None = None
    # Start of unbroken contact with the API server: a Lease may look stale only because we saw nothing.
    contact_since: datetime = EPOCH
    # Whether we decide about what is in a namespace, or another release does. Objects are known wherever they are.
    serves: Callable[[str], bool] = lambda namespace: True
    # uid of the operator's Deployment, which owns the Jobs of the release's namespace.
    owner_uid: str | None = None
    # Actions that are being applied, by their key: `plan` leaves what they touch alone and counts what they take.
    in_flight: dict[str, Any] = field(default_factory=dict)
    # Keys of actions that failed and are not tried again yet: `plan` gives their room to others.
    cooling: Set[str] = frozenset()
    # What the API server says to actions that fail again and again, by their key: a quota or a webhook may refuse.
    failing: Mapping[str, str] = field(default_factory=dict)
    # Names that an API server refused as taken by somebody else's Job, as the highest counter per name's stem.
    taken_counters: dict[tuple[str, str], int] = field(default_factory=dict)
    # Uids of adapters whose operations' namespace is being deleted with them: the API server takes no Job there.
    homeless: set[str] = field(default_factory=set)
    # Deleted objects, since when: an answer to a write of ours may arrive after the news of the deletion.
    gone: dict[str, datetime] = field(default_factory=dict)
    # Uids that a Lease lists without there being such a request, since when.
    strangers: dict[str, datetime] = field(default_factory=dict)
    # Objects set aside because they could not be parsed, by uid: what is wrong with them.
    broken: dict[str, str] = field(default_factory=dict)
    # Unended requests by `queue_of`: of an adapter, oldest first; bare ones of a kind, by priority and age.
    queues: dict[Line, list[Request]] = field(default_factory=dict)
    # Of these the ones whose status does not say that they wait for their adapter, in the same order: a plan must not
    # look at all of thousands to find them.
    untold: dict[Line, list[Request]] = field(default_factory=dict)
    # Of these the ones that do more than wait for their turn.
    at_work: dict[Line, dict[str, Request]] = field(default_factory=dict)
    # Of these the ones that a worker has, and has not reported.
    running: dict[str, Request] = field(default_factory=dict)
    # When an ended request's time to live is over, and its uid, in this order.
    expiring: list[tuple[datetime, str]] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    # Until when `plan` has found nothing to do about an adapter: with the entry and the settings that it looked at.
    rests: dict[str, tuple[Adapter, Settings, datetime | None]] = field(default_factory=dict)
    served: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    # Who names which version.
    named: Index = field(default_factory=Index)
    _by_name: dict[tuple[Kind, str, str], str] = field(default_factory=dict)

    def table(self, kind: Kind) -> dict[str, Any]:
        """The entries of a kind by uid."""
        tables: dict[Kind, dict[str, Any]] = {
            Kind.REQUEST: self.requests,
            Kind.ADAPTER: self.adapters,
            Kind.JOB: self.jobs,
            Kind.POD: self.pods,
            Kind.LEASE: self.leases,
        }
        return tables[kind]

    def put(self, kind: Kind, raw: Raw, now: datetime) -> AnyEntry | None:
        """Takes an object over unless a newer one is known; gives what is known afterwards.

        None: it is deleted, or could not be parsed (see `broken`).
        """
        uid = _uid(raw)
        table = self.table(kind)
        known = table.get(uid)
        if uid in self.gone:
            return None
        try:
            version = int(raw["metadata"]["resourceVersion"])
            if known is not None and version <= known.version:
                return known  # type: ignore[no-any-return]
            entry = parse(kind, raw, now, known)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # A ValidationError prints no input (the models hide it); the others could quote a user's text.
            self._forget(kind, uid)
            self.broken[uid] = explain(error, "object") if isinstance(error, ValidationError) else type(error).__name__
            return None
        self.broken.pop(uid, None)
        if known is not None:
            self._unindex(known)
        table[uid] = entry
        name = (kind, entry.namespace, entry.name)
        # Late news of a deleted namesake does not hide who has the name by now.
        if (namesake := table.get(self._by_name.get(name, ""))) is None or namesake.version <= version:
            self._by_name[name] = uid
        self._index(entry, now)
        return entry

    def remove(self, kind: Kind, uid: str, now: datetime) -> bool:
        """The object is gone. Whether it was known."""
        self.broken.pop(uid, None)
        self.gone[uid] = now
        known = uid in self.table(kind)
        self._forget(kind, uid)
        if kind is Kind.REQUEST and any(uid in lease.running for lease in self.leases.values()):
            self.strangers[uid] = now
        return known

    def _forget(self, kind: Kind, uid: str) -> None:
        entry = self.table(kind).pop(uid, None)
        self.rests.pop(uid, None)
        if entry is not None:
            self._unindex(entry)
            self.named.remove(uid)
            name = (kind, entry.namespace, entry.name)
            if self._by_name.get(name) == uid:
                del self._by_name[name]

    def sweep(self, now: datetime) -> None:
        """Forgets tombstones that nothing needs any more, so that memory stays bounded."""
        listed = {uid for lease in self.leases.values() for uid in lease.running}
        self.gone = {uid: at for uid, at in self.gone.items() if now - at < TOMBSTONE_LIFE}
        self.strangers = {uid: at for uid, at in self.strangers.items() if uid in listed}
        self.homeless &= self.adapters.keys()

    def by_name(self, kind: Kind, namespace: str, name: str) -> AnyEntry | None:
        """The object of that name."""
        return self.table(kind).get(self._by_name.get((kind, namespace, name), ""))

    def adapter(self, namespace: str, name: str) -> Adapter | None:
        """The adapter of that name."""
        found = self.by_name(Kind.ADAPTER, namespace, name)
        return found if isinstance(found, Adapter) else None

    def pod(self, namespace: str, name: str) -> Pod | None:
        """The Pod of that name."""
        found = self.by_name(Kind.POD, namespace, name)
        return found if isinstance(found, Pod) else None

    def lease_of(self, pod: Pod) -> Lease | None:
        """The Lease that this very Pod holds (not a namesake before it)."""
        found = self.by_name(Kind.LEASE, pod.namespace, pod.name)
        return found if isinstance(found, Lease) and found.holder == pod.uid else None

    def unended(self) -> Iterator[Request]:
        """Every request that has not ended and is ours to serve."""
        for (namespace, _), queue in self.queues.items():
            if self.serves(namespace):
                yield from queue

    def _index(self, entry: AnyEntry, now: datetime) -> None:
        if isinstance(entry, Request):
            self.strangers.pop(entry.uid, None)
            if entry.worker:
                self.served[entry.worker].add(entry.uid)
            if entry.ended is None:
                line = queue_of(entry)
                bisect.insort(self.queues.setdefault(line, []), entry, key=_turn)
                if entry.says != Reason.ADAPTER_BUSY:
                    bisect.insort(self.untold.setdefault(line, []), entry, key=_turn)
                if not entry.waits:
                    self.at_work.setdefault(line, {})[entry.uid] = entry
                if entry.worker and entry.result is None:
                    self.running[entry.uid] = entry
                self.named.put_request(entry)
            else:
                self.named.remove(entry.uid)
                if entry.expires_at is not None:
                    bisect.insort(self.expiring, (entry.expires_at, entry.uid))
            self.usage.put(entry, now)
        elif isinstance(entry, Adapter):
            self.named.put_adapter(entry)
        elif isinstance(entry, Lease):
            for uid in entry.running:
                if uid not in self.requests:
                    self.strangers.setdefault(uid, now)

    def _unindex(self, entry: AnyEntry) -> None:
        if not isinstance(entry, Request):
            return
        self.usage.remove(entry)
        self.running.pop(entry.uid, None)
        if entry.worker:
            served = self.served[entry.worker]
            served.discard(entry.uid)
            if not served:
                del self.served[entry.worker]
        if entry.ended is None:
            line = queue_of(entry)
            _leave(self.queues, line, entry)
            if entry.says != Reason.ADAPTER_BUSY:
                _leave(self.untold, line, entry)
            if (busy := self.at_work.get(line)) is not None:
                busy.pop(entry.uid, None)
                if not busy:
                    del self.at_work[line]
        elif entry.expires_at is not None:
            del self.expiring[bisect.bisect_left(self.expiring, (entry.expires_at, entry.uid))]


def counter_of(job_name: str) -> int:
    """The number that the name of one of our Jobs ends in."""
    tail = job_name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else 0


def queue_of(request: Request) -> Line:
    """The queue in which a request stands: its adapter's, or that of the bare requests which need what it needs."""
    if request.adapter_name:
        return request.namespace, request.adapter_name
    # No object's name has a slash.
    return request.namespace, f"/{request.pool}/{'teacher' if request.needs_teacher else ''}"


def _turn(request: Request) -> tuple[int, datetime, str, str]:
    """The order inside a queue: on an adapter age alone counts."""
    return (0 if request.adapter_name else -request.priority, *request.order)


def _leave(queues: dict[Line, list[Request]], line: Line, request: Request) -> None:
    queue = queues[line]
    del queue[bisect.bisect_left(queue, _turn(request), key=_turn)]
    if not queue:
        del queues[line]


def _uid(raw: Raw) -> str:
    metadata = raw.get("metadata")
    return str(metadata.get("uid", "")) if isinstance(metadata, Mapping) else ""


def parse(kind: Kind, raw: Raw, now: datetime, known: AnyEntry | None = None) -> AnyEntry:
    """One object as a record. `known` is the record before: an unchanged spec is not parsed again.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it cannot be parsed.
    """
    metadata = raw["metadata"]
    created = parse_time(metadata["creationTimestamp"])
    if created is None:
        raise ValueError("metadata.creationTimestamp is empty")
    if not _NAMESPACE.fullmatch(metadata["namespace"]):  # it becomes part of uris
        raise ValueError("metadata.namespace is no namespace's name")
    common: dict[str, Any] = {
        "uid": _text(metadata["uid"]),
        "name": _text(metadata["name"]),
        "namespace": sys.intern(_text(metadata["namespace"])),
        "version": int(metadata["resourceVersion"]),
        "created": created,
        "deleting": parse_time(metadata.get("deletionTimestamp")),
        "generation": int(metadata.get("generation") or 0),
    }
    if kind is Kind.REQUEST:
        return _request(raw, common, now, known if isinstance(known, Request) else None)
    if kind is Kind.ADAPTER:
        return _adapter(raw, common)
    labels = {_text(key): _text(value) for key, value in (metadata.get("labels") or {}).items()}
    component, pool = labels.get(names.COMPONENT_LABEL, ""), labels.get(names.POOL_LABEL, "")
    annotations = {_text(key): _text(value) for key, value in (metadata.get("annotations") or {}).items()}
    if kind is Kind.POD:
        return _pod(raw, common, component, pool, labels.get("batch.kubernetes.io/job-name", ""), annotations)
    if kind is Kind.JOB:
        return _job(raw, common, component, pool, labels, annotations)
    return _lease(raw, common, now, known if isinstance(known, Lease) else None, annotations)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a string was expected")
    return value


# A shared, empty status: ten thousand ended requests keep no numbers in memory, nor do those of which nothing was said.
_FORGOTTEN = DistillRequestStatus()


# A worker's clock may differ from ours by so much; a time beyond that is wrong, or a lie.
CLOCK_SKEW = timedelta(minutes=1)


def _workers_time(text: str, bound: datetime, now: datetime) -> datetime:
    """A time that a worker wrote after it was bound and before we saw it; else when it was bound."""
    try:
        when = parse_time(text)
    except ValueError:
        return bound
    return when if when is not None and bound - CLOCK_SKEW <= when <= now + CLOCK_SKEW else bound


def _request(raw: Raw, common: dict[str, Any], now: datetime, known: Request | None) -> Request:
    told = raw.get("status")
    status = DistillRequestStatus.model_validate(told) if told else _FORGOTTEN
    ended = next(
        (
            c
            for c in status.conditions
            if c.type in (ConditionType.COMPLETE, ConditionType.FAILED) and c.status == "True"
        ),
        None,
    )
    ended_at = parse_time(ended.last_transition_time) if ended else None
    assigned_at = parse_time(status.assigned_at) or common["created"]
    claimed_at = _workers_time(status.claim.at, assigned_at, now) if status.claim else None
    same = known is not None and known.generation == common["generation"]
    from_spec = {name: getattr(known, name) for name in _SPEC_FIELDS} if same else _request_spec(raw.get("spec"))
    return Request(
        **common,
        **from_spec,
        worker=sys.intern(status.worker),
        ended=ConditionType(ended.type) if ended else None,
        ended_at=ended_at,
        assigned_at=assigned_at,
        claimed_at=claimed_at,
        first_claim=parse_time(status.first_claim_at) or claimed_at,
        result_at=_workers_time(status.result.at, assigned_at, now) if status.result else None,
        waits=not (status.worker or from_spec["cancel"] or from_spec["problem"]),
        says=status.reason if status.observed_generation == common["generation"] else "",
        used_ms=status.gpu_ms,
        used_at=min(ended_at or assigned_at, now),  # a leader's clock may have been ahead of ours by years
        status=_FORGOTTEN if ended else status,
    )


_SPEC_FIELDS = (
    *("adapter_name", "lora_uri", "payload_uri", "base_model", "pool", "needs_teacher", "priority"),
    *("backoff_limit", "deadline", "ttl", "cancel", "problem"),
)


def _request_spec(raw: object) -> dict[str, Any]:
    """The part of the spec that decisions need; of a spec that does not validate, what can be read of it."""
    problem = None
    try:
        spec = DistillRequestSpec.model_validate(raw)
    except ValidationError as error:
        problem = (refusal(error), explain(error))
        raw = raw if isinstance(raw, Mapping) else {}
        ref = raw.get("adapterRef")
        name = ref.get("name") if isinstance(ref, Mapping) else None
        spec = DistillRequestSpec.model_construct(cancel=raw.get("cancel") is True)
        adapter_name = name if isinstance(name, str) else ""
    else:
        adapter_name = spec.adapter_ref.name if spec.adapter_ref else ""
    ttl = spec.ttl_seconds_after_finished
    return {
        "adapter_name": sys.intern(adapter_name),
        "lora_uri": spec.lora_uri or "",
        "payload_uri": spec.payload_ref.uri if spec.payload_ref else "",
        "base_model": sys.intern(spec.base_model or ""),
        "pool": sys.intern(spec.pool or ""),
        "needs_teacher": spec.teacher.mode == "Server",
        "priority": spec.priority,
        "backoff_limit": spec.backoff_limit,
        "deadline": timedelta(seconds=spec.active_deadline_seconds),
        "ttl": None if ttl is None else timedelta(seconds=ttl),
        "cancel": spec.cancel,
        "problem": problem,
    }


def succeeded(result: Result | None) -> bool:
    """Whether a result ends its request well; cancel and deadline lose to it."""
    return result is not None and result.outcome in (Outcome.SUCCEEDED, Outcome.NO_SIGNAL)


def _adapter(raw: Raw, common: dict[str, Any]) -> Adapter:
    status = LoraAdapterStatus.model_validate(raw.get("status") or {})
    spec, problem = None, ""
    try:
        spec = LoraAdapterSpec.model_validate(raw.get("spec"))
    except ValidationError as error:
        problem = explain(error)
    return Adapter(
        **common,
        spec=spec,
        problem=problem,
        init_from=_init_from(raw.get("spec")),
        status=status,
        active_since=parse_time(status.active.since) if status.active else None,
        sweep_at=parse_time(status.sweep_at),
        committed=frozenset(entry.request_uid for entry in status.history if entry.request_uid),
        finalizers=tuple(_text(finalizer) for finalizer in raw["metadata"].get("finalizers") or ()),
    )


def _init_from(spec: object) -> str:
    source = spec.get("initFrom") if isinstance(spec, Mapping) else None
    uri = source.get("uri") if isinstance(source, Mapping) else None
    return uri if isinstance(uri, str) else ""


def _pod(raw: Raw, common: dict[str, Any], component: str, pool: str, job: str, annotations: Mapping[str, str]) -> Pod:
    status = raw.get("status") or {}
    return Pod(
        **common,
        component=component,
        pool=pool,
        job=job,
        edition=sys.intern(annotations.get(names.EDITION, "")),
        linger_seconds=_seconds(annotations.get(names.LINGER_SECONDS, "")) or 0.0,
        phase=_text(status.get("phase", "")),
        started=parse_time(status.get("startTime")),
        trouble=_trouble(status),
        answer=_answer(status),
    )


def _trouble(status: Raw) -> str:
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason', 'Unschedulable')}: {condition.get('message', '')}"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason", "")
        if reason in _PULL_WAITS:
            return f"ImagePullBackOff: cannot pull image {container.get('image', '')}"
        if reason not in _USUAL_WAITS:
            return f"{reason}: {waiting.get('message', '')}"
    return ""


def _answer(status: Raw) -> str:
    for container in status.get("containerStatuses") or []:
        terminated = (container.get("state") or {}).get("terminated") or {}
        if container.get("name") == names.COMPONENT_OPERATION and terminated:
            return str(terminated.get("message") or "")
    return ""


def _job(
    raw: Raw, common: dict[str, Any], component: str, pool: str, labels: Raw, annotations: Mapping[str, str]
) -> Job:
    final = {c.get("type"): c for c in (raw.get("status") or {}).get("conditions") or [] if c.get("status") == "True"}
    # FailureTarget and SuccessCriteriaMet come before the last Pod has ended; the Job is over with these two only.
    end = final.get("Failed") or final.get("Complete")
    return Job(
        **common,
        component=component,
        pool=pool,
        edition=sys.intern(annotations.get(names.EDITION, "")),
        operation=labels.get(names.OPERATION_LABEL, ""),
        adapter_uid=labels.get(names.ADAPTER_UID_LABEL, ""),
        made_for=_number(labels.get(names.GENERATION_LABEL, "")) or 1,
        begun=parse_time((raw.get("status") or {}).get("startTime")) or common["created"],
        suspended=(raw.get("spec") or {}).get("suspend") is True,
        queue=_text(labels.get(names.KUEUE_QUEUE_LABEL, "")),
        finished=(parse_time(end.get("lastTransitionTime")) or common["created"]) if end else None,
        failed="Failed" in final,
        message=f"{end.get('reason', '')}: {end.get('message', '')}" if end and "Failed" in final else "",
    )


def _number(text: str) -> int:
    """Zero for what is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _seconds(text: str) -> float | None:
    """None for what is no number of them."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value >= 0 else None


def _lease(
    raw: Raw, common: dict[str, Any], now: datetime, known: Lease | None, annotations: Mapping[str, str]
) -> Lease:
    spec = raw.get("spec") or {}
    renewed = str(spec.get("renewTime") or "")
    return Lease(
        **common,
        holder=str(spec.get("holderIdentity") or ""),
        state=annotations.get(names.LEASE_STATE, ""),
        running=frozenset(uid for uid in annotations.get(names.LEASE_RUNNING, "").split(",") if uid),
        told=_seconds(annotations.get(names.LINGER_SECONDS, "")),
        renewed=renewed,
        observed=known.observed if known is not None and known.renewed == renewed else now,
    )
