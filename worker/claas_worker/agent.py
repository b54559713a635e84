"""The agent: a worker Pod's main loop. Requests that the operator bound to this Pod become results, one after another.

For each: announce it in the Lease, claim it, run the step, report the result, take it off the Lease (protocol.md). The
step is handed in, so that tests and benchmarks can run the loop with another one. Bad input is a result, never an exit
code. Three threads beside the main one, none of which a step can block: the Lease's renewal, the watch, and progress.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

import urllib3
from kubernetes.client import ApiException

from claas_crds import names
from claas_crds.request import Result
from claas_worker.api import CLAIM_LIMIT_SECONDS, Gone, Lost, Requests, Unreachable, backoff_seconds, retrying
from claas_worker.config import AgentSettings
from claas_worker.job import PHASES, Bound, Step, Unfit, failure, place
from claas_worker.lease import WorkerLease

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 1.0  # at most one write of progress in so long
SHORT_WATCH_SECONDS = 1.0  # a watch that ends sooner is a failure: no loop without a pause
REMEMBERED = 10_000  # attempts that this worker will not run a second time


class Agent:
    """Serves requests until it has been idle for `linger_seconds`, has served `max_requests`, or is told to stop.

    Args:
        requests: the API server's side.
        lease: not started yet.
        settings: linger, maximum and patience for the first request.
    """

    def __init__(self, requests: Requests, lease: WorkerLease, settings: AgentSettings) -> None:
        self._requests, self._lease, self._settings = requests, lease, settings
        # Requests as the watch finds them; None wakes the loop. A signal handler may put into a SimpleQueue, not lock.
        self._inbox: queue.SimpleQueue[Bound | None] = queue.SimpleQueue()
        self._stopping = False  # SIGTERM: nothing more is started
        self._draining = False
        self._loading = False
        self._run_before: dict[tuple[str, int], None] = {}  # attempts that were claimed here, oldest first
        self._served = 0
        self._progress = Progress(requests)

    def stop(self, *_: object) -> None:
        """As SIGTERM does: what runs is finished and reported if the grace period allows, nothing else is started."""
        self._stopping = True
        self._lease.drain_soon()
        self._inbox.put(None)
        if self._loading:
            raise SystemExit(0)

    def run(self, load: Callable[[], Step]) -> None:
        """Shows Starting, loads the step (seconds), shows Ready, serves, drains, returns.

        Raises:
            Unreachable: no API server at the start, or none that took a result for minutes. The process should end:
                the request runs again, and a version that was written is adopted.
            SystemExit: told to stop while loading.
        """
        threading.excepthook = _end_process
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self.stop)
        self._loading = True
        self._lease.start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        step = load()
        self._loading = False
        if not self._stopping:
            self._lease.set_state(names.STATE_READY)
            log.info("ready")
        self._serve(step)
        self._drain(step)
        self._lease.close()
        log.info("drained", extra={"served": self._served})

    def _serve(self, step: Step) -> None:
        """Runs what is bound here, until there is a reason to drain."""
        # A worker that does not linger at all must still meet the request that it was started for.
        idle_seconds = max(self._settings.linger_seconds, self._settings.first_request_seconds)
        idle_since = monotonic()
        while not self._stopping and not self._draining:
            try:
                request = self._inbox.get(timeout=max(0.0, idle_since + idle_seconds - monotonic()))
            except queue.Empty:
                log.info("idle", extra={"seconds": idle_seconds})
                return
            if request is not None and self._run_one(request, step):
                idle_seconds, idle_since = self._settings.linger_seconds, monotonic()

    def _drain(self, step: Step) -> None:
        """Shows Draining, then runs what was bound before that was seen, unless told to stop."""
        self._draining = True
        self._lease.set_state(names.STATE_DRAINING)
        tried: set[tuple[str, int]] = set()
        while not self._stopping:
            bound, _ = retrying("list requests", self._requests.bound, CLAIM_LIMIT_SECONDS)
            new = [request for request in bound if self._is_new(request) and request.key not in tried]
            if not new:
                return
            for request in new:
                tried.add(request.key)
                if not self._stopping:
                    self._run_one(request, step)

    def _is_new(self, request: Bound) -> bool:
        return request.key not in self._run_before and request.claimable(self._requests.worker)

    def _run_one(self, request: Bound, step: Step) -> bool:
        """Announce, claim, run, report, leave; whether it was claimed.

        Raises:
            Unreachable: see `run`.
        """
        if not self._is_new(request):
            return False
        who = {"uid": request.uid, "request": f"{request.namespace}/{request.name}", "attempt": request.attempt}
        try:
            try:
                self._lease.announce(request.uid)
                request = self._requests.claim(request)
            except Lost as lost:
                log.info("not claimed", extra=who | {"why": str(lost)})
                return False
            except Unreachable as error:
                log.warning("not claimed yet", extra=who | {"why": str(error)})
                self._inbox.put(request)  # the operator moves it elsewhere, or we try again
                return False
            log.info("claimed", extra=who)
            self._run_before[request.key] = None
            if len(self._run_before) > REMEMBERED:
                del self._run_before[next(iter(self._run_before))]
            self._served += 1
            if self._served >= self._settings.max_requests and not self._draining:
                self._draining = True
                self._lease.set_state(names.STATE_DRAINING)  # while it runs: no other one is bound here in vain
            started = monotonic()
            result = self._execute(request, step, who)
            seconds = round(monotonic() - started, 3)
            try:
                self._requests.report(request, result)
            except Lost as lost:
                log.info("result not wanted any more", extra=who | {"why": str(lost)})
            else:
                end = {"outcome": result.outcome, "reason": result.reason, "seconds": seconds}
                log.info("reported", extra=who | end)
        finally:
            self._lease.leave(request.uid)
        return True

    def _execute(self, request: Bound, step: Step, who: dict[str, Any]) -> Result:
        """The step's result; whatever it raises becomes one."""
        self._progress.begin(request)
        try:
            return step(request.job(), self._progress.phase)
        except Exception as error:
            log.exception("attempt failed", extra=who)
            self._stopping = self._stopping or isinstance(error, Unfit | MemoryError)
            return failure(Unfit("out of memory") if isinstance(error, MemoryError) else error, request.attempt)
        finally:
            self._progress.end()

    def _watch(self) -> None:
        """Lists, then watches, again and again: what is bound here comes into the inbox, mostly more than once."""
        version, failures = "", 0
        while True:
            started = monotonic()
            try:
                if not version:
                    bound, version = self._requests.bound()
                    for request in bound:
                        self._inbox.put(request)
                for latest, changed in self._requests.watch(version):
                    version, failures = latest, 0
                    if changed is not None and changed.claimable(self._requests.worker):
                        self._inbox.put(changed)
                if monotonic() - started > SHORT_WATCH_SECONDS:
                    continue
                problem = "ended at once"
            except Gone:
                version, problem = "", "resourceVersion too old"
            except (ApiException, urllib3.exceptions.HTTPError, OSError, json.JSONDecodeError) as error:
                version = "" if isinstance(error, ApiException) else version
                problem = f"HTTP {error.status}" if isinstance(error, ApiException) else type(error).__name__
            failures += 1
            log.warning("watch broke off", extra={"problem": problem, "failures": failures})
            sleep(backoff_seconds(failures))


