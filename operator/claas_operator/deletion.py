"""The end of an adapter: a finalizer while its versions must go with it, and never one that stays for ever.

`deletionPolicy: Retain` has no finalizer: the object goes, the versions stay. With `Delete` the finalizer is set before
the first version is made; a deleted adapter waits for whatever trains it, its versions are deleted by a Job, and it
goes. It goes as well when that takes too long, or when the policy is changed to Retain, and says what was left.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from claas_crds import names
from claas_crds.reasons import ConditionType, Reason, describe
from claas_operator import status
from claas_operator.actions import Action, Describe, Finalize, Note, StartDeletion, StopJob
from claas_operator.operations import Answer, Desk, each
from claas_operator.permissions import not_permitted, permitted
from claas_operator.references import References

# A node that is gone keeps a Pod for ever; an adapter does not wait for it longer than this beyond its own limit.
STOP_GRACE: Final = timedelta(seconds=60)
# So many names are shown of what was left, or of what a deletion waits for.
_SHOWN_VERSIONS: Final = 10


def plan_finalizer(desk: Desk) -> Action | None:
    """The finalizer comes and goes with `spec.deletionPolicy`."""
    adapter = desk.adapter
    wanted = adapter.spec is not None and adapter.spec.deletion_policy == "Delete"
    if wanted == adapter.held_back or (adapter.spec is None and adapter.status.head_seq):
        return None
    return _finalize(desk, wanted)


def _finalize(desk: Desk, held_back: bool, note: Note | None = None, left: str = "") -> Finalize:
    adapter = desk.adapter
    others = tuple(finalizer for finalizer in adapter.finalizers if finalizer != names.FINALIZER)
    return Finalize(
        adapter=adapter, finalizers=(*others, names.FINALIZER) if held_back else others, left=left, note=note
    )


def plan_deletion(desk: Desk, references: References) -> Iterator[Action]:
    """What to do about an adapter that was deleted."""
    adapter, now = desk.adapter, desk.now
    if not adapter.held_back or adapter.deleting is None:
        return
    root = adapter.spec.storage.uri if adapter.spec else ""
    limit = timedelta(seconds=desk.settings.timings.deletion_limit_seconds)
    desk.wake(adapter.deleting + limit)
    if adapter.spec is None:
        yield from _leave(desk, f"its stored spec does not fit this release ({adapter.problem}): its versions stay")
    elif adapter.spec.deletion_policy == "Retain":
        yield from _leave(desk, f"spec.deletionPolicy is Retain: what is at {root} and beside it stays", warning=False)
    elif (gone := desk.good("destroy")) is not None:
        yield _finalize(desk, held_back=False, note=_kept(desk, root, gone))
    elif not _has_versions(desk):
        yield _finalize(desk, held_back=False)
    elif now >= adapter.deleting + limit:
        # By then its Job was stopped and may be gone; what it died of was told before.
        told = adapter.condition(ConditionType.READY)
        why = told.message if told and told.reason == Reason.DELETING else _waits_for(desk, root, references)
        what = f"after {limit.total_seconds():.0f} s the versions at {root} and beside it are still in the store"
        yield from _leave(desk, f"{what}: {why}")
    elif adapter.uid in desk.snapshot.homeless:
        what = f"namespace {adapter.namespace} is being deleted, and with it whoever could delete what is at {root}"
        yield from _leave(desk, f"{what} and beside it: it stays")
    elif not permitted(root, desk.settings, adapter.namespace):
        yield from _leave(desk, not_permitted("spec.storage.uri", desk.settings, adapter.namespace))
    else:
        yield from _tell(desk, _waits_for(desk, root, references))
        creating = desk.running("create")
        if creating is not None and adapter.status.head_seq and creating.deleting is None:
            yield StopJob(job=creating)  # one too many: it must not write the first version once more
        elif not adapter.active and creating is None and not desk.lingers("create") and not references.bare(root):
            yield from _destroy(desk, root, references)


def _destroy(desk: Desk, root: str, references: References) -> Iterator[Action]:
    kept = references.siblings(root, desk.adapter)
    arguments = [
        *("destroy", "--root", root),
        *each("--keep-version", sorted(kept)),
        *("--adapter-uid", desk.adapter.uid),
        *("--grace-seconds", str(desk.settings.timings.orphan_grace_seconds)),
    ]
    if start := desk.start("destroy", arguments):
        yield StartDeletion(
            manifest=start.manifest, pool="", adapter=desk.adapter, root=root, versions=frozenset(), kept=kept
        )


def _has_versions(desk: Desk) -> bool:
    """Whether there is, or may soon be, something in the store that is this adapter's.

    What lies at the uri of an adapter that was never created may be somebody else's: only an answer says it is not.
    """
    answered = any(answer.ok for answer in desk.answers("create").values())
    return desk.adapter.status.head_seq > 0 or answered or desk.running("create") is not None


def _kept(desk: Desk, root: str, answer: Answer) -> Note | None:
    """What the deletion left although the adapter goes, because others need it, or because it is not the adapter's."""
    left = answer.kept if isinstance(answer.kept, list) else []
    if not left:
        return None
    message = f"{len(left)} versions at {root} and beside it stay in the store: {', '.join(left[:_SHOWN_VERSIONS])}"
    return Note(desk.adapter, Reason.VERSIONS_LEFT, message if len(left) <= _SHOWN_VERSIONS else f"{message}, …")


def _waits_for(desk: Desk, root: str, references: References) -> str:
    adapter = desk.adapter
    if adapter.status.active is not None:
        return f"request {adapter.status.active.request_name} still runs on the adapter"
    if (waiting := references.bare(root)) and desk.running("destroy") is None:
        shown = ", ".join(sorted(waiting.values())[:_SHOWN_VERSIONS])
        return f"requests without an adapter still train versions at {root} and beside it: {shown}"
    return desk.trouble("destroy") or describe(Reason.DELETING)


def _tell(desk: Desk, message: str) -> Iterator[Action]:
    if not status.unready_as(desk.adapter, Reason.DELETING, message):
        patch = status.not_ready(desk.adapter, Reason.DELETING, message, desk.now)
        yield Describe(adapter=desk.adapter, status=patch)


def _leave(desk: Desk, message: str, *, warning: bool = True) -> Iterator[Action]:
    """The adapter goes and its versions stay, once nothing is left that would delete them: somebody may want to have
    an adapter there again at once."""
    adapter, running = desk.adapter, desk.running("destroy")
    if running is not None and running.deleting is None:
        yield StopJob(job=running)
    limit = timedelta(seconds=desk.settings.timings.deletion_limit_seconds)
    given_up_at = (adapter.deleting or desk.now) + limit + STOP_GRACE
    if desk.now < given_up_at and (running is not None or desk.lingers("destroy")):
        desk.wake(given_up_at)
        return
    note = Note(adapter, Reason.VERSIONS_LEFT, message, warning=warning)
    yield _finalize(desk, held_back=False, note=note, left=adapter.status.uri)
