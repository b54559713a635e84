"""Whether a request would be served now: each part is looked at when somebody asks, at most every few seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from claas_crds import names
from claas_operator.api import FAILURES, describe
from claas_operator.shim.auth import Cache
from claas_operator.shim.cluster import Cluster
from claas_operator.shim.models import Health, Part, Workers
from claas_operator.shim.settings import ShimSettings
from claas_operator.snapshot import Kind, parse_time
from claas_operator.teacher import TeacherProbe
from claas_store.errors import StoreError
from claas_store.stores import open_store

LOOK_SECONDS: Final = 2.0  # an answer is this old at most
PART_SECONDS: Final = 5.0  # a part that takes longer to answer does not answer
# A Lease's own duration is doubled: it is renewed several times within one, and clocks differ a little.
STALE_LEASES: Final = 2


class HealthCheck:
    """`look` as often as you like.

    Args:
        watching: whether the shim's own watches are connected.
    """

    def __init__(self, settings: ShimSettings, cluster: Cluster, watching: Callable[[], bool]) -> None:
        self._settings, self._cluster, self._watching = settings, cluster, watching
        self._teacher = TeacherProbe(settings.teacher) if settings.teacher else None
        self._last: Cache[Health] = Cache(LOOK_SECONDS)

    async def look(self) -> Health:
        """What was seen within the last seconds."""
        return await self._last.get("health", self._look)

    async def close(self) -> None:
        """Closes the connection to the teacher."""
        if self._teacher is not None:
            await self._teacher.close()

    async def _look(self) -> Health:
        operator, workers, teacher, store = await asyncio.gather(
            _within(self._operator), self._workers(), _within(self._look_at_teacher), _within(self._object_store)
        )
        watching = self._watching()
        api_server = Part(
            status="healthy" if watching else "unhealthy",
            message="the watches are connected" if watching else "the watches are not connected",
        )
        needed = (operator, teacher, store, api_server)
        return Health(
            status="unhealthy" if any(part.status == "unhealthy" for part in needed) else "healthy",
            operator=operator,
            workers=workers,
            teacher=teacher,
            object_store=store,
            api_server=api_server,
        )

    async def _operator(self) -> Part:
        """By the Lease of whoever leads."""
        name = f"{self._settings.instance}-operator"
        lease = await self._cluster.get(Kind.LEASE, self._settings.namespace, name)
        spec = (lease or {}).get("spec") or {}
        renewed = parse_time(spec.get("renewTime"))
        if not spec.get("holderIdentity") or renewed is None:
            return Part(status="unhealthy", message="no operator leads")
        age = datetime.now(UTC) - renewed
        if age > timedelta(seconds=STALE_LEASES * int(spec.get("leaseDurationSeconds") or 15)):
            return Part(status="unhealthy", message=f"the operator was last seen {age.total_seconds():.0f} s ago")
        return Part(status="healthy", message="an operator leads")

    async def _workers(self) -> Workers:
        """By their Leases, in the release's namespace. (Those of pools with isolation Namespace are the tenants'.)"""
        path = self._cluster.path(Kind.LEASE, self._settings.namespace)
        labels = f"{names.INSTANCE_LABEL}={self._settings.instance},{names.COMPONENT_LABEL}={names.COMPONENT_WORKER}"
        try:
            async with asyncio.timeout(PART_SECONDS):
                leases = await self._cluster.labelled(path, labels)
        except FAILURES as error:
            return Workers(status="unknown", message=describe(error))
        states = [_state(lease) for lease in leases]
        counts = {
            word: states.count(state)
            for word, state in (
                ("ready", names.STATE_READY),
                ("starting", names.STATE_STARTING),
                ("draining", names.STATE_DRAINING),
            )
        }
        if counts["ready"]:
            return Workers(status="healthy", message=f"{counts['ready']} ready", **counts)
        message = "none is ready; the operator starts one when there is work"
        return Workers(status="unknown", message=message, **counts)

    async def _look_at_teacher(self) -> Part:
        if self._teacher is None:
            return Part(status="unknown", message="there is none: requests are taught by the student itself")
        seen = await self._teacher.look()
        return Part(status="healthy" if seen.ready else "unhealthy", message=seen.message)

    async def _object_store(self) -> Part:
        """Lists a folder that is not there, in the bucket of the first prefix: rights and reach, no tenant's data."""
        prefixes = self._settings.storage.prefixes
        if not prefixes:
            return Part(status="unhealthy", message="no namespace has a storage prefix")
        base = prefixes[0].uri.partition("{namespace}")[0]
        uri = base + ("" if base.endswith("/") else "/") + "claas-health/"
        try:
            await asyncio.to_thread(lambda: open_store(uri).list(uri))
        except StoreError as error:
            return Part(status="unhealthy", message=type(error).__name__)
        return Part(status="healthy", message="it answers")


async def _within(look: Callable[[], Awaitable[Part]]) -> Part:
    """The part, or that it could not be looked at."""
    try:
        async with asyncio.timeout(PART_SECONDS):
            return await look()
    except FAILURES as error:
        return Part(status="unhealthy", message=describe(error))


def _state(lease: dict[str, Any]) -> str:
    """What a worker's Lease says, if it is fresh."""
    spec = lease.get("spec") or {}
    renewed = parse_time(spec.get("renewTime"))
    life = timedelta(seconds=STALE_LEASES * int(spec.get("leaseDurationSeconds") or 15))
    if renewed is None or datetime.now(UTC) - renewed > life:
        return ""
    return str((lease["metadata"].get("annotations") or {}).get(names.LEASE_STATE) or "")
