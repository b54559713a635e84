"""The status that each write leaves behind, as pure functions: conditions whole, `state` and `reason` derived.

A merge patch replaces lists, so conditions are always written whole; a condition keeps its transition time while its
status stays. Values are JSON, camelCase; None removes a field.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final

from pydantic import BaseModel

from claas_crds.adapter import ActiveRequest, HistoryEntry
from claas_crds.model import MAX_MESSAGE, Condition
from claas_crds.reasons import Cause, ConditionType, Outcome, Reason, describe
from claas_crds.request import Parent, Timings
from claas_operator.snapshot import Adapter, Request, format_time
from claas_store.uris import version_name

Patch = dict[str, Any]
# (type, status, reason, message)
Change = tuple[ConditionType, bool, str, str]

# Moves of the head that stay listed, besides those that retention keeps and those whose request has not ended.
HISTORY_ENTRIES: Final = 100
# Versions beyond retention that may be waiting for their collection: they must not be forgotten before it.
SURPLUS_VERSIONS: Final = 50
# Of the 1.5 MiB that etcd takes in one object; what a history entry holds besides uri and version.
HISTORY_BYTES: Final = 1_000_000
ENTRY_BYTES: Final = 400


def conditions(old: Sequence[Condition], generation: int, now: datetime, changes: Iterable[Change]) -> list[Condition]:
    """`old` with `changes` made, each type once, in the order in which they first appeared."""
    table = {condition.type: condition for condition in old}
    for kind, holds, reason, message in changes:
        status = "True" if holds else "False"
        before = table.get(kind)
        since = before.last_transition_time if before and before.status == status else format_time(now)
        table[kind] = Condition(
            type=kind,
            status=status,
            reason=reason,
            message=clip(message),
            last_transition_time=since,
            observed_generation=generation,
        )
    return list(table.values())


def json(value: BaseModel) -> Any:
    """A model as the API server takes it."""
    return value.model_dump(by_alias=True, exclude_none=True, mode="json")


def _request(request: Request, now: datetime, state: str, reason: str, changes: Iterable[Change]) -> Patch:
    accepted = (ConditionType.ACCEPTED, True, Reason.ACCEPTED, describe(Reason.ACCEPTED))
    changes = list(changes)
    if all(change[0] != ConditionType.ACCEPTED for change in changes):
        changes.insert(0, accepted)
    whole = conditions(request.status.conditions, request.generation, now, changes)
    return {
        "state": state,
        "reason": reason,
        "conditions": [json(condition) for condition in whole],
        "observedGeneration": request.generation,
    }


def pending(request: Request, reason: Reason, message: str, now: datetime) -> Patch:
    """It waits, and says why."""
    return _request(request, now, "Pending", reason, [(ConditionType.ASSIGNED, False, reason, message)])


def clip(message: str) -> str:
    """A message as a status holds it: what is too long is cut."""
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"


def says(request: Request, reason: Reason, message: str) -> bool:
    """Whether its status says already that it waits for this reason."""
    assigned = request.condition(ConditionType.ASSIGNED)
    return (
        assigned is not None
        and (assigned.status, assigned.reason, assigned.message) == ("False", reason, clip(message))
        and request.status.observed_generation == request.generation
    )


def bound(request: Request, parent: Parent, worker: str, attempt: int, now: datetime) -> Patch:
    """It is `worker`'s. Claim and result of an attempt before are cleared; the first claim's time stays."""
    first = request.first_claim
    message = f"bound to worker {worker}, attempt {attempt}"
    return _request(request, now, "Assigned", "", [(ConditionType.ASSIGNED, True, Reason.BOUND, message)]) | {
        "worker": worker,
        "attempt": attempt,
        "gpuMs": used_ms(request, now) or None,
        "assignedAt": format_time(now),
        "firstClaimAt": format_time(first) if first else None,
        "parent": json(parent),
        "claim": None,
        "progress": None,
        "result": None,
    }


def running(request: Request, now: datetime) -> Patch:
    """The worker has claimed it. Written for steps that take a while only: people look, and nothing waits for it."""
    message = f"worker {request.worker} runs attempt {request.status.attempt}"
    first = request.first_claim
    return _request(request, now, "Running", "", [(ConditionType.ASSIGNED, True, Reason.CLAIMED, message)]) | {
        "firstClaimAt": format_time(first) if first else None
    }


def completed(request: Request, uri: str, version: str, reason: Reason, now: datetime) -> Patch:
    """It has ended well with the version at `uri`; the numbers are those of the report about that very version."""
    result = request.result
    message = describe(reason) if version == "" else f"version {version} was committed"
    patch = _request(
        request,
        now,
        "Complete",
        reason if reason is Reason.NO_SIGNAL else "",
        [(ConditionType.COMPLETE, True, reason, message)],
    ) | {"loraUri": uri, "version": version, "gpuMs": used_ms(request, now)}
    if result is not None and (result.lora_uri == uri or result.outcome is Outcome.NO_SIGNAL):
        patch["metadata"] = json(result.metadata) if result.metadata else None
        patch["timings"] = json(_timings(request, result.timings or Timings()))
    if request.first_claim:
        patch["firstClaimAt"] = format_time(request.first_claim)
    return patch


def used_ms(request: Request, now: datetime) -> int:
    """The time of workers that it has used, with the current attempt's if that is over at `now`."""
    result, held = request.result, _ms(request.claimed_at or now, request.result_at or now) or 0
    if request.claimed_at is None:
        return request.used_ms
    # A worker's own word, where it ran others at the same time; never more than it was seen to take.
    told = held if result is None or result.gpu_ms is None else result.gpu_ms
    return request.used_ms + max(0, min(told, held))


