"""A tombstone: the small object that says of a version that it is being collected, and afterwards that it was.

It is written before anything is deleted and outlives the version. It quotes the version's manifest, whose sha256 the
next version names, so a chain of parents can still be followed and verified to its beginning when most of its versions
have been collected (about 3 KB each): a collected parent is never mistaken for a broken chain. `claas.tombstone.json`.

Whether a tombstone is taken back or its version deleted is decided once, whoever asks for either at the same time: by
who writes the verdict, `claas.verdict.json`, which goes when what it says has been done.

A collection has a number, and whoever decides about it may be slow: a Job to declare a version dead may start long
after another one has restored it, when the version is some adapter's head again. So a restoration leaves a mark,
`claas.restored-<number>`, for as long as the version is there: from then on no tombstone of that collection counts,
and no deletion of it begins, in whatever order the Jobs run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from datetime import UTC, datetime
from typing import Final, Literal, get_args

from pydantic import Field, ValidationError

from claas_crds.model import StatusModel
from claas_store import uris
from claas_store.errors import AlreadyExists, NotFound, TooLarge, VersionCollected, VersionInvalid
from claas_store.limits import MAX_MANIFEST_BYTES, MAX_TOMBSTONE_BYTES
from claas_store.stores import Store

TOMBSTONE: Final = "claas.tombstone.json"
VERDICT: Final = "claas.verdict.json"
MARKS: Final = (TOMBSTONE, VERDICT)  # what a folder may hold that is no part of the version
RESTORED: Final = "claas.restored-"  # the number of a collection follows
MANIFEST: Final = "claas.json"
WAIT_SECONDS = 5.0  # a reader waits for so long: a collection that finds a reference takes its tombstones back
POLL_SECONDS = 0.5

Decision = Literal["delete", "restore"]
MAX_VERDICT_BYTES: Final = 64

_PLAIN = re.compile(r"[A-Za-z0-9 ,.:_+-]*")


class Tombstone(StatusModel):
    """`claas.tombstone.json`; fields of a later release are ignored."""

    schema_version: Literal[1] = 1
    at: str = Field("", max_length=40, description="RFC 3339, UTC.")
    why: str = Field("", max_length=253)
    collection: int = Field(0, ge=0, description="Which collection declared it dead; 0: somebody by hand.")
    manifest: str = Field("", description="The text of the version's claas.json; empty where it could not be read.")

    @property
    def since(self) -> str:
        """When and why, as a message may hold it."""
        parts = [
            part if _PLAIN.fullmatch(part) else "in words that cannot be shown" for part in (self.at, self.why) if part
        ]
        return ": ".join(parts)

    @property
    def manifest_sha256(self) -> str:
        """Of the manifest that it quotes: what the next version's `parent.sha256` is."""
        return hashlib.sha256(self.manifest.encode()).hexdigest()


def read_tombstone(store: Store, uri: str) -> Tombstone | None:
    """The tombstone of the version at `uri`; None when it has none that counts.

    Raises:
        VersionInvalid: there is one, but it cannot be read.
        StorageUnavailable, StorageDenied: see `Store`.
    """
    try:
        data = store.get(uris.join(uri, TOMBSTONE), max_bytes=MAX_TOMBSTONE_BYTES)
    except NotFound:
        return None
    try:
        stone = Tombstone.model_validate(json.loads(data))
    except (ValidationError, ValueError, RecursionError):
        raise VersionInvalid(f"{uri}: {TOMBSTONE} does not fit its schema") from None
    return None if was_restored(store, uri, stone.collection) else stone


def was_restored(store: Store, uri: str, collection: int) -> bool:
    """Whether the version at `uri` is there and that collection of it is over for good, by a restoration.

    Raises:
        StorageUnavailable, StorageDenied: see `Store`.
    """
    if not collection:
        return False
    try:
        store.get(uris.join(uri, f"{RESTORED}{collection}"), max_bytes=MAX_VERDICT_BYTES)
    except NotFound:
        return False
    except TooLarge:
        pass
    return _exists(store, uri)


def end_collection(store: Store, uri: str, collection: int) -> None:
    """From now on no tombstone of that collection counts, and no deletion of it begins.

    Raises:
        StorageUnavailable, StorageDenied: see `Store`.
    """
    if collection:
        with contextlib.suppress(AlreadyExists):
            store.put(uris.join(uri, f"{RESTORED}{collection}"), b"restored")


