"""A folder of one machine as an object store: create-if-absent by a hard link, and no way out of its roots.

Every path is walked from its root by directory descriptors without following symbolic links, so a link that is put
there, or swapped in between a check and its use, leads nowhere.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from claas_store import uris
from claas_store.errors import AlreadyExists, NotFound, StorageDenied, StorageUnavailable, StoreError, TooLarge
from claas_store.limits import CHUNK_BYTES, MAX_OBJECT_BYTES
from claas_store.listing import Entry, Upload
from claas_store.pieces import Pieces

_SCRATCH = ".claas-partial-"  # a file in the making; a killed writer leaves it behind, and readers never see it
_PAUSE_SECONDS = 0.01
_TRIES = 50  # of a write into a folder that others are emptying at the same time
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)


class FolderStore:
    """`file://` uris below `roots`; see `claas_store.stores.Store` for the methods.

    Args:
        roots: absolute paths of existing folders.

    Raises:
        StorageDenied: a root is not absolute.
    """

    def __init__(self, roots: Sequence[str]) -> None:
        for root in roots:
            if not root.startswith("/"):
                raise StorageDenied(f"the file root {root!r} is not an absolute path")
        # The file system's own root has no segments: all of it would be open.
        self._roots = [uris.parse(f"file://{os.path.normpath(root)}") for root in roots]

    def get(self, uri: str, *, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
        """See `Store.get`."""
        with self._open(uri, max_bytes) as stream:
            return stream.read(max_bytes)

    def digest(self, uri: str, *, max_bytes: int = MAX_OBJECT_BYTES) -> tuple[str, int]:
        """See `Store.digest`."""
        digest, size = hashlib.sha256(), 0
        with self._open(uri, max_bytes) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        return digest.hexdigest(), size

    def put(self, uri: str, data: bytes | Pieces, *, if_absent: bool = True) -> None:
        """See `Store.put`."""
        for _ in range(_TRIES):
            try:
                return self._put(uri, Pieces.of(data), if_absent)
            except NotFound:  # the folder was emptied, and so removed, between its making and its use
                time.sleep(random.uniform(0, _PAUSE_SECONDS))
        raise StorageUnavailable(f"{uri}: its folder is removed again and again")

    def _put(self, uri: str, data: Pieces, if_absent: bool) -> None:
        with _errors(uri), self._folder(uri, create=True) as (folder, name):
            scratch = f"{_SCRATCH}{uuid.uuid4().hex}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(scratch, flags, 0o644, dir_fd=folder), "wb") as stream:
                try:
                    stream.writelines(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                    if if_absent:
                        os.link(scratch, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
                    else:
                        os.rename(scratch, name, src_dir_fd=folder, dst_dir_fd=folder)
                except FileExistsError:
                    raise AlreadyExists(f"{uri} exists") from None
                finally:
                    with contextlib.suppress(FileNotFoundError):  # renamed
                        os.unlink(scratch, dir_fd=folder)
            os.fsync(folder)

    def delete(self, uri: str) -> None:
        """See `Store.delete`. A folder that it empties goes too, as in an object store."""
        try:
            with _errors(uri), self._folder(uri) as (folder, name):
                os.unlink(name, dir_fd=folder)
        except NotFound:
            return  # a folder without it may be one that somebody is about to write into
        location = uris.parse(uri)
        above = uris.Location("file", "", location.segments[:-1]).object_uri
        with contextlib.suppress(OSError, StoreError), self._folder(above) as (folder, name):
            os.rmdir(name, dir_fd=folder)

    def list(self, prefix: str) -> Sequence[tuple[str, int]]:
        """See `Store.list`. Symbolic links and other special files are no objects."""
        return [(entry.uri, entry.size) for entry in self.entries(prefix)]

    def entries(self, prefix: str, starting: str = "") -> Sequence[Entry]:
        """See `Store.entries`."""
        return [
            Entry(uri, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))
            for uri, status in self._files(prefix, starting)
            if not uri.rpartition("/")[2].startswith(_SCRATCH)
        ]

    def uploads(self, prefix: str, starting: str = "") -> Sequence[Upload]:
        """See `Store.uploads`: files in the making, whose writers were killed or are at work."""
        return [
            Upload(uri, "", datetime.fromtimestamp(status.st_mtime, UTC))
            for uri, status in self._files(prefix, starting)
            if uri.rpartition("/")[2].startswith(_SCRATCH)
        ]

    def discard(self, upload: Upload) -> None:
        """See `Store.discard`."""
        self.delete(upload.uri)

    def _files(self, prefix: str, starting: str) -> Sequence[tuple[str, os.stat_result]]:
        top = uris.normalise(prefix)
        found = []
        with contextlib.suppress(NotFound), _errors(top), self._folder(uris.join(top, "any")) as (folder, _):
            walk = os.fwalk(".", dir_fd=folder, follow_symlinks=False, onerror=_unless_gone)
            for path, folders, names, descriptor in walk:
                if path == ".":
                    folders[:] = [name for name in folders if name.startswith(starting)]
                    names = [name for name in names if name.startswith(starting)]
                for name in names:
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            found.append((top + os.path.normpath(os.path.join(path, name)), status))
        return sorted(found, key=lambda one: one[0])

    @contextlib.contextmanager
    def _open(self, uri: str, max_bytes: int) -> Iterator[BinaryIO]:
        """The object's bytes, as a stream.

        Raises:
            NotFound, TooLarge, StorageDenied, StorageUnavailable: as `Store.get`.
        """
        with _errors(uri), self._folder(uri) as (folder, name):
            # Non-blocking: the open of a FIFO would wait for its writer.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                status = os.fstat(file)
                if not stat.S_ISREG(status.st_mode):
                    raise StorageDenied(f"{uri} is not a regular file")
                if status.st_size > max_bytes:
                    raise TooLarge(f"{uri} has {status.st_size} bytes, at most {max_bytes} are read")
                with open(file, "rb", closefd=False) as stream:
                    yield stream
            finally:
                os.close(file)

    @contextlib.contextmanager
    def _folder(self, uri: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
        """A descriptor of the folder that holds the object, and the object's name in it."""
        location = uris.parse(uri)
        below = [root for root in self._roots if uris.within(uri, [root.folder_uri])]
        if not below:
            raise StorageDenied(f"{uri} lies outside the file roots")
        root = below[0]
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        *parents, name = location.segments[len(root.segments) :]
        # The root itself is the administrator's and may be a link.
        with contextlib.ExitStack() as descriptors:
            try:
                folder = os.open(Path("/", *root.segments), flags)
            except OSError as error:
                raise StorageDenied(f"the file root of {uri} cannot be opened here: {error.strerror}") from None
            descriptors.callback(os.close, folder)
            for segment in parents:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(segment, 0o755, dir_fd=folder)
                        os.fsync(folder)
                folder = os.open(segment, flags | os.O_NOFOLLOW, dir_fd=folder)
                descriptors.callback(os.close, folder)
            yield folder, name


def _unless_gone(error: OSError) -> None:
    if error.errno != errno.ENOENT:
        raise error


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turns an OSError into the store's own."""
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError:
        raise NotFound(f"{uri} does not exist") from None
    except OSError as error:
        if error.errno in _DENIED:
            raise StorageDenied(f"{uri}: {error.strerror} (symbolic links are not followed)") from None
        raise StorageUnavailable(f"{uri}: {error.strerror}") from None
