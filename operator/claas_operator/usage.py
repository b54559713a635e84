"""What each namespace has used of the workers, from what the requests say: the ground of fair shares and quotas.

A request's `status.gpuMs` counts at the minute of its end; of one that goes on after a failed attempt, at the minute
when it was bound anew. So whoever has the same requests has the same numbers: a restarted operator, another leader, and
the command that computes a place in the queue. A request that is deleted takes what it used along; with a quota, its
time to live does not begin before its day is over (`plan`).

Sums are whole milliseconds by the minute, exact in any order of coming and going; older than a day is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from claas_operator.snapshot import Request

DAY_MINUTES: Final = 24 * 60
# What a namespace used so long ago counts half.
HALF_LIFE_MINUTES: Final = 10
# A request's cost before any is known. Only a namespace's turns depend on it, all alike.
UNKNOWN_MS: Final = 1000.0


class _Used(Protocol):
    """What a namespace has used, and when that was told: of a request, or kept of one."""

    @property
    def namespace(self) -> str: ...
    @property
    def used_ms(self) -> int: ...
    @property
    def used_at(self) -> datetime: ...


class Used(NamedTuple):
    """What is kept of a request."""

    namespace: str
    used_ms: int
    used_at: datetime


@dataclass
class _Minute:
    ms: int = 0
    requests: int = 0


@dataclass
class Usage:
    """Milliseconds of workers by namespace and minute."""

    _minutes: dict[str, dict[int, _Minute]] = field(default_factory=dict)
    # Decayed sums of the minute `_at`: (milliseconds, requests) by namespace.
    _decayed: dict[str, tuple[float, float]] = field(default_factory=dict)
    _at: int = 0

    def put(self, request: _Used, now: datetime) -> None:
        """A request came, or has changed."""
        minute = _minute(request.used_at)
        if request.used_ms > 0 and minute > _minute(now) - DAY_MINUTES:
            slot = self._minutes.setdefault(request.namespace, {}).setdefault(minute, _Minute())
            slot.ms += request.used_ms
            slot.requests += 1
            self._decayed.pop(request.namespace, None)

    def remove(self, request: _Used) -> None:
        """It is gone, or is about to change."""
        minutes = self._minutes.get(request.namespace, {})
        slot = minutes.get(_minute(request.used_at))
        if request.used_ms <= 0 or slot is None:
            return
        slot.ms -= request.used_ms
        slot.requests -= 1
        self._decayed.pop(request.namespace, None)
        if not slot.requests:
            del minutes[_minute(request.used_at)]
            if not minutes:
                del self._minutes[request.namespace]

    def trim(self, now: datetime) -> None:
        """Forgets what is older than a day."""
        oldest = _minute(now) - DAY_MINUTES
        for namespace, minutes in list(self._minutes.items()):
            self._minutes[namespace] = {minute: slot for minute, slot in minutes.items() if minute > oldest}
            if not self._minutes[namespace]:
                del self._minutes[namespace]

    def decayed_ms(self, namespace: str, now: datetime) -> float:
        """What counts now of what it used, by the half-life."""
        return self._sums(namespace, now)[0]

    def typical_ms(self, now: datetime) -> float:
        """What a request of anybody costs, the recent ones above all."""
        sums = [self._sums(namespace, now) for namespace in sorted(self._minutes)]
        requests = sum(count for _, count in sums)
        return sum(ms for ms, _ in sums) / requests if requests else UNKNOWN_MS

    def _sums(self, namespace: str, now: datetime) -> tuple[float, float]:
        at = _minute(now)
        if at != self._at:
            self._at, self._decayed = at, {}
            self.trim(now)
        if namespace not in self._decayed:
            ms = requests = 0.0
            for minute, slot in sorted(self._minutes.get(namespace, {}).items()):
                share = 2.0 ** (min(0, minute - at) / HALF_LIFE_MINUTES)  # our clock may go back
                ms, requests = ms + share * slot.ms, requests + share * slot.requests
            self._decayed[namespace] = (ms, requests)
        return self._decayed[namespace]

    def day_ms(self, namespace: str, now: datetime) -> int:
        """What it used in the last 24 hours."""
        oldest = _minute(now) - DAY_MINUTES
        return sum(slot.ms for minute, slot in self._minutes.get(namespace, {}).items() if minute > oldest)

    def below_at(self, namespace: str, limit_ms: float, now: datetime) -> datetime:
        """When the last 24 hours will hold less than `limit_ms`, if nothing more is used."""
        left, oldest = self.day_ms(namespace, now), _minute(now) - DAY_MINUTES
        for minute, slot in sorted(self._minutes.get(namespace, {}).items()):
            if left < limit_ms:
                break
            if minute > oldest:
                left -= slot.ms
                now = datetime.fromtimestamp((minute + DAY_MINUTES) * 60, UTC)
        return now


def shares(
    namespaces: Iterable[str], usage: Usage, running: Iterable[Request], now: datetime, typical_ms: float
) -> dict[str, float]:
    """What each namespace has used, with what runs: that counts as long as a request usually takes, or as it has."""
    used = {namespace: usage.decayed_ms(namespace, now) for namespace in namespaces}
    for request in running:
        if request.namespace in used:
            taken = (now - request.assigned_at).total_seconds() * 1000 if request.worker else 0.0
            used[request.namespace] += max(typical_ms, taken)
    return used


def _minute(at: datetime) -> int:
    return int(at.timestamp()) // 60


def day_after(at: datetime) -> datetime:
    """When what was used at `at` no longer counts for anything."""
    return at + timedelta(minutes=DAY_MINUTES + 1)
