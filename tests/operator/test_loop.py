"""What the loop lets happen at the same time."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from datetime import UTC, datetime, timedelta

from claas_operator.actions import End, Say
from claas_operator.loop import TELLING_SECONDS, Loop
from claas_operator.metrics import Metrics
from claas_operator.plan import MAX_TELLING
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


async def test_while_there_is_work_what_only_tells_is_written_rarely() -> None:
    """Two hundred wait; with each of them that is told, one more is cancelled."""
    told: list[float] = []
    enough = asyncio.Event()

    async def write() -> None:
        writes = Counter(type(action) for action in loop.snapshot.in_flight.values())
        if writes[Say] > len(told):
            told.append(asyncio.get_running_loop().time())
            cancel()
        if len(told) == 6:
            enough.set()
        await asyncio.Event().wait()

    loop = Loop(settings(), MemoryApi(pause=write), Metrics())  # type: ignore[arg-type]
    loop.leader._leads_until, loop._synced = math.inf, True
    long_ago = datetime.now(UTC) - timedelta(minutes=1)
    cancelled = itertools.count()

    def see(raw: dict[str, object]) -> None:
        loop.observe(kind_of(raw), {"object": raw})

    def cancel() -> None:
        see(request(f"x{next(cancelled)}", "a0", spec={"cancel": True}, created=long_ago))

    cancel()
    turns = asyncio.create_task(loop._turns())
    try:
        await asyncio.sleep(0)  # the end of the first one begins
        for i in range(200):
            see(request(f"r{i}", f"a{i}", created=long_ago))
        async with asyncio.timeout(10):
            await enough.wait()
    finally:
        turns.cancel()
        for task in loop._tasks.values():
            task.cancel()
    between = [later - earlier for earlier, later in itertools.pairwise(told)]
    assert min(between) > 0.9 * TELLING_SECONDS


async def test_what_was_heard_while_a_renewal_was_late_is_done_once_it_has_come() -> None:
    """A process that could not run for a moment renews its Lease, and nobody else has taken it: nobody tells that."""
    ending = asyncio.Event()

    async def write() -> None:
        ending.set()
        await asyncio.Event().wait()

    loop = Loop(settings(timings={"leaderLeaseSeconds": 1}), MemoryApi(pause=write), Metrics())  # type: ignore[arg-type]
    loop.leader._leads_until, loop._synced = 0.0, True
    turns = asyncio.create_task(loop._turns())
    try:
        raw = request("x", "a", spec={"cancel": True})
        loop.observe(kind_of(raw), {"object": raw})
        for _ in range(5):
            await asyncio.sleep(0)
        assert not loop._wake.is_set() and not loop._tasks, "it was heard, and we do not lead just now"
        loop.leader._leads_until = math.inf
        async with asyncio.timeout(10):
            await ending.wait()
    finally:
        turns.cancel()
        for task in loop._tasks.values():
            task.cancel()


async def test_a_relist_that_ends_while_a_renewal_is_late_counts() -> None:
    """The next one comes in a minute, and nothing would be done until then."""
    loop = Loop(settings(), MemoryApi(), Metrics())  # type: ignore[arg-type]
    loop._leadership_changed(True)
    loop.leader._leads_until = 0.0
    await loop._relist()
    assert not loop._acting()
    loop.leader._leads_until = math.inf
    assert loop._acting()
    loop._leadership_changed(False)
    await loop._relist()
    assert not loop._acting(), "who does not lead acts on no list"
