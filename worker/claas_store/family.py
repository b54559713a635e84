"""The versions beside an adapter's own uri: which folders there are, what each holds, and whose each is.

An adapter's first version lies at its own uri, later ones beside it under the same name with our suffix. The name alone
does not make a folder an adapter's: another adapter's first version, or versions of one that starts at a version of
this one, may have such a name too. What counts is the chain of parents in the manifests, and in the tombstones of
versions that were collected.

A version is what lies in its folder itself. Whatever lies deeper is somebody else's (another adapter's versions, the
checkpoints of the training run whose output was adopted): it is not looked at and never deleted.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from claas_store import uris
from claas_store.errors import StorageDenied, UriInvalid, VersionInvalid
from claas_store.listing import Entry, Upload
from claas_store.stores import Store
from claas_store.tombstone import MANIFEST, MARKS, TOMBSTONE, VERDICT, Tombstone, read_tombstone
from claas_store.version import Manifest, parse_manifest, read_manifest

THREADS = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """A folder that may hold a version.

    Attributes:
        exists: it has a manifest, and so is a version.
        manifest: the version's, or the one that the tombstone of a collected version quotes.
        manifest_sha256: of that manifest's bytes.
        problem: why its manifest or its tombstone cannot be read; then nothing else is known of it.
    """

    uri: str
    entries: Sequence[Entry] = ()
    uploads: Sequence[Upload] = ()
    exists: bool = False
    manifest: Manifest | None = None
    manifest_sha256: str = ""
    tombstone: Tombstone | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        """The last segment of its uri."""
        return uris.version_name(self.uri)

    @property
    def interrupted(self) -> bool:
        """Objects without a manifest and without a tombstone: nobody can read them."""
        return not self.exists and self.tombstone is None and not self.problem

    @property
    def is_dead(self) -> bool:
        """Whether its deletion has begun, or is over. A version that had lost its manifest before it got its tombstone,
        which then quotes none, is there as long as it has any file.
        """
        if self.exists or (self.tombstone is None and not self.problem):
            return False
        quoted = self.tombstone is None or bool(self.tombstone.manifest)
        return quoted or not self.files

    @property
    def files(self) -> list[Entry]:
        """What it holds but its tombstone and what is decided about that."""
        return [entry for entry in self.entries if entry.uri.rpartition("/")[2] not in MARKS]

    @property
    def is_first(self) -> bool:
        """Whether no request made it: a created, adopted or forked version, with which an adapter begins."""
        return self.manifest is not None and not self.manifest.request_uid

    @property
    def is_bare(self) -> bool:
        """Whether a request made it that names no adapter: then it is its user's."""
        return self.manifest is not None and bool(self.manifest.request_uid) and not self.manifest.adapter_uid

    def is_of(self, request_uids: Collection[str]) -> bool:
        """Whether one of these requests makes or made it, as its manifest says; or its name, where it has none."""
        if self.manifest is not None:
            return bool(self.manifest.request_uid) and self.manifest.request_uid in request_uids
        named = uris.request_of(self.name)
        return bool(named) and named in {uid[:8] for uid in request_uids}

    @property
    def newest(self) -> datetime:
        """When something of it was last written."""
        return max([entry.modified for entry in self.entries] + [upload.started for upload in self.uploads])

    @cached_property
    def parent_uri(self) -> str | None:
        """The version that it was made from, in its one spelling."""
        if self.manifest is None or self.manifest.parent is None:
            return None
        try:
            return uris.normalise(self.manifest.parent.uri)
        except UriInvalid:
            return None


class Family:
    """The folders beside `uri` with names of its versions, by their names."""

    def __init__(self, uri: str, members: Mapping[str, Member]) -> None:
        self.uri, self.members = uri, members
        self._by_uri = {member.uri: member for member in members.values()}
        self._children: dict[str, list[Member]] = defaultdict(list)  # by the uri that they were made from
        for member in members.values():
            if not member.is_first and (parent := member.parent_uri) is not None and parent != member.uri:
                self._children[parent].append(member)

    @property
    def root(self) -> Member | None:
        """The folder at the adapter's own uri, if anything lies there."""
        return self.members.get(uris.version_name(self.uri))

    def ancestors(self, member: Member) -> Iterator[str]:
        """The uris of a version's parents, nearest first, as far as its adapter's first version and as they are known.

        The last may be of another adapter (a fork's origin), or not be there.
        """
        seen = {member.uri}
        at: Member | None = member
        while at is not None and not at.is_first and (parent := at.parent_uri) is not None and parent not in seen:
            yield parent
            seen.add(parent)
            at = self._by_uri.get(parent)

    def chained(self) -> list[Member]:
        """The version at `uri` and those whose parents lead there, whoever made them; collected ones included."""
        below = {member.uri for generation in self._generations([self.uri]) for member in generation}
        return [
            member
            for member in self.members.values()
            if member.manifest is not None and (member.uri == self.uri or member.uri in below)
        ]

    def parents_of(self, members: Iterable[Member]) -> set[str]:
        """The uris of the `ancestors` of all these."""
        found: set[str] = set()
        for member in members:
            for parent in self.ancestors(member):
                if parent in found:  # and so are all before it
                    break
                found.add(parent)
        return found

    def youngest_first(self, members: Iterable[Member]) -> list[Member]:
        """In an order in which none comes after its parent."""
        tops = self._children.keys() - {child.uri for children in self._children.values() for child in children}
        ages = {member.uri: age for age, all_ in enumerate(self._generations(tops), 1) for member in all_}
        return sorted(members, key=lambda member: (-ages.get(member.uri, 0), member.name))

    def _generations(self, uris_: Iterable[str]) -> Iterator[list[Member]]:
        """What was made of the versions at these uris, what was made of that, and so on; each member once."""
        seen: set[str] = set()
        parents = [*uris_]
        while children := [child for uri in parents for child in self._children.get(uri, ()) if child.uri not in seen]:
            parents = [child.uri for child in children]
            seen.update(parents)
            yield children

    def own(self, adapter_uid: str = "") -> list[Member]:
        """The versions of the adapter at `uri`, collected ones included: its first, and those made for it.

        An adapter may begin at another adapter's version, where that lies: then what that other adapter made is not
        its own, though its parents lead there too. Nor is what a request made that names no adapter: it is its user's.

        Args:
            adapter_uid: of the LoraAdapter. A version says in its manifest for which one it was made; one of an early
                release does not, and is judged by its parents. Without the uid, all are judged by their parents.
        """
        lender = self.lender if self.lender != adapter_uid else ""  # its own later version, named as the root
        chained = {member.uri for member in self.chained()}

        def is_own(member: Member) -> bool:
            manifest = member.manifest
            if manifest is None:  # at its own uri a tombstone says that a version of it was there
                return member.uri == self.uri and member.tombstone is not None
            if lender and manifest.adapter_uid == lender:
                return False
            if member.uri == self.uri:
                return True
            if manifest.adapter_uid:
                return manifest.adapter_uid == adapter_uid if adapter_uid else member.uri in chained
            return member.uri in chained and not manifest.says_for_whom

        return [member for member in self.members.values() if is_own(member)]

    @property
    def lender(self) -> str:
        """The uid of the adapter at whose version this one begins; empty where it begins at a first version."""
        first = None if self.root is None else self.root.manifest
        return first.adapter_uid if first is not None and first.request_uid else ""