def _timings(request: Request, worker: Timings) -> Timings:
    queue, claim = _ms(request.created, request.assigned_at), _ms(request.assigned_at, request.claimed_at)
    # A worker's own word: a negative one would turn a sum of Prometheus back, and a huge one spoil it for good.
    limit = round(request.deadline.total_seconds() * 1000)
    told = {phase: min(max(0, ms), limit) for phase, ms in worker.model_dump(exclude_none=True).items()}
    return worker.model_copy(update=told | {"queue_ms": queue, "claim_ms": claim})


def _ms(start: datetime, end: datetime | None) -> int | None:
    # Two machines' clocks, and a creation time without fractions: a little below zero is zero.
    return None if end is None else max(0, round((end - start).total_seconds() * 1000))


def ended(request: Request, reason: str, message: str, now: datetime) -> Patch:
    """It has ended without a step."""
    changes: list[Change] = []
    refused = request.status.attempt == 0 and reason != Reason.CANCELLED
    if refused:  # never bound: the request itself could not be accepted
        changes.append((ConditionType.ACCEPTED, False, reason, message))
    changes.append((ConditionType.FAILED, True, reason, message))
    state = "Cancelled" if reason == Reason.CANCELLED else "Failed"
    return _request(request, now, state, reason, changes) | {"gpuMs": used_ms(request, now)}


def _adapter(adapter: Adapter, now: datetime, changes: Iterable[Change]) -> Patch:
    whole = conditions(adapter.status.conditions, adapter.generation, now, changes)
    return {"conditions": [json(condition) for condition in whole], "observedGeneration": adapter.generation}


_IDLE: Final[Change] = (ConditionType.UPDATING, False, Reason.IDLE, describe(Reason.IDLE))


def _lock(request: Request, now: datetime) -> tuple[Patch, Change]:
    active = ActiveRequest(request_uid=request.uid, request_name=request.name, since=format_time(now))
    change = (ConditionType.UPDATING, True, Reason.TRAINING, f"request {request.name} holds the adapter")
    return json(active), change


def locked(adapter: Adapter, request: Request, now: datetime) -> Patch:
    """`request` holds the adapter."""
    active, change = _lock(request, now)
    return _adapter(adapter, now, [change]) | {"active": active}


def freed(adapter: Adapter, now: datetime) -> Patch:
    """Nobody holds the adapter."""
    return _adapter(adapter, now, [_IDLE]) | {"active": None}


