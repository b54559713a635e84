"""An S3 bucket by boto3: conditional puts whose lost answers are not mistaken for another writer, bounded calls.

A put that may be repeated needs care: boto3's own retries would answer 412 to a put whose first try succeeded and whose
answer was lost. So conditional writes go through a client that never retries; every put carries a random token in its
object's metadata, and when a 412 follows a try that ended without an answer, the token of what lies there tells ours
from another's.

Settings, besides the AWS_* variables that boto3 reads itself:
- AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL: anything but AWS (MinIO, SeaweedFS, R2). Checksum trailers, which some of
  them refuse, are then sent only where S3 requires one; what is read is checked against the manifest anyway.
- CLAAS_S3_ADDRESSING: `path` (endpoint/bucket/key), `virtual` (bucket.endpoint/key) or `auto`: path with an endpoint of
  its own, virtual at AWS.
- CLAAS_S3_ENCRYPTION: `AES256` (SSE-S3), `aws:kms` (SSE-KMS) or empty: what the bucket's default says. It goes with
  every object that is written.
- CLAAS_S3_KMS_KEY_ID: id or ARN of the key for `aws:kms`; the account's default key when empty.
"""

from __future__ import annotations

import hashlib
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import boto3
from boto3.exceptions import Boto3Error, S3TransferFailedError
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from claas_store import uris
from claas_store.errors import (
    AlreadyExists,
    NotFound,
    StorageDenied,
    StorageUnavailable,
    StoreError,
    TooLarge,
    UriInvalid,
)
from claas_store.limits import CHUNK_BYTES, MAX_OBJECT_BYTES
from claas_store.listing import Entry, Upload
from claas_store.pieces import Pieces, Window

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

ATTEMPTS: Final = 3
CONNECT_SECONDS: Final = 5
READ_SECONDS: Final = 30  # without a byte; a slow transfer may take longer
BACKOFF_SECONDS: Final = 0.2  # before the second try, doubled for each later one, with jitter
PART_BYTES: Final = 16 * 2**20  # an object above goes up in parts of this size, a failed one alone goes up again
PART_THREADS: Final = 24  # of all uploads together: a 3B model's version, weights and moments, at once
ADDRESSING: Final = ("auto", "path", "virtual")
ENCRYPTION: Final = ("", "AES256", "aws:kms")

T = TypeVar("T")

_TOKEN = "claas-put"
_UNAVAILABLE_CODES = {
    "NoSuchBucket",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ConditionalRequestConflict",
    "OperationAborted",
    "NoSuchUpload",
}
_CREDENTIAL_CODES = {"ExpiredToken", "InvalidToken", "AuthorizationHeaderMalformed"}


