"""Folders: no way out of the roots, and nothing half-written under an object's name."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from claas_store.errors import NotFound, StorageDenied, StorageUnavailable, StoreError
from claas_store.folder import FolderStore
from claas_store.stores import open_store


def test_roots_bound_everything(root: Path, tmp_path: Path) -> None:
    store = open_store(f"file://{root}/a")
    beside = tmp_path / "root2"
    beside.mkdir()
    for uri in (f"file://{beside}/x", f"file://{root}", "file:///etc/passwd"):
        for call in (store.get, lambda uri: store.put(uri, b"x"), store.delete):
            with pytest.raises(StorageDenied, match="outside the file roots"):
                call(uri)
    assert not any(beside.iterdir())


def test_several_roots_and_a_linked_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, linked = tmp_path / "real", tmp_path / "linked"
    real.mkdir()
    linked.symlink_to(real)  # the administrator's own doing
    monkeypatch.setenv("CLAAS_FILE_ROOTS", f"{tmp_path / 'elsewhere'}:{linked}/")
    open_store("file:///x").put(f"file://{linked}/a/b", b"1")
    assert (real / "a" / "b").read_bytes() == b"1"
    with pytest.raises(StorageDenied, match="cannot be opened"):
        open_store("file:///x").get(f"file://{tmp_path}/elsewhere/a")
    with pytest.raises(StorageDenied, match="absolute"):
        FolderStore(["data"])


def test_symbolic_links_lead_nowhere(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "dangling").symlink_to(outside / "new")
    store = open_store(f"file://{root}/a")
    for name in ("folder/secret", "file"):
        with pytest.raises(StorageDenied, match="symbolic links"):
            store.get(f"file://{root}/{name}")
    for name in ("folder/new", "dangling", "file"):
        with pytest.raises(StoreError):
            store.put(f"file://{root}/{name}", b"x")
    with pytest.raises(StorageDenied):
        store.delete(f"file://{root}/folder/secret")
    with pytest.raises(StorageDenied):
        store.list(f"file://{root}/folder/")
    (root / "real").mkdir()
    (root / "real" / "linked").symlink_to(outside)
    assert list(store.list(f"file://{root}/real/")) == []
    assert {path.name for path in outside.iterdir()} == {"secret"}
    store.put(f"file://{root}/file", b"x", if_absent=False)  # replaces the link, not what it points to
    assert (outside / "secret").read_text() == "secret"


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.sampled_from("../\\%2eab\0\n~ "), min_size=1, max_size=24))
def test_no_text_writes_outside(root: Path, text: str) -> None:
    store = FolderStore([str(root / "in")])
    (root / "in").mkdir(exist_ok=True)
    before = {path for path in root.rglob("*") if (root / "in") not in path.parents}
    try:
        store.put(f"file://{root}/in/{text}", b"x", if_absent=False)
    except StoreError:
        pass
    else:
        assert store.get(f"file://{root}/in/{text}") == b"x"
    assert {path for path in root.rglob("*") if (root / "in") not in path.parents} == before


def test_special_files_are_no_objects(root: Path) -> None:
    os.mkfifo(root / "fifo")
    (root / "folder").mkdir()
    store = open_store(f"file://{root}/a")
    for name in ("fifo", "folder"):  # a FIFO without a writer must not hang the reader
        with pytest.raises(StorageDenied):
            store.get(f"file://{root}/{name}")
    assert list(store.list(f"file://{root}/folder/")) == []
    with pytest.raises(NotFound):
        store.get(f"file://{root}/fifo2/x")


def test_a_killed_writer_leaves_nothing_to_read(root: Path) -> None:
    code = f"""
