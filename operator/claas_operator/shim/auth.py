"""Who is calling, and what they may do: three modes behind one face.

`Kubernetes`: a bearer token is reviewed by the API server, and every verb on a resource of a namespace is its RBAC's to
permit. `ApiKey`: a key's digest lies in a Secret that binds it to one namespace. `None`: everybody is one tenant.
What was learnt is kept for seconds, in caches of bounded size, keyed by the token's digest: no token is kept.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from claas_crds import names
from claas_operator.shim.cluster import Cluster
from claas_operator.shim.problems import FORBIDDEN, UNAUTHENTICATED, Problem
from claas_operator.shim.settings import NAMESPACE_PATTERN, ShimSettings

log = logging.getLogger(__name__)

MAX_TOKEN_CHARACTERS: Final = 16384
MAX_CACHED: Final = 4096
MAX_LOOKUPS: Final = 32  # at once: a flood of unknown tokens must not become one at the API server
KEY_LABEL: Final = f"{names.GROUP}/api-key"  # on the Secrets; its value is "true"
_SERVICE_ACCOUNT: Final = re.compile(r"system:serviceaccount:([a-z0-9-]+):[a-z0-9.-]+")
_NO_ONE: Final = "the token is not valid here"

T = TypeVar("T")


@dataclass(frozen=True)
class Caller:
    """Somebody known.

    Attributes:
        identity: tells one caller from another, for caches and rates; never shown.
        namespace: theirs when they name none; empty: they must name one.
        bound: they have no other.
        user: as the API server knows them (username, uid, groups, extra), for a SubjectAccessReview.
    """

    identity: str
    namespace: str
    bound: bool
    user: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Act:
    """What somebody wants to do to our resources."""

    verb: str
    resource: str
    namespace: str
    name: str = ""


class Auth(Protocol):
    """One mode."""

    async def caller(self, token: str | None) -> Caller:
        """Who holds the token.

        Raises:
            Problem: nobody (401).
        """

    async def may(self, caller: Caller, act: Act) -> bool:
        """Whether they may do it."""


class Cache(Generic[T]):
    """What was looked up, for `seconds`, at most MAX_CACHED of it; whoever asks for the same meanwhile waits for it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._known: OrderedDict[Any, tuple[float, asyncio.Future[T]]] = OrderedDict()

    async def get(self, key: Any, look_up: Callable[[], Awaitable[T]]) -> T:
        """The value of `key`, looked up where it is not known; a failed look-up is not kept."""
        loop = asyncio.get_running_loop()
        known = self._known.get(key)
        if known is not None and loop.time() < known[0]:
            return await asyncio.shield(known[1])
        # A task of its own: the first to ask may leave while others wait for the same.
        future = asyncio.ensure_future(look_up())
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
        self._known[key] = (loop.time() + self._seconds, future)
        self._known.move_to_end(key)
        while len(self._known) > MAX_CACHED:
            self._known.popitem(last=False)
        try:
            return await asyncio.shield(future)
        except BaseException:
            if future.done() and (future.cancelled() or future.exception() is not None):
                self._known.pop(key, None)
            raise


class KubernetesAuth:
    """The cluster's own tokens and RBAC."""

    def __init__(self, settings: ShimSettings, cluster: Cluster) -> None:
        self._audiences, self._cluster = list(settings.auth.audiences), cluster
        self._callers: Cache[Caller | None] = Cache(settings.auth.cache_seconds)
        self._rights: Cache[bool] = Cache(settings.auth.cache_seconds)
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)

    async def caller(self, token: str | None) -> Caller:
        """See `Auth`; one TokenReview every few seconds.

        Raises:
            Problem: 401.
            ApiException, aiohttp.ClientError, TimeoutError, OSError: the API server failed.
        """
        if not token:
            raise Problem(UNAUTHENTICATED, "no token was sent")
        found = await self._callers.get(_digest(token), lambda: self._review(token))
        if found is None:
            raise Problem(UNAUTHENTICATED, _NO_ONE)
        return found

    async def _review(self, token: str) -> Caller | None:
        spec: dict[str, Any] = {"token": token} | ({"audiences": self._audiences} if self._audiences else {})
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        async with self._lookups:
            answer = await self._cluster.create("/apis/authentication.k8s.io/v1/tokenreviews", body)
        status = answer.get("status") or {}
        if not status.get("authenticated"):
            return None
        if self._audiences and not set(self._audiences) & set(status.get("audiences") or []):
            return None  # an API server that knows no audiences would take any token of its own
        user = status.get("user") or {}
        account = _SERVICE_ACCOUNT.fullmatch(user.get("username") or "")
        flat = tuple(sorted((name, json.dumps(value, sort_keys=True)) for name, value in user.items()))
        return Caller(_digest(json.dumps(flat)), account[1] if account else "", False, flat)

    async def may(self, caller: Caller, act: Act) -> bool:
        """See `Auth`; a SubjectAccessReview every few seconds. Raises as `caller`."""
        whole = Act(act.verb, act.resource, act.namespace)
        if await self._rights.get((caller.identity, whole), lambda: self._ask(caller, whole)):
            return True
        # RBAC may permit single objects by their names.
        return bool(act.name) and await self._rights.get((caller.identity, act), lambda: self._ask(caller, act))

    async def _ask(self, caller: Caller, act: Act) -> bool:
        user = {name: json.loads(value) for name, value in caller.user}
        what = {"group": names.GROUP, "verb": act.verb, "resource": act.resource, "namespace": act.namespace}
        spec = {
            "user": user.get("username", ""),
            "uid": user.get("uid", ""),
            "groups": user.get("groups") or [],
            "extra": user.get("extra") or {},
            "resourceAttributes": what | ({"name": act.name} if act.name else {}),
        }
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        async with self._lookups:
            answer = await self._cluster.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", body)
        return bool((answer.get("status") or {}).get("allowed"))


