"""Which uris a namespace may use, compared by path segments. Pure text: nothing here touches a store."""

from __future__ import annotations

import re
from collections.abc import Iterable

from claas_crds.model import URI_PATTERN


def segments(uri: str) -> list[str] | None:
    """Scheme, bucket and path segments of a uri; None when it is none that CLaaS takes."""
    if not re.fullmatch(URI_PATTERN, uri):
        return None
    scheme, _, rest = uri.partition("://")
    parts = rest.strip("/").split("/")
    return None if "." in parts or ".." in parts else [scheme, *parts]


def permitted(uri: str, prefixes: Iterable[str]) -> bool:
    """Whether `uri` lies at least one segment below one of `prefixes`. s3://b/team is no prefix of s3://b/team2/x."""
    there = segments(uri)
    if there is None:
        return False
    for prefix in prefixes:
        # A whole bucket (s3://bucket/) is a fair prefix, though no version could lie at it.
        scheme, _, rest = prefix.partition("://")
        above = [scheme, *(part for part in rest.split("/") if part)]
        if len(there) > len(above) and there[: len(above)] == above:
            return True
    return False


def version_name(uri: str) -> str:
    """A version's name: the last segment of its uri."""
    return uri.rstrip("/").rpartition("/")[2]
