"""One interface over an object store and a folder: objects are written once, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from claas_store import uris
from claas_store.errors import StorageDenied
from claas_store.folder import FolderStore
from claas_store.limits import MAX_OBJECT_BYTES
from claas_store.listing import Entry, Upload
from claas_store.pieces import Pieces

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

    def put(self, uri: str, data: bytes | Pieces, *, if_absent: bool = True) -> None:
        """Writes the object, which readers see whole or not at all.

        Raises:
            AlreadyExists: `if_absent` and another writer's object, whatever its content, lies there.
            StorageUnavailable: the store fails; the object may or may not be there.
            StorageDenied: the store refuses.
        """

    def delete(self, uri: str) -> None:
        """Removes the object; none is fine."""

    def digest(self, uri: str, *, max_bytes: int = MAX_OBJECT_BYTES) -> tuple[str, int]:
        """(sha256, size in bytes) of the object, of which no more than a piece is in memory at a time.

        Raises:
            NotFound, TooLarge, StorageUnavailable, StorageDenied: as `get`.
        """

    def list(self, prefix: str) -> Sequence[tuple[str, int]]:
        """(uri, size in bytes) of every object below the folder `prefix`, sorted; empty when there is none."""

    def entries(self, prefix: str, starting: str = "") -> Sequence[Entry]:
        """The objects below the folder `prefix` whose path in it begins with the characters `starting`, sorted."""

    def uploads(self, prefix: str, starting: str = "") -> Sequence[Upload]:
        """What writers began below the folder `prefix` and did not finish, where the path begins with `starting`."""

    def discard(self, upload: Upload) -> None:
        """Frees what an unfinished upload takes; none is fine."""


def open_store(uri: str) -> Store:
    """The store that `uri` lies in.

    `s3://` takes its settings from boto3's own environment (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_REGION …) and from CLAAS_S3_* (see `claas_store.s3`); `file://` is refused but below the
    folders in CLAAS_FILE_ROOTS (colon-separated).

    Raises:
        UriInvalid: neither scheme.
        StorageDenied: no file roots, or settings that cannot be used.
    """
    if uris.parse(uri).scheme == "s3":
        return _s3(tuple(sorted(s3_environment(os.environ).items())))
    roots = [root for root in os.environ.get(FILE_ROOTS, "").split(":") if root]
    if not roots:
        raise StorageDenied(f"file:// is off: name the folders that may be used in {FILE_ROOTS} (colon-separated)")
    return FolderStore(roots)


def s3_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that say where the object store is and how it is used."""
    return {name: value for name, value in environment.items() if name.startswith(("AWS_", "CLAAS_S3_"))}


@lru_cache(maxsize=4)
def _s3(environment: tuple[tuple[str, str], ...]) -> Store:
    """A client costs about 0.1 s and holds connections: one for each set of settings."""
    from claas_store.s3 import S3Store

    return S3Store(dict(environment))