def committed(
    adapter: Adapter,
    request: Request,
    uri: str,
    version: str,
    keep: frozenset[str],
    heir: Request | None,
    now: datetime,
    sweep_at: datetime | None = None,
) -> Patch:
    """The head moves to `uri`; the lock goes to `heir`, or is cleared.

    Args:
        keep: uids of requests that have not ended: their entries stay until they are Complete.
        sweep_at: when to look for what lost attempts left behind, if that has changed.
    """
    result = request.result
    tokens = result.metadata.tokens_processed if result and result.metadata else 0
    active, change = _lock(heir, now) if heir else (None, _IDLE)
    totals = {"steps": adapter.status.totals.steps + 1, "tokens": adapter.status.totals.tokens + tokens}
    moved = _moved(adapter, uri, version, Cause.TRAINED, keep, now, [change], request_uid=request.uid)
    swept = {"sweepAt": format_time(sweep_at)} if sweep_at else {}
    return moved | swept | {"active": active, "totals": totals}


def created(adapter: Adapter, uri: str, version: str, origin: str, now: datetime) -> Patch:
    """The adapter has its first version, made from the one at `origin` if that is not empty."""
    came = origin.rstrip("/") == uri.rstrip("/")
    cause = Cause.CREATED if not origin else Cause.ADOPTED if came else Cause.FORKED
    made = _moved(adapter, uri, version, cause, frozenset(), now, [_IDLE], origin=origin)
    return made | {"totals": {"steps": 0, "tokens": 0}}


def rolled_back(adapter: Adapter, to: HistoryEntry, keep: frozenset[str], now: datetime) -> Patch:
    """The version of an old entry is the head again. History says so; nothing is rewritten."""
    message = f"version {to.version} is the head again"
    answered = {"rolledBackGeneration": adapter.generation, "rollbackAnswered": to.version}
    change = (ConditionType.ROLLED_BACK, True, Reason.ROLLED_BACK, message)
    if to.version == adapter.status.version:  # it is the head: there is nothing to move
        return _adapter(adapter, now, [change]) | answered
    return _moved(adapter, to.uri, to.version, Cause.ROLLED_BACK, keep, now, [_IDLE, change]) | answered


def rollback_refused(adapter: Adapter, reason: Reason, message: str, now: datetime) -> Patch:
    """spec.rollbackTo names nothing that the head could go back to; said once, and never looked at again."""
    asked = adapter.spec.rollback_to if adapter.spec else None
    change = (ConditionType.ROLLED_BACK, False, reason, message)
    return _adapter(adapter, now, [change]) | {"rollbackAnswered": asked or ""}


def rollback_waits(adapter: Adapter, message: str, now: datetime) -> Patch:
    """Something holds the adapter: the rollback waits for it."""
    return _adapter(adapter, now, [(ConditionType.ROLLED_BACK, False, Reason.ADAPTER_BUSY, message)])


def rollback_forgotten(adapter: Adapter, now: datetime) -> Patch:
    """spec.rollbackTo was removed: the same version may be asked for again."""
    return _adapter(adapter, now, []) | {"rollbackAnswered": ""}


def collecting(adapter: Adapter, versions: Sequence[str], now: datetime) -> Patch:
    """Versions beyond retention begin to go. One write only can follow on a resourceVersion, so no two collections have
    one number, also not of two adapters that had one place after each other."""
    begun = {"collecting": [*versions], "collection": adapter.version}
    return collection_waits(adapter, describe(Reason.COLLECTING), now) | begun


def collection_waits(adapter: Adapter, message: str, now: datetime) -> Patch:
    """Versions beyond retention are still there, and why."""
    return _adapter(adapter, now, [(ConditionType.COLLECTED, False, Reason.COLLECTING, message)])


def forgotten(adapter: Adapter, versions: Sequence[str], message: str, now: datetime) -> Patch:
    """Versions are gone, and with them every entry that names them."""
    left = [name for name in adapter.status.collecting if name not in versions]
    change: Change = (ConditionType.COLLECTED, True, Reason.COLLECTED, message)
    if left:
        change = (ConditionType.COLLECTED, False, Reason.COLLECTING, describe(Reason.COLLECTING))
    history = [entry for entry in adapter.status.history if entry.version not in versions]
    return _adapter(adapter, now, [change]) | {"collecting": left, "history": [json(entry) for entry in history]}


