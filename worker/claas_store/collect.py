"""The end of versions: collecting old ones, destroying an adapter, and sweeping up what was interrupted.

Collecting takes two commands, so that whoever decides can look for references once more in between: `tombstone`
declares versions dead, which readers obey, and `delete` deletes only what was declared dead; `restore` takes a
declaration back, where the deletion has not begun. Every function here may be killed anywhere and called again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from claas_store import uris
from claas_store.errors import ArgumentInvalid, NotTombstoned, VersionInvalid
from claas_store.family import Family, Member, erase, lies_in, read_family, read_files, read_member, read_uploads
from claas_store.stores import Store, open_store
from claas_store.tombstone import (
    VERDICT,
    decide,
    end_collection,
    entomb,
    read_tombstone,
    read_verdict,
    take_back,
    was_restored,
)

GRACE_SECONDS: Final = 86400.0  # more than a step may take


class Collected(NamedTuple):
    """What became of versions that were to go, by name."""

    done: list[str]  # as asked for
    restored: list[str]  # this collection of it is over, by a restoration: it stays


def tombstone(uri: str, names: Sequence[str], why: str, collection: int = 0) -> Collected:
    """Declares versions of the adapter at `uri` dead. Those that are not there need nothing.

    Args:
        collection: the number of the collection that wants it: once a version was restored in one, nothing of that
            collection comes into effect any more, however late it is done. 0: by hand.

    Raises:
        UriInvalid: a name that no version of this adapter can have. Nothing was written.
        StorageUnavailable, StorageDenied: see `Store`.
    """
    versions = [uris.beside(uri, name) for name in names]
    store = open_store(uri)
    answer = Collected([], [])
    for name, version in zip(names, versions, strict=True):
        (answer.done if entomb(store, version, why, collection) else answer.restored).append(name)
    return answer


class Restored(NamedTuple):
    """What became of tombstones that were to be taken back, by the versions' names."""

    done: list[str]  # the version is as it was, or there is nothing at all
    dead: list[str]  # its deletion has begun: the tombstone stays


def restore(uri: str, names: Sequence[str], collection: int = 0) -> Restored:
    """Takes tombstones back, of versions that a reference to was found, as far as these are still there.

    Args:
        collection: as `tombstone`'s. It is over with this, and the tombstone of a later one stays. 0: any.

    Raises:
        UriInvalid: as `tombstone`.
        StorageUnavailable, StorageDenied: see `Store`.
    """
    store = open_store(uri)
    answer = Restored([], [])
    for name in names:
        (answer.done if _restore(store, uris.beside(uri, name), collection) else answer.dead).append(name)
    return answer


def _restore(store: Store, version: str, collection: int) -> bool:
    member = read_member(store, version)
    stone = member.tombstone
    if (stone is None and not member.problem) or (stone is not None and 0 < collection < stone.collection):
        if not member.exists:
            return True
        end_collection(store, version, collection)
        # In this order: a deletion writes its verdict before it looks once more, and removes it when all is gone.
        if read_verdict(store, version) != "delete" and not read_member(store, version).is_dead:
            return True
    else:
        # Looked at again, because it may have been deleted, and the verdict with it, since the first look.
        takes = not member.is_dead and decide(store, version, "restore") == "restore"
        if takes and not read_member(store, version).is_dead:
            end_collection(store, version, collection)
            return take_back(store, version)
    _erase(store, version)  # whoever decided so may have been killed: to finish it harms nobody
    return False


def delete(uri: str, names: Sequence[str], collection: int = 0) -> Collected:
    """Deletes versions that bear a tombstone, which stays. Again, it finds nothing to do.

    Args:
        collection: as `tombstone`'s.

    Raises:
        UriInvalid: as `tombstone`.
        NotTombstoned: a version is there and bears none, and then nothing was deleted; or it is taken back just now,
            and then none of those that are named after it was.
        StorageUnavailable, StorageDenied: see `Store`.
    """
    store = open_store(uri)
    versions = {name: uris.beside(uri, name) for name in names}
    restored = [name for name, version in versions.items() if was_restored(store, version, collection)]
    going = {name: version for name, version in versions.items() if name not in restored}
    for version in going.values():
        if read_files(store, version) and read_tombstone(store, version) is None:
            raise NotTombstoned(f"{version} bears no tombstone, so it was not deleted: run tombstone first")
    for version in going.values():
        if not read_files(store, version):
            continue
        if decide(store, version, "delete") != "delete":
            raise NotTombstoned(f"{version} is being restored, so it was not deleted")
        # Restored between the look and the verdict?
        if read_tombstone(store, version) is None or was_restored(store, version, collection):
            store.delete(uris.join(version, VERDICT))
            raise NotTombstoned(f"{version} was restored, so it was not deleted: run tombstone first")
        _erase(store, version)
    return Collected(list(going), restored)


