"""Uris of versions: `s3://bucket/path/` and `file:///path/`, compared and built by path segments.

Segments are taken as they are: nothing is percent-decoded, so a uri names the same object to us, to boto3 and to a
person. What two readers could understand differently (`..`, `.`, empty segments, queries, fragments, backslashes,
control characters, dots and slashes in percent-encoding, once or more often) is refused.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from claas_store.errors import UriInvalid

MAX_URI_CHARACTERS = 1024
MAX_URI_BYTES = 3072  # with which an answer of an operation is still whole; an object store takes no more than 1,100
MAX_SEGMENT_BYTES = 255  # what a file system takes

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_OWN_SUFFIX = re.compile(r"(?P<base>.+)-\d{8}-\d{6}-(?P<uid>[0-9a-f]{8})(-a([2-9]|[1-9]\d+))?", re.ASCII | re.DOTALL)
_ENCODED = re.compile(r"%(25)*(2e|2f|5c)", re.IGNORECASE)  # a proxy before the store may decode it
_UID = re.compile(r"[0-9a-f]{8}")
_REMEMBERED_URIS = 16_384  # the operator looks at every adapter's again and again


@dataclass(frozen=True)
class Location:
    """A parsed uri. `segments` may be empty: the bucket or the file system's root."""

    scheme: Literal["s3", "file"]
    bucket: str
    segments: tuple[str, ...]

    @property
    def key(self) -> str:
        """Path without a slash at either end."""
        return "/".join(self.segments)

    @property
    def object_uri(self) -> str:
        """The uri of an object: no trailing slash."""
        return f"{self.scheme}://{self.bucket}/{self.key}"

    @property
    def folder_uri(self) -> str:
        """The uri of a folder: one trailing slash."""
        return self.object_uri + ("/" if self.segments else "")


@functools.lru_cache(_REMEMBERED_URIS)
def parse(uri: str) -> Location:
    """Takes a uri of an object or a folder (with or without its trailing slash) apart.

    Raises:
        UriInvalid: it is none, or could be read in two ways.
    """
    shown = repr(uri[:200])
    if len(uri) > MAX_URI_CHARACTERS:
        raise UriInvalid(f"{shown}… is longer than {MAX_URI_CHARACTERS} characters")
    if len(uri.encode(errors="replace")) > MAX_URI_BYTES:
        raise UriInvalid(f"{shown}… is longer than {MAX_URI_BYTES} bytes")
    scheme, separator, rest = uri.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme == "s3" and separator:
        if not _BUCKET.fullmatch(bucket) or ".." in bucket:
            raise UriInvalid(f"{shown}: the bucket must have 3 to 63 characters of a-z, 0-9, '-' and '.'")
    elif scheme != "file" or not separator or bucket or not rest:
        raise UriInvalid(f"{shown} must be s3://BUCKET/PATH/ or file:///PATH/")
    segments = tuple(path.removesuffix("/").split("/")) if path not in ("", "/") else ()
    if path == "/" or any(segment in ("", ".", "..") for segment in segments):
        raise UriInvalid(f"{shown} has an empty, '.' or '..' segment")
    if any(character in "?#\\" or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in path):
        raise UriInvalid(f"{shown} has a query, a fragment, a backslash or a control character")
    if _ENCODED.search(path):
        raise UriInvalid(f"{shown} has a dot, a slash or a backslash in percent-encoding")
    if any(len(segment.encode()) > MAX_SEGMENT_BYTES for segment in segments):
        raise UriInvalid(f"{shown} has a segment of more than {MAX_SEGMENT_BYTES} bytes")
    return Location("s3" if scheme == "s3" else "file", bucket, segments)


def normalise(uri: str) -> str:
    """The one spelling of a version's uri: one trailing slash, at least one segment.

    Raises:
        UriInvalid: see `parse`; or it names a bucket or the root of the file system.
    """
    location = parse(uri)
    if not location.segments:
        raise UriInvalid(f"{uri!r} names no folder: add a path, for example {location.folder_uri}my-adapter/")
    return location.folder_uri