class S3Store:
    """`s3://` uris at one endpoint with one set of credentials; see `claas_store.stores.Store` for the methods.

    Args:
        environment: the AWS_* and CLAAS_S3_* variables. Of AWS_* only the endpoint and the region are read here, boto3
            reads the rest itself.

    Raises:
        StorageDenied: the endpoint is not an address, or a setting has no such value.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or None
        self._endpoint = endpoint or "AWS"
        session = boto3.session.Session()  # not boto3's shared one, which is not safe to use from several threads
        region = environment.get("AWS_REGION") or session.region_name or "us-east-1"
        checksums: Any = "when_required" if endpoint else None  # None: boto3's default, CRC trailers, as AWS likes it
        config = Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            max_pool_connections=PART_THREADS + 16,
            s3={"addressing_style": _addressing(environment, endpoint)},
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
        )
        self._encryption = _encryption(environment)
        self._senders = ThreadPoolExecutor(PART_THREADS, "s3-part")
        once = config.merge(Config(retries={"total_max_attempts": 1}))
        try:
            self._client: S3Client = session.client("s3", region_name=region, endpoint_url=endpoint, config=config)
            self._once: S3Client = session.client("s3", region_name=region, endpoint_url=endpoint, config=once)
        except ValueError as error:
            raise StorageDenied(f"the object store's endpoint {endpoint!r} cannot be used: {error}") from None

    def get(self, uri: str, *, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
        """See `Store.get`."""
        with self._errors(uri):
            # Ours, because boto3's own would not cover a body that breaks off.
            return self._retry(lambda: b"".join(self._chunks(uri, max_bytes)))

    def digest(self, uri: str, *, max_bytes: int = MAX_OBJECT_BYTES) -> tuple[str, int]:
        """See `Store.digest`."""

        def read() -> tuple[str, int]:
            digest, size = hashlib.sha256(), 0
            for chunk in self._chunks(uri, max_bytes):
                digest.update(chunk)
                size += len(chunk)
            return digest.hexdigest(), size

        with self._errors(uri):
            return self._retry(read)

    def put(self, uri: str, data: bytes | Pieces, *, if_absent: bool = True) -> None:
        """See `Store.put`. A conditional put within this call may be sent several times; its answer is the same."""
        bucket, key = _split(uri)
        token = uuid.uuid4().hex
        condition: Any = {"IfNoneMatch": "*"} if if_absent else {}
        with self._errors(uri):
            if len(data) <= PART_BYTES:
                last: Any = {"Bucket": bucket, "Key": key, "Body": bytes(data), "Metadata": {_TOKEN: token}}
                last |= condition | self._encryption
                self._write(lambda: self._once.put_object(**last), bucket, key, token)
                return
            # The parts take the upload's encryption; they must not name one themselves.
            begin: Any = {"Bucket": bucket, "Key": key, "Metadata": {_TOKEN: token}, **self._encryption}
            upload = self._client.create_multipart_upload(**begin)["UploadId"]
            try:
                whole: Any = {"Bucket": bucket, "Key": key, "UploadId": upload, **condition}
                whole["MultipartUpload"] = {"Parts": self._upload_parts(bucket, key, upload, Pieces.of(data))}
                self._write(lambda: self._once.complete_multipart_upload(**whole), bucket, key, token)
            except BaseException:
                self._abort(bucket, key, upload)
                raise

    def delete(self, uri: str) -> None:
        """See `Store.delete`."""
        bucket, key = _split(uri)
        with self._errors(uri):
            self._client.delete_object(Bucket=bucket, Key=key)

    def download(self, uri: str, target: Path) -> None:
        """Streams the object into the file `target`, in parallel parts, for objects too large for memory.

        Raises:
            NotFound, StorageUnavailable, StorageDenied: as `get`.
        """
        bucket, key = _split(uri)
        with self._errors(uri):
            self._client.download_file(bucket, key, str(target))

    def list(self, prefix: str) -> Sequence[tuple[str, int]]:
        """See `Store.list`."""
        return [(entry.uri, entry.size) for entry in self.entries(prefix)]

    def entries(self, prefix: str, starting: str = "") -> Sequence[Entry]:
        """See `Store.entries`."""
        location, below = _below(prefix, starting)
        with self._errors(location.folder_uri):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=location.bucket, Prefix=below)
            return sorted(
                Entry(f"s3://{location.bucket}/{entry['Key']}", entry["Size"], entry["LastModified"])
                for page in pages
                for entry in page.get("Contents", [])
            )

    def uploads(self, prefix: str, starting: str = "") -> Sequence[Upload]:
        """See `Store.uploads`: multipart uploads without an end. MinIO lists none of them and ends them itself."""
        location, below = _below(prefix, starting)
        with self._errors(location.folder_uri):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=location.bucket, Prefix=below)
            return sorted(
                Upload(f"s3://{location.bucket}/{upload['Key']}", upload["UploadId"], upload["Initiated"])
                for page in pages
                for upload in page.get("Uploads", [])
            )

    def discard(self, upload: Upload) -> None:
        """See `Store.discard`."""
        bucket, key = _split(upload.uri)
        with self._errors(upload.uri):
            try:
                self._client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload.token)
            except ClientError as error:
                if _code(error) != "NoSuchUpload":
                    raise

    def _chunks(self, uri: str, max_bytes: int) -> Iterator[bytes]:
        """The object's bytes, piece by piece.

        Raises:
            TooLarge: it has more than `max_bytes`; none was read, or no more than these where the server did not say.
        """
        bucket, key = _split(uri)
        answer = self._once.get_object(Bucket=bucket, Key=key)
        with closing(answer["Body"]) as body:
            said, read = answer.get("ContentLength", 0), 0  # a proxy may send chunks without a length
            if said > max_bytes:
                raise TooLarge(f"{uri} has {said} bytes, at most {max_bytes} are read")
            for chunk in body.iter_chunks(CHUNK_BYTES):
                read += len(chunk)
                if read > max_bytes:
                    raise TooLarge(f"{uri} has more than the {max_bytes} bytes that are read")
                yield chunk

    def _write(self, send: Callable[[], object], bucket: str, key: str, token: str) -> None:
        """Sends a conditional write until it has an answer; a 412 after a lost one is success if the token is ours."""
        lost = False

        def once() -> None:
            nonlocal lost
            try:
                send()
            except (ClientError, BotoCoreError) as error:
                status, code = _status(error), _code(error)
                # An upload that the lost try completed is no longer there for the second one.
                if lost and (status == 412 or code == "NoSuchUpload") and self._token(bucket, key) == token:
                    return
                lost = lost or status is None or status >= 500
                raise

        self._retry(once)

    def _token(self, bucket: str, key: str) -> str | None:
        """The token of the object that lies there now, if any."""
        try:
            return self._client.head_object(Bucket=bucket, Key=key)["Metadata"].get(_TOKEN)
        except ClientError as error:
            if _status(error) == 404:
                return None
            raise

    def _upload_parts(self, bucket: str, key: str, upload: str, data: Pieces) -> Sequence[dict[str, Any]]:
        """Sends `data` in parts, side by side; gives what the completion needs."""

        def send(number: int) -> dict[str, Any]:
            body: Any = Window(data, (number - 1) * PART_BYTES, number * PART_BYTES)
            answer = self._client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=body)
            return {"ETag": answer["ETag"], "PartNumber": number}

        parts = [self._senders.submit(send, number) for number in range(1, -(-len(data) // PART_BYTES) + 1)]
        try:
            return [part.result() for part in parts]
        finally:  # after a failure too none is on its way any more, which the upload's abort would not free
            for part in parts:
                part.cancel()
            wait(parts)

    def _abort(self, bucket: str, key: str, upload: str) -> None:
        """Frees the parts of a failed upload; those of a killed process stay until a lifecycle rule ends them."""
        try:
            self._client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
        except (ClientError, BotoCoreError):
            return  # the failure that led here is the one to report

    def _retry(self, call: Callable[[], T]) -> T:
        """Up to ATTEMPTS tries while the store is unavailable."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except (ClientError, BotoCoreError) as error:
                if attempt == ATTEMPTS or not isinstance(self._translate(error, ""), StorageUnavailable):
                    raise
                time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    @contextmanager
    def _errors(self, uri: str) -> Iterator[None]:
        """Turns boto3's errors into the store's own."""
        try:
            yield
        except S3TransferFailedError as error:
            cause = error.__cause__ or error.__context__
            raise self._translate(cause if isinstance(cause, Exception) else error, uri) from None
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise self._translate(error, uri) from None

    def _translate(self, error: Exception, uri: str) -> StoreError:
        """By status and code alone: a server's own words might quote what was sent."""
        at = f"{uri} at {self._endpoint}"
        status, code = _status(error), _code(error)
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return StorageDenied(f"{at}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if isinstance(error, ParamValidationError):
            return UriInvalid(f"{uri} is not accepted by the client")
        if status is None:
            return StorageUnavailable(f"{at}: no answer ({type(error).__name__})")
        said = f"{at}: HTTP {status} {code}"
        if code == "NoSuchBucket":
            return StorageUnavailable(f"{said}; create the bucket")
        if status == 412:
            return AlreadyExists(f"{uri} exists")
        if status == 429 or status >= 500 or code in _UNAVAILABLE_CODES:
            return StorageUnavailable(said)
        if status in (401, 403) or code in _CREDENTIAL_CODES:
            return StorageDenied(f"{said}; check the credentials, their rights on the bucket, and the machine's clock")
        if status == 404:
            return NotFound(f"{uri} does not exist")
        return StorageDenied(said)


def _addressing(environment: Mapping[str, str], endpoint: str | None) -> Any:
    """botocore's word for where the bucket's name goes.

    Raises:
        StorageDenied: no such setting.
    """
    chosen = environment.get("CLAAS_S3_ADDRESSING") or "auto"
    if chosen not in ADDRESSING:
        raise StorageDenied(f"CLAAS_S3_ADDRESSING {chosen[:32]!r} must be one of {', '.join(ADDRESSING)}")
    return "path" if chosen == "auto" and endpoint else chosen


def _encryption(environment: Mapping[str, str]) -> dict[str, str]:
    """What every write says of server-side encryption.

    Raises:
        StorageDenied: no such setting, or a key that would not be used.
    """
    mode, key = (environment.get(name) or "" for name in ("CLAAS_S3_ENCRYPTION", "CLAAS_S3_KMS_KEY_ID"))
    if mode not in ENCRYPTION:
        raise StorageDenied(f"CLAAS_S3_ENCRYPTION {mode[:32]!r} must be AES256, aws:kms or empty")
    if key and mode != "aws:kms":
        raise StorageDenied("CLAAS_S3_KMS_KEY_ID needs CLAAS_S3_ENCRYPTION aws:kms: nothing would use the key")
    if not mode:
        return {}
    return {"ServerSideEncryption": mode} | ({"SSEKMSKeyId": key} if key else {})


def _below(prefix: str, starting: str) -> tuple[uris.Location, str]:
    """A folder, and what the keys in it that begin with `starting` begin with."""
    location = uris.parse(prefix)
    return location, (f"{location.key}/" if location.segments else "") + starting


def _split(uri: str) -> tuple[str, str]:
    """(bucket, key) of an object."""
    location = uris.parse(uri)
    if location.scheme != "s3" or not location.segments:
        raise UriInvalid(f"{uri!r} names no object in a bucket")
    return location.bucket, location.key


def _status(error: Exception) -> int | None:
    """HTTP status of an answer; None when there was none."""
    return error.response["ResponseMetadata"].get("HTTPStatusCode") if isinstance(error, ClientError) else None


def _code(error: Exception) -> str:
    return error.response.get("Error", {}).get("Code", "") if isinstance(error, ClientError) else ""
