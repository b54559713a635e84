"""How often a tenant may call: a token bucket each, at this replica."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

MAX_BUCKETS: Final = 10_000


class Rates:
    """Buckets that fill with `per_minute` calls and hold `burst` of them. per_minute 0: unlimited."""

    def __init__(self, per_minute: int, burst: int, clock: Callable[[], float]) -> None:
        self._per_second, self._burst, self._clock = per_minute / 60, float(burst), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key -> (calls left, at)

    def wait_seconds(self, key: str) -> float:
        """Takes one call; 0 when there was one, else how long to wait for it."""
        if not self._per_second:
            return 0.0
        now = self._clock()
        left, at = self._buckets.get(key, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._per_second)
        allowed = left >= 1
        self._buckets[key] = (left - 1 if allowed else left, now)
        self._buckets.move_to_end(key)
        while len(self._buckets) > MAX_BUCKETS:  # the longest unused: about full again by now
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._per_second