def join(folder: str, name: str) -> str:
    """The uri of the object `name` in `folder`.

    Raises:
        UriInvalid: the result is not a uri, or `name` is more than one segment.
    """
    if not name or "/" in name:
        raise UriInvalid(f"{name!r} is not a plain file name")
    return parse(f"{normalise(folder)}{name}").object_uri


def version_name(uri: str) -> str:
    """The last segment: what people call the version."""
    return parse(normalise(uri)).segments[-1]


def is_step_output(uri: str) -> bool:
    """Whether the name ends in the suffix that `next_version_uri` gives."""
    return _OWN_SUFFIX.fullmatch(version_name(uri)) is not None


def request_of(name: str) -> str:
    """The first 8 characters of the uid of the request that a version of this name was made by; empty for a first."""
    own = _OWN_SUFFIX.fullmatch(name)
    return own["uid"] if own else ""


def next_version_uri(parent_uri: str, request_created: str, request_uid: str, attempt: int) -> str:
    """Where attempt `attempt` of a request writes: beside its parent, our own suffix replaced.

    Args:
        request_created: the request's `metadata.creationTimestamp`, RFC 3339.
        request_uid: its `metadata.uid`, of which the first 8 characters are used.
        attempt: counts from 1; from the second on the name says so, so two attempts never share a folder.

    Raises:
        UriInvalid: a bad parent uri, or the name would be longer than a segment may be.
        ValueError: not a time, a uid or an attempt.
    """
    created = datetime.fromisoformat(request_created)
    if created.tzinfo is None:
        raise ValueError(f"{request_created!r} has no time zone")
    if attempt < 1:
        raise ValueError(f"attempt {attempt}: the first is 1")
    if not _UID.fullmatch(request_uid[:8]):
        raise ValueError(f"{request_uid[:64]!r} does not begin with 8 hexadecimal digits, as a uid does")
    parent = parse(normalise(parent_uri))
    own = _OWN_SUFFIX.fullmatch(parent.segments[-1])
    name = own["base"] if own else parent.segments[-1]
    name += f"-{created.astimezone(UTC):%Y%m%d-%H%M%S}-{request_uid[:8]}" + (f"-a{attempt}" if attempt > 1 else "")
    return normalise(Location(parent.scheme, parent.bucket, (*parent.segments[:-1], name)).folder_uri)


def beside(uri: str, name: str) -> str:
    """The version `name` of the adapter whose first version lies at `uri`: the first itself, or one of its suffixes.

    Raises:
        UriInvalid: a bad uri, or `name` is neither: what lies there is another's.
    """
    root = parse(normalise(uri))
    if not is_beside(uri, name):
        raise UriInvalid(f"{name[:253]!r} is no name of a version of {root.folder_uri}")
    return normalise(Location(root.scheme, root.bucket, (*root.segments[:-1], name)).folder_uri)


def is_beside(uri: str, name: str) -> bool:
    """Whether a folder of this name, in the same folder as `uri`, can hold a version of the same adapter."""
    own = _OWN_SUFFIX.fullmatch(name)
    return name == version_name(uri) or (own is not None and own["base"] == base_name(uri))


def base_name(uri: str) -> str:
    """What the names of all versions beside `uri` begin with: its own name without our suffix."""
    name = version_name(uri)
    own = _OWN_SUFFIX.fullmatch(name)
    return own["base"] if own else name


def parent_folder(uri: str) -> str:
    """The folder that the version at `uri` lies in: a bucket (`s3://bucket/`), perhaps, or the file system's root."""
    location = parse(normalise(uri))
    return Location(location.scheme, location.bucket, location.segments[:-1]).folder_uri


def within(uri: str, prefixes: Iterable[str]) -> bool:
    """Whether `uri` lies at least one segment below one of `prefixes`; False for what is not a uri.

    Raises:
        UriInvalid: a prefix is none (a setting, not a user's input).
    """
    roots = [parse(prefix) for prefix in prefixes]
    try:
        location = parse(uri)
    except UriInvalid:
        return False
    return any(
        (location.scheme, location.bucket) == (root.scheme, root.bucket)
        and len(location.segments) > len(root.segments)
        and location.segments[: len(root.segments)] == root.segments
        for root in roots
    )
