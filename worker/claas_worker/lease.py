"""The worker's Lease, named after its Pod: alive, its state, and the uids of the requests that it runs (protocol.md).

One thread renews it, never blocked by a step; any thread changes it and has the API server's word when the call
returns. Writes follow one another under a lock, and each carries the resourceVersion of the last: one that was given up
on and arrives late can never undo a newer one.
"""

from __future__ import annotations

import logging
import queue
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable
from time import monotonic
from typing import Any

import kubernetes.client
import urllib3
from kubernetes.client import ApiException

from claas_crds import names
from claas_worker.api import CALL_SECONDS, Unreachable, retrying
from claas_worker.config import AgentSettings, seconds
from claas_worker.job import now

log = logging.getLogger(__name__)

START_LIMIT_SECONDS = 60.0
CHANGE_LIMIT_SECONDS = 60.0
LEAVE_SECONDS = 0.2  # a request that is over leaves with the next announcement; one that comes later is not waited for


class WorkerLease:
    """`start` it, `set_state` and `announce`, `leave` requests; `close` ends the renewal and leaves the object, whose
    owner is the Pod.

    The operator writes one word into it: how long the worker stays without work from now on (LINGER_SECONDS). `told`
    is called with it, by any thread. No write of ours goes over it unread: with it the resourceVersion is another.
    """

    told: Callable[[float], None]

    def __init__(self, client: kubernetes.client.ApiClient, settings: AgentSettings) -> None:
        self.told = lambda linger_seconds: None
        self._api = kubernetes.client.CoordinationV1Api(client)
        self._settings = settings
        self._state = names.STATE_STARTING
        self._running: set[str] = set()
        self._left_at: float | None = None  # when a request left that the object still lists
        self._written_at = monotonic()
        self._word = ""  # the operator's, as it was read
        self._resource_version = ""  # empty: not known, read it first
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # Whether to write at once, or only to look when. A signal handler may put into a SimpleQueue, never lock.
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def start(self) -> None:
        """Creates the Lease (state Starting) and starts the renewal.

        Raises:
            Unreachable: the API server did not answer for a minute.
            ApiException: it refused.
        """
        with self._lock:
            retrying("create lease", self._put, START_LIMIT_SECONDS)
        self._thread.start()

    def set_state(self, state: str) -> None:
        """Shows Ready or Draining: acknowledged when this returns, or logged and left to the renewal after a minute."""
        self._show(lambda: setattr(self, "_state", state))

    def announce(self, uid: str) -> None:
        """Lists a request as running: acknowledged when this returns, so that a claim may follow.

        Raises:
            Unreachable: not acknowledged within a minute; a renewal may still show it.
            ApiException: refused.
        """
        with self._lock:
            self._running.add(uid)
            retrying("announce", self._put, CHANGE_LIMIT_SECONDS, self._closed)

    def leave(self, uid: str) -> None:
        """Takes a request off the list. Shown with the next write, LEAVE_SECONDS from now at the latest: a busy worker
        writes its Lease once per request."""
        with self._lock:
            self._running.discard(uid)
            self._left_at = self._left_at or monotonic()
        self._wake.put(False)

    def drain_soon(self) -> None:
        """Has the renewal thread show Draining at once. The only method that a signal handler may call."""
        self._state = names.STATE_DRAINING
        self._wake.put(True)

    def close(self) -> None:
        """Shows what is still to be shown, and ends the renewal."""
        if self._left_at is not None:
            self._show(lambda: None)
        self._closed.set()
        self._wake.put(True)

    def _show(self, change: Callable[[], None]) -> None:
        with self._lock:
            change()
            try:
                retrying("write lease", self._put, CHANGE_LIMIT_SECONDS, self._closed)
            except Unreachable as error:
                log.warning("lease not written yet", extra={"problem": str(error)})

    def _renew(self) -> None:
        tried = monotonic()
        while True:
            try:
                at_once = self._wake.get(timeout=max(0.0, self._due(tried) - monotonic()))
            except queue.Empty:
                at_once = monotonic() >= self._due(tried)  # unless somebody has written it meanwhile
            if not at_once:
                continue
            tried = monotonic()
            try:
                with self._lock:
                    if self._closed.is_set():
                        return
                    self._put()
            except (ApiException, Unreachable, urllib3.exceptions.HTTPError, OSError) as error:
                self._left_at = None  # with the next renewal
                problem = f"HTTP {error.status}" if isinstance(error, ApiException) else type(error).__name__
                log.warning(
                    "lease not renewed",
                    extra={"problem": problem, "for_seconds": round(monotonic() - self._written_at, 1)},
                )

    def _due(self, tried: float) -> float:
        """When to write next, if nobody does before."""
        renewal = max(tried, self._written_at) + self._settings.lease_seconds / 3
        left_at = self._left_at
        return renewal if left_at is None else min(renewal, left_at + LEAVE_SECONDS)

    def _put(self) -> None:
        """Writes the Lease as it should be; the lock is held. One try, but for an outdated resourceVersion."""
        for _ in range(3):
            try:
                if not self._resource_version:
                    found = self._read()
                    self._resource_version = found or self._create()
                    if found is None:
                        self._left_at, self._written_at = None, monotonic()
                        return
                answer = self._api.replace_namespaced_lease(
                    self._settings.pod_name,
                    self._settings.pod_namespace,
                    self._body(self._resource_version),
                    _request_timeout=CALL_SECONDS,
                )
                self._resource_version = answer.metadata.resource_version
                self._left_at, self._written_at = None, monotonic()
                return
            except ApiException as error:
                self._resource_version = ""
                if error.status not in (404, 409):
                    raise
            except Exception:
                self._resource_version = ""  # whether it was written is not known
                raise
        raise Unreachable("write lease: somebody else keeps writing it")

    def _read(self) -> str | None:
        try:
            answer = self._api.read_namespaced_lease(
                self._settings.pod_name, self._settings.pod_namespace, _request_timeout=CALL_SECONDS
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        self._hear((answer.metadata.annotations or {}).get(names.LINGER_SECONDS, ""))
        version: str = answer.metadata.resource_version
        return version

    def _hear(self, word: str) -> None:
        if word in ("", self._word):
            return
        self._word = word
        try:
            linger_seconds = seconds(word)
        except (ValueError, ArgumentTypeError):
            log.warning("not a number of seconds", extra={"annotation": names.LINGER_SECONDS})
        else:
            self.told(linger_seconds)

    def _create(self) -> str:
        answer = self._api.create_namespaced_lease(
            self._settings.pod_namespace, self._body(None), _request_timeout=CALL_SECONDS
        )
        version: str = answer.metadata.resource_version
        return version

    def _body(self, resource_version: str | None) -> dict[str, Any]:
        return lease_body(self._settings, self._state, self._running, resource_version, self._word)


def lease_body(
    settings: AgentSettings, state: str, running: set[str], resource_version: str | None = None, word: str = ""
) -> dict[str, Any]:
    """The Lease of a worker, renewed now."""
    metadata: dict[str, Any] = {
        "name": settings.pod_name,
        "namespace": settings.pod_namespace,
        "labels": {
            names.COMPONENT_LABEL: names.COMPONENT_WORKER,
            **({names.INSTANCE_LABEL: settings.instance} if settings.instance else {}),
            **({names.POOL_LABEL: settings.pool} if settings.pool else {}),
        },
        "annotations": {
            names.LEASE_STATE: state,
            names.LEASE_RUNNING: ",".join(sorted(running)),
            **({names.LINGER_SECONDS: word} if word else {}),
        },
        "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": settings.pod_name, "uid": settings.pod_uid}],
    }
    if resource_version is not None:
        metadata["resourceVersion"] = resource_version
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata,
        "spec": {
            "holderIdentity": settings.pod_uid,
            "leaseDurationSeconds": max(1, round(settings.lease_seconds)),
            "renewTime": now(),
        },
    }
