"""What the API server showed: every version of every object of a release, in the API server's own order.

All kinds lie in one etcd, whose revisions are the resourceVersions: so what happened before what is known across kinds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chaos.api import Raw, RawApi
from claas_crds import names

_OURS = f"/apis/{names.API_VERSION}/namespaces"
COLLECTIONS = {
    "DistillRequest": (_OURS, names.REQUEST_PLURAL),
    "LoraAdapter": (_OURS, names.ADAPTER_PLURAL),
    "Lease": ("/apis/coordination.k8s.io/v1/namespaces", "leases"),
    "Pod": ("/api/v1/namespaces", "pods"),
    "Job": ("/apis/batch/v1/namespaces", "jobs"),
}


@dataclass(frozen=True)
class Seen:
    """An object as it was from `version` on."""

    version: int
    kind: str
    type: str  # ADDED, MODIFIED, DELETED
    raw: Raw

    @property
    def uid(self) -> str:
        return str(self.raw["metadata"]["uid"])

    @property
    def name(self) -> str:
        meta = self.raw["metadata"]
        return f"{meta['namespace']}/{meta['name']}"

    @property
    def status(self) -> Raw:
        found: Raw = self.raw.get("status") or {}
        return found


class Witness:
    """Watches a release's namespaces."""

    def __init__(self, api: RawApi) -> None:
        self._api = api
        self._seen: list[Seen] = []
        self._tasks: list[asyncio.Task[None]] = []

    def watch(self, kinds: Sequence[str], namespace: str) -> None:
        """Begins."""
        for kind in kinds:
            base, plural = COLLECTIONS[kind]
            self._tasks.append(asyncio.create_task(self._watch(kind, f"{base}/{namespace}/{plural}")))

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def history(self) -> list[Seen]:
        """Everything so far, in order, each version once."""
        for task in self._tasks:
            if task.done():
                task.result()  # its error: what it did not see cannot be judged
        last: dict[tuple[str, str], int] = {}
        ordered = []
        for seen in sorted(self._seen, key=lambda seen: seen.version):
            if last.get((seen.kind, seen.uid)) != seen.version:
                last[seen.kind, seen.uid] = seen.version
                ordered.append(seen)
        return ordered

    async def _watch(self, kind: str, collection: str) -> None:
        async for event, raw in self._api.watch(collection):
            raw["metadata"].pop("managedFields", None)
            self._seen.append(Seen(int(raw["metadata"]["resourceVersion"]), kind, event, raw))


def lives(history: Sequence[Seen], kind: str) -> dict[str, list[Seen]]:
    """The versions of each object of a kind, by uid."""
    found: dict[str, list[Seen]] = {}
    for seen in history:
        if seen.kind == kind:
            found.setdefault(seen.uid, []).append(seen)
    return found


def ended(status: Raw) -> bool:
    """Whether a request's status has a terminal condition."""
    return terminal(status) is not None


def terminal(status: Raw) -> Raw | None:
    """The terminal condition."""
    conditions: list[dict[str, Any]] = status.get("conditions") or []
    return next((c for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"), None)


def tell(history: Sequence[Seen], about: str = "") -> Iterator[str]:
    """The history in words, of what was said about requests and adapters."""
    for seen in history:
        s = seen.status
        line = ""
        if seen.kind == "DistillRequest":
            result, claim = s.get("result") or {}, s.get("claim") or {}
            line = (
                f"{s.get('state', '-')} {s.get('reason', '')} worker={s.get('worker', '')} attempt={s.get('attempt')}"
            )
            line += f" claim={claim.get('attempt', '')} result={result.get('attempt', '')}/{result.get('outcome', '')}"
            line += f" {result.get('reason', '')} parent={(s.get('parent') or {}).get('headSeq', '')}"
        elif seen.kind == "LoraAdapter":
            line = f"head={s.get('headSeq')} {s.get('version', '')} active={(s.get('active') or {}).get('requestName')}"
            line += (
                f" collecting={s.get('collecting') or []} deleting={seen.raw['metadata'].get('deletionTimestamp', '')}"
            )
        elif seen.kind == "Lease":
            a = seen.raw["metadata"].get("annotations") or {}
            line = f"{a.get(names.LEASE_STATE, '')} {a.get(names.LEASE_RUNNING, '')}"
        elif seen.kind == "Pod":
            line = f"{s.get('phase')} deleting={seen.raw['metadata'].get('deletionTimestamp', '')}"
        elif seen.kind == "Job":
            line = ",".join(c["type"] for c in s.get("conditions") or [])
        if about in seen.name or about in line:
            yield f"{seen.version} {seen.type:8} {seen.kind} {seen.name} {seen.uid[:8]}: {line}"
