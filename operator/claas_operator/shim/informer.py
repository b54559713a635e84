"""One list and one watch of a kind, in all namespaces, for every caller that waits.

A caller subscribes to one uid and is woken when its object changes or goes: no call polls, and none has a watch of its
own. What is kept of an object is up to `keep`; None keeps nothing but its uid and version, and whoever asks later
reads the object itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from claas_operator.api import FAILURES, describe
from claas_operator.shim.cluster import Cluster, Gone, Object
from claas_operator.snapshot import Kind

log = logging.getLogger(__name__)

PAGE: Final = 250
BACKOFF_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0)


class Subscription:
    """News of one object. What came between two looks is skipped: only the newest state counts."""

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self.latest: Object | None = None
        self.gone = False  # deleted
        self.closed = False  # nobody waits any more: the caller has left, or this process ends

    def tell(self, latest: Object | None) -> None:
        """The object's newest state; None: it is gone."""
        self.latest, self.gone = latest or self.latest, latest is None
        self._news.set()

    def close(self) -> None:
        """Ends the wait."""
        self.closed = True
        self._news.set()

    async def news(self) -> None:
        """Returns when something was told since the last call."""
        await self._news.wait()
        self._news.clear()


@dataclass(slots=True)
class _Entry:
    version: int
    kept: Object | None


class Informer:
    """`run` it for ever; `synced` is set when everything there is has been seen once.

    Args:
        trim: an object without what nobody waits for (samples, history); told to subscribers.
        keep: whether a trimmed object is kept for those who subscribe later.
        seen: called with every raw object that is new or has changed.
        lost: called with the uid of every object that is gone.
    """

    def __init__(
        self,
        cluster: Cluster,
        kind: Kind,
        trim: Callable[[Object], Object],
        keep: Callable[[Object], bool],
        seen: Sequence[Callable[[Object], None]] = (),
        lost: Sequence[Callable[[str], None]] = (),
    ) -> None:
        self._cluster, self._kind = cluster, kind
        self._trim, self._keep, self._seen, self._lost = trim, keep, seen, lost
        self._entries: dict[str, _Entry] = {}
        self._subscriptions: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._version = 0  # up to which everything was heard
        self.synced = asyncio.Event()
        self.connected = False
        self.closed = False

    @contextlib.contextmanager
    def subscribe(self, uid: str) -> Iterator[Subscription]:
        """News of one object, from now on; told at once what is known by now."""
        subscription = Subscription()
        self._subscriptions[uid].add(subscription)
        entry = self._entries.get(uid)
        if entry is not None and entry.kept is not None:
            subscription.tell(entry.kept)
        if self.closed:
            subscription.close()
        try:
            yield subscription
        finally:
            self._subscriptions[uid].discard(subscription)
            if not self._subscriptions[uid]:
                del self._subscriptions[uid]

    def over(self, raw: Object) -> bool:
        """Whether an object, read as `raw` before, was seen in a state that is not kept, or go: read it."""
        entry = self._entries.get(raw["metadata"]["uid"])
        if entry is None:
            return self._version >= int(raw["metadata"]["resourceVersion"])
        return entry.kept is None

    @property
    def waiting(self) -> int:
        """Subscriptions now."""
        return sum(map(len, self._subscriptions.values()))

    def close(self) -> None:
        """Ends every wait, now and later: this process ends."""
        self.closed = True
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.close()

    async def run(self) -> None:
        """Lists and watches, for ever."""
        failures = 0
        while True:
            try:
                version = await self._list()
                failures = 0
                await self._watch(version)
            except Gone:
                log.info("watch too old, listing again", extra={"kind": self._kind.value})
            except FAILURES as error:
                self._report(error)
                await asyncio.sleep(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)])
                failures += 1

    async def _list(self) -> str:
        """Everything there is, page by page; the version to watch from."""
        known, listed, token = set(self._entries), set[str](), ""
        while True:
            items, token, version = await self._cluster.page(self._kind, limit=PAGE, token=token)
            for raw in items:
                listed.add(raw["metadata"]["uid"])
                self._put(raw)
            if not token:
                break
        for uid in (known | set(self._subscriptions)) - listed:
            # A subscriber's object may be younger than the list; the watch tells of it then.
            if uid in known:
                self._remove(uid)
        self.connected, self._version = True, int(version)
        self.synced.set()
        return version

    async def _watch(self, version: str) -> None:
        """Goes on from `version` over ends and failures of the connection, until it is too old."""
        failures = 0
        while True:
            try:
                async for kind, raw in self._cluster.watch(self._kind, version):
                    self.connected, failures = True, 0
                    version = raw["metadata"]["resourceVersion"]
                    if kind == "DELETED":
                        self._remove(raw["metadata"]["uid"])
                    elif kind != "BOOKMARK":
                        self._put(raw)
                    self._version = int(version)
            except FAILURES as error:
                self._report(error)
                await asyncio.sleep(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)])
                failures += 1

    def _report(self, error: BaseException) -> None:
        self.connected = False
        log.warning("watch interrupted", extra={"kind": self._kind.value, "error": describe(error)})

    def _put(self, raw: Object) -> None:
        uid, version = raw["metadata"]["uid"], int(raw["metadata"]["resourceVersion"])
        entry = self._entries.get(uid)
        if entry is not None and version <= entry.version:
            return
        for seen in self._seen:
            seen(raw)
        trimmed = self._trim(raw)
        self._entries[uid] = _Entry(version, trimmed if self._keep(trimmed) else None)
        for subscription in self._subscriptions.get(uid, ()):
            subscription.tell(trimmed)

    def _remove(self, uid: str) -> None:
        self._entries.pop(uid, None)
        for lost in self._lost:
            lost(uid)
        for subscription in self._subscriptions.get(uid, ()):
            subscription.tell(None)
