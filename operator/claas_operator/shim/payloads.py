"""Samples that travel beside a request, as an object in its namespace's first prefix, and their end.

An object is `<prefix>claas-payloads/<UTC time>-<random>.json`. It goes with the request that names it (the watch
tells); what no request names, because a shim was killed between two writes or was not there when a request went, is
found by a sweep once it is older than the grace time. Of a namespace that went while no shim ran nobody knows any more:
a lifecycle rule of the bucket on `claas-payloads/` ends that too.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from claas_operator.api import FAILURES, describe
from claas_operator.shim.cluster import Cluster, Object
from claas_operator.shim.settings import ShimSettings
from claas_store import uris
from claas_store.errors import StoreError
from claas_store.stores import open_store

log = logging.getLogger(__name__)

FOLDER: Final = "claas-payloads"
_TIME: Final = "%Y%m%d-%H%M%S"


class Payloads:
    """`seen` and `lost` are the informer's; `run` it for ever.

    Args:
        whole: whether the informer has told of every request there is, and still hears: nothing is swept before.
    """

    def __init__(self, settings: ShimSettings, cluster: Cluster, whole: Callable[[], bool]) -> None:
        self._settings, self._cluster, self._whole = settings, cluster, whole
        self._named: dict[str, str] = {}  # uid of a request -> the payload that it names
        self._orphans: asyncio.Queue[str] = asyncio.Queue()

    async def put(self, prefix: str, samples: list[Object]) -> Object:
        """Writes the samples below `prefix`; gives the spec's payloadRef.

        Raises:
            StoreError: the store fails or refuses.
        """
        data = json.dumps({"samples": samples}, ensure_ascii=False, separators=(",", ":")).encode()
        name = f"{datetime.now(UTC).strftime(_TIME)}-{secrets.token_hex(8)}.json"
        uri = uris.join(uris.normalise(prefix.rstrip("/") + f"/{FOLDER}"), name)
        await asyncio.to_thread(lambda: open_store(uri).put(uri, data))
        return {"uri": uri, "sha256": hashlib.sha256(data).hexdigest()}

    def drop(self, reference: Object) -> None:
        """Nobody will name it."""
        self._orphans.put_nowait(reference["uri"])

    def seen(self, raw: Object) -> None:
        """A request is there."""
        uri = ((raw.get("spec") or {}).get("payloadRef") or {}).get("uri") or ""
        if self._made_here(uri, raw["metadata"]["namespace"]):
            self._named[raw["metadata"]["uid"]] = uri

    def lost(self, uid: str) -> None:
        """A request is gone."""
        if uri := self._named.pop(uid, None):
            self._orphans.put_nowait(uri)

    def _made_here(self, uri: str, namespace: str) -> bool:
        """Whether it is one of ours: another object, or another tenant's, is never deleted because a spec named it."""
        folders = [prefix.rstrip("/") + f"/{FOLDER}/" for prefix in self._settings.prefixes(namespace)]
        return any(uri.startswith(folder) for folder in folders) and uris.within(uri, folders)

    async def run(self) -> None:
        """Deletes what is no longer named, for ever."""
        loop = asyncio.get_running_loop()
        sweep_at = loop.time() + min(60.0, self._settings.sweep_seconds)
        while True:
            try:
                async with asyncio.timeout_at(sweep_at):
                    uri = await self._orphans.get()
            except TimeoutError:
                sweep_at = loop.time() + self._settings.sweep_seconds
                await self.sweep()
                continue
            if uri not in self._named.values():
                await self._delete(uri)

    async def sweep(self) -> None:
        """Finds payloads that nobody names and that are older than the grace time."""
        if not self._whole():
            log.warning("payloads not swept: not every request is known")
            return
        try:
            namespaces = await self._cluster.namespaces()
        except FAILURES as error:
            log.warning("payloads not swept", extra={"error": describe(error)})
            return
        before = datetime.now(UTC) - timedelta(seconds=self._settings.payload_grace_seconds)
        folders = {
            prefix.rstrip("/") + f"/{FOLDER}/" for name in namespaces for prefix in self._settings.prefixes(name)
        }
        for folder in sorted(folders):
            try:
                found = await asyncio.to_thread(_list, folder)
            except StoreError as error:
                log.warning("payloads not swept", extra={"error": type(error).__name__})
                return
            named = set(self._named.values())
            for uri, _ in found:
                if uri not in named and (made := _made_at(uri)) is not None and made < before:
                    await self._delete(uri)

    async def _delete(self, uri: str) -> None:
        try:
            await asyncio.to_thread(lambda: open_store(uri).delete(uri))
        except StoreError as error:  # the next sweep finds it again
            log.warning("payload not deleted", extra={"error": type(error).__name__})


def _list(folder: str) -> Sequence[tuple[str, int]]:
    return open_store(folder).list(folder)


def _made_at(uri: str) -> datetime | None:
    """When a payload was written, by its name; None: the name is none of ours."""
    try:
        return datetime.strptime(uri.rpartition("/")[2][:15], _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None
