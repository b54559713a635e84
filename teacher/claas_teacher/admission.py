"""Who scores next, and who is turned away: a queue counted in tokens.

A request is admitted whole or not at all, by the tokens that are admitted and not done. Its samples then wait for a
turn: the engine gets no more than a window of tokens at once, because what it holds it serves first come, first served.
Outside the window the order is arrival plus what the sample itself costs: a short one overtakes long ones that came a
moment earlier, and none can be overtaken for longer than it would take itself.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from claas_teacher.errors import QueueFull, TeacherRefused

RETRY_AFTER_CAP_SECONDS = 60
FIRST_GUESS_SECONDS_PER_TOKEN = 1e-4  # a 32B on an H100; measured from the first scoring on
NEW_SHARE = 0.2  # of the running mean of seconds a token


class Admission:
    """One event loop's queue.

    Args:
        limit_tokens: admitted and not done, at most; also the largest request.
        window_tokens: given to the engine at once; a larger sample goes alone.
    """

    def __init__(self, limit_tokens: int, window_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_tokens, self.window_tokens = limit_tokens, window_tokens
        self.queued_tokens = 0  # admitted and not done
        self.engine_tokens = 0  # of those, with the engine
        self.seconds_per_token = FIRST_GUESS_SECONDS_PER_TOKEN
        self._clock = clock
        self._heap: list[tuple[float, int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._last_done = clock()

    @contextmanager
    def admitted(self, tokens: int) -> Iterator[None]:
        """Count a request in for as long as it lasts.

        Raises:
            QueueFull: it has to come again later.
            TeacherRefused: it never fits.
        """
        if tokens > self.limit_tokens:
            raise TeacherRefused(
                f"{tokens} tokens in one request, the teacher takes {self.limit_tokens}: send fewer samples at once",
                "PromptTooLong",
                413,
            )
        if self.queued_tokens + tokens > self.limit_tokens:
            wait = math.ceil((self.queued_tokens + tokens - self.limit_tokens) * self.seconds_per_token)
            raise QueueFull(
                f"{self.queued_tokens} tokens wait already, the teacher takes {self.limit_tokens}",
                max(1, min(RETRY_AFTER_CAP_SECONDS, wait)),
            )
        self.queued_tokens += tokens
        try:
            yield
        finally:
            self.queued_tokens -= tokens

    @asynccontextmanager
    async def turn(self, tokens: int) -> AsyncIterator[None]:
        """Wait until the engine may have a sample of so many tokens, and hold its place there."""
        await self._wait_for_turn(tokens)
        started = self._clock()
        try:
            yield
        except BaseException:
            self._leave(tokens)
            raise
        self._measure(tokens, started)
        self._leave(tokens)

    async def _wait_for_turn(self, tokens: int) -> None:
        if not self._heap and self._fits(tokens):
            self.engine_tokens += tokens
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        due = self._clock() + tokens * self.seconds_per_token
        heapq.heappush(self._heap, (due, next(self._numbers), tokens, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # the turn came in the moment in which we left
                self._leave(tokens)
            else:
                granted.cancel()
                self._grant()
            raise

    def _fits(self, tokens: int) -> bool:
        return self.engine_tokens == 0 or self.engine_tokens + tokens <= self.window_tokens

    def _leave(self, tokens: int) -> None:
        self.engine_tokens -= tokens
        self._grant()

    def _grant(self) -> None:
        while self._heap:
            _, _, tokens, granted = self._heap[0]
            if not granted.done() and not self._fits(tokens):
                return  # nobody passes who is next: long ones would starve
            heapq.heappop(self._heap)
            if not granted.done():
                self.engine_tokens += tokens
                granted.set_result(None)

    def _measure(self, tokens: int, started: float) -> None:
        now = self._clock()
        busy = now - max(started, self._last_done)  # the engine works on several; each is charged since the last end
        self._last_done = now
        self.seconds_per_token += NEW_SHARE * (busy / tokens - self.seconds_per_token)
