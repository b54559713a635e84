"""When a call is tried again, and after how long: pure, so that both clients and their tests share it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import httpx

# What the server did not begin to serve, or what stands before it could not reach it.
RETRIED_STATUS: Final = frozenset({429, 502, 503, 504})
# Nothing has been sent: even what must not happen twice may be tried again.
NOT_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


@dataclass(frozen=True)
class Retries:
    """How often and how patiently.

    Attributes:
        attempts: of a call in all; 1 never tries again.
        base_seconds: the first pause is random up to this; it doubles with each.
        cap_seconds: the longest pause. A server that asks for a longer one (Retry-After) is not waited for.
    """

    attempts: int = 4
    base_seconds: float = 0.25
    cap_seconds: float = 30.0
    jitter: Callable[[], float] = field(default=random.random, repr=False)

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.base_seconds < 0 or self.cap_seconds < 0:
            raise ValueError("attempts must be at least 1, base_seconds and cap_seconds at least 0")

    def pause(self, tried: int, retry_after: float | None, left: float) -> float | None:
        """Seconds to wait after `tried` tries; None: give up.

        Args:
            retry_after: what the server asked for, if it did. A little jitter is added, or all whom it told would
                come back at once.
            left: until the call's deadline.
        """
        if tried >= self.attempts:
            return None
        pause = min(self.cap_seconds, self.base_seconds * 2 ** (tried - 1)) * self.jitter()
        if retry_after is not None:
            if retry_after > self.cap_seconds:
                return None
            pause = retry_after + min(pause, self.base_seconds)
        return None if pause >= left else pause


def retry_after_seconds(header: str | None, now: datetime | None = None) -> float | None:
    """The value of a Retry-After header, seconds or a date; None when there is none or it is neither."""
    if not header:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())
