"""Decisions about one adapter: its first version, its head, the lock of a request that has ended, and its end."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from claas_crds.adapter import HistoryEntry
from claas_crds.reasons import ConditionType, Reason, describe
from claas_operator import status
from claas_operator.actions import Action, Describe, Fold, Free, Note, Rollback
from claas_operator.deletion import plan_deletion, plan_finalizer
from claas_operator.jobs import create_arguments
from claas_operator.operations import Answer, Desk
from claas_operator.permissions import may_fork, may_not_fork, not_permitted, permitted
from claas_operator.references import References
from claas_operator.retention import collects_at, plan_collection, plan_sweep, sweeps_at
from claas_operator.settings import Settings
from claas_operator.snapshot import Adapter, Job, Snapshot
from claas_store.uris import version_name

# The store has said that a first version cannot be: nothing is tried again before the adapter changes.
_LASTING: Final = (Reason.CREATE_FAILED, Reason.ADAPTER_INVALID, Reason.VERSION_COLLECTED)
# Of these, what is wrong with a source: the user's to mend.
_OF_THE_SOURCE: Final = (Reason.ADAPTER_INVALID, Reason.VERSION_COLLECTED)
FAR: Final = datetime.max.replace(tzinfo=UTC)
# So many names of versions are shown to somebody who asked for one that is not there.
_SHOWN_VERSIONS: Final = 10


def refuses(adapter: Adapter, settings: Settings) -> tuple[Reason, str] | None:
    """Why the adapter, as it is written, can never be trained here; None when it can."""
    if adapter.spec is None:
        return Reason.INVALID_SPEC, adapter.problem
    pool_name = adapter.spec.pool or settings.default_pool
    pool = settings.pool(pool_name)
    if pool is None:
        return Reason.UNKNOWN_POOL, f"spec.pool {pool_name!r} names no pool; there are {_list(settings)}"
    if pool.base_model != adapter.spec.base_model:
        return (
            Reason.BASE_MODEL_MISMATCH,
            f"spec.baseModel is {adapter.spec.base_model}, but the workers of pool {pool.name} hold {pool.base_model}",
        )
    if not permitted(adapter.spec.storage.uri, settings, adapter.namespace):
        return Reason.STORAGE_DENIED, not_permitted("spec.storage.uri", settings, adapter.namespace)
    return None


def _refuses_source(adapter: Adapter, settings: Settings) -> tuple[Reason, str] | None:
    """Why the adapter may not start from `spec.initFrom`. What it has become by then is its own."""
    if not adapter.init_from or may_fork(adapter.init_from, settings, adapter.namespace):
        return None
    return Reason.STORAGE_DENIED, may_not_fork("spec.initFrom.uri", settings, adapter.namespace)


def rests_until(adapter: Adapter, settings: Settings) -> datetime | None:
    """When `plan_adapter` has something to do, by what the adapter itself says; None: look at once.

    That its lock is to be freed is another's news, and not in here. A thousand adapters are in every plan, and next to
    none of them has changed since the last.
    """
    spec, seen = adapter.spec, adapter.status
    if spec is None or adapter.deleting is not None or not seen.head_seq or seen.collecting:
        return None
    if spec.rollback_to or seen.rollback_answered or adapter.held_back != (spec.deletion_policy == "Delete"):
        return None
    ready = adapter.condition(ConditionType.READY)
    if (ready is not None and ready.status != "True") or _is_stale(adapter):
        return None
    if refuses(adapter, settings) is not None:
        return None
    due = [at for at in (collects_at(adapter, settings), sweeps_at(adapter, settings)) if at is not None]
    return min(due, default=FAR)


def plan_adapter(desk: Desk, references: References) -> Iterator[Action]:
    """What to do about one adapter; of two actions on the adapter itself the first is done, the rest thought again."""
    adapter = desk.adapter
    if may_be_freed(adapter, desk.snapshot, desk.settings):
        holder_name = adapter.status.active.request_name if adapter.status.active else ""
        freed = status.freed(adapter, desk.now)
        yield Free(adapter=adapter, holder=adapter.active, holder_name=holder_name, status=freed)
    elif adapter.deleting is not None:
        yield from plan_deletion(desk, references)
    elif finalizer := plan_finalizer(desk):
        yield finalizer
    elif adapter.status.head_seq == 0:
        yield from _create(desk)
    elif answer := _roll_back(desk) or _observe(desk):
        yield answer
    elif refuses(adapter, desk.settings) is None:
        yield from plan_collection(desk, references)
        yield from plan_sweep(desk, references)


def may_be_freed(adapter: Adapter, snapshot: Snapshot, settings: Settings) -> bool:
    """Whether it is locked for one that has ended or is gone, and no living worker lists it, as far as is known.

    Its workers are in the release's namespace or beside it; nobody else's Lease may hold a lock.
    """
    uid, places = adapter.active, (settings.namespace, adapter.namespace)
    holder = snapshot.requests.get(uid)
    if not uid or uid in snapshot.broken or (holder is not None and holder.ended is None):
        return False
    return not any(
        uid in lease.running and lease.namespace in places and holds(lease.holder, snapshot)
        for lease in snapshot.leases.values()
    )


def holds(pod_uid: str, snapshot: Snapshot) -> bool:
    """Whether the Pod behind a Lease may still be running."""
    pod = snapshot.pods.get(pod_uid)
    return pod is not None and not pod.over


# The head goes back


def _roll_back(desk: Desk) -> Action | None:
    """The answer to `spec.rollbackTo`: the head moves, or the condition says why not, once for each change of it."""
    adapter, now = desk.adapter, desk.now
    if adapter.spec is None:
        return None
    if not adapter.spec.rollback_to and adapter.status.rollback_answered:
        return Describe(adapter=adapter, status=status.rollback_forgotten(adapter, now))
    asked = adapter.rollback
    if not asked:
        return None
    target = next((entry for entry in reversed(adapter.status.history) if entry.version == asked), None)
    if target is None or asked in adapter.status.collecting:
        return _refuse_rollback(desk, asked, target)
    if adapter.active:
        holder = adapter.status.active.request_name if adapter.status.active else ""
        message = f"request {holder} holds the adapter; the rollback follows it, and nothing else before"
        if status.adapter_says(adapter, ConditionType.ROLLED_BACK, Reason.ADAPTER_BUSY, message):
            return None
        return Describe(adapter=adapter, status=status.rollback_waits(adapter, message, now))
    queue = desk.snapshot.queues.get((adapter.namespace, adapter.name), [])
    unended = frozenset(request.uid for request in queue)
    note = Note(adapter, Reason.ROLLED_BACK, f"version {asked} is the head again", warning=False)
    return Rollback(adapter=adapter, to=asked, status=status.rolled_back(adapter, target, unended, now), note=note)


def _refuse_rollback(desk: Desk, asked: str, target: HistoryEntry | None) -> Action:
    adapter = desk.adapter
    if target is None:
        known = list(dict.fromkeys(e.version for e in reversed(adapter.status.history)))[:_SHOWN_VERSIONS]
        reason = Reason.VERSION_UNKNOWN
        message = f"spec.rollbackTo {asked[:100]!r} is no version of status.history; the latest are {', '.join(known)}"
    else:
        reason, message = Reason.VERSION_COLLECTED, f"version {asked} is beyond spec.retention and is being deleted"
    refused = status.rollback_refused(adapter, reason, message, desk.now)
    return Describe(adapter=adapter, status=refused, note=Note(adapter, reason, message))


def _observe(desk: Desk) -> Action | None:
    """What changed in a spec and needs nothing else done is acknowledged: `observedGeneration` and Ready follow."""
    adapter = desk.adapter
    refusal = refuses(adapter, desk.settings)
    ready = adapter.condition(ConditionType.READY)
    stale = _is_stale(adapter)
    if refusal is not None:
        told = status.unready_as(adapter, *refusal) or ready is None
        if told and not stale:
            return None
        refused = status.not_ready(adapter, *refusal, desk.now)
        return Describe(adapter=adapter, status=refused, note=None if told else Note(adapter, *refusal))
    if stale or (ready is not None and ready.status != "True"):
        return Describe(adapter=adapter, status=status.ready(adapter, desk.now))
    return None


def _is_stale(adapter: Adapter) -> bool:
    """Whether the spec has changed since the status, or Ready in it, answered it: a rollback answers without Ready."""
    ready = adapter.condition(ConditionType.READY)
    answered = (adapter.status.observed_generation, ready.observed_generation if ready else 0)
    return any(0 < generation != adapter.generation for generation in answered)


# The first version


def _create(desk: Desk) -> Iterator[Action]:
    adapter, settings = desk.adapter, desk.settings
    refusal = refuses(adapter, settings) or _refuses_source(adapter, settings)
    if refusal is not None:
        yield from _describe(desk, *refusal)
        return
    answers = desk.answers("create")
    if good := next((answer for answer in answers.values() if answer.ok and _is_asked_for(answer, adapter)), None):
        yield _fold(desk, good)
        return
    ready = adapter.condition(ConditionType.READY)
    if ready and ready.reason in _LASTING and ready.observed_generation == adapter.generation:
        return  # the store refused it for good; a new generation, or a new adapter, is tried again
    current = [answers[job.name] for job in desk.of("create") if job.name in answers and _is_current(job, adapter)]
    if refused := next((answer for answer in current if answer.ok or not answer.retryable), None):
        yield from _describe(desk, *_failure(adapter, refused))
        return
    yield from _describe(desk, Reason.CREATING, desk.trouble("create") or describe(Reason.CREATING))
    if start := desk.start("create", create_arguments(settings, adapter)):
        yield start


def _is_current(job: Job, adapter: Adapter) -> bool:
    """Whether a Job's failure says something about the adapter as it is now."""
    return job.made_for >= adapter.generation


