"""The API server, as raw JSON over `kubernetes.aio`: five verbs, each with a time-out. Nothing decides or retries here.

Raw objects instead of the client's models: parsing is lenient and ours (`snapshot`), and a merge patch must carry null
to remove a field, which the models drop.
"""

from __future__ import annotations

import os
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from claas_crds import names
from claas_operator.snapshot import Kind

CALL_SECONDS: Final = 10.0
PAGE: Final = 500
MAX_OBJECT_BYTES: Final = 2 * 1024 * 1024  # more than etcd takes
# What a call raises when it did not succeed: the API server's answer, or no answer at all.
FAILURES: Final = (ApiException, aiohttp.ClientError, TimeoutError, OSError)

_COLLECTIONS: Final[Mapping[Kind, tuple[str, str]]] = {
    Kind.REQUEST: (f"/apis/{names.API_VERSION}", names.REQUEST_PLURAL),
    Kind.ADAPTER: (f"/apis/{names.API_VERSION}", names.ADAPTER_PLURAL),
    Kind.JOB: ("/apis/batch/v1", "jobs"),
    Kind.POD: ("/api/v1", "pods"),
    Kind.LEASE: ("/apis/coordination.k8s.io/v1", "leases"),
}
_METADATA: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

Object = dict[str, Any]


class Api:
    """A connection to the API server; `close` it.

    Args:
        called: told the verb and the HTTP status of every call; 0 where there was no answer.
    """

    def __init__(
        self, configuration: client.Configuration, called: Callable[[str, int], None] = lambda verb, code: None
    ) -> None:
        self._called = called
        configuration.proxy = configuration.proxy or _proxy(configuration.host)
        self._client = client.ApiClient(configuration)
        # The client's own session looks for a proxy in the environment at every call, in a thread: half of what a call
        # costs us.
        rest = self._client.rest_client
        connector = rest.pool_manager.connector
        rest.pool_manager.detach()
        rest.pool_manager = aiohttp.ClientSession(connector=connector, read_bufsize=MAX_OBJECT_BYTES)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """The object as it is now; None when there is none."""
        return await self.get_path(self.path(kind, namespace, name))

    async def get_path(self, path: str, query: Mapping[str, str] | None = None) -> Object | None:
        """What lies at `path` now; None when there is nothing."""
        try:
            return await self._call("GET", path, query=query)
        except ApiException as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    async def list(self, kind: Kind, selector: str = "", *, metadata_only: bool = False) -> AsyncIterator[Object]:
        """Every object of the kind in all namespaces, page by page; with their metadata alone where that will do."""
        base, plural = _COLLECTIONS[kind]
        query = {"limit": str(PAGE)} | ({"labelSelector": selector} if selector else {})
        headers = {"Accept": _METADATA} if metadata_only else {}
        while True:
            page = await self._call("GET", f"{base}/{plural}", query=query, headers=headers)
            if "items" not in page:  # not to be taken for a cluster in which nothing is left
                raise ApiException(status=HTTPStatus.OK, reason="the answer is no list")
            for item in page["items"] or []:
                yield item
            following = page.get("metadata", {}).get("continue")
            if not following:
                return
            query["continue"] = following

    async def create(self, path: str, body: Object) -> Object:
        """Creates an object in the collection at `path`."""
        return await self._call("POST", path, body=body)

    async def patch_status(self, kind: Kind, namespace: str, name: str, version: int, status: Object) -> Object:
        """Merges `status` in, if the object still has the resourceVersion `version` (else ApiException 409)."""
        body = {"metadata": {"resourceVersion": str(version)}, "status": status}
        return await self.merge(f"{self.path(kind, namespace, name)}/status", body)

    async def patch_metadata(self, kind: Kind, namespace: str, name: str, version: int, metadata: Object) -> Object:
        """Merges `metadata` in, if the object still has the resourceVersion `version` (else ApiException 409)."""
        body = {"metadata": metadata | {"resourceVersion": str(version)}}
        return await self.merge(self.path(kind, namespace, name), body)

    async def merge(self, path: str, body: Object) -> Object:
        """A JSON merge patch (RFC 7386)."""
        headers = {"Content-Type": "application/merge-patch+json"}
        return await self._call("PATCH", path, body=body, headers=headers)

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str, grace_seconds: int | None = None
    ) -> None:
        """Deletes this very object (ApiException 409 when the name is another's by now)."""
        options: Object = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        await self._call("DELETE", self.path(kind, namespace, name), body=options)

    def path(self, kind: Kind, namespace: str, name: str = "") -> str:
        """Path of an object, or of its collection in a namespace."""
        base, plural = _COLLECTIONS[kind]
        return f"{base}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")

    async def _call(
        self,
        verb: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Object:
        code = 0
        try:
            answer, code, _ = await self._client.call_api(
                path,
                verb,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json", "Content-Type": "application/json", **(headers or {})},
                body=body,
                response_types_map={200: "object", 201: "object", 202: "object"},
                auth_settings=["BearerToken"],
                _request_timeout=CALL_SECONDS,
            )
        except ApiException as error:
            code = error.status or 0
            raise
        finally:
            self._called(verb, code)
        if not isinstance(answer, dict):  # a proxy's page, say
            raise ApiException(status=code, reason="the answer is no object")
        return answer


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for `url`."""
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)


async def configure() -> client.Configuration:
    """How to reach the API server: as the Pod's service account, or by KUBECONFIG (~/.kube/config) outside a cluster.

    Raises:
        kubernetes.aio.config.ConfigException: neither is there.
    """
    configuration = client.Configuration()
    if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
        config.load_incluster_config(client_configuration=configuration)
    else:
        await config.load_kube_config(client_configuration=configuration)
    return configuration


async def connect(called: Callable[[str, int], None] = lambda verb, code: None) -> Api:
    """A connection; see `configure` and `Api`."""
    return Api(await configure(), called)


def describe(error: BaseException) -> str:
    """An error for the log. Never the API server's text: it may quote the object, hence a user's."""
    if isinstance(error, ApiException):
        return f"HTTP {error.status} {error.reason}"
    return type(error).__name__
