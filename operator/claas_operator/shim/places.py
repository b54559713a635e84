"""Where the requests that have not ended stand, from what the informer tells: nothing is listed for it."""

from __future__ import annotations

import asyncio
import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from claas_operator import queueing, snapshot
from claas_operator.shim import models, spec
from claas_operator.shim.cluster import Object
from claas_operator.usage import Usage, Used

MANY: Final = 500  # to replay a longer queue takes so long that it must not hold up the other calls


class Places:
    """`seen` and `lost` are the informer's."""

    def __init__(self, weight: Callable[[str], float] = lambda _: 1.0) -> None:
        self._weight, self._usage = weight, Usage()
        self._used: dict[str, Used] = {}  # by request: ended ones count as long as they are there
        self._waiting: dict[str, snapshot.Request] = {}
        self._complete: OrderedDict[str, snapshot.Request] = OrderedDict()  # the latest: what the estimate rests on

    def seen(self, raw: Object) -> None:
        """A request is there, or has changed. One that cannot be parsed is in nobody's way."""
        uid = raw["metadata"]["uid"]
        try:
            request = snapshot.parse(snapshot.Kind.REQUEST, raw, datetime.now(UTC), self._waiting.get(uid))
        except (KeyError, TypeError, ValueError, AttributeError):
            request = None
        self._count(uid, request)
        if isinstance(request, snapshot.Request) and request.ended is None:
            self._waiting[uid] = request
            return
        self._waiting.pop(uid, None)
        if isinstance(request, snapshot.Request) and request.complete:
            self._complete[uid] = request
            if len(self._complete) > queueing.RECENT_STEPS:
                self._complete.popitem(last=False)

    def lost(self, uid: str) -> None:
        """A request is gone."""
        self._waiting.pop(uid, None)
        self._count(uid, None)

    def _count(self, uid: str, request: snapshot.AnyEntry | None) -> None:
        """What the request has used counts for its namespace, once."""
        if (before := self._used.pop(uid, None)) is not None:
            self._usage.remove(before)
        if isinstance(request, snapshot.Request) and request.used_ms:
            self._used[uid] = Used(request.namespace, request.used_ms, request.used_at)
            self._usage.put(self._used[uid], datetime.now(UTC))

    async def of(self, uid: str) -> models.Place | None:
        """Where the request stands now; None: it has ended, or is not known yet."""
        request = self._waiting.get(uid)
        if request is None:
            return None
        everyone, now = [*self._waiting.values(), *self._complete.values()], datetime.now(UTC)
        replay = functools.partial(
            queueing.place, request, everyone, now, weight=self._weight, usage=copy.deepcopy(self._usage)
        )
        return spec.to_place(replay() if len(everyone) < MANY else await asyncio.to_thread(replay))
