"""Old versions go: what `spec.retention.keepLast` does not keep and nobody needs, and what no history names.

Collection takes two Jobs. First the versions are listed in `status.collecting`, where no rollback takes them any more,
and get a tombstone, which turns away whoever reads them from then on. Then everybody who needs a version is listed
again, live, and what nobody needs is deleted. What somebody began to need in between gets its tombstone taken off.

A leader may be slow: its Job to mark a version may be created long after another leader has given that version back.
So a collection has a number, `status.collection`; a restoration ends it for a version, in the store; and what else a
Job of that number was to do to that version is not done any more (`claas_store.tombstone`). A version is given back
only when it was restored, and nothing but another collection, of another number, marks it again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Final

from claas_crds.reasons import ConditionType, Reason, describe
from claas_operator import status
from claas_operator.actions import Action, Collect, Describe, Forget, Note, OnAdapter, StartDeletion
from claas_operator.operations import Answer, Desk, each
from claas_operator.references import References, beside
from claas_operator.settings import Settings
from claas_operator.snapshot import CLOCK_SKEW, EPOCH, Adapter, parse_time
from claas_store.uris import version_name

# So many versions beyond retention are not left lying until the adapter is idle: each collection costs two small Jobs.
MANY_VERSIONS: Final = status.SURPLUS_VERSIONS
# An answer holds the names of what was done, and an answer has 4 KiB.
MAX_NAMES_CHARACTERS: Final = 2500
# The kernel takes 128 KiB in one argument; all arguments lie in the Job, and so in one object of etcd.
MAX_KNOWN_CHARACTERS: Final = 120_000
# A store that refuses is asked again less often than one that a user waits for.
PATIENCE: Final = 10.0


def plan_collection(desk: Desk, references: References) -> Iterator[Action]:
    """The next step of deleting what `spec.retention` does not keep."""
    adapter, collecting = desk.adapter, desk.adapter.status.collecting
    if adapter.spec is None:
        return
    root, deleted, restored = adapter.spec.storage.uri, desk.done("delete") | desk.dead("restore"), desk.restored()
    if gone := [name for name in collecting if name in deleted]:
        message = f"deleted from the store: {', '.join(gone)}"
        yield Forget(adapter=adapter, versions=tuple(gone), status=status.forgotten(adapter, gone, message, desk.now))
    elif back := [name for name in collecting if name in restored]:
        yield Describe(adapter=adapter, status=status.given_back(adapter, back, desk.now))
    elif not collecting:
        yield from _begin(desk, references)
    else:
        needed = [name for name in collecting if references.needed(beside(root, name), adapter)]
        actions = [
            *_delete(desk, root, [name for name in collecting if name not in needed]),
            *_give_back(desk, root, needed),
        ]
        yield from actions
        if not any(isinstance(action, OnAdapter) for action in actions):
            yield from _tell(desk)


def _delete(desk: Desk, root: str, versions: Sequence[str]) -> Iterator[Action]:
    """A tombstone first, then the end; neither while something may still take tombstones off."""
    if desk.at_work("restore"):
        return
    marked = desk.done("tombstone")
    unmarked = [name for name in versions if name not in marked]
    if unmarked:
        if start := desk.collect("tombstone", root, _batch(unmarked), PATIENCE):
            yield start
    elif versions:
        batch = _batch(versions)
        if start := desk.collect("delete", root, batch, PATIENCE):
            yield StartDeletion(
                manifest=start.manifest,
                pool="",
                adapter=desk.adapter,
                root=root,
                versions=frozenset(batch),
                kept=frozenset(),
            )


def _give_back(desk: Desk, root: str, versions: Sequence[str]) -> Iterator[Action]:
    """What somebody turned out to need loses its tombstone; then it is collected no more."""
    if not versions or desk.at_work("tombstone") or desk.at_work("delete"):
        return
    if start := desk.collect("restore", root, _batch(versions), PATIENCE):
        yield start


def collects_at(adapter: Adapter, settings: Settings) -> datetime | None:
    """When to look for versions that go, by the length of its history alone; None: it is short."""
    surplus = len(adapter.status.history) - status.keep_last(adapter)
    if surplus <= 0:
        return None
    return EPOCH if surplus >= MANY_VERSIONS else _moved_at(adapter) + _delay(settings)


def _begin(desk: Desk, references: References) -> Iterator[Action]:
    adapter = desk.adapter
    if adapter.spec is None or collects_at(adapter, desk.settings) is None:
        return
    if not (surplus := _surplus(desk)):
        return
    due_at = _moved_at(adapter) + _delay(desk.settings)
    if len(surplus) < MANY_VERSIONS and desk.now < due_at:
        desk.wake(due_at)
        return
    root = adapter.spec.storage.uri
    going = _batch([name for name in surplus if not references.needed(beside(root, name), adapter)])
    if going:
        yield Collect(adapter=adapter, versions=tuple(going), status=status.collecting(adapter, going, desk.now))


def _delay(settings: Settings) -> timedelta:
    return timedelta(seconds=settings.timings.collect_delay_seconds)


def _moved_at(adapter: Adapter) -> datetime:
    try:
        return parse_time(adapter.status.history[-1].at) or adapter.created
    except ValueError:
        return adapter.created


def _surplus(desk: Desk) -> list[str]:
    """Names of the versions in history that nothing of the adapter itself keeps, oldest first.

    Kept are the last `keepLast` that were head, which has the head among them, and what an unended request has made.
    """
    adapter = desk.adapter
    if adapter.spec is None:
        return []
    recent = list(dict.fromkeys(entry.version for entry in reversed(adapter.status.history)))
    unended = _unended(desk)
    kept = {adapter.status.version, adapter.rollback, *recent[: status.keep_last(adapter)]}
    kept |= {*adapter.status.collecting}
    kept |= {entry.version for entry in adapter.status.history if entry.request_uid in unended}
    return [name for name in reversed(recent) if name not in kept]


def _unended(desk: Desk) -> set[str]:
    """Uids of the requests on the adapter that may still commit what they have made."""
    adapter = desk.adapter
    queue = desk.snapshot.queues.get((adapter.namespace, adapter.name), [])
    return {adapter.active, *(request.uid for request in queue)} - {""}


def _batch(versions: Sequence[str]) -> list[str]:
    """The first of `versions`, as many as an answer has room for."""
    taken, room = list[str](), MAX_NAMES_CHARACTERS
    for name in versions:
        room -= len(name.encode()) + 4
        if taken and room < 0:
            break
        taken.append(name)
    return taken


def _tell(desk: Desk) -> Iterator[Action]:
    """Says what collection waits for, when there is something to say: once, or two troubles would take turns."""
    troubles = [desk.trouble(operation) for operation in ("tombstone", "delete", "restore")]
    adapter, message = desk.adapter, "; ".join(filter(None, troubles)) or describe(Reason.COLLECTING)
    if not status.adapter_says(adapter, ConditionType.COLLECTED, Reason.COLLECTING, message):
        yield Describe(adapter=adapter, status=status.collection_waits(adapter, message, desk.now))


# Orphans


def sweeps_at(adapter: Adapter, settings: Settings) -> datetime | None:
    """When to look beside the adapter; None: never."""
    interval = timedelta(seconds=settings.timings.sweep_seconds)
    return (adapter.sweep_at or adapter.created + interval) if interval else None


def plan_sweep(desk: Desk, references: References) -> Iterator[Action]:
    """Once in a while a Job looks beside the adapter for interrupted uploads and for versions that nobody names."""
    adapter, timings = desk.adapter, desk.settings.timings
    interval, due_at = timedelta(seconds=timings.sweep_seconds), sweeps_at(adapter, desk.settings)
    if due_at is None or adapter.spec is None:
        return
    if desk.now < due_at:
        desk.wake(due_at)
        return
    if adapter.sweep_at is None:
        first = desk.now + _spread(adapter, interval)
        yield Describe(adapter=adapter, status=status.swept(adapter, first, desk.now))
        return
    since = due_at - min(CLOCK_SKEW, interval / 4)
    latest = desk.of("sweep")[-1:]
    if latest and latest[0].created >= since and latest[0].finished is not None:
        answer = desk.answers("sweep").get(latest[0].name)
        note = _swept(adapter, answer) if answer and answer.ok else None
        yield Describe(adapter=adapter, status=status.swept(adapter, desk.now + interval, desk.now), note=note)
    elif desk.may_start("sweep", PATIENCE) and (known := _known(adapter, references)):
        unended = ",".join(sorted(_unended(desk) | {*references.bare(adapter.spec.storage.uri)}))
        if len(unended) >= MAX_KNOWN_CHARACTERS:
            return  # thousands wait: orphans can as well
        arguments = [
            "sweep",
            *("--root", adapter.spec.storage.uri),
            *each("--known-version", known),
            *("--grace-seconds", str(timings.orphan_grace_seconds)),
            *("--adapter-uid", adapter.uid),
            *(("--unended", unended) if unended else ()),
        ]
        if start := desk.start("sweep", arguments, PATIENCE):
            yield start


def _spread(adapter: Adapter, interval: timedelta) -> timedelta:
    """A part of `interval`: adapters made together, or met by a new operator, are not swept all at once."""
    share: float = zlib.crc32(adapter.uid.encode()) / 2**32
    return interval * share


def _swept(adapter: Adapter, answer: Answer) -> Note | None:
    found = {
        "interrupted uploads": answer.interrupted + answer.uploads,
        "versions that nobody names": answer.orphans,
    }
    message = ", ".join(f"{count} {what} deleted" for what, count in found.items() if count)
    return Note(adapter, Reason.SWEPT, message, warning=False) if message else None


def _known(adapter: Adapter, references: References) -> list[str]:
    """Names of the versions of the adapter's family that somebody names; empty when they are too many to pass on."""
    root = adapter.spec.storage.uri if adapter.spec else ""
    ours = {entry.version for entry in adapter.status.history} | {*adapter.status.collecting, version_name(root)}
    known = sorted(ours | references.siblings(root, adapter))
    return known if sum(map(len, known)) < MAX_KNOWN_CHARACTERS else []


def sweep_soon(adapter: Adapter, grace_seconds: float, now: datetime) -> datetime | None:
    """When to look for what a lost attempt may have left behind, if that is sooner than planned."""
    soon = now + timedelta(seconds=grace_seconds)
    return soon if adapter.sweep_at is None or soon < adapter.sweep_at else None
