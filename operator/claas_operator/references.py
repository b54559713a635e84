"""Who needs which version: what collection and deletion must leave alone, whoever's it is.

The snapshot keeps the `Index` as objects come and go, so that a plan looks names up instead of reading every history.
`References` is the index under the settings: what an object only asks for counts where its namespace may have it, or
a refused object would hold another tenant's versions for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from claas_operator.permissions import may_fork, permitted
from claas_operator.settings import Settings
from claas_store.errors import UriInvalid
from claas_store.uris import Location, base_name, is_step_output, parent_folder, parse

if TYPE_CHECKING:
    from claas_operator.snapshot import Adapter, Request


class How(Enum):
    """In which way an object names a version."""

    HAS = "it is, or was, its head, or a worker was bound to it"
    BEGAN = "its history says that it began there"
    WANTS = "it asks to have it: permitted within its namespace's prefixes"
    WANTS_TO_BEGIN = "it asks to begin there: permitted where it may fork"


@dataclass(frozen=True, slots=True)
class Use:
    """One object that names a version."""

    uid: str
    namespace: str
    how: How
    bare: str = ""  # name of the request, if it names no adapter


@dataclass
class Index:
    """Every version that an adapter or an unended request names, and by whom; kept as objects come and go.

    Adapters name their own versions, their `spec.initFrom` and the origins in their histories. Requests that have not
    ended name what they were bound to, a bare one its `loraUri`, and what they reported.
    """

    _uses: dict[str, set[Use]] = field(default_factory=dict)  # by key
    _families: dict[str, set[str]] = field(default_factory=dict)  # keys
    _named: dict[str, set[tuple[str, Use]]] = field(default_factory=dict)  # keys and uses by the object's uid

    def put_adapter(self, adapter: Adapter) -> None:
        """An adapter came, or has changed."""
        has, began = (Use(adapter.uid, adapter.namespace, how) for how in (How.HAS, How.BEGAN))
        exists = adapter.status.head_seq > 0
        wants = has if exists else Use(adapter.uid, adapter.namespace, How.WANTS)
        wants_to_begin = began if exists else Use(adapter.uid, adapter.namespace, How.WANTS_TO_BEGIN)
        named = [(adapter.status.uri, has), (adapter.init_from, wants_to_begin)]
        named += [(adapter.spec.storage.uri, wants)] if adapter.spec else []
        for entry in adapter.status.history:
            named += [(entry.uri, has), (entry.origin, began)]
        self._put(adapter.uid, named)

    def put_request(self, request: Request) -> None:
        """A request came that has not ended, or has changed."""
        bare = request.name if request.bare else ""
        has, wants = (Use(request.uid, request.namespace, how, bare) for how in (How.HAS, How.WANTS))
        parent, result = request.status.parent, request.status.result
        named = [(request.lora_uri, wants), (parent.uri if parent else "", has)]
        # A worker wrote it, in a tenant's namespace perhaps.
        named += [(result.lora_uri, wants)] if result else []
        self._put(request.uid, named)

    def _put(self, uid: str, named: list[tuple[str, Use]]) -> None:
        """Only what is new and what is gone costs: a history of a thousand entries comes again with every step."""
        keys = {(key, use) for uri, use in named if uri and (key := _key(uri))}
        known: Set[tuple[str, Use]] = self._named.get(uid, frozenset())
        for key, use in keys - known:
            if key not in self._uses:
                self._uses[key] = set()
                self._families.setdefault(family(key), set()).add(key)
            self._uses[key].add(use)
        self._drop(known - keys)
        if keys:
            self._named[uid] = keys
        else:
            self._named.pop(uid, None)

    def remove(self, uid: str) -> None:
        """The object is gone, or has ended."""
        self._drop(self._named.pop(uid, frozenset()))

    def _drop(self, named: Set[tuple[str, Use]]) -> None:
        for key, use in named:
            uses = self._uses[key]
            uses.discard(use)
            if uses:
                continue
            del self._uses[key]
            keys = self._families[family(key)]
            keys.discard(key)
            if not keys:
                del self._families[family(key)]

    def uses(self, key: str) -> Iterator[Use]:
        """Who names the version of that key."""
        return iter(self._uses.get(key, ()))

    def relatives(self, root: str) -> Iterator[str]:
        """Keys of all versions of the family of `root` that somebody names."""
        return iter(self._families.get(family(root), ()))


@dataclass(frozen=True)
class References:
    """Who needs which version, by an index and the permissions of the settings."""

    index: Index
    settings: Settings

    def _uses(self, key: str) -> Iterator[Use]:
        return (use for use in self.index.uses(key) if self._counts(use, key))

    def _counts(self, use: Use, key: str) -> bool:
        match use.how:
            case How.WANTS:
                return permitted(key, self.settings, use.namespace)
            case How.WANTS_TO_BEGIN:
                return may_fork(key, self.settings, use.namespace)
            case _:
                return True

    def needed(self, uri: str, adapter: Adapter) -> bool:
        """Whether another object needs a version of `adapter`, or any adapter, also this one, began as it."""
        begins = (How.BEGAN, How.WANTS_TO_BEGIN)
        return any(use.uid != adapter.uid or use.how in begins for use in self._uses(_key(uri)))

    def siblings(self, root: str, adapter: Adapter) -> frozenset[str]:
        """Names of the versions of the family of `root` that objects other than `adapter` need."""
        own = _key(root)
        return frozenset(
            key.rpartition("/")[2]
            for key in self.index.relatives(root)
            # Where the adapter began at another's version, that one's own uri is beside it, and never its to delete.
            if (key == own or is_step_output(key)) and any(use.uid != adapter.uid for use in self._uses(key))
        )

    def bare(self, root: str) -> dict[str, str]:
        """Bare requests, unended, that train a version of the family of `root` or wait to: their names by uid."""
        found = (use for key in self.index.relatives(root) for use in self._uses(key) if use.bare)
        return {use.uid: use.bare for use in found}


def family(uri: str) -> str:
    """What a version shares with all that is trained from it, step by step: the folder beside it and its name without
    our suffix; empty for what is no version's uri."""
    try:
        return f"{parent_folder(uri)}/{base_name(uri)}"
    except UriInvalid:
        return ""


def beside(root: str, name: str) -> str:
    """The uri of the version `name` of the adapter whose own uri is `root`.

    Raises:
        UriInvalid: `root` is none.
    """
    location = parse(root)
    return Location(location.scheme, location.bucket, (*location.segments[:-1], name)).folder_uri


def _key(uri: str) -> str:
    """One spelling, without the last slash; empty for what is no uri of a version."""
    try:
        location = parse(uri)
    except UriInvalid:
        return ""
    return location.object_uri if location.segments else ""
