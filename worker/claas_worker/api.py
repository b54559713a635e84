"""What the agent does on the API server: list and watch its requests, claim, progress, report; and its Lease's writes.

Every call has a time-out, transient failures are tried again until a limit, and every write of a request tests
`status.worker` and `status.attempt` (protocol.md): where they moved on, `Lost` says that the attempt is no longer ours.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from threading import Event
from time import monotonic, sleep
from typing import Any, TypeVar

import kubernetes.client
import kubernetes.config
import urllib3
from kubernetes.client import ApiException

from claas_crds import names
from claas_crds.reasons import Outcome, Reason, describe
from claas_crds.request import Claim, Progress, Result
from claas_worker.job import PHASES, Bound, now

log = logging.getLogger(__name__)

CALL_SECONDS = (3.0, 10.0)  # to connect, to read
WATCH_SECONDS = 300  # after which the API server ends a watch, and we open the next
CLAIM_LIMIT_SECONDS = 60.0
REPORT_LIMIT_SECONDS = 600.0  # a finished step is worth waiting for; beyond it the process ends and a retry adopts
BACKOFF_BASE_SECONDS, BACKOFF_CAP_SECONDS = 0.2, 5.0
# 409: the API server gave up merging our patch between the writes of others; a lost precondition is a 422.
TRANSIENT_CODES = frozenset({0, 408, 409, 429, 500, 502, 503, 504})
LOST_CODES = frozenset({403, 404, 409, 422})  # 422: a test failed; 403: the admission policy, bound to another Pod

Answer = TypeVar("Answer")


class Lost(Exception):
    """The attempt is no longer ours: moved on, ended or gone. Nothing of it is to be written any more."""


class Unreachable(Exception):
    """The API server did not take a call within its limit."""


class Gone(Exception):
    """The watch cannot go on from its resourceVersion: list again."""


def connect() -> kubernetes.client.ApiClient:
    """A client by the Pod's service account, or by KUBECONFIG where there is none. Thread-safe.

    Raises:
        kubernetes.config.ConfigException: neither is there.
    """
    configuration = kubernetes.client.Configuration()
    if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
        kubernetes.config.load_incluster_config(client_configuration=configuration)
    else:
        kubernetes.config.load_kube_config(client_configuration=configuration)
    configuration.retries = urllib3.Retry(0)  # `retrying` alone decides what is sent again
    return kubernetes.client.ApiClient(configuration)


def is_transient(error: Exception) -> bool:
    """Whether another try may do: the network, or an overloaded or restarting API server."""
    if isinstance(error, ApiException):
        return (error.status or 0) in TRANSIENT_CODES
    return isinstance(error, urllib3.exceptions.HTTPError | OSError)


def retrying(what: str, call: Callable[[], Answer], limit_seconds: float, stop: Event | None = None) -> Answer:
    """`call()`, again while its failure is transient, with full jitter (or the server's Retry-After), up to a limit.

    Raises:
        Unreachable: still failing at the limit, or `stop` was set between two tries.
        Exception: whatever is not transient, as it came.
    """
    stop = stop or Event()
    end = monotonic() + limit_seconds
    tries = 0
    while True:
        tries += 1
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            pause = backoff_seconds(tries, error)
            problem = f"HTTP {error.status}" if isinstance(error, ApiException) else type(error).__name__
            if monotonic() + pause > end or stop.is_set():
                raise Unreachable(
                    f"{what}: {problem}, given up after {tries} tries in {limit_seconds:.0f} s"
                ) from error
            log.warning("api call failed", extra={"what": what, "problem": problem, "tries": tries})
        stop.wait(pause)


def backoff_seconds(tries: int, error: Exception | None = None) -> float:
    """How long to wait after so many failures."""
    headers = getattr(error, "headers", None) or {}
    asked = str(headers.get("Retry-After", ""))
    jitter = random.uniform(0, min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2**tries))
    return max(jitter, min(float(asked), 30.0) if asked.isdigit() else 0.0)


class Requests:
    """The DistillRequests that are bound to one worker.

    Args:
        worker: name of the Pod, which status.worker names.
        namespace: where to look; empty: everywhere.
    """

    def __init__(self, client: kubernetes.client.ApiClient, worker: str, namespace: str = "") -> None:
        self.worker = worker
        self._namespace = namespace
        self._api = kubernetes.client.CustomObjectsApi(client)

    def bound(self) -> tuple[list[Bound], str]:
        """What is bound now, and the resourceVersion to watch from."""
        answer = self._select(_request_timeout=CALL_SECONDS)
        return [Bound.of(item) for item in answer["items"]], answer["metadata"]["resourceVersion"]

    def watch(self, resource_version: str) -> Iterator[tuple[str, Bound | None]]:
        """Changes until the server ends the watch: resourceVersions, each with the request where one is bound here.

        Raises:
            Gone: the resourceVersion is too old.
            ApiException, urllib3.exceptions.HTTPError: as they come.
        """
        response = self._select(
            watch=True,
            resource_version=resource_version,
            allow_watch_bookmarks=True,
            timeout_seconds=WATCH_SECONDS,
            _request_timeout=(CALL_SECONDS[0], WATCH_SECONDS + 30),
            _preload_content=False,
        )
        try:
            for event in _json_lines(response):
                kind, item = event["type"], event["object"]
                if kind == "ERROR":
                    if item.get("code") == HTTPStatus.GONE:
                        raise Gone
                    raise ApiException(status=item.get("code", 500), reason=item.get("reason", "watch error"))
                yield item["metadata"]["resourceVersion"], Bound.of(item) if kind in ("ADDED", "MODIFIED") else None
        finally:
            response.close()
            response.release_conn()

    def get(self, request: Bound) -> Bound:
        """The request as it is now.

        Raises:
            Lost: it is gone, or another one has its name.
        """

        def call() -> Any:
            return self._api.get_namespaced_custom_object(*_place(request), request.name, _request_timeout=CALL_SECONDS)

        try:
            live = Bound.of(retrying("get request", call, CLAIM_LIMIT_SECONDS))
        except ApiException as error:
            if error.status in LOST_CODES:
                raise Lost(f"HTTP {error.status}") from error
            raise
        if live.uid != request.uid:
            raise Lost("another object has its name now")
        return live

    def claim(self, request: Bound) -> Bound:
        """Writes status.claim, and the first phase with it. Nothing may be trained or written before this returned.

        The precondition (worker, attempt, no terminal condition, no result of this attempt) holds for the object that
        was read, and the write tests its resourceVersion. Safe to repeat: a claim whose answer was lost is found again.

        Raises:
            Lost: the precondition does not hold.
            Unreachable: not within CLAIM_LIMIT_SECONDS; the claim may or may not be there.
        """
        attempt, tries, end = request.attempt, 0, monotonic() + CLAIM_LIMIT_SECONDS
        while True:
            if request.attempt != attempt or not request.claimable(self.worker):
                raise Lost("bound elsewhere, ended or already reported")
            if request.claimed_by == self.worker:
                return request
            at = now()
            patch = [
                {"op": "test", "path": "/metadata/resourceVersion", "value": request.resource_version},
                *self._tests(request),
                {
                    "op": "add",
                    "path": "/status/claim",
                    "value": _json(Claim(worker=self.worker, attempt=attempt, at=at)),
                },
                {"op": "add", "path": "/status/progress", "value": _json(Progress(phase=PHASES[0], at=at))},
            ]
            try:
                return Bound.of(self._patch(request, patch))
            except Exception as error:
                if isinstance(error, ApiException) and error.status == HTTPStatus.FORBIDDEN:
                    raise Lost("HTTP 403, by the admission policy or RBAC") from error
                moved = isinstance(error, ApiException) and error.status in LOST_CODES
                if not moved and not is_transient(error):
                    raise
                tries += 1
                if monotonic() > end:
                    raise Unreachable(f"claim: given up after {tries} tries") from error
                sleep(0 if moved and tries == 1 else backoff_seconds(tries, error))
            request = self.get(request)

    def progress(self, request: Bound, phase: str) -> None:
        """Writes status.progress; one try, and what fails is the caller's to ignore."""
        progress = Progress(phase=phase, at=now())
        self._patch(
            request, [*self._tests(request), {"op": "add", "path": "/status/progress", "value": _json(progress)}]
        )

    def report(self, request: Bound, result: Result) -> None:
        """Writes status.result. Safe to repeat: the same result once more changes nothing.

        Raises:
            Lost: another attempt is bound, or the request is gone: the result is nobody's any more. Or another result
                of this attempt is there, which stands.
            Unreachable: not within REPORT_LIMIT_SECONDS.
        """

        def call(result: Result) -> None:
            patch = [*self._tests(request), {"op": "add", "path": "/status/result", "value": _json(result)}]
            self._patch(request, patch)

        try:
            retrying("report", lambda: call(result), REPORT_LIMIT_SECONDS)
        except ApiException as error:
            live = self.get(request)  # raises Lost where it is gone
            if live.worker != self.worker or live.attempt != request.attempt:
                raise Lost(f"HTTP {error.status}") from error
            if live.reported:
                raise Lost(f"HTTP {error.status}, a result of this attempt is there") from error
            # Still ours, so it is the result itself that is refused. Without any, the request would hang.
            log.error("result refused", extra={"uid": request.uid, "code": error.status})
            plain = Result(
                attempt=request.attempt,
                outcome=Outcome.FAILED,
                reason=Reason.INTERNAL_ERROR,
                message=f"{describe(Reason.INTERNAL_ERROR)} (the API server refused its result: HTTP {error.status})",
                at=now(),
            )
            retrying("report", lambda: call(plain), REPORT_LIMIT_SECONDS)

    def _tests(self, request: Bound) -> list[dict[str, Any]]:
        return [
            {"op": "test", "path": "/status/worker", "value": self.worker},
            {"op": "test", "path": "/status/attempt", "value": request.attempt},
        ]

    def _patch(self, request: Bound, patch: list[dict[str, Any]]) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self._api.patch_namespaced_custom_object_status(
            *_place(request),
            request.name,
            patch,
            _content_type="application/json-patch+json",  # the client would call a list a merge patch
            _request_timeout=CALL_SECONDS,
        )
        return answer

    def _select(self, **options: Any) -> Any:
        kind = (names.GROUP, names.VERSION)
        options["field_selector"] = f"status.worker={self.worker}"
        if self._namespace:
            return self._api.list_namespaced_custom_object(*kind, self._namespace, names.REQUEST_PLURAL, **options)
        return self._api.list_cluster_custom_object(*kind, names.REQUEST_PLURAL, **options)


def _place(request: Bound) -> tuple[str, str, str, str]:
    return names.GROUP, names.VERSION, request.namespace, names.REQUEST_PLURAL


def _json(model: Claim | Progress | Result) -> dict[str, Any]:
    return model.model_dump(by_alias=True, exclude_none=True, mode="json")


def _json_lines(response: Any) -> Iterator[dict[str, Any]]:
    """One JSON object a line, whatever the chunks; a last line that was cut off is dropped with its connection."""
    rest = b""
    for chunk in response.stream(amt=None, decode_content=False):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (json.loads(line) for line in lines if line.strip())
