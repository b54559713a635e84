"""One interface over an object store and a folder: objects are written once, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from claas_store import uris
from claas_store.errors import StorageDenied
from claas_store.folder import FolderStore
from claas_store.limits import MAX_OBJECT_BYTES

FILE_ROOTS = "CLAAS_FILE_ROOTS"


class Store(Protocol):
    """Objects by uri. Implementations may be used by several threads at once; every call ends within a bounded time."""

    def get(self, uri: str, *, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
        """The object's bytes.

        Raises:
            NotFound: there is none.
            TooLarge: it has more than `max_bytes`; it was not read.
            StorageUnavailable, StorageDenied: the store fails or refuses.
        """

    def put(self, uri: str, data: bytes, *, if_absent: bool = True) -> None:
        """Writes the object, which readers see whole or not at all.

        Raises:
            AlreadyExists: `if_absent` and another writer's object, whatever its content, lies there.
            StorageUnavailable: the store fails; the object may or may not be there.
            StorageDenied: the store refuses.
        """

    def delete(self, uri: str) -> None:
        """Removes the object; none is fine."""

    def list(self, prefix: str) -> Sequence[tuple[str, int]]:
        """(uri, size in bytes) of every object below the folder `prefix`, sorted; empty when there is none."""


def open_store(uri: str) -> Store:
    """The store that `uri` lies in.

    `s3://` takes its settings from boto3's own environment (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_REGION …); `file://` is refused but below the folders in CLAAS_FILE_ROOTS
    (colon-separated).

    Raises:
        UriInvalid: neither scheme.
        StorageDenied: no file roots, or settings that cannot be used.
    """
    if uris.parse(uri).scheme == "s3":
        return _s3(tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))))
    roots = [root for root in os.environ.get(FILE_ROOTS, "").split(":") if root]
    if not roots:
        raise StorageDenied(f"file:// is off: name the folders that may be used in {FILE_ROOTS} (colon-separated)")
    return FolderStore(roots)


@lru_cache(maxsize=4)
def _s3(environment: tuple[tuple[str, str], ...]) -> Store:
    """A client costs about 0.1 s and holds connections: one for each set of settings."""
    from claas_store.s3 import S3Store

    return S3Store(dict(environment))