def _erase(store: Store, version: str) -> None:
    """What lies at `version` but its tombstone; the verdict goes when all of it has."""
    entries = read_files(store, version)
    uploads = [upload for upload in read_uploads(store, version) if lies_in(version, upload.uri)]
    erase(store, Member(version, entries, uploads), keep_tombstone=True)


class Destroyed(NamedTuple):
    """What became of an adapter's folders, by name."""

    deleted: list[str]
    kept: list[str]  # beside it under such names, but others', or nobody can tell whose


def destroy(
    uri: str, keep: Collection[str] = (), *, adapter_uid: str = "", grace_seconds: float = GRACE_SECONDS
) -> Destroyed:
    """Deletes every version of the adapter at `uri`, its tombstones, and what its interrupted steps left behind.

    Its versions are its first and those that were made for it (`Family.own`). What a request made that names no adapter
    stays, and so does what another adapter made of a version of this one; of their parents the tombstones stay, so that
    the chain can still be verified. All get a tombstone before the first is deleted and the youngest go first, so that
    the next call after a kill still knows what belongs to it. Interrupted steps have no manifest to tell whose they
    are, or whether they still run: they go after the grace time, unless another adapter's versions lie among them.

    Args:
        keep: names of versions that stay too, because others begin there.
        adapter_uid: the LoraAdapter's. Without it a version is its own that was made for any adapter and whose parents
            lead to its first.
        grace_seconds: more than a step may take. What has no manifest and is younger stays.

    Raises:
        VersionInvalid: the first version's manifest cannot be read. Nothing was deleted.
        UriInvalid, StorageUnavailable, StorageDenied: see `Store`.
    """
    uri = uris.normalise(uri)
    store = open_store(uri)
    family = read_family(store, uri)
    if family.root is not None and family.root.problem:
        raise VersionInvalid(family.root.problem)
    for name in keep:
        uris.beside(uri, name)
    own = [member for member in family.own(adapter_uid) if member.name not in keep]
    own = family.youngest_first(own)
    doomed = {member.name for member in own}
    staying = [member for member in family.members.values() if member.name not in doomed]
    named = family.parents_of(staying)
    leftovers = _leftovers(store, [member for member in staying if member.name not in keep], grace_seconds)
    for member in own:
        if member.exists and member.tombstone is None:
            entomb(store, member.uri, "the adapter is deleted")
    for member in [*leftovers, *own]:
        erase(store, member, keep_tombstone=member.uri in named)
    gone = doomed | {member.name for member in leftovers}
    return Destroyed(sorted(gone), sorted(family.members.keys() - gone))


def _leftovers(store: Store, others: Sequence[Member], grace_seconds: float) -> list[Member]:
    """Of what is not the adapter's own, what its steps may have left behind, if nothing says that it is another's."""
    if any(member.problem or (member.manifest is not None and not member.is_bare) for member in others):
        return []
    before = datetime.now(UTC) - timedelta(seconds=grace_seconds)
    nameless = [member for member in others if member.manifest is None and uris.is_step_output(member.uri)]
    return [member for member in nameless if _is_dead(store, member, before)]


class Swept(NamedTuple):
    """How many folders (uploads: objects) were removed, and how many left for a later sweep."""

    interrupted: int = 0  # without a manifest; or with a tombstone, their deletion killed
    orphans: int = 0  # versions that no head and no history ever named
    uploads: int = 0
    kept: int = 0  # such as these, but younger than the grace time, or a parent of a version that stays


