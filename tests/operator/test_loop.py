"""What the loop lets happen at the same time."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from datetime import UTC, datetime, timedelta

from claas_operator.actions import End, Say
from claas_operator.loop import MAX_TELLING, Loop
from claas_operator.metrics import Metrics
from operatorkit import MemoryApi, kind_of, request, settings


async def test_what_only_tells_leaves_room_for_what_ends() -> None:
    """Two hundred requests are to be told that they have no adapter; one more is cancelled while these writes hang."""
    telling, ending = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        writes = Counter(type(action) for action in loop.snapshot.in_flight.values())
        if writes[Say] >= MAX_TELLING:
            telling.set()
        if writes[End]:
            ending.set()
        await asyncio.Event().wait()

    # In memory, with the same interface.
    loop = Loop(settings(), MemoryApi(pause=hang), Metrics())  # type: ignore[arg-type]
    loop.leader._leads_until, loop._synced = math.inf, True
    long_ago = datetime.now(UTC) - timedelta(minutes=1)

    def see(raw: dict[str, object]) -> None:
        loop.observe(kind_of(raw), {"object": raw})

    for i in range(200):
        see(request(f"r{i}", f"a{i}", created=long_ago))
    turns = asyncio.create_task(loop._turns())
    try:
        async with asyncio.timeout(10):
            await telling.wait()
            see(request("x", "a0", spec={"cancel": True}, created=long_ago))
            await ending.wait()
        told = [action for action in loop.snapshot.in_flight.values() if isinstance(action, Say)]
        assert len(told) == MAX_TELLING
    finally:
        turns.cancel()
        for task in loop._tasks.values():
            task.cancel()
