"""Looks at the teacher, while something waits for it or uses it. The result is an observation like any other."""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus

import httpx

from claas_operator.settings import Teacher
from claas_operator.snapshot import TeacherHealth

PROBE_SECONDS = 3.0


class TeacherProbe:
    """One connection to the teacher's readiness route; `close` it."""

    def __init__(self, teacher: Teacher, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._url = f"{teacher.url.rstrip('/')}/claas/v1/ready"
        # trust_env off: a proxy of the cluster's must not stand between us and a Service.
        self._client = httpx.AsyncClient(timeout=PROBE_SECONDS, trust_env=False, transport=transport)

    async def look(self) -> TeacherHealth:
        """Whether it is ready. The time is that of the start: what happened later cannot have been seen."""
        at = datetime.now(UTC)
        try:
            answer = await self._client.get(self._url)
        except httpx.HTTPError as error:
            return TeacherHealth(False, at, type(error).__name__)
        return TeacherHealth(answer.status_code == HTTPStatus.OK, at, f"HTTP {answer.status_code}")

    async def close(self) -> None:
        """Closes the connection."""
        await self._client.aclose()