import os, signal
from claas_store.folder import FolderStore
os.link = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
FolderStore([{str(root)!r}]).put("file://{root}/v/object", b"data")
"""
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    store = open_store(f"file://{root}/a")
    assert any((root / "v").iterdir()), "the test killed too early"
    assert list(store.list(f"file://{root}/v/")) == []
    with pytest.raises(NotFound):
        store.get(f"file://{root}/v/object")
    store.put(f"file://{root}/v/object", b"again")
    assert store.get(f"file://{root}/v/object") == b"again"


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "v").mkdir()
    with pytest.raises(StorageUnavailable, match="No space left"):
        FolderStore([str(tmp_path)]).put(f"file://{tmp_path}/v/object", b"data")
    assert not any((tmp_path / "v").iterdir())


@pytest.mark.parametrize(
    "trick",
    [
        "../{name}2/secret", "x/../../{name}2/secret", "./x", "x/./y", "x//y", "/x", "x\\..\\y", "x?y", "x#y", "x\0",
        "%2e%2e/{name}2/secret", "..%2f{name}2/secret", "%2e%2e%2f{name}2%2fsecret", "\u3002\u3002/{name}2/secret",
        "\uff0e\uff0e/{name}2/secret", "..\u2215{name}2/secret", "x/%00",
    ],
)  # fmt: skip
def test_no_trick_in_a_uri_leads_out_of_a_root(root: Path, trick: str) -> None:
    """Refused, or the name of a file inside it: nothing is decoded, folded or resolved."""
    beside = root.with_name(f"{root.name}2")  # a prefix of whose name is the root's
    beside.mkdir()
    (beside / "secret").write_text("secret")
    uri = f"file://{root}/{trick.format(name=root.name)}"
    store = open_store(f"file://{root}/a")
    with pytest.raises(StoreError):
        store.get(uri)
    with contextlib.suppress(StoreError):
        store.put(uri, b"x")
        assert store.get(uri) == b"x"
        assert [found for found, _ in store.list(f"file://{root}/")] == [uri]
        store.delete(uri)
    assert [path.name for path in beside.iterdir()] == ["secret"]
    assert (beside / "secret").read_text() == "secret"


@pytest.mark.parametrize("name", ["coder", "coder-20261123-191107-00000001"])
def test_a_version_that_is_a_link_is_neither_read_nor_collected(root: Path, tmp_path: Path, name: str) -> None:
    """A tenant who can write into the volume links a name of its own to another's version."""
    from claas_store import collect
    from claas_store.fsck import fsck
    from claas_store.version import read_version
    from store.chains import first, step

    theirs = step(first(f"file://{root}/theirs/coder"), 1)
    (root / "mine").mkdir()
    if name != "coder":
        first(f"file://{root}/mine/coder")
    (root / "mine" / name).symlink_to(theirs.uri.removeprefix("file://").rstrip("/"))
    before = sorted((root / "theirs").rglob("*"))
    uri = f"file://{root}/mine/{name}/"
    for act in (
        lambda: read_version(uri),
        lambda: fsck(uri, everything=False),
        lambda: collect.tombstone(uri, [name], "retention"),
        lambda: collect.delete(uri, [name]),
    ):
        with pytest.raises(StorageDenied):
            act()
    collect.destroy(f"file://{root}/mine/coder")
    assert sorted((root / "theirs").rglob("*")) == before
    assert read_version(theirs.uri).manifest == theirs.manifest


def test_an_emptied_folder_goes_and_its_neighbours_stay(root: Path) -> None:
    """As in an object store, where a folder is only what its objects' names begin with."""
    store = open_store(f"file://{root}/a")
    store.put(f"file://{root}/a/b/one", b"1")
    store.put(f"file://{root}/a/b/two", b"2")
    store.delete(f"file://{root}/a/b/one")
    assert (root / "a" / "b").is_dir()
    store.delete(f"file://{root}/a/b/two")
    assert not (root / "a" / "b").exists()
    store.put(f"file://{root}/x", b"1")
    store.delete(f"file://{root}/x")
    assert root.is_dir()


def test_writers_into_a_folder_that_others_empty_all_end_well(root: Path) -> None:
    store = open_store(f"file://{root}/a")

    def write(number: int) -> None:
        for _ in range(50):
            store.put(f"file://{root}/v/{number}", b"x")
            store.delete(f"file://{root}/v/{number}")

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(write, number) for number in range(4)]:
            done.result()
    assert list(store.list(f"file://{root}/v/")) == []


def test_a_write_into_a_folder_arrives_while_others_delete_there_what_is_not_there(root: Path) -> None:
    """As an operation does that runs again: a folder goes with its last object, and not while one is on its way."""
    store, over = open_store(f"file://{root}/v/"), threading.Event()

    def empty() -> None:
        while not over.is_set():
            store.delete(f"file://{root}/v/nothing")

    with ThreadPoolExecutor(1) as threads:
        emptying = threads.submit(empty)
        try:
            for number in range(300):
                store.put(f"file://{root}/v/{number}", b"x")
                assert store.get(f"file://{root}/v/{number}") == b"x"
                store.delete(f"file://{root}/v/{number}")
        finally:
            over.set()
        emptying.result()