def read_family(store: Store, uri: str) -> Family:
    """What lies beside `uri` under the names of its versions.

    Raises:
        UriInvalid, StorageUnavailable, StorageDenied: see `Store`.
    """
    uri = uris.normalise(uri)
    folder, base = uris.parent_folder(uri), uris.base_name(uri)
    entries: dict[str, list[Entry]] = defaultdict(list)
    uploads: dict[str, list[Upload]] = defaultdict(list)
    for entry in store.entries(folder, base):
        if name := _member_name(uri, folder, entry.uri):
            entries[name].append(entry)
    for upload in read_uploads(store, folder, base):
        if name := _member_name(uri, folder, upload.uri):
            uploads[name].append(upload)
    names = sorted(entries.keys() | uploads.keys())
    with ThreadPoolExecutor(THREADS) as threads:
        read = threads.map(lambda name: _member(store, uris.beside(uri, name), entries[name], uploads[name]), names)
        return Family(uri, dict(zip(names, read, strict=True)))


def read_member(store: Store, uri: str) -> Member:
    """What lies at `uri` alone.

    Raises:
        UriInvalid, StorageUnavailable, StorageDenied: see `Store`.
    """
    uri = uris.normalise(uri)
    return _member(store, uri, read_files(store, uri), [])


def read_files(store: Store, uri: str) -> list[Entry]:
    """The objects in the folder at `uri`, a normalised one, without what lies deeper.

    Raises:
        StorageUnavailable, StorageDenied: see `Store`.
    """
    return [entry for entry in store.entries(uri) if lies_in(uri, entry.uri)]


def lies_in(uri: str, found: str) -> bool:
    """Whether an object found below the folder at `uri` lies in it, and not deeper."""
    name = found.removeprefix(uri)
    return bool(name) and "/" not in name


def read_uploads(store: Store, folder: str, starting: str = "") -> Sequence[Upload]:
    """As `Store.uploads`; none, and a word in the log, where the credentials may not list them: rights that are enough
    for everything else often lack this one.

    Raises:
        StorageUnavailable: see `Store`.
    """
    try:
        return store.uploads(folder, starting)
    except StorageDenied as error:
        log.warning("unfinished uploads are not looked for (s3:ListBucketMultipartUploads is needed): %s", error)
        return []


def erase(store: Store, member: Member, *, keep_tombstone: bool) -> None:
    """Deletes what lies in a version's folder, and nothing deeper: the manifest first, so that no half of it can be
    read; the tombstone last.

    Raises:
        StorageUnavailable, StorageDenied: see `Store`.
    """
    store.delete(uris.join(member.uri, MANIFEST))
    for entry in member.files:
        try:
            store.delete(entry.uri)
        except UriInvalid as error:  # a key that is none of ours, such as one with an empty segment
            log.warning("an object stays: %s", error)
    for upload in member.uploads:
        store.discard(upload)
    store.delete(uris.join(member.uri, VERDICT))
    if not keep_tombstone:
        store.delete(uris.join(member.uri, TOMBSTONE))


def _member_name(uri: str, folder: str, found: str) -> str | None:
    """The name of the version that an object below `folder` is part of, if it is of one beside `uri`."""
    name, _, rest = found.removeprefix(folder).partition("/")
    return name if rest and "/" not in rest and uris.is_beside(uri, name) else None


def _member(store: Store, uri: str, entries: Sequence[Entry], uploads: Sequence[Upload]) -> Member:
    names = {entry.uri.removeprefix(uri) for entry in entries}
    try:
        stone = read_tombstone(store, uri) if TOMBSTONE in names else None
        found = read_manifest(store, uri) if MANIFEST in names else None
        quoted = stone.manifest.encode() if stone else b""
        known = found or (parse_manifest(quoted, f"{uri}: {TOMBSTONE}: manifest") if quoted else None)
    except VersionInvalid as error:
        return Member(uri, entries, uploads, exists=MANIFEST in names, problem=str(error))
    manifest, digest = known or (None, "")
    return Member(uri, entries, uploads, found is not None, manifest, digest, stone)
