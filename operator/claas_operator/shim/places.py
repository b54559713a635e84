"""Where the requests that have not ended stand, from what the informer tells: nothing is listed for it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Final

from claas_operator import queueing, snapshot
from claas_operator.shim import models, spec
from claas_operator.shim.cluster import Object

MANY: Final = 500  # to replay a longer queue takes so long that it must not hold up the other calls


class Places:
    """`seen` and `lost` are the informer's."""

    def __init__(self) -> None:
        self._waiting: dict[str, snapshot.Request] = {}
        self._complete: OrderedDict[str, snapshot.Request] = OrderedDict()  # the latest: what the estimate rests on

    def seen(self, raw: Object) -> None:
        """A request is there, or has changed. One that cannot be parsed is in nobody's way."""
        uid = raw["metadata"]["uid"]
        try:
            request = snapshot.parse(snapshot.Kind.REQUEST, raw, datetime.now(UTC), self._waiting.get(uid))
        except (KeyError, TypeError, ValueError, AttributeError):
            request = None
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

    async def of(self, uid: str) -> models.Place | None:
        """Where the request stands now; None: it has ended, or is not known yet."""
        request = self._waiting.get(uid)
        if request is None:
            return None
        everyone, now = [*self._waiting.values(), *self._complete.values()], datetime.now(UTC)
        if len(everyone) < MANY:
            return spec.to_place(queueing.place(request, everyone, now))
        return spec.to_place(await asyncio.to_thread(queueing.place, request, everyone, now))