def given_back(adapter: Adapter, versions: Sequence[str], now: datetime) -> Patch:
    """Versions that turned out to be needed stay."""
    left = [name for name in adapter.status.collecting if name not in versions]
    message = f"{len(versions)} versions stay: another adapter or request needs them"
    change = (ConditionType.COLLECTED, not left, Reason.COLLECTING if left else Reason.COLLECTED, message)
    return _adapter(adapter, now, [change]) | {"collecting": left}


def swept(adapter: Adapter, again_at: datetime, now: datetime) -> Patch:
    """Orphans were looked for."""
    return _adapter(adapter, now, []) | {"sweepAt": format_time(again_at)}


def ready(adapter: Adapter, now: datetime) -> Patch:
    """What stood against training the head does not any more; the whole spec is answered."""
    change = (ConditionType.READY, True, Reason.CREATED, f"version {adapter.status.version} is the head")
    return _adapter(adapter, now, [change])


def _moved(
    adapter: Adapter,
    uri: str,
    version: str,
    cause: Cause,
    keep: frozenset[str],
    now: datetime,
    changes: Iterable[Change],
    *,
    request_uid: str = "",
    origin: str = "",
) -> Patch:
    """The head is the version at `uri`, by one more move."""
    seq = adapter.status.head_seq + 1
    entry = HistoryEntry(
        seq=seq, version=version, uri=uri, request_uid=request_uid, at=format_time(now), cause=cause, origin=origin
    )
    ready = (ConditionType.READY, True, Reason.CREATED, f"version {version} is the head")
    return _adapter(adapter, now, [ready, *changes]) | {
        "uri": uri,
        "version": version,
        "headSeq": seq,
        "history": [json(item) for item in _bounded(adapter, keep, entry)],
    }


def keep_last(adapter: Adapter) -> int:
    """How many versions retention keeps: `spec.retention.keepLast`, or as many as an object has room to name."""
    if adapter.spec is None:
        return 0
    uri = adapter.spec.storage.uri
    escaped = 5 * sum(uri.count(character) for character in "<>&")  # as Go's JSON has them
    entry = ENTRY_BYTES + len(uri.encode()) + len(version_name(uri).encode()) + 2 * escaped
    # Beside them lie those that are to be collected, and those that are being.
    return min(adapter.spec.retention.keep_last, HISTORY_BYTES // entry - 2 * SURPLUS_VERSIONS)


def _bounded(adapter: Adapter, keep: frozenset[str], entry: HistoryEntry) -> list[HistoryEntry]:
    """The history with `entry`. What is too long loses first the older moves of versions that were moved to again.

    Args:
        keep: uids of requests whose entries stay.
    """
    retained = max(HISTORY_ENTRIES, keep_last(adapter) + SURPLUS_VERSIONS + len(adapter.status.collecting))
    before = list(adapter.status.history)
    over = len(before) + 1 - retained
    if over > 0:
        last = {old.version: old.seq for old in [*before, entry]}
        again = [old for old in before if last[old.version] != old.seq and old.request_uid not in keep][:over]
        before = [old for old in before if old not in again]
    cut = max(0, len(before) + 1 - retained)
    return [old for i, old in enumerate(before) if i >= cut or old.request_uid in keep] + [entry]


def not_ready(adapter: Adapter, reason: Reason, message: str, now: datetime) -> Patch:
    """The adapter has no version yet, and says why."""
    return _adapter(adapter, now, [(ConditionType.READY, False, reason, message)])


def unready_as(adapter: Adapter, reason: Reason, message: str) -> bool:
    """Whether its status says already that it is not ready for this reason."""
    return adapter_says(adapter, ConditionType.READY, reason, message)


def adapter_says(adapter: Adapter, kind: ConditionType, reason: Reason, message: str) -> bool:
    """Whether its status says already that a condition does not hold, for this reason."""
    found = adapter.condition(kind)
    return (
        found is not None
        and (found.status, found.reason, found.message) == ("False", reason, clip(message))
        and adapter.status.observed_generation == adapter.generation
    )
