"""The loop: events -> snapshot -> wake-up -> `plan` -> `apply`. Level-triggered: a lost wake-up costs time, not truth.

One plan at a time; its actions run side by side, one per object. While an action is applied, `plan` sees it in
`snapshot.in_flight` and leaves its object alone. The next plan is made when something was heard, an action ended, or
the time came that the last plan named.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from kubernetes.aio.client.exceptions import ApiException

from claas_operator.actions import (
    Action,
    Bind,
    Collect,
    Commit,
    End,
    Fence,
    Forget,
    Lock,
    OnRequest,
    Rollback,
    Say,
    Tell,
)
from claas_operator.api import FAILURES, Api, describe
from claas_operator.apply import Apply, Lost
from claas_operator.jobs import owner_references
from claas_operator.leader import Leader
from claas_operator.metrics import Metrics
from claas_operator.plan import plan
from claas_operator.relist import relist, selectors
from claas_operator.settings import Settings
from claas_operator.snapshot import Entry, Kind, Snapshot
from claas_operator.teacher import TeacherProbe
from claas_operator.territory import EVERY, Territory, survey
from claas_operator.workers import doubled

log = logging.getLogger(__name__)

# More writes at once than this only queue up in the API server.
MAX_IN_FLIGHT: Final = 64
# Writes that only tell people what a request waits for: one at a time and so rarely, until nothing else was written for
# a while; a queue of thousands would make the work that it waits for slower. `plan` names no more than MAX_TELLING.
TELLING_SECONDS: Final = 0.1
QUIET_SECONDS: Final = 1.0
# A write that failed is tried again after this, doubled each time.
COOL_BASE_SECONDS: Final = 0.2
COOL_CAP_SECONDS: Final = 30.0
# What has failed so often in a row will not go away by itself: people are told.
FAILING: Final = 3
# A failure so long ago does not slow the next try down.
FORGET_SECONDS: Final = 60.0
# Planning again and again takes at most about this share of the time; under load, events are taken several at once.
PLAN_SHARE: Final = 0.5


@dataclass
class _Cooling:
    failures: int
    until: float  # loop time
    why: str  # the API server's answer; empty where there was none


class Loop:
    """Everything that runs in the operator besides kopf's watches."""

    def __init__(self, settings: Settings, api: Api, metrics: Metrics) -> None:
        self.settings, self.snapshot, self._metrics = settings, Snapshot(), metrics
        self._api = api
        self._wake, self._look = asyncio.Event(), asyncio.Event()
        self._relist_now = asyncio.Event()
        self._leads = False  # by the leader's last word: `leading()` may lapse for a moment without one
        self._synced = False  # whether the snapshot is known to be whole, since we lead
        self._take(Territory(frozenset(settings.watch_namespaces)))
        self._cooling: dict[str, _Cooling] = {}
        self._skipped: dict[str, int] = {}  # uid and resourceVersion that were complained about
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._worked_at = self._told_at = 0.0  # when a write last began that does more than tell, or only tells
        self._beat = 0.0
        self.leader = Leader(
            api, settings, self._leadership_changed, lambda: owner_references(settings, self.snapshot.owner_uid)
        )
        self._apply = Apply(api, self.snapshot, settings, self._acting)
        self._probe = TeacherProbe(settings.teacher) if settings.teacher else None
        metrics.watch(self.snapshot, settings, self._acting)

    def observe(self, kind: Kind, event: Mapping[str, Any]) -> None:
        """An event of a watch: an object as it is now, or its deletion."""
        now, raw = datetime.now(UTC), event["object"]
        uid = str(raw.get("metadata", {}).get("uid", ""))
        if event.get("type") == "DELETED":
            self.snapshot.remove(kind, uid, now)
        else:
            self.snapshot.put(kind, raw, now)
            if problem := self.snapshot.broken.get(uid):
                log.warning("object cannot be read", extra={"kind": kind.value, "uid": uid, "problem": problem})
        self._wake.set()

    @property
    def stalled_seconds(self) -> float:
        """How long ago the loop last came round; it does so at least once per relist."""
        return asyncio.get_running_loop().time() - self._beat

    async def run(self) -> None:
        """Runs until cancelled; whatever else ends it is a bug, and ends the process."""
        self._beat = asyncio.get_running_loop().time()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.leader.run(), name="leader")
                group.create_task(self._relists(), name="relists")
                group.create_task(self._turns(), name="turns")
                if self._probe:
                    group.create_task(self._looks(self._probe), name="teacher")
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            if self._probe:
                await self._probe.close()

    # Leadership

    def _acting(self) -> bool:
        return self.leader.leading() and self._synced

    def _leadership_changed(self, leads: bool) -> None:
        self._leads = leads
        if self.leader.contact_since is not None:
            self.snapshot.contact_since = self.leader.contact_since
        if not leads:
            self._synced = False
            for task in self._tasks.values():
                task.cancel()
        self._relist_now.set()
        self._wake.set()

    # Plan and apply

    async def _turns(self) -> None:
        loop = asyncio.get_running_loop()
        timeout: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            self._wake.clear()
            self._beat = started = loop.time()
            timeout = self.settings.timings.relist_seconds
            if not self._acting():
                if self._synced:  # a renewal is late, and nobody tells when it has come
                    timeout = min(timeout, self.settings.timings.leader_lease_seconds / 4)
                self._metrics.workqueue_depth.set(0)
                continue
            cooling = {key: cooled.until for key, cooled in self._cooling.items() if cooled.until > started}
            if cooling:
                timeout = min(timeout, min(cooling.values()) - started)
            self.snapshot.cooling = cooling.keys()
            self.snapshot.failing = {
                key: cooled.why for key, cooled in self._cooling.items() if cooled.why and cooled.failures >= FAILING
            }
            with self._metrics.reconcile_seconds.time():
                made = plan(self.snapshot, self.settings, datetime.now(UTC))
            if made.teacher_wanted:
                self._look.set()
            else:
                self._look.clear()
            for entry, error in made.skipped:
                if self._skipped.get(entry.uid) != entry.version:
                    self._skipped[entry.uid] = entry.version
                    log.error("nothing decided", extra={"object": str(entry), "error": type(error).__name__})
            for action in made.actions:
                if len(self._tasks) >= MAX_IN_FLIGHT:
                    break  # the first of them to end wakes us
                if wait := self._wait(action, started):
                    timeout = min(timeout, wait)
                elif action.key not in self._tasks:
                    self._start(action)
            self._metrics.workqueue_depth.set(len(self._tasks.keys() | {action.key for action in made.actions}))
            if made.wake_at is not None:
                timeout = min(timeout, max(0.0, (made.wake_at - datetime.now(UTC)).total_seconds()))
            spent = loop.time() - started
            await asyncio.sleep(spent / PLAN_SHARE - spent)

    def _wait(self, action: Action, now: float) -> float:
        """Seconds until an action may go; it is planned again then."""
        cooling = self._cooling.get(action.key)
        wait = cooling.until - now if cooling else 0.0
        if isinstance(action, Say) and now < self._worked_at + QUIET_SECONDS:
            wait = max(wait, self._told_at + TELLING_SECONDS - now)
        return max(0.0, wait)

    def _start(self, action: Action) -> None:
        if isinstance(action, Say):
            self._told_at = asyncio.get_running_loop().time()
        else:
            self._worked_at = asyncio.get_running_loop().time()
        self.snapshot.in_flight[action.key] = action
        task = asyncio.create_task(self._do(action), name=f"{type(action).__name__} {action.about}")
        self._tasks[action.key] = task
        task.add_done_callback(lambda done: self._done(action, done))

    async def _do(self, action: Action) -> None:
        clock = asyncio.get_running_loop().time
        what, started = {"action": type(action).__name__, "object": action.about} | _details(action), clock()

        def told(more: dict[str, Any]) -> dict[str, Any]:
            return what | more | {"ms": round((clock() - started) * 1000, 1)}

        try:
            await self._apply(action)
        except Lost as lost:
            log.info("lost", extra=told({"why": str(lost)}))
            self._cool(action, at_once=True)
        except FAILURES as error:
            log.warning("failed", extra=told({"error": describe(error)}))
            why = describe(error) if isinstance(error, ApiException) else ""
            self._cool(action, after=_retry_after(error), why=why)
        else:
            self._cooling.pop(action.key, None)
            self._metrics.done(action)
            log.info("done", extra=told({}))

    def _cool(self, action: Action, *, at_once: bool = False, after: float = 0.0, why: str = "") -> None:
        """Not the same object again at once: a first loss may be decided anew, for the snapshot has learnt from it."""
        before = self._cooling.get(action.key)
        failures = before.failures + 1 if before else 1
        wait = 0.0 if at_once and failures == 1 else doubled(COOL_BASE_SECONDS, COOL_CAP_SECONDS, failures)
        self._cooling[action.key] = _Cooling(failures, asyncio.get_running_loop().time() + max(wait, after), why)

    def _done(self, action: Action, task: asyncio.Task[None]) -> None:
        self._tasks.pop(action.key, None)
        self.snapshot.in_flight.pop(action.key, None)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("action failed unexpectedly", exc_info=error, extra={"object": action.about})
            self._cool(action)

    # Relists

    async def _relists(self) -> None:
        """Compares uids with the API server's, when leadership is won and then once in a while."""
        # A list that began before we led would have to be made again: the first begins when that is known.
        await self._relist_now.wait()
        self._relist_now.clear()
        failures = 0
        while True:
            try:
                await self._relist()
            except FAILURES as error:
                failures += 1
                log.warning("relist failed", extra={"error": describe(error)})
                await asyncio.sleep(doubled(COOL_BASE_SECONDS, COOL_CAP_SECONDS, failures + 1))
                continue
            failures = 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.timings.relist_seconds):
                    await self._relist_now.wait()
            self._relist_now.clear()

    async def _relist(self) -> None:
        led = self._leads
        await self._find_owner()
        found = await survey(self._api, self._territory.own, self.settings.cluster_role)
        if found != self._territory:
            self._take(found)
        await relist(self._api, self.snapshot, selectors(self.settings))
        now, here = asyncio.get_running_loop().time(), self.snapshot
        self._cooling = {key: c for key, c in self._cooling.items() if now < c.until + FORGET_SECONDS}
        self._skipped = {u: v for u, v in self._skipped.items() if u in here.requests or u in here.adapters}
        if led and self._leads and not self._synced:
            self._synced = True
            log.info("synced", extra={kind.value: len(here.table(kind)) for kind in Kind})
        self._wake.set()

    def _take(self, found: Territory) -> None:
        """Decides about these namespaces from now on."""
        self._territory = found
        self.snapshot.serves = found.serves
        for namespace, role in found.taken.items():
            which = "every namespace that this release names" if namespace == EVERY else f"namespace {namespace}"
            why = f"an older release (ClusterRole {role}) serves {which}: set watchNamespaces of both"
            log.error("namespaces taken", extra={"namespaces": namespace, "clusterRole": role, "why": why})

    async def _find_owner(self) -> None:
        if self.settings.owner is None or self.snapshot.owner_uid is not None:
            return
        path = f"/apis/apps/v1/namespaces/{self.settings.namespace}/deployments/{self.settings.owner.deployment}"
        raw = await self._api.get_path(path)
        if raw is None:
            log.warning("owner not found: Jobs will have none", extra={"deployment": self.settings.owner.deployment})
        else:
            self.snapshot.owner_uid = raw["metadata"]["uid"]

    # The teacher

    async def _looks(self, probe: TeacherProbe) -> None:
        """Looks once per probe period, as long as the plans say that somebody needs the teacher."""
        while True:
            await self._look.wait()
            health = await probe.look()
            before = self.snapshot.teacher
            self.snapshot.teacher = health
            if before is None or before.ready != health.ready:
                log.info("teacher", extra={"ready": health.ready, "found": health.message})
            self._wake.set()
            await asyncio.sleep(self.settings.timings.teacher_probe_seconds)


