"""What both kinds of store promise: objects appear whole, once, and are found again."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from claas_store.errors import AlreadyExists, NotFound, StorageDenied, TooLarge, UriInvalid
from claas_store.stores import open_store
from objectstore import ObjectStore


def test_round_trip(home: str) -> None:
    store, uri = open_store(home), f"{home}a/b/ü %20.bin"
    data = bytes(range(256)) * 5000
    store.put(uri, data)
    store.put(f"{home}a/empty", b"")
    assert store.get(uri) == data
    assert store.get(f"{home}a/empty") == b""
    assert list(store.list(f"{home}a/")) == [(uri, len(data)), (f"{home}a/empty", 0)]
    store.delete(uri)
    store.delete(uri)
    assert list(store.list(f"{home}a/")) == [(f"{home}a/empty", 0)]
    with pytest.raises(NotFound, match="does not exist"):
        store.get(uri)


def test_listing_keeps_to_segments(home: str) -> None:
    store = open_store(home)
    store.put(f"{home}team/x", b"1")
    store.put(f"{home}team2/x", b"1")
    assert [uri for uri, _ in store.list(f"{home}team")] == [f"{home}team/x"]
    assert list(store.list(f"{home}nobody/")) == []


def test_entries_begin_with_what_is_asked_for_and_know_their_time(home: str) -> None:
    store, start = open_store(home), datetime.now(UTC) - timedelta(seconds=2)
    for name in ("coder/a", "coder-1/b", "code/c", "coder", "x/coder/d"):
        store.put(f"{home}{name}" if name != "coder" else f"{home}coder.txt", b"12")
    found = store.entries(home, "coder")
    assert [(entry.uri.removeprefix(home), entry.size) for entry in found] == [
        ("coder-1/b", 2), ("coder.txt", 2), ("coder/a", 2)
    ]  # fmt: skip
    assert all(start <= entry.modified <= datetime.now(UTC) for entry in found)
    assert list(store.entries(f"{home}nobody", "coder")) == []
    assert list(store.uploads(home)) == []


def test_a_digest_is_read_in_pieces_and_bounded(home: str) -> None:
    store, data = open_store(home), bytes(range(256)) * 12_000
    store.put(f"{home}object", data)
    assert store.digest(f"{home}object") == (hashlib.sha256(data).hexdigest(), len(data))
    with pytest.raises(TooLarge):
        store.digest(f"{home}object", max_bytes=len(data) - 1)
    with pytest.raises(NotFound):
        store.digest(f"{home}nothing")


def test_an_object_is_written_once(home: str) -> None:
    store, uri = open_store(home), f"{home}object"
    store.put(uri, b"first")
    for data in (b"second", b"first"):
        with pytest.raises(AlreadyExists, match="exists") as caught:
            store.put(uri, data)
        assert caught.value.retryable
        assert caught.value.reason == "VersionConflict"
    assert store.get(uri) == b"first"
    store.put(uri, b"third", if_absent=False)
    assert store.get(uri) == b"third"


@pytest.mark.parametrize("same", [False, True], ids=["different", "identical"])
def test_of_eight_racing_writers_exactly_one_wins(home: str, same: bool) -> None:
    store, start = open_store(home), threading.Barrier(8)

    def write(number: int) -> bytes | None:
        data = (b"x" if same else b"%d" % number) * 300_000
        start.wait(timeout=30)
        try:
            store.put(f"{home}race", data)
        except AlreadyExists:
            return None
        return data

    with ThreadPoolExecutor(8) as threads:
        won = [data for data in threads.map(write, range(8)) if data is not None]
    assert len(won) == 1
    assert store.get(f"{home}race") == won[0]


def test_what_is_too_large_is_not_read(home: str) -> None:
    store = open_store(home)
    store.put(f"{home}large", b"x" * 1001)
    with pytest.raises(TooLarge, match="1001 bytes, at most 1000"):
        store.get(f"{home}large", max_bytes=1000)
    assert len(store.get(f"{home}large", max_bytes=1001)) == 1001


@pytest.mark.parametrize("uri", ["ftp://a/b", "s3://b/a", "file://host/a", "/etc/passwd", "s3://bucket/a/../b"])
def test_no_other_places(uri: str, root: Path) -> None:
    with pytest.raises(UriInvalid):
        open_store(uri).get(uri)


def test_folders_are_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLAAS_FILE_ROOTS", raising=False)
    with pytest.raises(StorageDenied, match="CLAAS_FILE_ROOTS"):
        open_store("file:///tmp/a/")


def test_never_imports_torch(object_store: ObjectStore, tmp_path: Path) -> None:
    """Whatever an operation Job loads, up to an adapter created in S3: nothing of torch's weight."""
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from store import examples
from claas_store import __main__, models, s3
folder = examples.model_dir(pathlib.Path({str(tmp_path)!r}) / "model")
assert __main__.main(["create", "--uri", "s3://adapters/no-torch-{tmp_path.name}/", "--base-model", "example/tiny",
    "--model-dir", str(folder), "--r", "4", "--alpha", "8", "--target-modules", "q_proj", "--adapter-uid", "u"]) == 0
heavy = {{"torch", "transformers", "peft", "kubernetes", "kopf"}} & {{name.partition(".")[0] for name in sys.modules}}
assert not heavy, heavy
"""
    environment = {**object_store.environment, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
