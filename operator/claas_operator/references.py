"""Who needs which version: what collection and deletion must leave alone, whoever's it is."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable

from claas_operator.snapshot import Adapter, Request, Snapshot
from claas_store.errors import UriInvalid
from claas_store.uris import Location, is_step_output, next_version_uri, parse

_ANY_TIME, _ANY_UID = "1970-01-01T00:00:00Z", "00000000"


class References:
    """Every version that an adapter or an unended request names, and by whom.

    Adapters name their own versions, their `spec.initFrom` and the origins in their histories. Requests that have not
    ended name what they were bound to, a bare one its `loraUri`, and what they reported.
    """

    def __init__(self, adapters: Iterable[Adapter], requests: Iterable[Request]) -> None:
        self._owners: dict[str, set[str]] = defaultdict(set)
        self._starts: dict[str, set[str]] = defaultdict(set)
        for adapter in adapters:
            storage = [adapter.spec.storage.uri] if adapter.spec else []
            for uri in (adapter.status.uri, *storage, *(entry.uri for entry in adapter.status.history)):
                self._owners[_key(uri)].add(adapter.uid)
            for uri in (adapter.init_from, *(entry.origin for entry in adapter.status.history)):
                self._starts[_key(uri)].add(adapter.uid)
        for request in requests:
            parent, result = request.status.parent, request.status.result
            for uri in (request.lora_uri, parent.uri if parent else "", result.lora_uri if result else ""):
                self._owners[_key(uri)].add(request.uid)

    @classmethod
    def of(cls, snapshot: Snapshot) -> References:
        """As far as the snapshot knows."""
        return cls(snapshot.adapters.values(), snapshot.unended())

    def needed(self, uri: str, adapter: Adapter) -> bool:
        """Whether another object needs a version of `adapter`, or any adapter, also this one, began as it."""
        return bool(self._owners[_key(uri)] - {adapter.uid} or self._starts[_key(uri)])

    def needed_by_others(self, uri: str, adapter: Adapter) -> bool:
        """Whether an object other than `adapter` needs the version."""
        return bool((self._owners[_key(uri)] | self._starts[_key(uri)]) - {adapter.uid})

    def siblings(self, root: str, adapter: Adapter) -> frozenset[str]:
        """Names of the versions of the family of `root` that objects other than `adapter` need."""
        wanted, folder = family(root), _key(root).rpartition("/")[0] + "/"
        beside_it = [uri for uri in {*self._owners, *self._starts} if uri.startswith(folder)]
        return frozenset(
            uri.rpartition("/")[2]
            for uri in beside_it
            if family(uri) == wanted and self.needed_by_others(uri, adapter)
            # Where the adapter began at another's version, that one's own uri is beside it, and never its to delete.
            if uri == _key(root) or is_step_output(uri)
        )


def family(uri: str) -> str:
    """What a version shares with all that is trained from it, step by step: the folder beside it and its name without
    our suffix; empty for what is no version's uri."""
    try:
        return next_version_uri(uri, _ANY_TIME, _ANY_UID, 1)
    except UriInvalid:
        return ""


def beside(root: str, name: str) -> str:
    """The uri of the version `name` of the adapter whose own uri is `root`.

    Raises:
        UriInvalid: `root` is none.
    """
    location = parse(root)
    return Location(location.scheme, location.bucket, (*location.segments[:-1], name)).folder_uri


@functools.lru_cache(maxsize=65_536)
def _key(uri: str) -> str:
    """One spelling, without the last slash; empty for what is no uri."""
    try:
        return parse(uri).object_uri
    except UriInvalid:
        return ""
