"""Where a namespace may read and write: the storage prefixes of the settings, compared by path segments."""

from __future__ import annotations

import functools
from typing import Final

from claas_operator.settings import Settings
from claas_store.uris import MAX_SEGMENT_BYTES, base_name, version_name, within

# What a status takes as the name of a version.
MAX_VERSION_NAME: Final = 253
# What a step adds to the name of the first version: `-YYYYMMDD-HHMMSS-xxxxxxxx`, and `-a11` with most retries.
_SUFFIX_BYTES: Final = len("-20260101-000000-01234567-a11")


def permitted(uri: str, settings: Settings, namespace: str) -> bool:
    """Whether a version of `namespace` may lie at `uri`, and what is trained from it beside it."""
    return _fits(uri, tuple(settings.prefixes(namespace)))


@functools.lru_cache(16_384)  # every adapter is looked at in every plan
def _fits(uri: str, prefixes: tuple[str, ...]) -> bool:
    if not within(uri, prefixes):
        return False
    longest = len(base_name(uri).encode()) + _SUFFIX_BYTES
    return len(version_name(uri)) <= MAX_VERSION_NAME and longest <= min(MAX_VERSION_NAME, MAX_SEGMENT_BYTES)


def not_permitted(field: str, settings: Settings, namespace: str) -> str:
    """What to do about a uri in `field` that is not permitted."""
    room = f"its last segment at most {MAX_VERSION_NAME - _SUFFIX_BYTES} bytes long"
    return f"{_must_lie_below(field, settings.prefixes(namespace), namespace)}; {room}"


def may_read(uri: str, settings: Settings, namespace: str) -> bool:
    """Whether a request of `namespace` may have its samples in the object at `uri`."""
    return within(uri, settings.prefixes(namespace))


def may_fork(uri: str, settings: Settings, namespace: str) -> bool:
    """Whether an adapter of `namespace` may start from what lies at `uri`: its own, or what it was allowed to fork."""
    return within(uri, [*settings.prefixes(namespace), *settings.fork_prefixes(namespace)])


def may_not_fork(field: str, settings: Settings, namespace: str) -> str:
    """What to do about a uri in `field` that may not be started from."""
    return _must_lie_below(field, [*settings.prefixes(namespace), *settings.fork_prefixes(namespace)], namespace)


def _must_lie_below(field: str, prefixes: list[str], namespace: str) -> str:
    return f"{field} must lie below a storage prefix of namespace {namespace}: {', '.join(prefixes) or 'none'}"
