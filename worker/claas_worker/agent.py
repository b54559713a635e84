"""The agent: a worker Pod's main loop. Requests that the operator bound to this Pod become results, one after another,
or several in one batched step if they are there at the same time: nothing waits for company.

For each: announce it in the Lease, claim it, run the step, report the result, take it off the Lease (protocol.md). The
step is handed in, so that tests and benchmarks can run the loop with another one. Bad input is a result, never an exit
code. Three threads beside the main one, none of which a step can block: the Lease's renewal, the watch, and progress.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

import urllib3
from kubernetes.client import ApiException

from claas_crds import names
from claas_crds.request import Result
from claas_worker.api import CLAIM_LIMIT_SECONDS, Gone, Lost, Requests, Unreachable, backoff_seconds, retrying
from claas_worker.config import AgentSettings
from claas_worker.job import PHASES, BatchStep, Bound, Job, Report, Step, Unfit, failure, place
from claas_worker.lease import WorkerLease

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 1.0  # at most one write of progress in so long
SHORT_WATCH_SECONDS = 1.0  # a watch that ends sooner is a failure: no loop without a pause
REMEMBERED = 10_000  # attempts that this worker will not run a second time


class Agent:
    """Serves requests until it has been idle for `linger_seconds`, or for what its Lease tells it since, has served
    `max_requests`, or is told to stop.

    Args:
        requests: the API server's side.
        lease: not started yet.
        settings: linger, maximum and patience for the first request.
    """

    def __init__(self, requests: Requests, lease: WorkerLease, settings: AgentSettings) -> None:
        self._requests, self._lease, self._settings = requests, lease, settings
        self._linger_seconds = settings.linger_seconds
        # A worker that does not linger at all must still meet the request that it was started for.
        self._first_seconds = settings.first_request_seconds
        lease.told = self._told
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

    def _told(self, linger_seconds: float) -> None:
        """The operator wants it to leave after being idle for so long."""
        log.info("told", extra={"linger_seconds": linger_seconds})
        self._linger_seconds, self._first_seconds = linger_seconds, 0.0
        self._inbox.put(None)

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
        idle_since = monotonic()
        while not self._stopping and not self._draining:
            idle_seconds = max(self._linger_seconds, self._first_seconds)
            try:
                request = self._inbox.get(timeout=max(0.0, idle_since + idle_seconds - monotonic()))
            except queue.Empty:
                log.info("idle", extra={"seconds": idle_seconds})
                return
            if request is not None and self._run(request, step):
                idle_since, self._first_seconds = monotonic(), 0.0

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
                    self._run(request, step)

    def _is_new(self, request: Bound) -> bool:
        return request.key not in self._run_before and request.claimable(self._requests.worker)

    def _run(self, first: Bound, step: Step) -> bool:
        """Runs a request, together with others that have come by then if the step can; whether any was claimed.

        Raises:
            Unreachable: see `run`.
        """
        places = self._settings.batch if isinstance(step, BatchStep) else 1
        claimed: list[Bound] = []
        try:
            request: Bound | None = first
            while request is not None:
                try:
                    if (mine := self._claim(request)) is not None:
                        claimed.append(mine)
                except Unreachable as error:
                    log.warning("not claimed yet", extra=_who(request) | {"why": str(error)})
                    self._inbox.put(request)  # the operator moves it elsewhere, or we try again
                    break
                # A claim takes as long as the others of a batch need to arrive.
                request = self._company() if len(claimed) < places and not self._draining else None
            if claimed:
                started = monotonic()
                results = self._execute(claimed, step)
                seconds = monotonic() - started
                for mine, result in zip(claimed, results, strict=True):
                    # What it has cost: its share of the time, where others had theirs.
                    share = round(1000 * seconds / len(claimed))
                    self._report(mine, result.model_copy(update={"gpu_ms": share}), seconds)
        finally:
            for mine in claimed:
                self._lease.leave(mine.uid)
        return bool(claimed)

    def _company(self) -> Bound | None:
        """A request that is there already."""
        while True:
            try:
                request = self._inbox.get_nowait()
            except queue.Empty:
                return None
            if request is None or self._is_new(request):
                return request

    def _claim(self, request: Bound) -> Bound | None:
        """Announces and claims it; None if it is not ours.

        Raises:
            Unreachable: it may be claimed or not.
        """
        if not self._is_new(request):
            return None
        who, kept = _who(request), False
        if request.pool and self._settings.pool and request.pool != self._settings.pool:
            # Bound by mistake or by somebody else than our operator, which moves it: another model may be meant.
            why = f"spec.pool is {request.pool}, and this worker is of pool {self._settings.pool}"
            log.warning("not claimed", extra=who | {"why": why})
            return None
        try:
            self._lease.announce(request.uid)
            request = self._requests.claim(request)
            kept = True
        except Lost as lost:
            log.info("not claimed", extra=who | {"why": str(lost)})
            return None
        finally:
            if not kept:
                self._lease.leave(request.uid)
        log.info("claimed", extra=who)
        self._run_before[request.key] = None
        if len(self._run_before) > REMEMBERED:
            del self._run_before[next(iter(self._run_before))]
        self._served += 1
        if self._served >= self._settings.max_requests and not self._draining:
            self._draining = True
            self._lease.set_state(names.STATE_DRAINING)  # while it runs: no other one is bound here in vain
        return request

    def _report(self, request: Bound, result: Result, seconds: float) -> None:
        """Writes the result, unless nobody wants it any more."""
        who = _who(request)
        try:
            self._requests.report(request, result)
        except Lost as lost:
            log.info("result not wanted any more", extra=who | {"why": str(lost)})
        else:
            end = {"outcome": result.outcome, "reason": result.reason, "seconds": round(seconds, 3)}
            log.info("reported", extra=who | end)

    def _execute(self, requests: Sequence[Bound], step: Step) -> list[Result]:
        """The results of one step; whatever it raises becomes one."""
        for request in requests:
            self._progress.begin(request)
        try:
            ends: dict[tuple[str, int], Result | Exception] = {}
            tasks: dict[tuple[str, int], tuple[Job, Report]] = {}
            for request in requests:
                try:
                    tasks[request.key] = (request.job(), functools.partial(self._progress.phase, request))
                except Exception as error:  # noqa: BLE001 (it is its result)
                    ends[request.key] = error
            try:
                if isinstance(step, BatchStep) and len(tasks) > 1:
                    ends |= zip(tasks, step.batch(list(tasks.values())), strict=True)
                else:
                    ends |= {key: step(*task) for key, task in tasks.items()}
            except Exception as error:  # noqa: BLE001 (it is everyone's who was in it)
                ends |= dict.fromkeys(tasks, error)
            return [self._end(request, ends[request.key]) for request in requests]
        finally:
            for request in requests:
                self._progress.end(request)

    def _end(self, request: Bound, end: Result | Exception) -> Result:
        if isinstance(end, Result):
            return end
        log.error("attempt failed", extra=_who(request), exc_info=end)
        self._stopping = self._stopping or isinstance(end, Unfit | MemoryError)
        return failure(Unfit("out of memory") if isinstance(end, MemoryError) else end, request.attempt)

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


@dataclass
class _Shown:
    """An attempt's phase, as it is and as it was written."""

    request: Bound
    phase: str
    written: str
    not_before: float


