"""The object store at its worst: lost answers, wrong keys, plugs pulled, silence. Real SeaweedFS throughout."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from claas_store import s3
from claas_store.errors import AlreadyExists, NotFound, StorageDenied, StorageUnavailable
from claas_store.stores import open_store
from claas_store.version import find_manifest, read_version
from objectstore import ObjectStore, running
from store.proxy import LossyProxy, lossy


@pytest.fixture
def proxy(bucket: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[LossyProxy]:
    """The code under test talks through it; `bucket` is what it talks about."""
    with lossy(object_store.endpoint) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", between.endpoint)
        yield between


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multipart from 5 MiB on, the least that S3 takes."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)


def test_a_lost_answer_is_not_another_writer(proxy: LossyProxy, bucket: str) -> None:
    proxy.lose = 1
    open_store(bucket).put(f"{bucket}object", b"data")
    assert proxy.lost == 1
    assert open_store(bucket).get(f"{bucket}object") == b"data"


def test_another_writer_is_not_a_lost_answer(proxy: LossyProxy, bucket: str) -> None:
    store = open_store(bucket)
    store.put(f"{bucket}object", b"data")
    proxy.lose = 1
    with pytest.raises(AlreadyExists):  # although the bytes are the same
        store.put(f"{bucket}object", b"data")
    assert proxy.lost == 1


def test_answers_lost_for_good_end_in_a_retryable_failure(proxy: LossyProxy, bucket: str) -> None:
    proxy.lose = 100
    with pytest.raises(StorageUnavailable) as caught:
        open_store(bucket).put(f"{bucket}object", b"data")
    assert caught.value.retryable
    assert proxy.lost == s3.ATTEMPTS


def test_a_body_that_breaks_off_is_read_again(proxy: LossyProxy, bucket: str) -> None:
    open_store(bucket).put(f"{bucket}object", b"x" * 1_000_000)
    proxy.method, proxy.lose = b"GET ", 2
    assert open_store(bucket).get(f"{bucket}object") == b"x" * 1_000_000
    assert proxy.lost == 2


@pytest.mark.parametrize("lost", [0, 1])
def test_large_objects_go_up_in_parts_and_appear_once(
    proxy: LossyProxy, bucket: str, small_parts: None, object_store: ObjectStore, lost: int
) -> None:
    data = bytes(range(251)) * 50_000  # 12 MB: three parts
    proxy.method, proxy.text, proxy.lose = b"POST ", b"uploadId=", lost  # the completion
    open_store(bucket).put(f"{bucket}object", data)
    assert proxy.lost == lost
    assert open_store(bucket).get(f"{bucket}object") == data
    with pytest.raises(AlreadyExists):
        open_store(bucket).put(f"{bucket}object", data[::-1])
    assert open_store(bucket).get(f"{bucket}object") == data
    assert "Uploads" not in object_store.client().list_multipart_uploads(Bucket=object_store.bucket)


def test_a_wrong_secret_is_denied_and_not_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-0123456789")
    store = open_store(bucket)
    for call in (
        lambda: store.get(f"{bucket}a"),
        lambda: store.put(f"{bucket}a", b""),
        lambda: store.list(bucket),
        lambda: store.delete(f"{bucket}a"),
        lambda: find_manifest(bucket),
    ):
        with pytest.raises(StorageDenied, match=r"s3://adapters/.* at http://127.0.0.1:\d+: HTTP 403") as caught:
            call()
        assert not caught.value.retryable
        assert "wrong-secret" not in str(caught.value)


def test_an_unknown_key_is_denied(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StorageDenied, match="check the credentials"):
        open_store(bucket).get(f"{bucket}a")


def test_no_credentials_at_all(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageDenied, match="AWS_ACCESS_KEY_ID"):
        open_store(bucket).get(f"{bucket}a")


def test_a_missing_bucket_is_awaited(bucket: str) -> None:
    """A store that is just starting has no bucket yet."""
    with pytest.raises(StorageUnavailable, match="create the bucket") as caught:
        open_store(bucket).get("s3://no-such-bucket/a")
    assert caught.value.retryable


def test_an_endpoint_that_is_none(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "not an address")
    with pytest.raises(StorageDenied, match="endpoint 'not an address'"):
        open_store(bucket)


def test_a_store_that_goes_down_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "s3://adapters/down/object"
    with running(tmp_path) as up:
        for name, value in up.environment.items():
            monkeypatch.setenv(name, value)
        store = open_store(uri)
        store.put(uri, b"data")
    start = time.monotonic()
    for call in (
        lambda: store.get(uri),
        lambda: store.put(uri, b""),
        lambda: store.list(uri),
        lambda: read_version(uri),
    ):
        with pytest.raises(StorageUnavailable, match="no answer") as caught:
            call()
        assert caught.value.retryable
    assert time.monotonic() - start < 30
    port = int(up.endpoint.rpartition(":")[2])
    with running(tmp_path, port=port, access_key=up.access_key, secret_key=up.secret_key):
        assert store.get(uri) == b"data", "the same client goes on when the store is back"


def test_silence_ends(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that takes the request and never answers costs a few read time-outs, no more."""
    monkeypatch.setattr(s3, "READ_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(StorageUnavailable, match="no answer"):
            open_store(bucket).get(f"{bucket}a")
        assert s3.ATTEMPTS * 0.3 <= time.monotonic() - start < 15


def test_a_missing_object_is_not_found(bucket: str) -> None:
    with pytest.raises(NotFound):
        open_store(bucket).get(f"{bucket}nothing")
    assert find_manifest(bucket) is None