class ApiKeyAuth:
    """Keys whose SHA-256 digests lie in Secrets with the label `claas.dev/api-key: "true"`.

    A key is 256 random bits (`new_key`), so a plain digest is as safe as a slow hash: there is nothing to guess. The
    Secrets are listed once every few seconds whatever is asked, so unknown keys cost the API server nothing.
    """

    def __init__(self, settings: ShimSettings, cluster: Cluster) -> None:
        self._cluster = cluster
        namespace = settings.auth.keys_namespace or settings.namespace
        self._path = f"/api/v1/namespaces/{namespace}/secrets"
        self._keys: Cache[dict[bytes, str]] = Cache(settings.auth.cache_seconds)

    async def caller(self, token: str | None) -> Caller:
        """See `Auth`. Raises as `KubernetesAuth.caller`."""
        if not token:
            raise Problem(UNAUTHENTICATED, "no key was sent")
        digest = _digest(token).encode()
        found = ""
        for known, namespace in (await self._keys.get("keys", self._list)).items():
            if hmac.compare_digest(known, digest):  # all of them, always: the time tells nothing
                found = namespace
        if not found:
            raise Problem(UNAUTHENTICATED, _NO_ONE)
        return Caller(digest.decode(), found, True)

    async def may(self, caller: Caller, act: Act) -> bool:
        """See `Auth`: everything in its own namespace, nothing elsewhere."""
        return act.namespace == caller.namespace

    async def _list(self) -> dict[bytes, str]:
        found: dict[bytes, str] = {}
        for secret in await self._cluster.labelled(self._path, f"{KEY_LABEL}=true"):
            data = secret.get("data") or {}
            digest, namespace = (_decode(data.get(field)) for field in ("sha256", "namespace"))
            if re.fullmatch("[0-9a-f]{64}", digest) and re.fullmatch(NAMESPACE_PATTERN, namespace):
                found[digest.encode()] = namespace
            else:
                log.warning("a Secret for an API key is ignored", extra={"secret": secret["metadata"]["name"]})
        return found


class NoAuth:
    """Everybody is one tenant."""

    def __init__(self, settings: ShimSettings) -> None:
        self._everybody = Caller("everybody", settings.auth.namespace, True)

    async def caller(self, token: str | None) -> Caller:
        """See `Auth`."""
        return self._everybody

    async def may(self, caller: Caller, act: Act) -> bool:
        """See `Auth`."""
        return act.namespace == caller.namespace


def make_auth(settings: ShimSettings, cluster: Cluster) -> Auth:
    """The mode that the settings name."""
    if settings.auth.mode == "ApiKey":
        return ApiKeyAuth(settings, cluster)
    if settings.auth.mode == "None":
        log.warning(
            "nobody is asked who they are: every caller is the tenant of auth.namespace",
            extra={"namespace": settings.auth.namespace},
        )
        return NoAuth(settings)
    return KubernetesAuth(settings, cluster)


def bearer(header: str | None) -> str | None:
    """The token of an Authorization header; None: there is none that could be one."""
    scheme, _, token = (header or "").partition(" ")
    token = token.strip()
    usable = scheme.lower() == "bearer" and 0 < len(token) <= MAX_TOKEN_CHARACTERS
    return token if usable and token.isascii() and token.isprintable() else None


def new_key() -> tuple[str, str]:
    """(a key, the digest that goes into its Secret)."""
    key = f"claas_{secrets.token_urlsafe(32)}"
    return key, _digest(key)


def forbidden(act: Act) -> Problem:
    """The same for a namespace that exists and one that does not."""
    return Problem(FORBIDDEN, f"you may not {act.verb} {act.resource} in namespace {act.namespace}")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _decode(value: object) -> str:
    try:
        return base64.b64decode(str(value or ""), validate=True).decode("ascii").strip()
    except ValueError:
        return ""
