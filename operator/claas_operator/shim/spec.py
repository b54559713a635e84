"""From a body to a resource and back: pure functions, so that the handlers only call and wait."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from claas_crds import names
from claas_crds.adapter import HistoryEntry, LoraAdapterSpec, LoraAdapterStatus
from claas_crds.model import Condition
from claas_crds.reasons import ConditionType, Reason, describe
from claas_crds.request import DistillRequestStatus, Payload
from claas_operator import queueing
from claas_operator.shim import models
from claas_operator.shim.models import DistillBody, InitBody, LiteBody
from claas_operator.shim.settings import ShimSettings
from claas_operator.snapshot import format_time, parse_time
from claas_store import uris

Object = dict[str, Any]

# Set on what is made here; of an Idempotency-Key nothing is kept but these.
DOOR_LABEL: Final = f"{names.GROUP}/door"
BODY_ANNOTATION: Final = f"{names.GROUP}/body-digest"
ASKED_ANNOTATION: Final = f"{names.GROUP}/asked-at"  # creationTimestamp is cut to the second
ASKED_BEFORE: Final = timedelta(minutes=1)  # its creation at most; whoever may patch could write anything
_ENDS: Final = frozenset({ConditionType.COMPLETE, ConditionType.FAILED})
_STATES: Final = frozenset({"Pending", "Assigned", "Running", "Complete", "Failed", "Cancelled"})
# Of an adapter without a version: nothing comes of waiting.
LASTING: Final = frozenset(
    {
        Reason.CREATE_FAILED,
        Reason.STORAGE_DENIED,
        Reason.UNKNOWN_POOL,
        Reason.BASE_MODEL_MISMATCH,
        Reason.INVALID_SPEC,
    }
)


# Names


def request_name(key: str | None) -> str:
    """Name of the DistillRequest: of an Idempotency-Key always the same, without one never."""
    return f"rest-{hashlib.sha256(key.encode()).hexdigest()[:40] if key else secrets.token_hex(20)}"


def adapter_name(body: InitBody) -> str:
    """Name of the LoraAdapter: the given one, or one made of its uri."""
    if body.name:
        return body.name
    uri = uris.normalise(body.output_uri)
    word = re.sub(r"[^a-z0-9]+", "-", uris.version_name(uri).lower()).strip("-")[:40].strip("-")
    return f"{word or 'lora'}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def digest(route: str, content: Mapping[str, Any], key: str) -> str:
    """Tells whether two bodies mean the same, and nothing else: it is keyed, because short texts could be guessed."""
    text = json.dumps([route, content], sort_keys=True, separators=(",", ":"))
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()


# To a resource


def samples_of(body: DistillBody | LiteBody) -> list[Object]:
    """The samples as the resource spells them (camelCase, nothing that is absent)."""
    given = body.samples if body.samples is not None else [body]
    kept = {*models.LiteSample.model_fields}
    raw = [sample.model_dump(include=kept, exclude_none=True) for sample in given]
    return _wire(Payload.model_validate({"samples": raw}))["samples"]  # type: ignore[no-any-return]


def request_spec(body: DistillBody | LiteBody, settings: ShimSettings) -> Object:
    """The DistillRequest's spec without its samples."""
    spec: Object = {"ttlSecondsAfterFinished": settings.request_ttl_seconds}
    if body.adapter is not None:
        spec["adapterRef"] = {"name": body.adapter}
    else:
        spec["loraUri"] = body.lora_uri
        spec |= {"baseModel": body.base_model} if body.base_model else {}
        spec |= {"pool": body.pool} if body.pool else {}
    if body.training is not None:
        spec["training"] = _wire_names(body.training.model_dump(exclude_none=True))
    if isinstance(body, LiteBody):
        spec["teacher"] = {"mode": "Provided"}
    else:
        given = body.teacher.model_dump(exclude_none=True) if body.teacher else {}
        spec["teacher"] = {"mode": "Server" if settings.teacher else "Self"} | given
    if body.priority is not None:
        spec["priority"] = body.priority
    return spec


def request_object(name: str, spec: Object, body_digest: str, asked_at: datetime) -> Object:
    """The DistillRequest."""
    annotations = {BODY_ANNOTATION: body_digest, ASKED_ANNOTATION: format_time(asked_at)}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.REQUEST_KIND,
        "metadata": {"name": name, "labels": {DOOR_LABEL: "rest"}, "annotations": annotations},
        "spec": spec,
    }


def adapter_object(body: InitBody, settings: ShimSettings) -> Object:
    """The LoraAdapter."""
    lora = {
        "r": 16 if body.lora_r is None else body.lora_r,
        "alpha": 32 if body.lora_alpha is None else body.lora_alpha,
    } | ({"targetModules": body.target_modules} if body.target_modules else {})
    spec: Object = {
        "baseModel": body.base_model or settings.default_base_model,
        "lora": lora,
        "storage": {"uri": uris.normalise(body.output_uri)},
    }
    if body.init_from:
        spec["initFrom"] = {"uri": uris.normalise(body.init_from)}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.ADAPTER_KIND,
        "metadata": {"name": adapter_name(body), "labels": {DOOR_LABEL: "rest"}},
        "spec": spec,
    }


