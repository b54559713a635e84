"""The end of versions: what is declared dead, deleted, destroyed and swept, and above all what is not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from claas_store import collect, tombstone
from claas_store.collect import delete, destroy, restore, sweep
from claas_store.errors import (
    ArgumentInvalid,
    NotFound,
    NotTombstoned,
    StorageDenied,
    UriInvalid,
    VersionCollected,
    VersionInvalid,
)
from claas_store.family import Family, Member
from claas_store.fsck import fsck
from claas_store.stores import Store, open_store
from claas_store.tombstone import MANIFEST, TOMBSTONE, VERDICT, read_tombstone
from claas_store.version import ADAPTER, CONFIG, Manifest, ParentVersion, Version, find_manifest, read_version
from objectstore import ObjectStore
from store import examples
from store.chains import age, files_of, first, killed_step, name, names_in, request_uid, step, step_uri

OTHER = "11111111-0000-4000-8000-000000000000"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that meet a tombstone wait a moment only."""
    monkeypatch.setattr(tombstone, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(tombstone, "POLL_SECONDS", 0.02)


def chain(home: str, length: int = 3) -> list[Version]:
    """An adapter `coder` with so many versions."""
    versions = [first(f"{home}coder")]
    for number in range(1, length):
        versions.append(step(versions[-1], number))
    return versions


# tombstone, restore, delete


def test_a_collected_version_is_refused_by_name_and_the_rest_can_be_read(home: str) -> None:
    versions = chain(home)
    old = [name(version) for version in versions[:2]]
    assert collect.tombstone(f"{home}coder", old, "retention").done == old
    for version in versions[:2]:
        with pytest.raises(VersionCollected, match=r"is collected \(since \d{4}-.*: retention\)") as caught:
            read_version(version.uri)
        assert not caught.value.retryable
    assert delete(f"{home}coder", old).done == old
    for version in versions[:2]:
        assert files_of(version.uri) == [TOMBSTONE]
        assert find_manifest(version.uri) is None
        with pytest.raises(VersionCollected):
            read_version(version.uri)
        with pytest.raises(VersionCollected):
            read_version(version.uri, adopt=True)
    assert read_version(versions[2].uri).manifest == versions[2].manifest


def test_the_tombstone_quotes_the_manifest_so_that_the_chain_can_be_verified(home: str) -> None:
    versions = chain(home)
    collect.tombstone(f"{home}coder", [name(versions[1])], "retention")
    delete(f"{home}coder", [name(versions[1])])
    stone = read_tombstone(open_store(home), versions[1].uri)
    assert stone is not None
    assert versions[2].manifest.parent is not None
    assert stone.manifest_sha256 == versions[1].manifest_sha256 == versions[2].manifest.parent.sha256


def test_collecting_twice_changes_nothing(home: str) -> None:
    (version, *_) = chain(home)
    collect.tombstone(f"{home}coder", ["coder"], "retention")
    stone = open_store(home).get(f"{version.uri}{TOMBSTONE}")
    assert collect.tombstone(f"{home}coder", ["coder"], "another time").done == ["coder"]
    assert open_store(home).get(f"{version.uri}{TOMBSTONE}") == stone
    for _ in range(2):
        assert delete(f"{home}coder", ["coder"]).done == ["coder"]
        assert collect.tombstone(f"{home}coder", ["coder"], "retention").done == ["coder"]
    assert files_of(version.uri) == [TOMBSTONE]


def test_what_bears_no_tombstone_is_not_deleted_nor_anything_with_it(home: str) -> None:
    versions = chain(home)
    collect.tombstone(f"{home}coder", ["coder"], "retention")
    with pytest.raises(NotTombstoned, match=name(versions[1])):
        delete(f"{home}coder", ["coder", name(versions[1])])
    assert MANIFEST in files_of(versions[0].uri)
    assert MANIFEST in files_of(versions[1].uri)


def test_what_is_wholly_gone_needs_no_tombstone(home: str) -> None:
    (root, *_) = chain(home)
    gone = name(step_uri(root.uri, 77))
    assert collect.tombstone(f"{home}coder", [gone], "retention").done == [gone]
    assert delete(f"{home}coder", [gone]).done == [gone]
    assert gone not in names_in(home)


def test_a_tombstone_is_taken_back_when_a_reference_was_found(home: str) -> None:
    (root, *_) = chain(home)
    collect.tombstone(f"{home}coder", ["coder"], "retention")
    assert restore(f"{home}coder", ["coder"]) == (["coder"], [])
    assert read_version(root.uri).manifest == root.manifest
    collect.tombstone(f"{home}coder", ["coder"], "retention")
    delete(f"{home}coder", ["coder"])
    assert restore(f"{home}coder", ["coder"]) == ([], ["coder"])
    assert files_of(root.uri) == [TOMBSTONE]


def test_what_is_there_comes_back_although_another_is_dead(home: str) -> None:
    versions = chain(home)
    names = [name(version) for version in versions[:2]]
    gone = name(step_uri(versions[0].uri, 77))
    collect.tombstone(f"{home}coder", names, "retention")
    open_store(home).delete(f"{versions[0].uri}{MANIFEST}")  # a deletion that was killed
    assert restore(f"{home}coder", [*names, gone]) == ([names[1], gone], ["coder"])
    assert read_version(versions[1].uri).manifest == versions[1].manifest
    with pytest.raises(VersionCollected):
        read_version(versions[0].uri)


def test_a_damaged_version_does_not_hold_up_the_others(home: str) -> None:
    versions = chain(home, 4)
    store, names = open_store(home), [name(version) for version in versions[:3]]
    store.delete(f"{versions[1].uri}{MANIFEST}")
    store.put(f"{versions[2].uri}{MANIFEST}", b"x" * (2**20 + 1), if_absent=False)
    assert collect.tombstone(f"{home}coder", names, "retention").done == names
    assert restore(f"{home}coder", [names[1]]) == ([names[1]], [])
    assert TOMBSTONE not in files_of(versions[1].uri)
    collect.tombstone(f"{home}coder", names, "retention")
    assert delete(f"{home}coder", names).done == names
    assert all(files_of(version.uri) == [TOMBSTONE] for version in versions[:3])
    assert restore(f"{home}coder", names) == ([], names)
    destroy(f"{home}coder", adapter_uid=examples.UID, grace_seconds=0)
    assert names_in(home) == [], "nor are tombstones left that quote nothing"


def test_a_reader_waits_for_a_tombstone_that_is_taken_back(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombstone, "WAIT_SECONDS", 20)
    (root, *_) = chain(home)
    collect.tombstone(f"{home}coder", ["coder"], "retention")
    looked, real = threading.Event(), tombstone.read_tombstone

    def look(*where: object) -> object:
        looked.set()
        return real(*where)  # type: ignore[arg-type]

    monkeypatch.setattr(tombstone, "read_tombstone", look)
    threading.Thread(target=lambda: looked.wait(10) and restore(f"{home}coder", ["coder"])).start()
    assert read_version(root.uri).manifest == root.manifest


def test_a_deletion_in_the_middle_of_a_read_is_said(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader has the manifest, and then the files go: collected, not broken."""
    from claas_store import version as module

    (root, *_) = chain(home)
    real = module.read_manifest

    def slow(*where: object) -> object:
        found = real(*where)  # type: ignore[arg-type]
        collect.tombstone(f"{home}coder", ["coder"], "retention")
        delete(f"{home}coder", ["coder"])
        return found

    monkeypatch.setattr(module, "read_manifest", slow)
    with pytest.raises(VersionCollected):
        read_version(root.uri)


def test_what_lies_deeper_than_a_version_is_nobody_elses_to_delete(home: str) -> None:
    """Another adapter lives in the folder of the first version, and so do the checkpoints of somebody's run."""
    store = open_store(home)
    versions = chain(home)
    inner = first(f"{home}coder/v2", OTHER)
    theirs = [inner, step(inner, 5, adapter_uid=OTHER)]
    deeper = [f"{home}coder/checkpoint-500/{ADAPTER}", f"{versions[1].uri}claas-payloads/a.json"]
    for uri in deeper:
        store.put(uri, b"not a version's")
    killed_step(versions[2], 9)
    in_the_making = f"{step_uri(versions[2].uri, 9)}notes/{CONFIG}"
    store.put(in_the_making, b"{}")

    collect.tombstone(f"{home}coder", ["coder", name(versions[1])], "retention")
    delete(f"{home}coder", ["coder", name(versions[1])])
    sweep(f"{home}coder", [name(version) for version in versions], 0)
    destroy(f"{home}coder")
    for version in theirs:
        assert read_version(version.uri).manifest == version.manifest
    assert all(store.get(uri) for uri in [*deeper, in_the_making])
    assert destroy(f"{home}coder") == ([], []), "nothing of this is the adapter's"


def test_a_folder_with_nothing_but_deeper_ones_needs_no_tombstone(home: str) -> None:
    inner = first(f"{home}coder/v2", OTHER)
    assert delete(f"{home}coder", ["coder"]).done == ["coder"]
    assert read_version(inner.uri).manifest == inner.manifest


@pytest.mark.parametrize(
    "bad",
    ["..", ".", "", "/", "coder/..", "../coder", "coder2", "coder-v2", "coder/claas.json", "%2e%2e", "coder%2f..",
     "Coder",
     "coder-20261123-191007-9f2c4d1e/../other", "coder-20261123-191007-9F2C4D1E", "coder-20261123-191007-9f2c4d1e-a1",
     "xcoder-20261123-191007-9f2c4d1e", "coder\n", "coder-20261123-191007-9f2c4d1e\n"],
)  # fmt: skip
def test_only_names_of_this_adapters_versions_are_taken(home: str, bad: str) -> None:
    first(f"{home}coder")
    first(f"{home}coder2", OTHER)
    before = [*open_store(home).list(home)]
    for act in (
        lambda: collect.tombstone(f"{home}coder", ["coder", bad], "retention"),
        lambda: restore(f"{home}coder", ["coder", bad]),
        lambda: delete(f"{home}coder", ["coder", bad]),
        lambda: destroy(f"{home}coder", [bad]),
        lambda: sweep(f"{home}coder", ["coder", bad], 0),
    ):
        with pytest.raises(UriInvalid):
            act()
    assert [*open_store(home).list(home)] == before


# destroy


def test_an_adapter_is_destroyed_with_all_it_made_and_nothing_else(home: str) -> None:
    versions = chain(home, 4)
    collect.tombstone(f"{home}coder", ["coder", name(versions[1])], "retention")
    delete(f"{home}coder", ["coder"])
    step(versions[1], 20)  # rolled back to, and trained on
    killed_step(versions[3], 21)
    first(f"{home}coder2", OTHER)  # a prefix of whose name is ours
    first(f"{home}code", OTHER)
    open_store(home).put(f"{home}coder.txt", b"a note")
    assert len(destroy(f"{home}coder", grace_seconds=0).deleted) == 6
    assert names_in(home) == ["code", "coder.txt", "coder2"]
    assert destroy(f"{home}coder") == ([], [])


def test_a_fork_beside_it_survives_with_its_own_versions(home: str) -> None:
    """A fork may lie under a name that looks like a version's, and its steps are siblings of the destroyed one's."""
    versions = chain(home, 3)
    fork_uri = step_uri(versions[0].uri, 50)
    from claas_store.version import write_version

    origin = ParentVersion(uri=versions[1].uri, sha256=versions[1].manifest_sha256)
    manifest = Manifest(base_model=examples.BASE, adapter_uid=OTHER, parent=origin)
    fork = write_version(fork_uri, examples.CONFIG, examples.tensors(), None, manifest)
    later = step(fork, 51, adapter_uid=OTHER)
    leftover = killed_step(later, 52)  # nobody can tell whose
    destroyed = destroy(f"{home}coder", grace_seconds=0)
    assert sorted(destroyed.deleted) == sorted(map(name, versions))
    assert destroyed.kept == sorted(map(name, (fork, later, leftover))) == names_in(home)
    assert read_version(later.uri).manifest == later.manifest
    assert len(destroy(fork.uri, adapter_uid=OTHER, grace_seconds=0).deleted) == 3
    assert names_in(home) == []


def test_an_adapter_that_begins_at_anothers_version_takes_only_its_own(home: str) -> None:
    lender = chain(home, 3)
    borrowed = step(lender[1], 60, adapter_uid=OTHER)  # an adapter adopted lender[1] where it lies
    destroyed = destroy(lender[1].uri)
    assert destroyed.deleted == [name(borrowed)]
    assert names_in(home) == sorted(map(name, lender))


def test_what_others_need_stays_and_its_parents_can_still_be_verified(home: str) -> None:
    versions = chain(home, 4)
    kept = versions[2]
    assert name(kept) not in destroy(f"{home}coder", [name(kept)]).deleted
    assert names_in(home) == sorted(map(name, versions[:3]))
    assert files_of(versions[0].uri) == [TOMBSTONE]
    assert fsck(kept.uri).ok
    destroy(f"{home}coder")
    assert names_in(home) == []


def test_a_folder_that_was_never_an_adapters_stays(home: str) -> None:
    """A creation that was refused because somebody's PEFT folder lies there; the LoraAdapter is deleted."""
    open_store(home).put(f"{home}coder/{CONFIG}", b"{}")
    open_store(home).put(f"{home}coder/{ADAPTER}", b"weights")
    assert destroy(f"{home}coder").kept == ["coder"]
    assert files_of(f"{home}coder/") == [CONFIG, ADAPTER]


def test_a_manifest_that_nobody_can_read_is_not_deleted(home: str) -> None:
    versions = chain(home, 2)
    open_store(home).put(f"{versions[1].uri}{MANIFEST}", b"{}", if_absent=False)
    assert destroy(f"{home}coder").kept == [name(versions[1])]
    open_store(home).put(f"{home}other/{MANIFEST}", b'{"schemaVersion": 2}')
    with pytest.raises(VersionInvalid):
        destroy(f"{home}other")


def test_what_was_not_made_for_the_adapter_stays_and_is_named(home: str) -> None:
    versions = chain(home, 3)
    bare = step(versions[2], 9, adapter_uid="")  # a request with a bare uri: its user's
    borrowed = step(versions[1], 11, adapter_uid=OTHER)  # an adapter that adopted versions[1] where it lies,
    unreported = step(borrowed, 12, adapter_uid=OTHER)  # and what it has just made
    destroyed = destroy(f"{home}coder", [name(versions[1])], adapter_uid=examples.UID)
    assert destroyed.kept == sorted(map(name, (versions[1], bare, borrowed, unreported)))
    assert sorted(destroyed.deleted) == sorted(map(name, (versions[0], versions[2])))
    for version in (bare, borrowed, unreported):
        assert read_version(version.uri).manifest == version.manifest
        assert fsck(version.uri).ok, "its parents' tombstones stay"


def test_a_bare_requests_output_is_never_the_adapters_even_without_a_uid(home: str) -> None:
    versions = chain(home, 2)
    bare = step(versions[1], 9, adapter_uid="")
    assert destroy(f"{home}coder").kept == [name(bare)]
    assert read_version(bare.uri).manifest == bare.manifest


def test_a_step_that_still_writes_is_not_destroyed(root: Path) -> None:
    home = f"file://{root}/"
    versions = chain(home, 2)
    young, old = killed_step(versions[1], 9), killed_step(versions[1], 10)
    bare = step(versions[1], 11, adapter_uid="")
    age(old, 90000)
    age(bare.uri, 90000)
    destroyed = destroy(f"{home}coder", adapter_uid=examples.UID)
    assert destroyed.kept == sorted([name(young), name(bare)])
    assert name(old) in destroyed.deleted
    assert files_of(young) == [CONFIG]


def test_a_version_of_an_early_release_belongs_where_its_parents_lead(home: str) -> None:
    versions = chain(home, 2)
    store, uri = open_store(home), f"{versions[1].uri}{MANIFEST}"
    early = json.loads(store.get(uri))
    del early["adapterUid"]
    store.put(uri, json.dumps(early).encode(), if_absent=False)
    assert destroy(f"{home}coder", adapter_uid=examples.UID).kept == []
    assert names_in(home) == []


def test_a_family_of_thousands_is_sorted_out_in_a_moment() -> None:
    """Each parent is looked at once: what grows with the square of the versions took minutes."""
    base = "s3://adapters/team/coder"
    members, parent = {}, None
    for number in range(4000):
        uri = step_uri(f"{base}/", number) if number else f"{base}/"
        manifest = Manifest(
            base_model="b", adapter_uid="u", parent=parent, request_uid=request_uid(number) if number else ""
        )
        members[name(uri)] = Member(uri, exists=True, manifest=manifest)
        parent = ParentVersion(uri=uri, sha256="0" * 64)
    start = time.process_time()
    family = Family(f"{base}/", members)
    ordered = family.youngest_first(family.own("u"))
    assert [member.name for member in ordered] == [*reversed(members)]
    assert len(family.parents_of(ordered)) == 3999
    assert time.process_time() - start < 3


def test_a_circle_of_parents_is_destroyed_as_well(home: str) -> None:
    versions = chain(home, 3)
    store, uri = open_store(home), f"{versions[1].uri}{MANIFEST}"
    said = json.loads(store.get(uri)) | {"parent": {"uri": versions[2].uri, "sha256": "0" * 64}}
    store.put(uri, json.dumps(said).encode(), if_absent=False)
    assert len(destroy(f"{home}coder", adapter_uid=examples.UID).deleted) == 3
    assert names_in(home) == []


def die_after(deletions: int, act: str) -> str:
    """A program that runs `act` and is killed with SIGKILL at the store's next write or deletion after so many."""
    return f"""
import os, signal, sys
from claas_store import collect
real, left = collect.open_store, [{deletions}]
class Dying:
    def __init__(self, store): self.store = store
    def __getattr__(self, name):
        if name in ("put", "delete", "discard"):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        return getattr(self.store, name)
collect.open_store = lambda uri: Dying(real(uri))
{act}
print("done")
"""


def run(code: str) -> bool:
    """Whether the program ended by itself."""
    tests = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": ":".join([tests, *(path for path in sys.path if path)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("steps", [0, 2, 5, 9, 14, 16, 18, 20])
def test_a_killed_destruction_is_finished_by_the_next(home: str, steps: int) -> None:
    versions = chain(home, 3)
    first(f"{home}coder2", OTHER)
    killed_step(versions[2], 21)
    assert not run(die_after(steps, f"collect.destroy('{home}coder', grace_seconds=0)"))
    destroy(f"{home}coder", grace_seconds=0)
    assert names_in(home) == ["coder2"]


@pytest.mark.parametrize("steps", range(7))
def test_a_killed_deletion_never_leaves_half_a_version_readable(home: str, steps: int) -> None:
    versions = chain(home, 2)
    collect.tombstone(f"{home}coder", [name(versions[1])], "retention")
    assert not run(die_after(steps, f"collect.delete('{home}coder', ['{name(versions[1])}'])")) or steps == 6
    with pytest.raises(VersionCollected):
        read_version(versions[1].uri)
    assert (find_manifest(versions[1].uri) is None) == (steps > 1)  # the first write is the verdict
    delete(f"{home}coder", [name(versions[1])])
    assert files_of(versions[1].uri) == [TOMBSTONE]


@pytest.mark.parametrize("steps", range(1, 7))
def test_a_killed_deletion_is_finished_by_who_would_take_it_back(home: str, steps: int) -> None:
    versions = chain(home, 2)
    names = [name(versions[1])]
    collect.tombstone(f"{home}coder", names, "retention")
    run(die_after(steps, f"collect.delete('{home}coder', {names})"))
    assert restore(f"{home}coder", names) == ([], names)
    assert files_of(versions[1].uri) == [TOMBSTONE]


@pytest.mark.parametrize("steps", range(4))
def test_a_killed_restoration_is_finished_by_the_next_and_may_be_followed_by_a_collection(
    home: str, steps: int
) -> None:
    versions = chain(home, 2)
    names = [name(versions[1])]
    collect.tombstone(f"{home}coder", names, "retention")
    assert run(die_after(steps, f"collect.restore('{home}coder', {names})")) == (steps == 3)
    if steps:
        with pytest.raises(NotTombstoned):
            delete(f"{home}coder", names)
    assert restore(f"{home}coder", names) == (names, [])
    assert read_version(versions[1].uri).uri == versions[1].uri
    collect.tombstone(f"{home}coder", names, "retention")
    delete(f"{home}coder", names)
    assert files_of(versions[1].uri) == [TOMBSTONE]


class Turns:
    """A store of two users: the first makes so many calls, then the second so many, then each the rest."""

    def __init__(self, store: Store, first: int, second: int) -> None:
        self._store, self._left = store, {"first": first, "second": second}
        self._turn, self._changed = "first", threading.Condition()
        self._ended: set[str] = set()

    def end(self, who: str) -> None:
        """The other one's turn, for good."""
        with self._changed:
            self._ended.add(who)
            self._changed.notify_all()

    def _wait(self, who: str) -> None:
        with self._changed:
            other = "second" if who == "first" else "first"
            if self._left[who] == 0:
                self._turn = other
                self._changed.notify_all()
            self._left[who] -= 1
            mine = self._changed.wait_for(lambda: self._turn == who or other in self._ended, 20)
        assert mine, "the other one's turn does not end"

    def __getattr__(self, called: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread().name in self._left:
                self._wait(threading.current_thread().name)
            return getattr(self._store, called)(*arguments, **named)

        return call


def end_of(act: Callable[[], object]) -> object:
    """What it gave, or the error that it expects when it comes too late."""
    try:
        return act()
    except NotTombstoned:
        return "not tombstoned"


@pytest.mark.parametrize("begins", ["delete", "restore"])
@pytest.mark.parametrize("collection", [0, 7], ids=["by hand", "collection"])
@pytest.mark.parametrize("calls", range(18))
def test_two_leaders_delete_and_restore_at_once_and_one_of_them_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begins: str, calls: int, collection: int
) -> None:
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    acts = {"delete": delete, "restore": restore}
    other = "restore" if begins == "delete" else "delete"
    home = f"file://{tmp_path}/home/"
    uri, versions = f"{home}coder", chain(home, 2)
    names = [name(versions[1])]
    collect.tombstone(uri, names, "retention", collection)
    shutil.copytree(tmp_path / "home", tmp_path / "before")
    for more in range(18):
        shutil.rmtree(tmp_path / "home")
        shutil.copytree(tmp_path / "before", tmp_path / "home")
        turns = Turns(open_store(home), calls, more)
        with monkeypatch.context() as patched, ThreadPoolExecutor(2) as pool:
            patched.setattr(collect, "open_store", lambda _, turns=turns: turns)

            def act(who: str, what: str, uri: str, names: list[str], turns: Turns) -> object:
                threading.current_thread().name = who
                try:
                    return end_of(lambda: acts[what](uri, names, collection))
                finally:
                    turns.end(who)

            results = {
                what: pool.submit(act, who, what, uri, names, turns)
                for who, what in (("first", begins), ("second", other))
            }
            deleted, restored = results["delete"].result(30), results["restore"].result(30)
        left = files_of(versions[1].uri)
        if deleted == (names, []):
            assert restored == ([], names), (calls, more)
            assert left == [TOMBSTONE], (calls, more)
        else:
            assert restored == (names, []), (calls, more)
            assert read_version(versions[1].uri).uri == versions[1].uri
            assert not {TOMBSTONE, VERDICT} & set(left), (calls, more)


class Interrupted:
    """A store whose user sleeps before its so-many-th call, while others do as they like."""

    def __init__(self, store: Store, calls: int, meanwhile: Callable[[], object]) -> None:
        self._store, self._left, self._meanwhile = store, calls, meanwhile

    def __getattr__(self, called: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self._left -= 1
            if self._left == -1:
                self._meanwhile()
            return getattr(self._store, called)(*arguments, **named)

        return call


@pytest.mark.parametrize(
    "rounds", [["delete"], ["restore", "tombstone", "delete"], ["restore", "tombstone"]], ids="-".join
)
@pytest.mark.parametrize("calls", range(10))
def test_a_restoration_that_slept_through_all_that_came_after_takes_no_tombstone_of_what_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, rounds: list[str]
) -> None:
    """Its Pod was on a node that nobody heard of for an hour, say; the chain must stay verifiable all the same."""
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    versions = chain(home := f"file://{tmp_path}/", 2)
    uri, names = f"{home}coder", [name(versions[1])]
    collect.tombstone(uri, names, "retention")

    def meanwhile() -> None:
        acts = {"tombstone": lambda: collect.tombstone(uri, names, "retention")}
        acts |= {"restore": lambda: restore(uri, names), "delete": lambda: delete(uri, names)}
        for what in rounds:
            end_of(acts[what])

    sleeper = Interrupted(open_store(home), calls, meanwhile)
    with monkeypatch.context() as patched:
        patched.setattr(collect, "open_store", lambda _: sleeper)
        restore(uri, names)
    left = files_of(versions[1].uri)
    if find_manifest(versions[1].uri) is None:
        assert left == [TOMBSTONE]
        assert fsck(uri, known=[name(version) for version in versions]).ok
    else:
        assert not {VERDICT} & set(left)
        assert {MANIFEST, CONFIG, ADAPTER} <= {*left}


@pytest.mark.parametrize("late", [["tombstone"], ["delete"], ["tombstone", "delete"], ["restore", "tombstone"]])
def test_what_a_slow_leader_wanted_of_a_collection_that_is_over_is_not_done(home: str, late: list[str]) -> None:
    """Its Jobs are created, or run once more, when the version may be a head again; another collection is another."""
    versions = chain(home, 2)
    uri, names = f"{home}coder", [name(versions[1])]
    acts: dict[str, Callable[[int], object]] = {
        "tombstone": lambda number: collect.tombstone(uri, names, "retention", number),
        "restore": lambda number: restore(uri, names, number),
        "delete": lambda number: delete(uri, names, number),
    }
    assert restore(uri, names, 7) == (names, []), "before anything of it was done"
    for what in late:
        assert acts[what](7) == ((names, []) if what == "restore" else ([], names))
    assert read_version(versions[1].uri).uri == versions[1].uri
    assert fsck(uri).findings == []

    assert acts["tombstone"](8) == (names, [])
    for what in ("tombstone", "delete", "restore"):
        acts[what](7)
        with pytest.raises(VersionCollected):
            read_version(versions[1].uri)
    assert acts["delete"](8) == (names, [])
    assert files_of(versions[1].uri) == [TOMBSTONE]
    assert fsck(uri, known=["coder", *names]).ok
    for what in ("tombstone", "delete", "restore"):
        acts[what](7)
    assert files_of(versions[1].uri) == [TOMBSTONE]


@pytest.mark.parametrize("late", ["tombstone", "delete"])
@pytest.mark.parametrize("calls", range(12))
def test_a_job_that_slept_through_the_restoration_marks_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, late: str
) -> None:
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    versions = chain(home := f"file://{tmp_path}/", 2)
    uri, names = f"{home}coder", [name(versions[1])]
    if late == "delete":
        collect.tombstone(uri, names, "retention", 7)
    answers: list[object] = []
    sleeper = Interrupted(open_store(home), calls, lambda: answers.append(restore(uri, names, 7)))
    with monkeypatch.context() as patched:
        patched.setattr(collect, "open_store", lambda _: sleeper)
        acts: dict[str, Callable[[], object]] = {
            "tombstone": lambda: collect.tombstone(uri, names, "retention", 7),
            "delete": lambda: delete(uri, names, 7),
        }
        end_of(acts[late])
    if answers == [(names, [])]:
        assert read_version(versions[1].uri).uri == versions[1].uri
        assert VERDICT not in files_of(versions[1].uri)
    elif answers:
        assert answers == [([], names)], "the deletion had begun"
        assert find_manifest(versions[1].uri) is None


# sweep


def test_a_killed_steps_files_go_after_the_grace_time(home: str) -> None:
    versions = chain(home, 2)
    leftover = killed_step(versions[1], 9)
    known = [name(version) for version in versions]
    assert sweep(f"{home}coder", known, 3600) == (0, 0, 0, 1)
    assert find_manifest(leftover) is None
    assert name(leftover) in names_in(home)
    assert sweep(f"{home}coder", known, 0).interrupted == 1
    assert names_in(home) == sorted(known)
    assert sweep(f"{home}coder", known, 0) == (0, 0, 0, 0)


def test_orphans_go_and_what_is_known_or_needed_or_somebody_elses_stays(home: str) -> None:
    versions = chain(home, 3)
    orphan = step(versions[1], 30, attempt=2)
    parent = step(versions[1], 31)  # unknown too, but a known version was made from it
    child = step(parent, 32)
    bare = step(versions[2], 33, adapter_uid="")
    theirs = step(versions[2], 34, adapter_uid=OTHER)
    known = [name(version) for version in (*versions, child)]
    assert sweep(f"{home}coder", known, 3600) == (0, 0, 0, 2)
    swept = sweep(f"{home}coder", known, 0)
    assert (swept.orphans, swept.kept) == (1, 1)
    assert names_in(home) == sorted([*known, name(parent), name(bare), name(theirs)])
    assert name(orphan) not in names_in(home)
    assert sweep(f"{home}coder", known, 0, adapter_uid=OTHER).orphans == 1


def test_a_young_orphan_keeps_an_old_ones_that_it_was_made_from(root: Path) -> None:
    home = f"file://{root}/"
    versions = chain(home, 2)
    old = step(versions[1], 40)
    young = step(old, 41)
    age(old.uri, 7200)
    known = [name(version) for version in versions]
    assert sweep(f"{home}coder", known, 3600).orphans == 0
    age(young.uri, 7200)
    assert sweep(f"{home}coder", known, 3600).orphans == 2
    assert names_in(home) == sorted(known)


def test_what_a_request_made_that_has_not_ended_stays(home: str) -> None:
    """Its first attempt's version is whole, its second attempt's is half, and the status names neither yet."""
    versions = chain(home, 2)
    whole, half = step(versions[1], 7), killed_step(versions[1], 8)
    ended, dead = step(versions[1], 9), killed_step(versions[1], 10)
    parent = step(versions[1], 11)  # unknown, but an unended request's version was made from it
    child = step(parent, 12)
    known = [name(version) for version in versions]
    unended = [request_uid(number) for number in (7, 8, 12)]
    swept = sweep(f"{home}coder", known, 0, adapter_uid=examples.UID, unended=unended)
    assert (swept.orphans, swept.interrupted, swept.kept) == (1, 1, 4)
    assert names_in(home) == sorted([*known, *map(name, (whole, half, parent, child))])
    assert name(ended) not in names_in(home) and name(dead) not in names_in(home)
    assert sweep(f"{home}coder", known, 0, adapter_uid=examples.UID).orphans == 3


def test_an_adapter_created_anew_does_not_sweep_what_the_old_one_made(home: str) -> None:
    """deletionPolicy Retain: the old versions stay, whoever adopts the first of them."""
    versions = chain(home, 3)
    assert sweep(f"{home}coder", ["coder"], 0, adapter_uid=OTHER).orphans == 0
    assert sweep(f"{home}coder", ["coder"], 0).orphans == 0
    assert names_in(home) == sorted(map(name, versions))


def test_an_adapter_without_versions_is_not_swept(home: str) -> None:
    chain(home, 2)
    with pytest.raises(ArgumentInvalid, match="--known names no version"):
        sweep(f"{home}coder", [], 0)
    assert len(names_in(home)) == 2


def test_a_folder_without_a_manifest_at_the_adapters_own_uri_stays(home: str) -> None:
    open_store(home).put(f"{home}coder/{CONFIG}", b"{}")
    assert sweep(f"{home}coder", ["coder"], 0) == (0, 0, 0, 0)
    assert files_of(f"{home}coder/") == [CONFIG]


def test_a_killed_deletion_is_swept_up(home: str) -> None:
    versions = chain(home, 2)
    collect.tombstone(f"{home}coder", ["coder"], "retention")
    open_store(home).delete(f"{versions[0].uri}{MANIFEST}")
    assert sweep(f"{home}coder", [name(versions[1])], 0).interrupted == 1
    assert files_of(versions[0].uri) == [TOMBSTONE]


def test_a_step_that_ends_while_the_sweep_looks_is_not_lost(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = chain(home, 2)
    leftover = killed_step(versions[1], 9)
    real = collect._orphans

    def slow(*arguments: object) -> object:
        open_store(leftover).delete(f"{leftover}{CONFIG}")
        step(versions[1], 9)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(collect, "_orphans", slow)
    sweep(f"{home}coder", [name(version) for version in versions], 0)
    assert read_version(leftover).manifest.request_uid == request_uid(9)


def test_unfinished_multipart_uploads_go_after_the_grace_time(bucket: str, object_store: ObjectStore) -> None:
    versions = chain(bucket, 2)
    client, known = object_store.client(), [name(version) for version in versions]
    folder = bucket.removeprefix(f"s3://{object_store.bucket}/")
    dead = step_uri(versions[1].uri, 9).removeprefix(f"s3://{object_store.bucket}/")
    keys = [f"{folder}coder/{ADAPTER}", f"{dead}{ADAPTER}", f"{folder}coder2/{ADAPTER}"]
    for key in keys:
        upload = client.create_multipart_upload(Bucket=object_store.bucket, Key=key)["UploadId"]
        part = {"Bucket": object_store.bucket, "Key": key, "UploadId": upload, "PartNumber": 1}
        client.upload_part(**part, Body=b"x" * 1000)

    def left() -> list[str]:
        return sorted(upload.uri for upload in open_store(bucket).uploads(bucket))

    assert sweep(f"{bucket}coder", known, 3600) == (0, 0, 0, 2)
    assert len(left()) == 3
    time.sleep(1.1)  # the store's times are in whole seconds
    swept = sweep(f"{bucket}coder", known, 0)
    assert swept.uploads + swept.interrupted == 2
    assert left() == [f"{bucket}coder2/{ADAPTER}"]
    assert destroy(f"{bucket}coder").kept == []
    (theirs,) = open_store(bucket).uploads(bucket)
    assert theirs.uri == f"{bucket}coder2/{ADAPTER}"
    for _ in range(2):
        open_store(bucket).discard(theirs)
    assert left() == []


def test_files_in_the_making_go_after_the_grace_time(root: Path) -> None:
    home = f"file://{root}/"
    versions = chain(home, 2)
    scratch = root / "coder" / ".claas-partial-0123"
    scratch.write_bytes(b"half")
    known = [name(version) for version in versions]
    assert sweep(f"{home}coder", known, 3600) == (0, 0, 0, 1)
    assert sweep(f"{home}coder", known, 0).uploads == 1
    assert not scratch.exists()


def test_credentials_that_may_not_list_uploads_still_sweep(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from claas_store.s3 import S3Store

    def denied(*_: object) -> None:
        raise StorageDenied("HTTP 403")

    monkeypatch.setattr(S3Store, "uploads", denied)
    versions = chain(bucket, 2)
    killed_step(versions[1], 9)
    assert sweep(f"{bucket}coder", [name(version) for version in versions], 0).interrupted == 1
    assert "ListBucketMultipartUploads" in caplog.text


def test_reading_what_was_destroyed(home: str) -> None:
    chain(home)
    destroy(f"{home}coder")
    with pytest.raises(NotFound, match="no version"):
        read_version(f"{home}coder")
