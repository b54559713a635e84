"""What a request, an adapter and a version look like to people: rows and fields."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from claas_client.models import Adapter, Numbers, Part, Place, Request, Version, Workers

Fields = list[tuple[str, object]]

REQUEST_COLUMNS = ("ID", "ADAPTER", "STATE", "REASON", "LOSS", "TOKENS", "AGE")
ADAPTER_COLUMNS = ("NAME", "BASE", "VERSION", "STEPS", "READY", "REASON", "AGE")
VERSION_COLUMNS = ("SEQ", "VERSION", "HEAD", "MADE BY", "AT", "URI")
PART_COLUMNS = ("PART", "STATUS", "MESSAGE")


def request_row(request: Request) -> list[object]:
    """Of a list."""
    numbers = request.metadata
    return [
        request.id,
        request.adapter,
        request.state,
        request.reason,
        numbers.total_loss if numbers else None,
        numbers.tokens_processed if numbers else None,
        age(request.created_at),
    ]


def request_fields(request: Request) -> Fields:
    """All of it."""
    fields: Fields = [
        ("id", request.id),
        ("namespace", request.namespace),
        ("adapter", request.adapter),
        ("state", request.state),
        ("reason", request.reason),
        ("message", request.message if not request.ended or request.state != "Complete" else ""),
        ("phase", request.phase),
        *(place_fields(request.place) if request.place else []),
        ("worker", request.worker),
        ("attempt", request.attempt or None),
        ("priority", request.priority or None),
        ("created", request.created_at),
        ("ended", request.ended_at),
        ("parent_uri", request.parent_uri),
    ]
    return fields + step_fields(request)


def place_fields(place: Place) -> Fields:
    """Where a request stands in the queue."""
    starts, ends = (
        "" if seconds is None else f"in {seconds:.0f} s at the earliest"
        for seconds in (place.starts_in_seconds, place.ends_in_seconds)
    )
    if place.position == 0:
        return [("ends", ends)]
    queue = f"{place.position}, with {place.ahead} before it" + (f" ({place.note})" if place.note else "")
    return [("place", queue), ("starts", starts), ("ends", ends)]


def step_fields(request: Request) -> Fields:
    """What the step did."""
    fields: Fields = [("lora_uri", request.lora_uri), ("version", request.version)]
    if request.metadata:
        fields += [(name, getattr(request.metadata, name)) for name in Numbers.model_fields]
    if request.timings:
        fields += [(name, value) for name, value in request.timings.model_dump().items()]
    return fields


def adapter_row(adapter: Adapter) -> list[object]:
    """Of a list."""
    return [
        adapter.name,
        adapter.base_model,
        adapter.version,
        adapter.steps,
        adapter.ready,
        "" if adapter.ready else adapter.reason,
        age(adapter.created_at),
    ]


def adapter_fields(adapter: Adapter) -> Fields:
    """All of it."""
    return [
        ("name", adapter.name),
        ("namespace", adapter.namespace),
        ("lora_uri", adapter.lora_uri),
        ("version", adapter.version),
        ("head_seq", adapter.head_seq),
        ("ready", adapter.ready),
        ("reason", adapter.reason),
        ("message", adapter.message),
        ("active_request", adapter.active_request),
        ("steps", adapter.steps),
        ("tokens", adapter.tokens),
        ("base_model", adapter.base_model),
        ("lora_r", adapter.lora_r),
        ("lora_alpha", adapter.lora_alpha),
        ("target_modules", ",".join(adapter.target_modules)),
        ("storage_uri", adapter.storage_uri),
        ("init_from", adapter.init_from),
        ("created", adapter.created_at),
    ]


def version_row(version: Version) -> list[object]:
    """Of a list."""
    made_by = version.request_uid or ("creation" if version.seq == 1 else "rollback")
    return [version.seq, version.version, version.head, made_by, version.at, version.lora_uri]


def part_rows(parts: Iterable[tuple[str, Part]]) -> Iterable[list[object]]:
    """The parts of an installation."""
    for name, part in parts:
        counts = ""
        if isinstance(part, Workers):
            counts = f"{part.ready} ready, {part.starting} starting, {part.draining} draining"
        yield [name, part.status, "; ".join(filter(None, (counts, part.message)))]


def age(created: str, now: datetime | None = None) -> str:
    """How long ago, as kubectl says it; empty for what is no time."""
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return ""
    seconds = int(((now or datetime.now(UTC)) - (when if when.tzinfo else when.replace(tzinfo=UTC))).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{max(0, seconds)}s"
