"""Decisions about one adapter: its first version by an operation Job, and the lock of a request that has ended."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from claas_crds import names
from claas_crds.reasons import ConditionType, Reason, describe
from claas_operator import status
from claas_operator.actions import Action, Describe, Fold, Free, Note, StartJob
from claas_operator.jobs import build_create_job, create_stem
from claas_operator.settings import Pool, Settings
from claas_operator.snapshot import Adapter, Job, Pod, Snapshot
from claas_operator.workers import Wake, backoff
from claas_store.uris import version_name, within


class Answer(BaseModel):
    """The termination message of a `claas_store create` container."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)
    ok: bool
    uri: str = ""
    version: str = ""
    reason: str = ""
    message: str = ""
    retryable: bool = True


def parse_answer(text: str) -> Answer | None:
    """The answer in a termination message; None when it holds none (the container was killed, say)."""
    try:
        return Answer.model_validate_json(text)
    except ValidationError:
        return None


# What a status takes as the name of a version.
MAX_VERSION_NAME: Final = 253


def permitted(uri: str, settings: Settings, namespace: str) -> bool:
    """Whether a version of `namespace` may lie at `uri`."""
    return within(uri, settings.prefixes(namespace)) and len(version_name(uri)) <= MAX_VERSION_NAME


def not_permitted(field: str, settings: Settings, namespace: str) -> str:
    """What to do about a uri in `field` that is not permitted."""
    allowed = ", ".join(settings.prefixes(namespace)) or "none"
    return f"{field} must lie below a storage prefix of namespace {namespace}: {allowed}"


def refuses(adapter: Adapter, settings: Settings) -> tuple[Reason, str] | None:
    """Why the adapter, as it is written, can never have a version here; None when it can."""
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
    if adapter.spec.init_from is not None:
        return Reason.CREATE_FAILED, "spec.initFrom is not supported by this release: leave it out for a fresh adapter"
    return None


def plan_adapter(
    adapter: Adapter,
    snapshot: Snapshot,
    settings: Settings,
    jobs: list[Job],
    pods: list[Pod],
    now: datetime,
    wake: Wake,
) -> Iterator[Action]:
    """What to do about one adapter.

    Args:
        jobs: its create Jobs.
        pods: the Pods of these.
    """
    if adapter.status.head_seq == 0:
        home = operation_namespace(adapter, settings)
        jobs, pods = [j for j in jobs if j.namespace == home], [p for p in pods if p.namespace == home]
        if adapter.deleting is None:
            yield from _create(adapter, snapshot, settings, sorted(jobs, key=lambda job: job.counter), pods, now, wake)
    elif adapter.active and _may_be_freed(adapter, snapshot, settings):
        holder_name = adapter.status.active.request_name if adapter.status.active else ""
        yield Free(adapter=adapter, holder=adapter.active, holder_name=holder_name, status=status.freed(adapter, now))


def _may_be_freed(adapter: Adapter, snapshot: Snapshot, settings: Settings) -> bool:
    """Whether the lock's holder has ended or is gone, and no living worker lists it, as far as the snapshot knows.

    Its workers are in the release's namespace or beside it; nobody else's Lease may hold a lock.
    """
    uid, places = adapter.active, (settings.namespace, adapter.namespace)
    holder = snapshot.requests.get(uid)
    if uid in snapshot.broken or (holder is not None and holder.ended is None):
        return False
    return not any(
        uid in lease.running and lease.namespace in places and holds(lease.holder, snapshot)
        for lease in snapshot.leases.values()
    )


def holds(pod_uid: str, snapshot: Snapshot) -> bool:
    """Whether the Pod behind a Lease may still be running."""
    pod = snapshot.pods.get(pod_uid)
    return pod is not None and not pod.over