def same_adapter(wanted: Object, found: Object) -> bool:
    """Whether the LoraAdapter that is there is the one that was asked for."""
    one, other = (LoraAdapterSpec.model_validate(raw["spec"]) for raw in (wanted, found))
    same_uri = uris.normalise(one.storage.uri) == uris.normalise(other.storage.uri)
    origins = [spec.init_from and uris.normalise(spec.init_from.uri) for spec in (one, other)]
    same_shape = (one.lora.r, one.lora.alpha, sorted(one.lora.target_modules)) == (
        other.lora.r,
        other.lora.alpha,
        sorted(other.lora.target_modules),
    )
    return same_uri and same_shape and one.base_model == other.base_model and origins[0] == origins[1]


def _wire(model: Payload) -> Object:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)


def _wire_names(content: Mapping[str, Any]) -> Object:
    from claas_crds.request import Training

    return Training.model_validate(dict(content)).model_dump(mode="json", by_alias=True, exclude_unset=True)


# From a resource


_TOLD_OF_ADAPTERS: Final = (
    "headSeq",
    "uri",
    "version",
    "conditions",
    "observedGeneration",
    "rolledBackGeneration",
    "rollbackAnswered",
)


def trim_request(raw: Object) -> Object:
    """A DistillRequest without samples, claim and result: what somebody who waits may be told."""
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    meta = raw["metadata"]
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    asked = (meta.get("annotations") or {}).get(ASKED_ANNOTATION)
    return {
        "metadata": {name: meta.get(name) for name in kept} | {"annotations": {ASKED_ANNOTATION: asked}},
        "spec": {name: spec[name] for name in ("adapterRef", "loraUri", "priority", "cancel") if name in spec},
        "status": {name: value for name, value in status.items() if name not in ("claim", "result")},
    }


def trim_adapter(raw: Object) -> Object:
    """A LoraAdapter without its history, which may be long."""
    status = raw.get("status") or {}
    meta = raw["metadata"]
    return {
        "metadata": {name: meta.get(name) for name in ("name", "namespace", "uid", "resourceVersion", "generation")},
        "spec": {},
        "status": {name: status[name] for name in _TOLD_OF_ADAPTERS if name in status},
    }


def ended(raw: Object) -> Object | None:
    """The terminal condition of a DistillRequest; None while it has none."""
    for condition in (raw.get("status") or {}).get("conditions") or []:
        if condition.get("type") in _ENDS and condition.get("status") == "True":
            return dict(condition)
    return None


def settled(raw: Object) -> bool:
    """Whether nothing more comes of waiting for a LoraAdapter's first version."""
    status = raw.get("status") or {}
    return bool(status.get("headSeq")) or unmade(raw) is not None


def unmade(raw: Object) -> Object | None:
    """The Ready condition of a LoraAdapter whose first version will not come; None of every other."""
    status, generation = raw.get("status") or {}, raw["metadata"].get("generation")
    if status.get("headSeq"):
        return None
    for condition in status.get("conditions") or []:
        lasting = condition.get("reason") in LASTING and condition.get("observedGeneration") == generation
        if condition.get("type") == ConditionType.READY and condition.get("status") == "False" and lasting:
            return dict(condition)
    return None


def rolled_back(raw: Object, version: str, generation: int) -> bool:
    """Whether the operator has answered the wish of that generation: done, or refused."""
    status = raw.get("status") or {}
    answered = status.get("rollbackAnswered") == version and int(status.get("observedGeneration") or 0) >= generation
    return answered or int(status.get("rolledBackGeneration") or 0) >= generation


def not_rolled_back(raw: Object, generation: int) -> Object | None:
    """The condition that says why that wish was refused; None: it was done."""
    status = raw.get("status") or {}
    if int(status.get("rolledBackGeneration") or 0) >= generation:
        return None
    said = (c for c in status.get("conditions") or [] if c.get("type") == "RolledBack" and c.get("status") == "False")
    return dict(next(said, {}))


def _condition(conditions: list[Condition], kind: ConditionType) -> Condition | None:
    return next((c for c in conditions if c.type == kind), None)


def _asked_at(meta: Object) -> str:
    """When the call came that made it, as far as that can be: else its creation, which is cut to the second."""
    created: str = meta["creationTimestamp"]
    try:
        asked = parse_time((meta.get("annotations") or {}).get(ASKED_ANNOTATION))
    except ValueError:
        asked = None
    when = parse_time(created)
    believed = asked and when and when - ASKED_BEFORE <= asked < when + timedelta(seconds=1)
    return format_time(asked) if asked and believed else created