def sweep(
    uri: str,
    known: Collection[str],
    grace_seconds: float,
    *,
    adapter_uid: str = "",
    unended: Collection[str] = (),
) -> Swept:
    """Removes what killed processes left beside the adapter at `uri` more than `grace_seconds` ago.

    - Interrupted uploads: folders of steps without a manifest, unfinished multipart uploads, deletions that were
      killed. A folder at `uri` itself without a manifest may be somebody's own and stays.
    - Orphans: versions that a request of this adapter made and that are not `known`: their attempt was retried, say.
      A version says in its manifest for which adapter it was made. One that says nothing was made by a request that
      named no adapter, and is its user's; one of another adapter is not ours to judge. Neither is removed, and nothing
      is that a version which stays has among its parents.

    Args:
        known: names of the versions that the adapter's status names.
        grace_seconds: more than a step may take, or a running step's files are taken for a dead one's.
        adapter_uid: the adapter's. Without it, the uid that its known versions carry.
        unended: uids of requests that have not ended. Whatever they made stays, however old: the next attempt looks for
            it, and a status that names it may not be written yet.

    Raises:
        ArgumentInvalid: nothing is known, which would make every version an orphan.
        UriInvalid: a name that no version of this adapter can have.
        StorageUnavailable, StorageDenied: see `Store`.
    """
    uri = uris.normalise(uri)
    if not known:
        raise ArgumentInvalid("--known names no version: an adapter without a version has nothing to sweep")
    for name in known:
        uris.beside(uri, name)
    before = datetime.now(UTC) - timedelta(seconds=grace_seconds)
    store = open_store(uri)
    family = read_family(store, uri)
    makers = _makers(family, known, adapter_uid)
    needed = {name for name, member in family.members.items() if member.is_of(unended)}
    orphans = _orphans(family, {*known, *needed}, makers, before)
    count = dict.fromkeys(Swept._fields, 0)
    for member in family.members.values():
        if member.name in orphans:
            erase(store, member, keep_tombstone=False)
            count["orphans"] += 1
        elif member.name in needed:
            count["kept"] += _is_leftover(member) or _is_orphan(member, known, makers) or bool(member.uploads)
        elif _is_leftover(member) and _is_dead(store, member, before):
            erase(store, member, keep_tombstone=True)
            count["interrupted"] += 1
        else:
            stale = [upload for upload in member.uploads if upload.started <= before and not _is_leftover(member)]
            for upload in stale:
                store.discard(upload)
            count["uploads"] += len(stale)
            count["kept"] += (
                _is_leftover(member) or _is_orphan(member, known, makers) or len(stale) < len(member.uploads)
            )
    return Swept(**count)


def _is_leftover(member: Member) -> bool:
    """Whether it holds what no reader can reach, and is certainly ours."""
    if not uris.is_step_output(member.uri) and member.tombstone is None:
        return False
    return not member.exists and not member.problem and bool(member.files or member.uploads)


def _is_dead(store: Store, member: Member, before: datetime) -> bool:
    """Whether nothing was written there since `before`; looked at once more, for a writer that was only slow."""
    now = read_member(store, member.uri)
    return not now.exists and member.newest <= before and all(entry.modified <= before for entry in now.entries)


def _orphans(family: Family, known: Collection[str], makers: Collection[str], before: datetime) -> set[str]:
    """Names of the versions to remove: claimed by nobody, old enough, and no parent of one that stays."""
    members = family.members
    if any(one.problem for one in members.values()):
        return set()  # whoever cannot be read may have any parent
    orphans = {name for name, one in members.items() if _is_orphan(one, known, makers) and one.newest <= before}
    names = {members[name].uri: name for name in orphans}
    staying = [one for name, one in members.items() if name not in orphans]
    while staying:
        parent = names.pop(staying.pop().parent_uri or "", None)
        if parent is not None:
            staying.append(members[parent])
    return set(names.values())


def _makers(family: Family, known: Collection[str], adapter_uid: str) -> set[str]:
    """The adapter's uid, as it was given or as the steps that it committed carry it."""
    if adapter_uid:
        return {adapter_uid}
    committed = [family.members[name].manifest for name in known if name in family.members]
    return {manifest.adapter_uid for manifest in committed if manifest and manifest.request_uid} - {""}


def _is_orphan(member: Member, known: Collection[str], makers: Collection[str]) -> bool:
    """Whether a step made it for this adapter, and the adapter does not know it."""
    manifest = member.manifest
    if not member.exists or member.tombstone or manifest is None or member.name in known:
        return False
    return bool(manifest.request_uid) and manifest.adapter_uid in makers