def _create(
    adapter: Adapter,
    snapshot: Snapshot,
    settings: Settings,
    jobs: list[Job],
    pods: list[Pod],
    now: datetime,
    wake: Wake,
) -> Iterator[Action]:
    refusal = refuses(adapter, settings)
    if refusal is not None:
        yield from _describe(adapter, *refusal, now)
        return
    ready = adapter.condition(ConditionType.READY)
    if ready and ready.reason == Reason.CREATE_FAILED and ready.observed_generation == adapter.generation:
        return  # the store refused it for good; a new generation, or a new adapter, is tried again
    answers = {pod.job: answer for pod in pods if (answer := parse_answer(pod.answer))}
    for answer in answers.values():
        if answer.ok:
            yield _fold(adapter, settings, answer, now)
            return
        if not answer.retryable:
            yield from _describe(adapter, Reason.CREATE_FAILED, f"{answer.reason}: {answer.message}", now)
            return
    if not jobs:
        yield from _describe(adapter, Reason.CREATING, describe(Reason.CREATING), now)
        yield _start(adapter, snapshot, settings, jobs)
        return
    latest = jobs[-1]
    if latest.finished is None:
        trouble = next((pod.trouble for pod in pods if pod.job == latest.name and pod.trouble), "")
        message = f"the Job {latest.name} does not start: {trouble}" if trouble else describe(Reason.CREATING)
        yield from _describe(adapter, Reason.CREATING, message, now)
        return
    found = answers.get(latest.name)
    why = f"{found.reason}: {found.message}" if found else latest.message or "its answer was lost with its Pod"
    yield from _describe(adapter, Reason.CREATING, f"the Job {latest.name} failed and is tried again: {why}", now)
    retry_at = latest.finished + backoff(settings, len(jobs))
    if now >= retry_at:
        yield _start(adapter, snapshot, settings, jobs)
    else:
        wake(retry_at)


def _describe(adapter: Adapter, reason: Reason, message: str, now: datetime) -> Iterator[Describe]:
    if not status.unready_as(adapter, reason, message):
        note = None if reason is Reason.CREATING else Note(adapter, reason, message)
        yield Describe(adapter=adapter, status=status.not_ready(adapter, reason, message, now), note=note)


def _fold(adapter: Adapter, settings: Settings, answer: Answer, now: datetime) -> Action:
    """The answer becomes the head; a version anywhere else than asked for is nobody's."""
    asked = adapter.spec.storage.uri.rstrip("/") if adapter.spec else ""
    if answer.uri.rstrip("/") != asked or answer.version != version_name(asked):
        message = "the create Job answered with another uri than spec.storage.uri; nothing was taken over"
        return Describe(
            adapter=adapter,
            status=status.not_ready(adapter, Reason.CREATE_FAILED, message, now),
            note=Note(adapter, Reason.CREATE_FAILED, message),
        )
    note = Note(adapter, Reason.CREATED, f"version {answer.version} was created", warning=False)
    return Fold(adapter=adapter, status=status.created(adapter, answer.uri, answer.version, now), note=note)


def _start(adapter: Adapter, snapshot: Snapshot, settings: Settings, jobs: list[Job]) -> StartJob:
    namespace = operation_namespace(adapter, settings)
    taken = snapshot.taken_counters.get((namespace, create_stem(settings, adapter.uid)), 0)
    counter = max([taken, *(job.counter for job in jobs)]) + 1
    return StartJob(manifest=build_create_job(settings, adapter, namespace, counter, snapshot.owner_uid), pool="")


def operation_namespace(adapter: Adapter, settings: Settings) -> str:
    """Where the adapter's operation Jobs run. Jobs anywhere else are not ours, whatever their labels say."""
    pool = pool_of(adapter, settings)
    return adapter.namespace if pool is not None and pool.isolation == "Namespace" else settings.namespace


def pool_of(adapter: Adapter, settings: Settings) -> Pool | None:
    """The pool that trains the adapter."""
    return settings.pool(adapter.spec.pool or settings.default_pool) if adapter.spec else None


def create_jobs(snapshot: Snapshot) -> dict[str, list[Job]]:
    """The create Jobs by adapter uid."""
    found: dict[str, list[Job]] = {}
    for job in snapshot.jobs.values():
        if job.component == names.COMPONENT_OPERATION and job.operation == "create":
            found.setdefault(job.adapter_uid, []).append(job)
    return found


def pods_by_job(snapshot: Snapshot) -> dict[tuple[str, str], list[Pod]]:
    """The operation Pods by namespace and Job."""
    found: dict[tuple[str, str], list[Pod]] = {}
    for pod in snapshot.pods.values():
        if pod.component == names.COMPONENT_OPERATION:
            found.setdefault((pod.namespace, pod.job), []).append(pod)
    return found


def _list(settings: Settings) -> str:
    return ", ".join(pool.name for pool in settings.pools)
