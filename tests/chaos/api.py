"""The API server as the tests' own parts see it, straight and never through a proxy: raw JSON, asynchronous."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import aiohttp

from cluster.api import Api
from cluster.controlplane import ControlPlane

Raw = dict[str, Any]
PATIENCE_SECONDS = 60.0  # an API server that was killed comes back within it


def identity(control_plane: ControlPlane, user: str, groups: tuple[str, ...] = ()) -> ssl.SSLContext:
    """A client certificate with which the API server sees `user`."""
    authority = control_plane.authority
    pair = authority.issue(user.replace(":", "-"), user, groups=groups)
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.load_cert_chain(pair.certificate, pair.key)
    return context


class PatientApi(Api):
    """As a user sees it who tries again while nobody answers, be it that this machine is busy."""

    def __init__(self, api: Api) -> None:
        self.__dict__ |= vars(api)

    def __call__(self, method: str, path: str, body: Raw | None = None) -> Any:
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return super().__call__(method, path, body)
            except (OSError, http.client.HTTPException):
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)


class RawApi:
    """Calls and watches as a cluster admin; make it in the loop that it runs in."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._url = control_plane.url
        self._tls = identity(control_plane, "admin", ("system:masters",))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    async def close(self) -> None:
        await self._session.close()

    async def __call__(self, method: str, path: str, body: Raw | None = None) -> tuple[int, Raw]:
        """(status, answer), tried again while the API server does not answer or is too busy."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        end = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while True:
            try:
                data = None if body is None else json.dumps(body).encode()
                async with self._session.request(
                    method, self._url + path, data=data, headers={"Content-Type": kind}, ssl=self._tls
                ) as answer:
                    if answer.status not in (429, 500, 503):
                        return answer.status, await answer.json()
            except aiohttp.ClientError:
                pass
            if asyncio.get_running_loop().time() > end:
                raise TimeoutError(f"{method} {path}")
            await asyncio.sleep(0.1)

    async def watch(self, collection: str, selector: str = "") -> AsyncIterator[tuple[str, Raw]]:
        """(type, object), of what is there and of every change, for ever. Each change once, in its order."""
        label = f"&labelSelector={selector}" if selector else ""
        while True:
            code, listed = await self("GET", f"{collection}?{label.lstrip('&')}")
            if code != HTTPStatus.OK:  # it has just been started, and does not serve our kinds yet
                await asyncio.sleep(0.1)
                continue
            for item in listed["items"]:
                yield "ADDED", item
            version: str | None = listed["metadata"]["resourceVersion"]
            while version is not None:
                path = f"{collection}?watch=true&allowWatchBookmarks=true&resourceVersion={version}{label}"
                try:
                    async with self._session.get(
                        self._url + path, ssl=self._tls, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=2**22
                    ) as answer:
                        if answer.status == HTTPStatus.GONE:
                            version = None
                        if answer.status != HTTPStatus.OK:
                            raise ValueError(answer.status)
                        async for line in answer.content:
                            event = json.loads(line)
                            if event["type"] == "ERROR":
                                version = None  # too old: what was missed is in the list
                                break
                            version = event["object"]["metadata"]["resourceVersion"]
                            if event["type"] != "BOOKMARK":
                                yield event["type"], event["object"]
                except (aiohttp.ClientError, ValueError):
                    pass
                await asyncio.sleep(0.05)
