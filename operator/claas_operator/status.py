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
from claas_crds.reasons import ConditionType, Outcome, Reason, describe
from claas_crds.request import Parent, Timings
from claas_operator.snapshot import Adapter, Request, format_time

Patch = dict[str, Any]
# (type, status, reason, message)
Change = tuple[ConditionType, bool, str, str]

# Moves of the head that stay listed, besides those that retention keeps and those whose request has not ended.
HISTORY_ENTRIES: Final = 100


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
    ) | {"loraUri": uri, "version": version}
    if result is not None and (result.lora_uri == uri or result.outcome is Outcome.NO_SIGNAL):
        patch["metadata"] = json(result.metadata) if result.metadata else None
        patch["timings"] = json(_timings(request, result.timings or Timings()))
    if request.first_claim:
        patch["firstClaimAt"] = format_time(request.first_claim)
    return patch


def _timings(request: Request, worker: Timings) -> Timings:
    queue, claim = _ms(request.created, request.assigned_at), _ms(request.assigned_at, request.claimed_at)
    return worker.model_copy(update={"queue_ms": queue, "claim_ms": claim})


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
    return _request(request, now, state, reason, changes)


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
) -> Patch:
    """The head moves to `uri`; the lock goes to `heir`, or is cleared.

    Args:
        keep: uids of requests that have not ended: their entries stay until they are Complete.
    """
    seq = adapter.status.head_seq + 1
    entry = HistoryEntry(seq=seq, version=version, uri=uri, request_uid=request.uid, at=format_time(now))
    before = adapter.status.history
    retained = max(HISTORY_ENTRIES, adapter.spec.retention.keep_last if adapter.spec else 0)
    cut = max(0, len(before) + 1 - retained)
    history = [old for i, old in enumerate(before) if i >= cut or old.request_uid in keep] + [entry]
    result = request.result
    tokens = result.metadata.tokens_processed if result and result.metadata else 0
    active, change = _lock(heir, now) if heir else (None, _IDLE)
    ready = (ConditionType.READY, True, Reason.CREATED, f"version {version} is the head")
    return _adapter(adapter, now, [ready, change]) | {
        "uri": uri,
        "version": version,
        "headSeq": seq,
        "history": [json(item) for item in history],
        "active": active,
        "totals": {
            "steps": adapter.status.totals.steps + 1,
            "tokens": adapter.status.totals.tokens + tokens,
        },
    }


def created(adapter: Adapter, uri: str, version: str, now: datetime) -> Patch:
    """The adapter has its first version."""
    entry = HistoryEntry(seq=1, version=version, uri=uri, request_uid="", at=format_time(now))
    ready = (ConditionType.READY, True, Reason.CREATED, f"version {version} is the head")
    return _adapter(adapter, now, [ready, _IDLE]) | {
        "uri": uri,
        "version": version,
        "headSeq": 1,
        "history": [json(entry)],
    }


def not_ready(adapter: Adapter, reason: Reason, message: str, now: datetime) -> Patch:
    """The adapter has no version yet, and says why."""
    return _adapter(adapter, now, [(ConditionType.READY, False, reason, message)])


def unready_as(adapter: Adapter, reason: Reason, message: str) -> bool:
    """Whether its status says already that it is not ready for this reason."""
    ready = adapter.condition(ConditionType.READY)
    return (
        ready is not None
        and (ready.status, ready.reason, ready.message) == ("False", reason, clip(message))
        and adapter.status.observed_generation == adapter.generation
    )