class Progress:
    """Writes the phases of the running attempts from a thread of its own: of each at most one in PROGRESS_SECONDS, the
    latest.

    Progress is for people: a write that fails is logged and left, and none delays the step.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._change = threading.Condition()
        self._shown: dict[tuple[str, int], _Shown] = {}
        threading.Thread(target=self._write, name="progress", daemon=True).start()

    def begin(self, request: Bound) -> None:
        """An attempt was claimed; the claim itself showed the first phase."""
        with self._change:
            self._shown[request.key] = _Shown(request, PHASES[0], PHASES[0], monotonic() + PROGRESS_SECONDS)

    def phase(self, request: Bound, phase: str) -> None:
        """Its step goes on to this phase."""
        with self._change:
            if request.key in self._shown:
                self._shown[request.key].phase = phase
                self._change.notify()

    def end(self, request: Bound) -> None:
        """The attempt is over: nothing more is written for it, but for a write that is on its way."""
        with self._change:
            self._shown.pop(request.key, None)

    def _write(self) -> None:
        while True:
            with self._change:
                changed = [shown for shown in self._shown.values() if shown.phase != shown.written]
                if not changed:
                    self._change.wait()
                    continue
                shown = min(changed, key=lambda one: one.not_before)
                if (early := shown.not_before - monotonic()) > 0:
                    self._change.wait(early)
                    continue
                request, phase = shown.request, shown.phase
                shown.written, shown.not_before = phase, monotonic() + PROGRESS_SECONDS
            try:
                self._requests.progress(request, phase)
            except (ApiException, urllib3.exceptions.HTTPError, OSError) as error:
                problem = f"HTTP {error.status}" if isinstance(error, ApiException) else type(error).__name__
                log.warning("progress not written", extra={"uid": request.uid, "problem": problem})


def _who(request: Bound) -> dict[str, Any]:
    return {"uid": request.uid, "request": f"{request.namespace}/{request.name}", "attempt": request.attempt}


def _end_process(raised: threading.ExceptHookArgs) -> None:
    """A thread that dies (renewal, watch) leaves a worker that only looks alive: end it, and its request runs again."""
    error: BaseException | None = raised.exc_value
    log.critical(
        "thread died", extra={"thread": getattr(raised.thread, "name", ""), "error": place(error) if error else ""}
    )
    sys.stderr.flush()
    os._exit(1)
