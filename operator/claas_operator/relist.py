"""The safety net under the watches: once in a while, every object's uid and resourceVersion is compared with the API
server's.

kopf loses deletions that fall into a gap of a watch (410), a watch may be dead without saying so, and before a new
leader acts it must know everything there is. Metadata alone is listed, page by page; afterwards the snapshot holds
every object that existed at the start of the list, as it was then or later, and none that had been deleted by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple

from claas_crds import names
from claas_operator.api import Api
from claas_operator.settings import Settings
from claas_operator.snapshot import Kind, Snapshot

# At the start, the objects that we know to exist are given this long to arrive by the watches before they are fetched.
ARRIVAL_SECONDS: Final = 20.0
ARRIVAL_LOOK_SECONDS: Final = 0.5


def selectors(settings: Settings) -> dict[Kind, str]:
    """Label selectors of the kinds that are not ours alone, for watches and lists."""
    instance = f"{names.INSTANCE_LABEL}={settings.instance}"
    both = f"{instance},{names.COMPONENT_LABEL} in ({names.COMPONENT_WORKER},{names.COMPONENT_OPERATION})"
    worker = f"{instance},{names.COMPONENT_LABEL}={names.COMPONENT_WORKER}"
    return {Kind.JOB: both, Kind.POD: both, Kind.LEASE: worker}


async def relist(api: Api, snapshot: Snapshot, selected: Mapping[Kind, str]) -> None:
    """Mends `snapshot`.

    Raises:
        ApiException, aiohttp.ClientError, TimeoutError, OSError: the API server failed.
    """
    missing: list[_Listed] = []
    for kind in Kind:
        known = set(snapshot.table(kind))
        listed: set[str] = set()
        async for item in api.list(kind, selected.get(kind, ""), metadata_only=True):
            metadata = item["metadata"]
            listed.add(metadata["uid"])
            version = int(metadata["resourceVersion"])
            missing.append(_Listed(kind, metadata["uid"], metadata["namespace"], metadata["name"], version))
        # Known before the list began and not in it: deleted, and the news was lost. A uid never comes back.
        for uid in known - listed:
            snapshot.remove(kind, uid, datetime.now(UTC))
    await _arrive(api, snapshot, missing)
    snapshot.sweep(datetime.now(UTC))


class _Listed(NamedTuple):
    """An object in a list."""

    kind: Kind
    uid: str
    namespace: str
    name: str
    version: int

    def known(self, snapshot: Snapshot) -> bool:
        """Whether nothing newer is to be learnt from it."""
        entry = snapshot.table(self.kind).get(self.uid)
        seen = entry is not None and entry.version >= self.version
        return seen or self.uid in snapshot.gone or self.uid in snapshot.broken


async def _arrive(api: Api, snapshot: Snapshot, listed: list[_Listed]) -> None:
    """What exists comes by the watches, ten thousand objects within seconds; what does not come is fetched."""
    clock = asyncio.get_running_loop().time
    end, before, missing = clock() + ARRIVAL_SECONDS, len(listed) + 1, listed
    while clock() < end:
        missing = [item for item in missing if not item.known(snapshot)]
        if not missing or len(missing) == before:
            break  # all are there, or no more come
        before = len(missing)
        await asyncio.sleep(ARRIVAL_LOOK_SECONDS)
    for item in missing:
        raw = await api.get(item.kind, item.namespace, item.name)
        if raw is not None:
            snapshot.put(item.kind, raw, datetime.now(UTC))
