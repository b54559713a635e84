"""Is what lies in the store what was written? Every digest of a version and of its parents, back to the beginning.

A chain is verified by the sha256 of each parent's manifest, which the next version names. A collected parent is known
by its tombstone, which quotes the manifest, so its digest is checked too and the chain goes on; a parent without one is
missing. Nothing is written, and no more than a piece of a file is in memory at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from enum import StrEnum
from typing import Final

from pydantic import Field

from claas_crds.model import StatusModel
from claas_store import uris
from claas_store.checks import ADAPTER
from claas_store.errors import NotFound, StorageDenied, TooLarge, UriInvalid
from claas_store.family import Family, Member, read_family, read_member
from claas_store.stores import open_store
from claas_store.tombstone import MANIFEST
from claas_store.version import FileDigest, ParentVersion


class Kind(StrEnum):
    """What a finding is."""

    BROKEN = "broken"  # bytes are not what a digest says, or cannot be read as what they should be
    MISSING = "missing"  # named by a manifest, and neither there nor collected
    INTERRUPTED = "interrupted"  # no manifest: a writer was killed, or is at work; nobody can read it
    ORPHANED = "orphaned"  # a version that belongs to no chain of this adapter, or that its status does not name
    COLLECTING = "collecting"  # bears a tombstone and is still there
    COLLECTED = "collected"  # only the tombstone is left
    UNREACHABLE = "unreachable"  # a parent elsewhere (a fork's origin) that is gone, or that nobody here may read


BAD: Final = frozenset({Kind.BROKEN, Kind.MISSING})


class Finding(StatusModel):
    """One thing that is not as a healthy version's; only those of `BAD` kinds say that something is lost."""

    kind: Kind
    uri: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind:<11} {self.uri}: {self.message}"