def _retry_after(error: BaseException) -> float:
    """What the API server asked for (429, 503), in seconds."""
    headers = error.headers if isinstance(error, ApiException) else None
    value = headers.get("Retry-After", "") if headers else ""
    return min(COOL_CAP_SECONDS, float(value)) if value.isdigit() else 0.0


def _details(action: Action) -> dict[str, Any]:
    """What is worth a place in the log line of a decision, besides its object. Never text: none is known.

    `uid` is the request's wherever there is one, so that all lines about a request are found by it.
    """
    about_whom = (getattr(action, name, None) for name in ("request", "adapter", "pod", "job"))
    uid = next((entry.uid for entry in about_whom if isinstance(entry, Entry)), "")
    about = {"uid": uid} if uid else {}
    match action:
        case Bind():
            return about | {"worker": action.worker, "attempt": action.attempt}
        case Lock():
            return about | {"request": action.request.name}
        case Commit():
            return about | {"request": action.request.name, "heir": action.heir.name if action.heir else ""}
        case End():
            return about | {"reason": action.reason}
        case OnRequest():
            return about | {"reason": action.status.get("reason", ""), "state": action.status.get("state", "")}
        case Tell():
            return about | {"lingerSeconds": action.linger_seconds}
        case Fence():
            return about | {"fault": action.fault.value}
        case Rollback():
            return about | {"to": action.to}
        case Collect() | Forget():
            return about | {"versions": len(action.versions)}
        case _:
            return about
