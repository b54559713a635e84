"""What the store can refuse, each with its reason of the API and whether the same call may do later.

Messages name the uri, the endpoint and the fix; they never hold a credential or an object's content.
"""

from __future__ import annotations

from typing import ClassVar

from claas_crds.reasons import Reason


class StoreError(Exception):
    """Base of all. `retryable`: the same call may succeed later, without any change by a user."""

    reason: ClassVar[Reason]
    retryable: ClassVar[bool] = False


class UriInvalid(StoreError):
    """Not a uri of ours: scheme, bucket, `..`, empty segments, query."""

    reason = Reason.INVALID_SPEC


class ArgumentInvalid(StoreError):
    """A command line or a setting that cannot work."""

    reason = Reason.INVALID_SPEC


class NotFound(StoreError):
    """No such object, or a folder without a manifest: a version that does not exist."""

    reason = Reason.ADAPTER_INVALID


class VersionCollected(NotFound):
    """The version bears a tombstone: it is being collected, or was; the message says when and why."""

    reason = Reason.VERSION_COLLECTED


class NotTombstoned(StoreError):
    """A version that nobody declared dead must not be deleted."""

    reason = Reason.VERSION_CONFLICT


class AlreadyExists(StoreError):
    """Another writer's object lies at the uri of a conditional put; for a step, the next attempt takes another uri."""

    reason = Reason.VERSION_CONFLICT
    retryable = True


class Occupied(StoreError):
    """Something else lies at the uri where an adapter should be created; a user must decide."""

    reason = Reason.VERSION_CONFLICT


class StorageUnavailable(StoreError):
    """The store does not answer, fails, or lacks the bucket."""

    reason = Reason.STORAGE_UNAVAILABLE
    retryable = True


class StorageDenied(StoreError):
    """The store or our own rules refuse: credentials, rights, a folder outside its roots."""

    reason = Reason.STORAGE_DENIED


class VersionInvalid(StoreError):
    """The version is broken: digest, size, format, keys or shapes; the message names the file."""

    reason = Reason.ADAPTER_INVALID


class TooLarge(VersionInvalid):
    """An object exceeds the bound that its reader set; nothing of it was read."""