class Report(StatusModel):
    """What `fsck` found."""

    uri: str
    versions: int = Field(0, description="Versions whose every byte was read, and collected ones.")
    size_bytes: int = Field(0, description="Of the files that were read.")
    findings: list[Finding] = Field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is broken or missing."""
        return not any(finding.kind in BAD for finding in self.findings)

    def lines(self) -> Iterator[str]:
        """For people: one line for each finding, and a last one that sums up."""
        yield from map(str, self.findings)
        state = "clean" if self.ok else "BROKEN"
        yield f"{state}: {self.uri}, {self.versions} versions, {self.size_bytes} bytes read"


def fsck(uri: str, *, everything: bool | None = None, known: Collection[str] | None = None) -> Report:
    """Checks a version and the chain of its parents, or all versions beside an adapter's uri and their chains.

    Args:
        everything: all versions beside `uri`; by default where its name has no suffix of ours, as an adapter's own, or
            where `known` says that an adapter begins there.
        known: names of the versions that the adapter's status names; others are reported as orphaned. Each must be
            there with its manifest, or bear a tombstone.

    Raises:
        UriInvalid: `uri` is none, or a known name is none of a version of the adapter there.
        StorageUnavailable, StorageDenied: the store does not answer, or not for `uri`.
    """
    uri = uris.normalise(uri)
    known_uris = frozenset(uris.beside(uri, name) for name in known or ())
    check = _Check(uri, known_uris)
    if everything is None:
        everything = known is not None or not uris.is_step_output(uri)
    if everything:
        family = read_family(open_store(uri), uri)
        check.beside(family, known)
    else:
        check.chain(read_member(open_store(uri), uri))
        for one in sorted(known_uris):
            check.chain(read_member(open_store(one), one))
    return check.report


class _Check:
    """One run: each version is looked at once, however many chains lead through it."""

    def __init__(self, uri: str, known: Collection[str] = ()) -> None:
        self.report = Report(uri=uri)
        self._known = known  # uris that the adapter's status names
        self._seen: dict[str, Member] = {}

    def beside(self, family: Family, known: Collection[str] | None) -> None:
        """All versions of a family, and where each belongs."""
        if family.root is None:
            self._found(Kind.MISSING, family.uri, "nothing lies there")
        for uri in sorted(self._known):
            if uri != family.uri and uris.version_name(uri) not in family.members:
                self._found(Kind.MISSING, uri, "the adapter's status names it; it is not there, and was not collected")
        chained = {member.uri for member in family.chained()}
        for member in family.members.values():
            if member.uploads:
                self._found(Kind.INTERRUPTED, member.uri, f"{len(member.uploads)} uploads were begun and not finished")
            if member.entries or member.uri in self._known:
                self.chain(member)
            if not member.exists or member.is_first or member.problem:
                continue
            if member.uri not in chained:
                self._found(Kind.ORPHANED, member.uri, f"its parents do not lead to {family.uri}")
            elif known is not None and member.name not in known and member.tombstone is None:
                self._found(Kind.ORPHANED, member.uri, "the adapter's status does not name it")

    def chain(self, start: Member) -> None:
        """A version, and its parents as far as there are any."""
        queue: deque[tuple[Member, ParentVersion | None, str]] = deque([(start, None, "")])
        while queue:
            member, expected, child = queue.popleft()
            if expected is not None and not self._is_parent(member, expected, child):
                continue
            if member.uri in self._seen:
                continue
            self._seen[member.uri] = member
            self._version(member)
            parent = member.manifest.parent if member.manifest else None
            if parent and (found := self._read(parent.uri, member.uri)):
                queue.append((found, parent, member.uri))

    def _read(self, uri: str, child: str) -> Member | None:
        try:
            uri = uris.normalise(uri)
            return self._seen.get(uri) or read_member(open_store(uri), uri)
        except StorageDenied as error:
            self._found(Kind.UNREACHABLE, child, f"its parent cannot be read from here: {error}")
        except UriInvalid as error:
            self._found(Kind.BROKEN, child, f"its manifest names a parent that is no uri: {error}")
        return None

    def _is_parent(self, member: Member, expected: ParentVersion, child: str) -> bool:
        """Whether the chain goes on: it is there, or was, and is the one that its child names."""
        if member.problem:
            return True  # told with the version itself
        if member.manifest is not None:
            # A fork of a plain PEFT folder names its adapter file; the folder may have been adopted since.
            if expected.sha256 in (member.manifest_sha256, member.manifest.files[ADAPTER].sha256):
                return True
            whose = "the manifest" if member.exists else "the manifest that its tombstone quotes"
            self._found(Kind.BROKEN, member.uri, f"{whose} is not the one that {child} names as its parent's")
        elif member.tombstone is not None:
            self._found(Kind.COLLECTED, member.uri, "its tombstone quotes no manifest: the chain ends here, unverified")
        elif self._is_folder(member, expected):
            return False  # somebody's own, where the chain begins
        elif uris.is_beside(child, member.name) and uris.parent_folder(child) == uris.parent_folder(member.uri):
            self._found(Kind.MISSING, member.uri, f"the parent of {child} is not there, and was not collected")
        else:
            self._found(Kind.UNREACHABLE, member.uri, f"{child} was forked from it, and it is gone: the copy is whole")
        return False

    def _is_folder(self, member: Member, expected: ParentVersion) -> bool:
        try:
            digest, _ = open_store(member.uri).digest(uris.join(member.uri, ADAPTER))
        except (NotFound, TooLarge):
            return False
        return digest == expected.sha256

    def _version(self, member: Member) -> None:
        """The version's own files."""
        stone = member.tombstone
        if member.problem:
            self._found(Kind.BROKEN, member.uri, member.problem)
        elif member.exists and member.manifest is not None:
            self.report.versions += 1
            if stone is not None:
                self._found(Kind.COLLECTING, member.uri, f"since {stone.since}")
            for name, known in member.manifest.files.items():
                self._file(member, name, known)
        elif stone is not None:
            self.report.versions += 1
            left = len(member.files)
            end = f"; {left} files are left of a deletion that was killed" if left else ""
            self._found(Kind.COLLECTED, member.uri, f"at {stone.since}{end}")
        elif member.entries and member.uri in self._known:
            self._found(Kind.BROKEN, member.uri, f"the adapter's status names it, and it has no {MANIFEST}")
        elif not member.entries:
            self._found(Kind.MISSING, member.uri, "nothing lies there")
        elif uris.is_step_output(member.uri):
            self._found(Kind.INTERRUPTED, member.uri, "no manifest: a step was killed there, or is still writing")
        else:
            self._found(Kind.INTERRUPTED, member.uri, "no manifest: not adopted, or its creation did not end")

    def _file(self, member: Member, name: str, known: FileDigest) -> None:
        file = uris.join(member.uri, name)
        try:
            digest, size = open_store(file).digest(file, max_bytes=known.size)
        except NotFound:
            self._found(Kind.MISSING, file, "the manifest lists it, and it is not there")
        except TooLarge:
            self._found(Kind.BROKEN, file, f"it has more than the {known.size} bytes that the manifest says")
        else:
            self.report.size_bytes += size
            if size != known.size:
                self._found(Kind.BROKEN, file, f"it has {size} bytes, the manifest says {known.size}")
            elif digest != known.sha256:
                self._found(Kind.BROKEN, file, "its sha256 is not what the manifest says")

    def _found(self, kind: Kind, uri: str, message: str) -> None:
        self.report.findings.append(Finding(kind=kind, uri=uri, message=message))
