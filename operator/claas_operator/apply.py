"""Actions become writes, each under the exact precondition of the protocol. Nothing here decides.

A write that lost (409, 404, 422, or a live read that says otherwise) raises `Lost`; by then the snapshot holds what is
true, so the next plan decides anew instead of trying again. Whatever the API server answers goes into the snapshot at
once (read your writes). All other failures pass through to the loop, which waits before it tries again.
"""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final, assert_never

from kubernetes.aio.client.exceptions import ApiException

from claas_crds import names
from claas_crds.reasons import Outcome
from claas_operator.actions import (
    Action,
    Commit,
    DeleteRequest,
    End,
    Fault,
    Fence,
    Finalize,
    Free,
    Note,
    OnAdapter,
    OnRequest,
    Retry,
    StartDeletion,
    StartJob,
    StopJob,
    Tell,
)
from claas_operator.api import FAILURES, Api, describe
from claas_operator.jobs import number, selector
from claas_operator.references import References, beside
from claas_operator.settings import Settings
from claas_operator.snapshot import Adapter, Entry, Kind, Lease, Pod, Request, Snapshot, format_time, succeeded
from claas_operator.workers import lost, works_for

log = logging.getLogger(__name__)

_LOST_CODES: Final = frozenset({HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
_KINDS: Final[dict[type[Entry], tuple[Kind, str]]] = {
    Request: (Kind.REQUEST, names.API_VERSION),
    Adapter: (Kind.ADAPTER, names.API_VERSION),
    Pod: (Kind.POD, "v1"),
}


class Lost(Exception):
    """A precondition did not hold: somebody else was first, or the world has moved on. The message says which."""


class Apply:
    """Applies actions for a leader.

    Args:
        leading: whether we are, asked before every write; writes that are on their way have their preconditions.
        clock: the time now.
    """

    def __init__(
        self,
        api: Api,
        snapshot: Snapshot,
        settings: Settings,
        leading: Callable[[], bool],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api, self._snapshot, self._settings = api, snapshot, settings
        self._leading, self._clock = leading, clock

    async def __call__(self, action: Action) -> None:
        """Does it.

        Raises:
            Lost: a precondition did not hold.
            ApiException, aiohttp.ClientError, TimeoutError, OSError: the API server failed, or refused.
        """
        match action:
            case Commit():
                await self._commit(action)
            case Free():
                await self._free(action)
            case Finalize():
                await self._finalize(action)
            case OnAdapter():
                await self._patch(Kind.ADAPTER, action.adapter, action.adapter.version, action.status)
            case Retry(lost=True) | End(lost=True):
                await self._after_loss(action)
            case End(adapter_gone=True):
                await self._after_adapter(action)
            case OnRequest():
                await self._patch(Kind.REQUEST, action.request, action.request.version, action.status)
            case StartDeletion():
                await self._delete_versions(action)
            case StartJob():
                await self._start(action)
            case Fence():
                await self._fence(action)
            case StopJob():
                await self._stop(action)
            case Tell():
                await self._tell(action)
            case DeleteRequest():
                await self._delete(Kind.REQUEST, action.request)
            case _:
                raise TypeError(f"no way to apply {type(action).__name__}")
        if action.note is not None:
            await self._post(action.note)

    # Request and adapter

    async def _patch(self, kind: Kind, entry: Entry, version: int, status: dict[str, Any]) -> None:
        self._may_write()
        try:
            answer = await self._api.patch_status(kind, entry.namespace, entry.name, version, status)
        except ApiException as error:
            if error.status in _LOST_CODES:
                await self._refresh(kind, entry)
                raise Lost(f"{describe(error)}: the object has changed") from error
            raise
        self._snapshot.put(kind, answer, self._clock())

    async def _finalize(self, action: Finalize) -> None:
        adapter = action.adapter
        if action.left:
            log.warning("versions left", extra={"object": str(adapter), "uid": adapter.uid, "head": action.left})
        finalizers = list(action.finalizers)
        await self._patch_metadata(Kind.ADAPTER, adapter, {"uid": adapter.uid, "finalizers": finalizers})

    async def _patch_metadata(self, kind: Kind, entry: Entry, metadata: dict[str, Any]) -> None:
        self._may_write()
        try:
            answer = await self._api.patch_metadata(kind, entry.namespace, entry.name, entry.version, metadata)
        except ApiException as error:
            if error.status in _LOST_CODES:
                await self._refresh(kind, entry)
                raise Lost(f"{describe(error)}: the object has changed") from error
            raise
        self._snapshot.put(kind, answer, self._clock())

    async def _commit(self, action: Commit) -> None:
        """The request is read after the adapter's resourceVersion was, so that no Retry or End can be in between."""
        live = await self._live_request(action.request)
        if live.ended is not None or not succeeded(live.result):
            raise Lost("the request has no successful result of its current attempt any more")
        decided = action.request.result
        result, parent = live.result, live.status.parent
        if (
            result is None
            or decided is None
            or (result.attempt, result.lora_uri) != (decided.attempt, decided.lora_uri)
        ):
            raise Lost("the request has another result")
        if result.outcome is not Outcome.SUCCEEDED or parent is None:
            raise Lost("the request has nothing to commit")
        adapter = action.adapter
        if (parent.adapter_uid, parent.head_seq) != (adapter.uid, adapter.status.head_seq):
            raise Lost("the request trained another head")
        if adapter.active != live.uid:
            raise Lost("the adapter is not the request's")
        await self._patch(Kind.ADAPTER, adapter, adapter.version, action.status)

    async def _free(self, action: Free) -> None:
        """First the end of the holder, then every worker's Lease, both live and in this order."""
        namespace = action.adapter.namespace
        raw = await self._api.get(Kind.REQUEST, namespace, action.holder_name)
        if raw is None or raw.get("metadata", {}).get("uid") != action.holder:
            self._snapshot.remove(Kind.REQUEST, action.holder, self._clock())
        else:
            holder = self._snapshot.put(Kind.REQUEST, raw, self._clock())
            if not isinstance(holder, Request) or holder.ended is None:
                raise Lost("the request that holds the adapter has not ended")
        workers = ",".join(f"{k}={v}" for k, v in selector(self._settings, names.COMPONENT_WORKER).items())
        async for item in self._api.list(Kind.LEASE, workers):
            if item["metadata"]["namespace"] not in (self._settings.namespace, namespace):
                continue  # its workers are in the release's namespace or beside it
            lease = self._snapshot.put(Kind.LEASE, item, self._clock())
            if not isinstance(lease, Lease):
                raise Lost("a worker's Lease cannot be read")
            listed = action.holder in lease.running
            if listed and not await self._pod_is_gone(lease.namespace, lease.name, lease.holder):
                raise Lost("a living worker still lists the request")
        await self._patch(Kind.ADAPTER, action.adapter, action.adapter.version, action.status)

    async def _after_loss(self, action: Retry | End) -> None:
        """The claiming worker's Pod is gone, and the request, read after that, still has no result."""
        request = action.request
        for namespace in {self._settings.namespace, request.namespace}:
            gone = await self._pod_is_gone(namespace, request.worker)
            pod = self._snapshot.pod(namespace, request.worker)
            if not gone and (pod is None or works_for(pod, self._settings)):
                raise Lost("the claiming worker's Pod is there")
        live = await self._live_request(request)
        if live.ended is not None or live.result is not None:
            raise Lost("the request has a result, or has ended")
        if (live.worker, live.status.attempt) != (request.worker, request.status.attempt):
            raise Lost("the request was bound anew")
        await self._patch(Kind.REQUEST, request, live.version, action.status)

    async def _after_adapter(self, action: End) -> None:
        request, parent = action.request, action.request.status.parent
        raw = await self._api.get(Kind.ADAPTER, request.namespace, request.adapter_name)
        if raw is not None:
            self._snapshot.put(Kind.ADAPTER, raw, self._clock())
            if parent is not None and raw.get("metadata", {}).get("uid") == parent.adapter_uid:
                raise Lost("the adapter is there")
        await self._patch(Kind.REQUEST, request, request.version, action.status)

    async def _live_request(self, request: Request) -> Request:
        raw = await self._api.get(Kind.REQUEST, request.namespace, request.name)
        if raw is None or raw.get("metadata", {}).get("uid") != request.uid:
            self._snapshot.remove(Kind.REQUEST, request.uid, self._clock())
            raise Lost("the request is gone")
        live = self._snapshot.put(Kind.REQUEST, raw, self._clock())
        if not isinstance(live, Request):
            raise Lost("the request cannot be read")
        return live

    async def _pod_is_gone(self, namespace: str, name: str, uid: str = "") -> bool:
        """Whether no Pod of that name (and uid) can run anything any more, read live."""
        raw = await self._api.get(Kind.POD, namespace, name)
        known = self._snapshot.pod(namespace, name)
        if raw is None:
            if known is not None:
                self._snapshot.remove(Kind.POD, known.uid, self._clock())
            return True
        if uid and raw.get("metadata", {}).get("uid") != uid:
            return True
        pod = self._snapshot.put(Kind.POD, raw, self._clock())
        return isinstance(pod, Pod) and lost(pod)

    # Jobs and Pods

    async def _start(self, action: StartJob) -> None:
        self._may_write()
        try:
            answer = await self._api.create(self._api.path(Kind.JOB, action.namespace), action.manifest)
        except ApiException as error:
            if error.status != HTTPStatus.CONFLICT:
                raise
            # Another leader was first, which is as good; or the name is somebody else's, and the next is tried.
            found = await self._api.get(Kind.JOB, action.namespace, action.name)
            ours = action.manifest["metadata"]["labels"].items()
            if found is not None and ours <= (found["metadata"].get("labels") or {}).items():
                self._snapshot.put(Kind.JOB, found, self._clock())
                return
            stem, _, counter = action.name.rpartition("-")
            self._snapshot.taken_counters[action.namespace, stem] = int(counter)
            raise Lost("the Job's name is taken") from error
        self._snapshot.put(Kind.JOB, answer, self._clock())

    async def _delete_versions(self, action: StartDeletion) -> None:
        """Who needs which version is read live, whole: what was tombstoned before is safe from whoever comes after.

        What the snapshot knows beyond that is about to go, and counts until then.
        """
        now, live = self._clock(), None
        for kind in (Kind.ADAPTER, Kind.REQUEST):
            async for raw in self._api.list(kind):
                found, uid = self._snapshot.put(kind, raw, now), raw.get("metadata", {}).get("uid", "")
                if uid in self._snapshot.broken:
                    raise Lost("an object cannot be read: nobody knows what it needs")
                if isinstance(found, Adapter) and uid == action.adapter.uid:
                    live = found
        if live is None or not action.versions <= {*live.status.collecting}:
            raise Lost("the adapter has no such versions to delete any more")
        references = References(self._snapshot.named, self._settings)
        if any(references.needed(beside(action.root, name), live) for name in action.versions):
            raise Lost("somebody needs one of the versions")
        if not action.versions and references.bare(action.root):
            raise Lost("a request without an adapter trains one of the versions")
        if not action.versions and references.siblings(action.root, live) != action.kept:
            raise Lost("others need other versions beside the adapter's")
        try:
            await self._start(action)
        except ApiException as error:
            if error.status == HTTPStatus.FORBIDDEN and "NamespaceTerminating" in str(error.body):
                self._snapshot.homeless.add(action.adapter.uid)
                raise Lost("the namespace in which the Job would run is being deleted") from error
            raise

    async def _fence(self, action: Fence) -> None:
        pod, before = action.pod, action.lease
        lease = await self._live_lease(pod)
        match action.fault:
            case Fault.STALE:
                holds = lease is not None and before is not None and lease.renewed == before.renewed
            case Fault.NO_LEASE:
                holds = lease is None
            case Fault.SLOW_START:
                holds = lease is not None and lease.state == names.STATE_STARTING
            case Fault.OVERRUN:
                holds = lease is not None and action.overrun in lease.running
            case Fault.STUCK:
                holds = lease is None or (before is not None and lease.renewed == before.renewed)
            case _:
                assert_never(action.fault)
        if not holds:
            raise Lost("the worker's Lease says otherwise by now")
        await self._delete(Kind.POD, pod, grace_seconds=0 if action.fault is Fault.STUCK else None)
        if action.fault is Fault.STUCK and pod.uid in self._snapshot.pods:
            raise Lost("the Pod is still there: somebody's finalizer holds it")

    async def _live_lease(self, pod: Pod) -> Lease | None:
        """The Lease that this very Pod holds, as it is now."""
        raw = await self._api.get(Kind.LEASE, pod.namespace, pod.name)
        live = self._snapshot.put(Kind.LEASE, raw, self._clock()) if raw is not None else None
        return live if isinstance(live, Lease) and live.holder == pod.uid else None

    async def _stop(self, action: StopJob) -> None:
        if action.pod is not None:
            lease = await self._live_lease(action.pod)
            if lease is not None and lease.state != names.STATE_STARTING:
                raise Lost("the worker is Ready by now")
        await self._delete(Kind.JOB, action.job)

    async def _tell(self, action: Tell) -> None:
        """With the resourceVersion: the worker's next write, which carries an older one, fails, and it reads."""
        lease = action.lease
        annotations = {names.LINGER_SECONDS: number(action.linger_seconds)}
        await self._patch_metadata(Kind.LEASE, lease, {"uid": lease.uid, "annotations": annotations})

    async def _delete(self, kind: Kind, entry: Entry, grace_seconds: int | None = None) -> None:
        self._may_write()
        try:
            await self._api.delete(kind, entry.namespace, entry.name, uid=entry.uid, grace_seconds=grace_seconds)
        except ApiException as error:
            if error.status not in _LOST_CODES:
                raise
        await self._refresh(kind, entry)

    # Everything

    def _may_write(self) -> None:
        if not self._leading():
            raise Lost("no longer the leader")

    async def _refresh(self, kind: Kind, entry: Entry) -> None:
        """The snapshot learns what the object is now."""
        raw = await self._api.get(kind, entry.namespace, entry.name)
        if raw is None or raw.get("metadata", {}).get("uid") != entry.uid:
            self._snapshot.remove(kind, entry.uid, self._clock())
        if raw is not None:
            self._snapshot.put(kind, raw, self._clock())

    async def _post(self, note: Note) -> None:
        """A Kubernetes Event. Its name comes from what it says: saying it twice is refused, and that is right."""
        kind, api_version = _KINDS[type(note.regarding)]
        entry = note.regarding
        said = f"{entry.uid} {note.reason} {note.message}"
        event = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{entry.name[:200].rstrip('-.')}.{hashlib.sha256(said.encode()).hexdigest()[:16]}",
                "namespace": entry.namespace,
            },
            "eventTime": format_time(self._clock()),
            "reportingController": f"{names.GROUP}/operator",
            "reportingInstance": socket.gethostname()[:128],
            "action": "Reconcile",
            "type": "Warning" if note.warning else "Normal",
            "reason": note.reason,
            "note": note.message.encode()[:1000].decode(errors="ignore"),  # the API server counts bytes
            "regarding": {
                "apiVersion": api_version,
                "kind": kind.value,
                "name": entry.name,
                "namespace": entry.namespace,
                "uid": entry.uid,
            },
        }
        try:
            await self._api.create(f"/apis/events.k8s.io/v1/namespaces/{entry.namespace}/events", event)
        except FAILURES as error:
            if not (isinstance(error, ApiException) and error.status == HTTPStatus.CONFLICT):
                # An Event is a courtesy; what it tells is in the object's status as well.
                log.warning("event not posted", extra={"object": str(entry), "error": describe(error)})
