"""What every route needs: who calls, the resources behind a call, and the wait for their end.

One `Door` a process. It keeps nothing that a second replica would need.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Final

from fastapi import Request
from kubernetes.aio.client.exceptions import ApiException

from claas_crds import names
from claas_crds.reasons import Reason
from claas_operator.api import FAILURES
from claas_operator.settings import tenant_of
from claas_operator.shim import problems, spec
from claas_operator.shim.auth import Act, Caller, bearer, forbidden, make_auth
from claas_operator.shim.cluster import Cluster, Object
from claas_operator.shim.health import HealthCheck
from claas_operator.shim.http import CallerLeft
from claas_operator.shim.informer import Informer, Subscription
from claas_operator.shim.models import FieldProblem
from claas_operator.shim.payloads import Payloads
from claas_operator.shim.places import Places
from claas_operator.shim.problems import Problem
from claas_operator.shim.rates import Rates
from claas_operator.shim.settings import ShimSettings
from claas_operator.snapshot import Kind
from claas_store import uris
from claas_store.errors import StoreError, UriInvalid

CREATE_TRIES: Final = 3
CREATE_BACKOFF_SECONDS: Final = 0.3
MAX_VERSION: Final = 253
_LONGEST_SUFFIX: Final = ("2026-01-01T00:00:00Z", "0" * 8, 99)
_RESOURCES: Final = {Kind.REQUEST: names.REQUEST_PLURAL, Kind.ADAPTER: names.ADAPTER_PLURAL}
_WORDS: Final = {Kind.REQUEST: "request", Kind.ADAPTER: "adapter"}


class Door:
    """`start` it, `stop` it."""

    def __init__(self, settings: ShimSettings, cluster: Cluster) -> None:
        self.settings, self.cluster = settings, cluster
        self.auth = make_auth(settings, cluster)
        self.payloads = Payloads(settings, cluster, lambda: self.requests.synced.is_set() and self.requests.connected)
        self.places = Places(lambda namespace: tenant_of(settings.tenants, namespace).weight)
        self.requests = Informer(
            cluster,
            Kind.REQUEST,
            spec.trim_request,
            keep=lambda trimmed: spec.ended(trimmed) is None,
            seen=(self.payloads.seen, self.places.seen),
            lost=(self.payloads.lost, self.places.lost),
        )
        self.adapters = Informer(cluster, Kind.ADAPTER, spec.trim_adapter, keep=lambda _: True)
        self.health = HealthCheck(settings, cluster, self.watching)
        limits = settings.limits
        self._rates = Rates(limits.requests_per_minute, limits.burst, lambda: asyncio.get_running_loop().time())
        self._tasks: list[asyncio.Task[None]] = []

    def watching(self) -> bool:
        """Whether both watches are connected."""
        return self.requests.connected and self.adapters.connected

    async def start(self) -> None:
        """Starts the watches; returns at once."""
        runs = (self.requests.run(), self.adapters.run(), self.payloads.run())
        self._tasks = [asyncio.create_task(run) for run in runs]

    def alive(self) -> bool:
        """Whether every task still runs."""
        return all(not task.done() for task in self._tasks)

    def leave(self) -> None:
        """Answers everybody who waits with where their request is: this process ends."""
        self.requests.close()
        self.adapters.close()

    async def stop(self) -> None:
        """Ends the watches and the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.health.close()
        await self.cluster.close()

    # Who

    async def admit(self, request: Request) -> None:
        """Finds out who calls, and whether they call too often.

        Raises:
            Problem: 401, 429.
        """
        caller = await self.auth.caller(bearer(request.headers.get("authorization")))
        self._take(f"caller {caller.identity}")
        request.state.caller = caller

    async def authorize(self, request: Request, act: Act, named: bool) -> None:
        """Whether the caller may do it. `named`: they named the namespace themselves.

        Raises:
            Problem: 403, 429.
        """
        caller: Caller = request.state.caller
        request.state.namespace = act.namespace
        if not await self.auth.may(caller, act):
            raise forbidden(act)
        watched = self.settings.watch_namespaces
        if watched and act.namespace not in watched:
            fix = f"ask the release that serves {act.namespace}; this one serves {', '.join(watched)}"
            raise Problem(problems.FORBIDDEN, f"namespace {act.namespace} is not of this release", fix=fix)
        if named and act.namespace != caller.namespace:
            self._take(f"namespace {act.namespace}")

    def _take(self, key: str) -> None:
        if seconds := self._rates.wait_seconds(key):
            rate = f"{self.settings.limits.requests_per_minute} calls a minute"
            raise Problem(problems.RATE, f"more than {rate}", retry_seconds=seconds)

    # What

    async def read(self, kind: Kind, namespace: str, name: str) -> Object:
        """The object as it is now.

        Raises:
            Problem: 404.
        """
        found = await self.cluster.get(kind, namespace, name)
        if found is None:
            raise not_found(kind, namespace)
        return found

    async def page(self, kind: Kind, namespace: str, limit: int, token: str | None) -> tuple[list[Object], str]:
        """(objects, token of the next page or "").

        Raises:
            Problem: 404 no page has that token.
        """
        try:
            items, following, _ = await self.cluster.page(kind, namespace, limit=limit, token=token or "")
        except ApiException as error:
            if token and error.status == HTTPStatus.BAD_REQUEST:
                wrong = FieldProblem(field="continue", detail="is not the `continue` of a page of this list")
                fix = "start again without `continue`"
                raise Problem(problems.NOT_FOUND, "there is no such page", fix=fix, errors=[wrong]) from None
            raise
        return items, following

    async def create(self, kind: Kind, namespace: str, wanted: Object) -> tuple[Object, bool]:
        """(the object of that name, whether this call made it). Tried again when an answer was lost: the name is ours.

        Raises:
            Problem: 404 the namespace is not there.
            ApiException and others: the API server refuses, or fails again and again.
        """
        name = wanted["metadata"]["name"]
        for attempt in range(1, CREATE_TRIES + 1):
            try:
                return await self.cluster.create(self.cluster.path(kind, namespace), wanted), True
            except FAILURES as error:
                status = error.status if isinstance(error, ApiException) else None
                if status == HTTPStatus.CONFLICT:
                    found = await self.cluster.get(kind, namespace, name)
                    if found is not None:
                        return found, False
                elif status == HTTPStatus.NOT_FOUND:
                    raise Problem(problems.NOT_FOUND, f"there is no namespace {namespace}") from None
                elif status is not None and status < 500 and status != HTTPStatus.TOO_MANY_REQUESTS:
                    raise
                if attempt == CREATE_TRIES:
                    raise
            await asyncio.sleep(CREATE_BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    async def payload(self, namespace: str, samples: list[Object]) -> Object:
        """The samples in the object store; gives the payloadRef.

        Raises:
            Problem: 403 the namespace has no prefix; 503 the store does not take it.
        """
        prefixes = self.settings.prefixes(namespace)
        if not prefixes:
            raise Problem(problems.OUTSIDE, f"namespace {namespace} has no storage prefix")
        try:
            return await self.payloads.put(prefixes[0], samples)
        except StoreError as error:
            what = f"the object store did not take the samples ({type(error).__name__})"
            raise Problem(problems.UNAVAILABLE, what) from None

    def check_parent(self, field: str, uri: str, namespace: str) -> None:
        """As `check_uri`, and whether the names of later versions have room beside it."""
        self.check_uri(field, uri, namespace)
        try:
            later = uris.next_version_uri(uri, *_LONGEST_SUFFIX)
        except UriInvalid:
            later = ""
        if not later or len(uris.version_name(later)) > MAX_VERSION:
            raise problems.invalid(field, f"is too long: a later version's name has at most {MAX_VERSION} characters")

    def check_uri(self, field: str, uri: str, namespace: str, more: Sequence[str] = ()) -> None:
        """Whether the namespace may read and write there; `more`: prefixes that it may read besides.

        Raises:
            Problem: 422 it is no uri; 403 it lies elsewhere. What lies there is not looked at.
        """
        try:
            uris.normalise(uri)
        except UriInvalid as error:
            raise problems.invalid(field, str(error).partition(" ")[2] or "is no uri of a version") from None
        prefixes = [*self.settings.prefixes(namespace), *more]
        if not uris.within(uri, prefixes):
            allowed = ", ".join(prefixes) or "none"
            detail = f"must lie below a storage prefix of namespace {namespace}: {allowed}"
            wrong = FieldProblem(field=field, detail=detail)
            raise Problem(problems.OUTSIDE, f"{field} {detail}", errors=[wrong])

    def check_pool(self, pool: str | None, base_model: str | None) -> None:
        """Whether there is such a pool, and one with such a base model. Whether they go together the operator knows.

        Raises:
            Problem: 422.
        """
        pools = self.settings.pools
        for field, given, known, reason in (
            ("pool", pool, pools.keys(), Reason.UNKNOWN_POOL),
            ("base_model", base_model, pools.values(), Reason.BASE_MODEL_MISMATCH),
        ):
            if pools and given is not None and given not in known:
                detail = f"is not of this installation; there are: {', '.join(sorted(set(known)))}"
                wrong = FieldProblem(field=field, detail=detail)
                raise Problem(problems.INVALID, f"{field} {detail}", errors=[wrong], reason=reason)

    # When

    async def until(
        self,
        request: Request,
        kind: Kind,
        raw: Object,
        over: Callable[[Object], bool],
        seconds: float,
    ) -> Object:
        """The object when `over`, or as it is after `seconds`, or when this process ends.

        Raises:
            CallerLeft: nobody waits any more.
            Problem: 410, it was deleted meanwhile.
        """
        if over(raw) or seconds <= 0:
            return raw
        informer = self.requests if kind is Kind.REQUEST else self.adapters
        namespace, name = raw["metadata"]["namespace"], raw["metadata"]["name"]
        if informer.waiting >= self.settings.limits.max_waiting:
            return raw
        with informer.subscribe(raw["metadata"]["uid"]) as subscription:
            if not informer.over(raw):
                await _wait(request, subscription, over, seconds)
        if subscription.latest is not None and over(subscription.latest) and not subscription.gone:
            # What waits is told little of an adapter; an ended request is told whole.
            return subscription.latest if kind is Kind.REQUEST else await self.read(kind, namespace, name)
        now = await self.cluster.get(kind, namespace, name)
        if now is None or now["metadata"]["uid"] != raw["metadata"]["uid"]:
            word = _WORDS[kind]
            fix = f"somebody has deleted the {word}; ask again for a new one"
            raise Problem(problems.EXPIRED, f"the {word} is gone", fix=fix, instance=location(kind, name))
        return now


async def _wait(request: Request, subscription: Subscription, over: Callable[[Object], bool], seconds: float) -> None:
    left = asyncio.create_task(_left(request, subscription))
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    await subscription.news()
                    if left.done():
                        raise CallerLeft
                    latest = subscription.latest
                    if subscription.gone or subscription.closed or (latest is not None and over(latest)):
                        return
    finally:
        left.cancel()


async def _left(request: Request, subscription: Subscription) -> None:
    """Ends the wait when the caller has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    subscription.close()


def location(kind: Kind, name: str, namespace: str | None = None) -> str:
    """Path of a request or an adapter; the namespace where it has to be named."""
    return f"/v1/{_WORDS[kind]}s/{name}" + (f"?namespace={namespace}" if namespace else "")


def resource(kind: Kind) -> str:
    """The plural that RBAC knows it by."""
    return _RESOURCES[kind]


def not_found(kind: Kind, namespace: str) -> Problem:
    """The same for what is not there and for what is another tenant's."""
    word = _WORDS[kind]
    return Problem(problems.NOT_FOUND, f"namespace {namespace} has no such {word}", fix=f"list them: GET /v1/{word}s")
