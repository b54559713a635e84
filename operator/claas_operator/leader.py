"""Who acts: the holder of one coordination Lease (`<release>-operator`). Everybody else only watches.

The kubernetes package's own leader election blocks, cannot be stopped and never tells that leadership was lost, hence
these lines, after client-go's algorithm: a Lease is judged by when we saw it change, never by another machine's clock;
a leader that could not renew for two thirds of the Lease's duration stops before anybody else may start. It is an
optimisation all the same: writes are protected by their preconditions alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from kubernetes.aio.client.exceptions import ApiException

from claas_crds import names
from claas_operator.api import FAILURES, Api, describe
from claas_operator.settings import Settings
from claas_operator.snapshot import Kind, format_time

log = logging.getLogger(__name__)


class Leader:
    """`run` it; `leading()` says at any moment whether to act.

    Args:
        changed: told whether we lead, when leadership was won or lost, and when contact with the API server was lost or
            found. A renewal that comes late, to a Lease that nobody else took, is no change.
        owners: the Lease's ownerReferences as far as they are known by now; asked at each write.
    """

    def __init__(
        self,
        api: Api,
        settings: Settings,
        changed: Callable[[bool], None],
        owners: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self._api, self._changed, self._owners = api, changed, owners
        self._namespace, self._name = settings.namespace, f"{settings.instance}-operator"
        self._labels = {names.INSTANCE_LABEL: settings.instance, names.COMPONENT_LABEL: "operator"}
        self._duration = settings.timings.leader_lease_seconds
        self.identity = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self.contact_since: datetime | None = None  # of unbroken contact with the API server
        self._leads_until = 0.0  # loop time
        self._seen: tuple[str, str] = ("", "")  # holder and renewTime as last seen
        self._seen_at = 0.0
        self._version = ""  # of the Lease as last written or seen

    def leading(self) -> bool:
        """Whether to act, by what we knew last."""
        return asyncio.get_running_loop().time() < self._leads_until

    async def run(self) -> None:
        """Wins and keeps the Lease, for ever; gives it back when cancelled."""
        told = (False, False)
        try:
            while True:
                await self._turn()
                state = (self.leading(), self.contact_since is not None)
                if state != told:
                    told = state
                    log.info("leadership", extra={"leading": state[0], "contact": state[1]})
                    self._changed(state[0])
                # The holder renews three times within its duration; the others look often enough to take over in time.
                await asyncio.sleep(self._duration / (4 if self.leading() else 8))
        finally:
            await self._resign()

    async def _turn(self) -> None:
        started = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._duration / 4):
                won = await self._try()
        except FAILURES as error:
            log.warning("leader lease not reached", extra={"error": describe(error)})
            self.contact_since = None
            return  # what we hold runs out by itself
        if self.contact_since is None:
            self.contact_since = datetime.now(UTC)
        # From before the write: the others count from when they see it, which is later.
        self._leads_until = started + self._duration * 2 / 3 if won else 0.0

    async def _try(self) -> bool:
        """One look, and one write where it is ours to write. Whether we hold it now."""
        now = asyncio.get_running_loop().time()
        lease = await self._api.get(Kind.LEASE, self._namespace, self._name)
        if lease is None:
            return await self._write(None)
        spec = lease.get("spec") or {}
        seen = (str(spec.get("holderIdentity") or ""), str(spec.get("renewTime") or ""))
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        holder = seen[0]
        if holder not in ("", self.identity) and now < self._seen_at + self._duration:
            return False
        return await self._write(lease)

    async def _write(self, lease: dict[str, Any] | None) -> bool:
        now = format_time(datetime.now(UTC))
        spec: dict[str, Any] = {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": max(1, round(self._duration)),
            "renewTime": now,
        }
        path = self._api.path(Kind.LEASE, self._namespace)
        owners = self._owners()
        owned: dict[str, Any] = {"ownerReferences": owners} if owners else {}
        try:
            if lease is None:
                spec |= {"acquireTime": now, "leaseTransitions": 0}
                metadata = {"name": self._name, "namespace": self._namespace, "labels": self._labels, **owned}
                body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
                answer = await self._api.create(path, body)
            else:
                before = lease.get("spec") or {}
                if before.get("holderIdentity") != self.identity:
                    spec |= {"acquireTime": now, "leaseTransitions": int(before.get("leaseTransitions") or 0) + 1}
                metadata = {"resourceVersion": lease["metadata"]["resourceVersion"], **owned}
                answer = await self._api.merge(f"{path}/{self._name}", {"metadata": metadata, "spec": spec})
        except ApiException as error:
            if error.status in (HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND):
                return False  # somebody else was first
            raise
        self._seen, self._seen_at = (self.identity, now), asyncio.get_running_loop().time()
        self._version = answer["metadata"]["resourceVersion"]
        return True

    async def _resign(self) -> None:
        """Leaves the Lease to whoever comes next, if it is still ours."""
        if not self.leading():
            return
        self._leads_until = 0.0
        body = {"metadata": {"resourceVersion": self._version}, "spec": {"holderIdentity": "", "renewTime": None}}
        with contextlib.suppress(*FAILURES):  # it runs out by itself
            await self._api.merge(self._api.path(Kind.LEASE, self._namespace, self._name), body)