def to_request(raw: Object) -> models.Request:
    """What the API tells of a DistillRequest."""
    meta, spec = raw["metadata"], raw.get("spec") or {}
    status = DistillRequestStatus.model_validate(raw.get("status") or {})
    end = next((c for c in status.conditions if c.type in _ENDS and c.status == "True"), None)
    assigned = _condition(status.conditions, ConditionType.ASSIGNED)
    told = end or assigned
    message = told.message if told else describe(Reason.PENDING)
    return models.Request.model_validate(
        {
            "id": meta["name"],
            "namespace": meta["namespace"],
            "state": status.state if status.state in _STATES else "Pending",
            "reason": status.reason,
            "message": message,
            "phase": status.progress.phase if status.progress and end is None else "",
            "created_at": _asked_at(meta),
            "ended_at": end.last_transition_time if end else None,
            "adapter": (spec.get("adapterRef") or {}).get("name"),
            "parent_uri": status.parent.uri if status.parent else spec.get("loraUri"),
            "lora_uri": status.lora_uri or None,
            "version": status.version or None,
            "worker": status.worker or None,
            "attempt": status.attempt,
            "priority": spec.get("priority") or 0,
            "cancelled": bool(spec.get("cancel")),
            "metadata": status.metadata.model_dump() if status.metadata else None,
            "timings": status.timings.model_dump() if status.timings else None,
        }
    )


def to_place(found: queueing.Place, note: str = "") -> models.Place:
    """Where a request stands, as the API tells it."""
    spans = (found.starts_in, found.ends_in)
    starts, ends = (None if span is None else round(span.total_seconds(), 3) for span in spans)
    return models.Place(
        position=found.position, ahead=found.ahead, starts_in_seconds=starts, ends_in_seconds=ends, note=note
    )


def to_distilled(raw: Object) -> models.Distilled | None:
    """The published answer of a request that has ended well; None: its numbers were lost with an attempt."""
    status = DistillRequestStatus.model_validate(raw.get("status") or {})
    if status.metadata is not None:
        numbers: Mapping[str, Any] = status.metadata.model_dump()
    elif status.reason == Reason.NO_SIGNAL:
        numbers = _NOTHING_LEARNT
    else:
        return None
    return models.Distilled(lora_uri=status.lora_uri, metadata=models.Numbers.model_validate(numbers))


# With NoSignal a worker may report no numbers: student and teacher agree, so every term is zero and every ratio one.
_NOTHING_LEARNT: Final = dict.fromkeys(models.Numbers.model_fields, 0) | {"mean_is_ratio": 1.0}


def to_adapter(raw: Object) -> models.Adapter:
    """What the API tells of a LoraAdapter."""
    meta, spec = raw["metadata"], raw.get("spec") or {}
    status = LoraAdapterStatus.model_validate(raw.get("status") or {})
    ready = _condition(status.conditions, ConditionType.READY)
    lora = spec.get("lora") or {}
    return models.Adapter(
        name=meta["name"],
        namespace=meta["namespace"],
        base_model=spec["baseModel"],
        lora_r=lora.get("r", 16),
        lora_alpha=lora.get("alpha", 32),
        target_modules=lora.get("targetModules") or [],
        storage_uri=spec["storage"]["uri"],
        init_from=(spec.get("initFrom") or {}).get("uri"),
        lora_uri=status.uri or None,
        version=status.version or None,
        head_seq=status.head_seq,
        ready=ready.status == "True" if ready else status.head_seq > 0,
        reason=ready.reason if ready else "",
        message=ready.message if ready else "",
        active_request=status.active.request_name if status.active else None,
        steps=status.totals.steps,
        tokens=status.totals.tokens,
        created_at=meta["creationTimestamp"],
    )


def to_version(entry: HistoryEntry, head: str) -> models.Version:
    """One move of the head; `head`: name of the version that is it now."""
    return models.Version(
        seq=entry.seq,
        version=entry.version,
        lora_uri=entry.uri,
        request_uid=entry.request_uid or None,
        at=entry.at,
        head=entry.version == head,
    )


def lineage(raw: Object, version: str | None) -> models.Lineage | None:
    """The version (the head, where none is named) and its ancestors; None: the adapter never had it.

    A step's parent was the head before it. A rollback makes no version: what it went back to was made earlier.
    """
    status = LoraAdapterStatus.model_validate(raw.get("status") or {})
    by_seq = {entry.seq: entry for entry in status.history}
    made: dict[str, HistoryEntry] = {}
    for entry in status.history:
        made.setdefault(entry.version, entry)
    current = made.get(version or status.version)
    if current is None:
        return None if version else models.Lineage(items=[], complete=True, init_from=None)
    chain: list[HistoryEntry] = []
    while True:
        chain.append(current)
        before = by_seq.get(current.seq - 1)
        if before is None or not current.request_uid:
            break
        current = made[before.version]
    return models.Lineage(
        items=[to_version(entry, status.version) for entry in chain],
        complete=chain[-1].seq == 1,
        init_from=((raw.get("spec") or {}).get("initFrom") or {}).get("uri"),
    )
