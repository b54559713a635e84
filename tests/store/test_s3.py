"""The object store at its worst: lost answers, wrong keys, plugs pulled, silence. Real SeaweedFS throughout."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from claas_store import s3
from claas_store.errors import AlreadyExists, NotFound, StorageDenied, StorageUnavailable, StoreError, TooLarge
from claas_store.limits import MAX_MANIFEST_BYTES
from claas_store.stores import open_store
from claas_store.version import MANIFEST, find_manifest, read_version
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


def test_a_part_that_fails_for_good_leaves_nothing_of_the_others(
    proxy: LossyProxy, bucket: str, small_parts: None, object_store: ObjectStore
) -> None:
    """The upload is ended, and the object can be written after all."""
    proxy.text, proxy.lose = b"partNumber=2", 100
    with pytest.raises(StorageUnavailable):
        open_store(bucket).put(f"{bucket}object", bytes(31 * 2**20))
    assert proxy.lost == s3.ATTEMPTS
    client, prefix = object_store.client(), bucket.removeprefix(f"s3://{object_store.bucket}/")
    assert "Uploads" not in client.list_multipart_uploads(Bucket=object_store.bucket, Prefix=prefix)
    with pytest.raises(NotFound):
        open_store(bucket).get(f"{bucket}object")
    proxy.lose = 0
    open_store(bucket).put(f"{bucket}object", bytes(31 * 2**20))


def test_an_upload_is_not_ended_while_a_part_of_it_is_still_being_sent(
    proxy: LossyProxy, bucket: str, small_parts: None, object_store: ObjectStore
) -> None:
    """The store would take that part all the same, and nobody would ever free it."""
    proxy.text, proxy.lose, proxy.slow = b"partNumber=2", s3.ATTEMPTS, b"partNumber=3"
    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(open_store(bucket).put, f"{bucket}object", bytes(11 * 2**20))
        assert proxy.held.wait(20) and proxy.all_lost.wait(20)
        assert not proxy.deleting.wait(1), "the end came while the third part was on its way"
        proxy.go_on.set()
        with pytest.raises(StorageUnavailable):
            put.result(timeout=20)
    assert proxy.deleting.is_set()
    client, prefix = object_store.client(), bucket.removeprefix(f"s3://{object_store.bucket}/")
    assert "Uploads" not in client.list_multipart_uploads(Bucket=object_store.bucket, Prefix=prefix)


def test_a_server_that_sends_on_and_on_without_a_length_is_not_read_to_its_end(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with contextlib.suppress(OSError):  # the client has had enough
                while True:
                    self.wfile.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(TooLarge, match=f"{MANIFEST} has more than the {MAX_MANIFEST_BYTES} bytes that are read"):
            find_manifest(bucket)
        server.shutdown()


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


# Settings: AWS, MinIO, SeaweedFS, R2


class Sent(Exception):
    """In place of a request: where it would have gone."""


def url_of(environment: dict[str, str]) -> str:
    """Where an object is looked for with these settings."""

    def stop(request: Any, **_: Any) -> None:
        raise Sent(request.url)

    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (keys | environment).items():
            patch.setenv(name, value)
        store = s3.S3Store(environment)
        store._client.meta.events.register("before-send.s3", stop)
        with pytest.raises(Sent) as sent:
            store.delete("s3://loras/team/v 1/claas.json")
    return str(sent.value)


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({"AWS_REGION": "eu-central-1"}, "https://loras.s3.eu-central-1.amazonaws.com/team/v%201/claas.json"),
        (
            {"AWS_REGION": "us-west-2", "CLAAS_S3_ADDRESSING": "path"},
            "https://s3.us-west-2.amazonaws.com/loras/team/v%201/claas.json",
        ),
        (
            {"AWS_ENDPOINT_URL_S3": "https://minio.example.com:9000"},
            "https://minio.example.com:9000/loras/team/v%201/claas.json",
        ),
        (
            {"AWS_ENDPOINT_URL_S3": "https://minio.example.com", "CLAAS_S3_ADDRESSING": "virtual"},
            "https://loras.minio.example.com/team/v%201/claas.json",
        ),
        (
            {"AWS_ENDPOINT_URL": "https://account.r2.cloudflarestorage.com", "AWS_REGION": "auto"},
            "https://account.r2.cloudflarestorage.com/loras/team/v%201/claas.json",
        ),
    ],
)
def test_objects_are_looked_for_where_each_store_keeps_them(environment: dict[str, str], url: str) -> None:
    assert url_of(environment) == url


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"CLAAS_S3_ADDRESSING": "dns"}, "CLAAS_S3_ADDRESSING 'dns' must be one of auto, path, virtual"),
        ({"CLAAS_S3_ENCRYPTION": "aes"}, "CLAAS_S3_ENCRYPTION 'aes' must be AES256, aws:kms or empty"),
        ({"CLAAS_S3_KMS_KEY_ID": "key"}, "CLAAS_S3_KMS_KEY_ID needs CLAAS_S3_ENCRYPTION aws:kms"),
        ({"CLAAS_S3_KMS_KEY_ID": "key", "CLAAS_S3_ENCRYPTION": "AES256"}, "needs CLAAS_S3_ENCRYPTION aws:kms"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    bucket: str, monkeypatch: pytest.MonkeyPatch, setting: dict[str, str], said: str
) -> None:
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageDenied, match=said):
        open_store(bucket)


def test_an_endpoint_of_its_own_is_sent_no_checksum_trailers(proxy: LossyProxy, bucket: str, small_parts: None) -> None:
    """SeaweedFS takes them, others answer 400 or 501; what is read is checked against the manifest anyway."""
    open_store(bucket).put(f"{bucket}small", b"data")
    open_store(bucket).put(f"{bucket}large", bytes(6 * 2**20))
    assert open_store(bucket).get(f"{bucket}small") == b"data"
    assert len(proxy.heads) >= 6
    for head in proxy.heads:
        assert not any(word in head for word in ("x-amz-trailer", "aws-chunked", "x-amz-checksum", "x-amz-sdk-check"))


def test_writes_are_conditional_also_in_parts(proxy: LossyProxy, bucket: str, small_parts: None) -> None:
    open_store(bucket).put(f"{bucket}small", b"data")
    open_store(bucket).put(f"{bucket}large", bytes(6 * 2**20))
    open_store(bucket).put(f"{bucket}any", b"data", if_absent=False)
    conditional = [head.splitlines()[0] for head in proxy.heads if "\nif-none-match: *" in head]
    assert [line.split()[0] for line in conditional] == ["put", "post"]
    assert "small" in conditional[0] and "large" in conditional[1] and "uploadid=" in conditional[1]


def test_sse_s3_is_asked_for_and_the_store_says_so(
    bucket: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    monkeypatch.setenv("CLAAS_S3_ENCRYPTION", "AES256")
    store = open_store(bucket)
    for name, data in (("small", b"data"), ("large", bytes(range(256)) * 24_000)):
        store.put(f"{bucket}{name}", data)
        assert store.get(f"{bucket}{name}") == data
        key = f"{bucket}{name}".removeprefix(f"s3://{object_store.bucket}/")
        head = object_store.client().head_object(Bucket=object_store.bucket, Key=key)
        assert head["ServerSideEncryption"] == "AES256"


@pytest.mark.parametrize("key", ["", "arn:aws:kms:eu-central-1:1:key/k"])
def test_sse_kms_is_asked_for_with_the_key(
    proxy: LossyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch, small_parts: None, key: str
) -> None:
    """SeaweedFS has no KMS here and may refuse; this is about what is sent, which is all that a test can see."""
    monkeypatch.setenv("CLAAS_S3_ENCRYPTION", "aws:kms")
    monkeypatch.setenv("CLAAS_S3_KMS_KEY_ID", key)
    for name, size in (("small", 4), ("large", 6 * 2**20)):
        with contextlib.suppress(StoreError):
            open_store(bucket).put(f"{bucket}{name}", bytes(size))
    writes = [head for head in proxy.heads if head.startswith("put ") and "partnumber" not in head]
    begins = [head for head in proxy.heads if head.startswith("post ") and "?uploads" in head]
    assert writes and begins
    for head in (*writes, *begins):
        assert "\nx-amz-server-side-encryption: aws:kms" in head
        assert (f"\nx-amz-server-side-encryption-aws-kms-key-id: {key}" in head) == bool(key)
    for head in proxy.heads:
        if "partnumber" in head:
            assert "server-side-encryption" not in head, "S3 refuses it on a part"


def test_without_a_setting_nothing_is_said_of_encryption(proxy: LossyProxy, bucket: str) -> None:
    open_store(bucket).put(f"{bucket}object", b"data")
    assert not any("server-side-encryption" in head for head in proxy.heads)