def entomb(store: Store, uri: str, why: str, collection: int = 0) -> bool:
    """Gives the version at `uri` its tombstone; it may have one, and what is not there at all needs none. False: this
    collection of it is over, by a restoration.

    A damaged version, whose manifest is gone or is none, gets one that quotes nothing.

    Raises:
        StorageUnavailable, StorageDenied: see `Store`.
    """
    if was_restored(store, uri, collection):
        return False
    try:
        text = store.get(uris.join(uri, MANIFEST), max_bytes=MAX_MANIFEST_BYTES).decode()
    except NotFound:
        if not any("/" not in found.removeprefix(uri) for found, _ in store.list(uri)):
            return True
        text = ""
    except (TooLarge, UnicodeDecodeError):  # never ours
        text = ""
    at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    stone = Tombstone(at=at, why=why, manifest=text, collection=collection)
    data = json.dumps(stone.model_dump(by_alias=True, mode="json"), indent=2, ensure_ascii=False).encode() + b"\n"
    while not _put_tombstone(store, uri, data):
        try:
            if read_tombstone(store, uri) is not None:
                return True
        except VersionInvalid:
            return True
        store.delete(uris.join(uri, TOMBSTONE))  # of a collection that is over
    store.delete(uris.join(uri, VERDICT))  # what a restoration left that was killed at its end
    return True


def _put_tombstone(store: Store, uri: str, data: bytes) -> bool:
    """False: there is one."""
    try:
        store.put(uris.join(uri, TOMBSTONE), data)
    except AlreadyExists:
        return False
    return True


def read_verdict(store: Store, uri: str) -> Decision | None:
    """What was decided about the tombstone at `uri` and is not carried out yet; None: nothing.

    Raises:
        VersionInvalid: a verdict that cannot be read.
        StorageUnavailable, StorageDenied: see `Store`.
    """
    try:
        found = store.get(uris.join(uri, VERDICT), max_bytes=MAX_VERDICT_BYTES)
    except NotFound:
        return None
    except TooLarge:
        found = b""
    for known in get_args(Decision):
        if found == known.encode():
            return known  # type: ignore[no-any-return]
    raise VersionInvalid(f"{uri}: {VERDICT} is neither delete nor restore")


def decide(store: Store, uri: str, wanted: Decision) -> Decision:
    """What is done about the tombstone at `uri`: `wanted`, unless somebody decided otherwise before.

    Raises:
        VersionInvalid: a verdict that cannot be read.
        StorageUnavailable, StorageDenied: see `Store`.
    """
    verdict = uris.join(uri, VERDICT)
    try:
        store.put(verdict, wanted.encode())
    except AlreadyExists:
        # None: it has just been carried out.
        return read_verdict(store, uri) or decide(store, uri, wanted)
    return wanted


def take_back(store: Store, uri: str) -> bool:
    """Ends the tombstone at `uri`, after `decide` said restore; False when it was decided anew meanwhile.

    Raises:
        VersionInvalid, StorageUnavailable, StorageDenied: as `decide`.
    """
    stone, verdict = uris.join(uri, TOMBSTONE), uris.join(uri, VERDICT)
    try:
        text = store.get(stone, max_bytes=MAX_TOMBSTONE_BYTES)
    except NotFound:
        text = b""  # another restoration has taken it back
    else:
        store.delete(stone)
    try:
        decided = store.get(verdict, max_bytes=MAX_VERDICT_BYTES)
    except NotFound:  # it has been carried out, whatever it was
        decided = b""
    # While this one slept, it may have been taken back, declared again, and its deletion begun, or ended.
    stands = decided != b"delete" and _has_files(store, uri)
    if stands and decided:
        store.delete(verdict)
    elif not stands and text:
        with contextlib.suppress(AlreadyExists):
            store.put(stone, text)
    return stands


def _has_files(store: Store, uri: str) -> bool:
    """Whether anything lies at `uri` besides what is said about it."""
    names = (found.removeprefix(uri) for found, _ in store.list(uri))
    return any("/" not in name and name not in MARKS and not name.startswith(RESTORED) for name in names)


def refuse_collected(store: Store, uri: str) -> None:
    """Returns when the version at `uri` bears no tombstone, for which it waits a little.

    Raises:
        VersionCollected: it bears one.
        VersionInvalid, StorageUnavailable, StorageDenied: as `read_tombstone`.
    """
    end = time.monotonic() + WAIT_SECONDS
    while stone := read_tombstone(store, uri):
        if time.monotonic() >= end or not _exists(store, uri):
            raise VersionCollected(f"{uri} is collected (since {stone.since}): name a later version")
        time.sleep(POLL_SECONDS)


def _exists(store: Store, uri: str) -> bool:
    try:
        store.get(uris.join(uri, MANIFEST), max_bytes=MAX_MANIFEST_BYTES)
    except NotFound:
        return False
    return True
