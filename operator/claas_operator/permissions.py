"""Where a namespace may read and write: the storage prefixes of the settings, compared by path segments."""

from __future__ import annotations

from typing import Final

from claas_operator.settings import Settings
from claas_store.uris import version_name, within

# What a status takes as the name of a version.
MAX_VERSION_NAME: Final = 253


def permitted(uri: str, settings: Settings, namespace: str) -> bool:
    """Whether a version of `namespace` may lie at `uri`."""
    return within(uri, settings.prefixes(namespace)) and len(version_name(uri)) <= MAX_VERSION_NAME


def not_permitted(field: str, settings: Settings, namespace: str) -> str:
    """What to do about a uri in `field` that is not permitted."""
    return _must_lie_below(field, settings.prefixes(namespace), namespace)


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
