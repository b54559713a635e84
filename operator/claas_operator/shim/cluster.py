"""The API server as the shim uses it: the operator's five verbs, pages, and a watch."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any, Final

import aiohttp
from kubernetes.aio.client.exceptions import ApiException

from claas_crds import names
from claas_operator.api import Api, configure
from claas_operator.snapshot import Kind

# The server ends a watch after this; it sends bookmarks about once a minute, so a connection silent for longer is dead.
WATCH_SECONDS: Final = 240
SILENCE_SECONDS: Final = 100
# Few and kept: a TLS handshake costs both sides as much as several calls.
CONNECTIONS: Final = 24

_PLURALS: Final = {Kind.REQUEST: names.REQUEST_PLURAL, Kind.ADAPTER: names.ADAPTER_PLURAL}

METADATA: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

Object = dict[str, Any]


class Gone(Exception):
    """The watch cannot go on from there (410): list again."""


class Cluster(Api):
    """A connection to the API server; `close` it."""

    async def page(
        self, kind: Kind, namespace: str = "", *, limit: int, token: str = "", version: str = ""
    ) -> tuple[list[Object], str, str]:
        """(objects, token of the next page or "", resourceVersion of the list); no namespace: all of them.

        Raises:
            ApiException: 400 the token is none; 410 it is too old.
        """
        query = {"limit": str(limit)}
        if token:
            query["continue"] = token
        elif version:
            query["resourceVersion"] = version
        found = await self._call("GET", self._collection(kind, namespace), query=query)
        meta = found.get("metadata") or {}
        return found.get("items") or [], meta.get("continue") or "", meta.get("resourceVersion") or ""

    async def watch(self, kind: Kind, version: str) -> AsyncIterator[tuple[str, Object]]:
        """(type, object) of every event after `version`, in all namespaces, until the server or the network ends it.

        Raises:
            Gone: the server no longer has the events since `version`.
            ApiException, aiohttp.ClientError, TimeoutError: as ever.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        answer = await self._client.call_api(
            self._collection(kind),
            "GET",
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": "application/json"},
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=SILENCE_SECONDS),
        )
        try:
            if answer.status == HTTPStatus.GONE:
                raise Gone
            if answer.status != HTTPStatus.OK:
                raise ApiException(status=answer.status, reason=answer.reason)
            async for line in answer.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    if event["object"].get("code") == HTTPStatus.GONE:
                        raise Gone
                    raise ApiException(status=event["object"].get("code"), reason=event["object"].get("reason"))
                yield event["type"], event["object"]
        finally:
            answer.close()

    async def labelled(self, path: str, selector: str) -> list[Object]:
        """The objects of the collection at `path` with these labels."""
        return (await self._call("GET", path, query={"labelSelector": selector})).get("items") or []

    async def namespaces(self) -> list[str]:
        """Names of all namespaces."""
        found, query = [], {"limit": "500"}
        while True:
            page = await self._call("GET", "/api/v1/namespaces", query=query, headers={"Accept": METADATA})
            found += [item["metadata"]["name"] for item in page.get("items") or []]
            if not (token := (page.get("metadata") or {}).get("continue")):
                return found
            query["continue"] = token

    def _collection(self, kind: Kind, namespace: str = "") -> str:
        return self.path(kind, namespace) if namespace else f"/apis/{names.API_VERSION}/{_PLURALS[kind]}"


async def connect_cluster() -> Cluster:
    """A connection; see `claas_operator.api.configure`."""
    configuration = await configure()
    configuration.connection_pool_maxsize = CONNECTIONS
    return Cluster(configuration)