class Progress:
    """Writes the phase of the running attempt from a thread of its own, at most once in PROGRESS_SECONDS, latest first.

    Progress is for people: a write that fails is logged and left, and none delays the step.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._change = threading.Condition()
        self._request: Bound | None = None
        self._phase, self._written = "", ""
        self._not_before = 0.0
        threading.Thread(target=self._write, name="progress", daemon=True).start()

    def begin(self, request: Bound) -> None:
        """An attempt was claimed; the claim itself showed the first phase."""
        with self._change:
            self._request, self._phase, self._written = request, PHASES[0], PHASES[0]
            self._not_before = monotonic() + PROGRESS_SECONDS

    def phase(self, phase: str) -> None:
        """The step goes on to this phase."""
        with self._change:
            self._phase = phase
            self._change.notify()

    def end(self) -> None:
        """The attempt is over: nothing more is written for it, but for a write that is on its way."""
        with self._change:
            self._request = None

    def _write(self) -> None:
        while True:
            with self._change:
                while self._request is None or self._phase == self._written:
                    self._change.wait()
                if (early := self._not_before - monotonic()) > 0:
                    self._change.wait(early)
                    continue
                request, phase = self._request, self._phase
                self._written, self._not_before = phase, monotonic() + PROGRESS_SECONDS
            try:
                self._requests.progress(request, phase)
            except (ApiException, urllib3.exceptions.HTTPError, OSError) as error:
                problem = f"HTTP {error.status}" if isinstance(error, ApiException) else type(error).__name__
                log.warning("progress not written", extra={"uid": request.uid, "problem": problem})


def _end_process(raised: threading.ExceptHookArgs) -> None:
    """A thread that dies (renewal, watch) leaves a worker that only looks alive: end it, and its request runs again."""
    error: BaseException | None = raised.exc_value
    log.critical(
        "thread died", extra={"thread": getattr(raised.thread, "name", ""), "error": place(error) if error else ""}
    )
    sys.stderr.flush()
    os._exit(1)
