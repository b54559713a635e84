"""Folders: no way out of the roots, and nothing half-written under an object's name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
