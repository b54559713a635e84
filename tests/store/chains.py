"""Adapters and their later versions as a worker would write them, without one."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

from claas_store import uris
from claas_store.stores import open_store
from claas_store.version import CONFIG, Manifest, ParentVersion, Version, write_version
from store import examples

START = datetime(2026, 11, 23, 19, 10, 7, tzinfo=UTC)


def first(uri: str, adapter_uid: str = examples.UID) -> Version:
    """An adapter's first version."""
    manifest = Manifest(base_model=examples.BASE, adapter_uid=adapter_uid)
    return write_version(uri, examples.CONFIG, examples.tensors(), None, manifest)


def request_uid(number: int) -> str:
    """The uid of the `number`th request."""
    return f"{number:08x}-0000-4000-8000-000000000000"


def step_uri(parent_uri: str, number: int, attempt: int = 1) -> str:
    """Where the `number`th request writes."""
    created = (START + timedelta(minutes=number)).isoformat()
    return uris.next_version_uri(parent_uri, created, request_uid(number), attempt)


def step(parent: Version, number: int, *, adapter_uid: str = examples.UID, attempt: int = 1) -> Version:
    """What the `number`th request makes of `parent`; without an adapter uid, a request that names a bare uri."""
    manifest = examples.manifest(attempt).model_copy(
        update={
            "parent": ParentVersion(uri=parent.uri, sha256=parent.manifest_sha256),
            "request_uid": request_uid(number),
            "adapter_uid": adapter_uid,
        }
    )
    return write_version(
        step_uri(parent.uri, number, attempt), parent.config, examples.tensors(number), examples.optimizer(), manifest
    )


def killed_step(parent: Version, number: int) -> str:
    """What a step leaves that was killed before its manifest; gives the uri."""
    uri = step_uri(parent.uri, number)
    open_store(uri).put(uris.join(uri, CONFIG), b"{}")
    return uri


def name(version: Version | str) -> str:
    """The name of a version."""
    return uris.version_name(version if isinstance(version, str) else version.uri)


def names_in(home: str) -> list[str]:
    """The folders in `home` that hold anything."""
    return sorted({uri.removeprefix(home).split("/")[0] for uri, _ in open_store(home).list(home)})


def files_of(uri: str) -> list[str]:
    """The names of the objects in a version's folder."""
    return [found.removeprefix(uri) for found, _ in open_store(uri).list(uri)]


def age(uri: str, seconds: float) -> None:
    """Makes everything in a folder of a file store look that much older."""
    folder = Path(unquote(urlsplit(uri).path))
    for path in folder.rglob("*"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))