def _is_asked_for(answer: Answer, adapter: Adapter) -> bool:
    """Whether the version lies where it was asked for: anywhere else it is nobody's."""
    asked = adapter.spec.storage.uri.rstrip("/") if adapter.spec else ""
    return answer.uri.rstrip("/") == asked and answer.version == version_name(asked)


def _failure(adapter: Adapter, answer: Answer) -> tuple[Reason, str]:
    """What is wrong with a source has its own reason."""
    if answer.ok:
        message = "the create Job answered with another uri than spec.storage.uri; nothing was taken over"
        return Reason.CREATE_FAILED, message
    if adapter.init_from and answer.reason in _OF_THE_SOURCE:
        return Reason(answer.reason), answer.message
    return Reason.CREATE_FAILED, f"{answer.reason}: {answer.message}"


def _describe(desk: Desk, reason: Reason, message: str) -> Iterator[Describe]:
    adapter = desk.adapter
    if not status.unready_as(adapter, reason, message):
        note = None if reason is Reason.CREATING else Note(adapter, reason, message)
        yield Describe(adapter=adapter, status=status.not_ready(adapter, reason, message, desk.now), note=note)


def _fold(desk: Desk, answer: Answer) -> Action:
    """The answer becomes the head."""
    adapter = desk.adapter
    came = f" from {adapter.init_from}" if adapter.init_from else ""
    note = Note(adapter, Reason.CREATED, f"version {answer.version} was created{came}", warning=False)
    created = status.created(adapter, answer.uri, answer.version, adapter.init_from, desk.now)
    return Fold(adapter=adapter, status=created, note=note)


def _list(settings: Settings) -> str:
    return ", ".join(pool.name for pool in settings.pools)
