"""Workers as the scheduler sees them: who may take how much, who is lost, whose Pod must go, and how many to start.

Pure functions over the snapshot. A worker is a Pod and the Lease it holds; a Lease without its Pod counts for nothing.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from claas_crds import names
from claas_operator.actions import Bind, Fault, Fence, Lock, Note, StartJob, StopJob, Tell
from claas_operator.jobs import build_worker_job, worker_stem
from claas_operator.settings import Pool, Settings
from claas_operator.snapshot import Job, Kind, Lease, Pod, Request, Snapshot, counter_of

# Of a Pod whose pool is no longer configured.
DEFAULT_START_LIMIT: Final = timedelta(seconds=900)

# The Job controller makes a Job's Pod within a second; one that has none after this was refused one.
POD_LATE: Final = timedelta(seconds=20)

# Pool name and namespace: where one set of workers serves one set of requests.
Scope = tuple[str, str]
# Tells the planner that something becomes interesting at that time.
Wake = Callable[[datetime], None]


@dataclass
class Worker:
    """A worker that may take requests now; `slots` goes down as the planner gives them out."""

    name: str
    load: int
    slots: int


@dataclass
class Stint:
    """A worker Job that has not finished, with its Pod and its Lease as far as there are any."""

    job: Job
    pod: Pod | None
    lease: Lease | None
    outdated: bool  # its pool starts others by now, or is no more
    holds: bool  # something is bound to it, or about to be

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.lease is not None and self.lease.state == names.STATE_READY

    @property
    def starts(self) -> bool:
        """Whether it was never Ready."""
        return self.lease is None or self.lease.state == names.STATE_STARTING

    @property
    def goes(self) -> bool:
        """Whether it takes nothing more."""
        told = self.lease is not None and (self.lease.state == names.STATE_DRAINING or self.lease.told == 0)
        return told or self.outdated or (self.pod is not None and self.pod.deleting is not None)

    @property
    def linger_seconds(self) -> float:
        """How long it stays without work, as far as it knows."""
        if self.lease is not None and self.lease.told is not None:
            return self.lease.told
        return self.pod.linger_seconds if self.pod else 0.0


@dataclass
class Fleet:
    """The workers of every scope, with what they may still take."""

    ready: dict[Scope, list[Worker]] = field(default_factory=lambda: defaultdict(list))
    starting: Counter[Scope] = field(default_factory=Counter)  # worker Jobs on their way to Ready
    alive: Counter[Scope] = field(default_factory=Counter)  # worker Jobs that hold, or will hold, a GPU
    draining: Counter[Scope] = field(default_factory=Counter)  # of these, the ones that take nothing more
    stints: dict[Scope, list[Stint]] = field(default_factory=lambda: defaultdict(list))
    served: Counter[tuple[str, str]] = field(default_factory=Counter)  # by a worker's namespace and name
    latest: dict[Scope, datetime] = field(default_factory=dict)  # when something was last given to one of them
    trouble: dict[Scope, str] = field(default_factory=dict)  # why a worker does not start

    def take(self, scope: Scope, but: str = "") -> str | None:
        """The name of the least loaded worker with room, whose room shrinks by one; never the one called `but`."""
        free = [worker for worker in self.ready[scope] if worker.slots > 0 and worker.name != but]
        if not free:
            return None
        chosen = min(free, key=lambda worker: (worker.load, worker.name))
        chosen.slots -= 1
        chosen.load += 1
        return chosen.name


def stale(lease: Lease, snapshot: Snapshot, settings: Settings, now: datetime) -> bool:
    """Whether a Lease was not renewed in time, as far as we could see: while we were cut off we saw nothing."""
    return now >= stale_at(lease, snapshot, settings)


def stale_at(lease: Lease, snapshot: Snapshot, settings: Settings) -> datetime:
    """When a Lease that is not renewed any more becomes stale."""
    return max(lease.observed, snapshot.contact_since) + timedelta(seconds=settings.timings.lease_seconds)


def lost(pod: Pod | None) -> bool:
    """Whether a worker can do nothing any more: its Pod is gone, or all its containers have ended for good."""
    return pod is None or pod.over


def workplace(request: Request, snapshot: Snapshot, settings: Settings) -> str:
    """The namespace where the workers of the request's pool run.

    A worker is known by it and its name: anybody may give a Pod in their own namespace the name of a Shared worker.
    """
    adapter = snapshot.adapter(request.namespace, request.adapter_name) if request.adapter_name else None
    chosen = request.pool if request.bare else adapter.spec.pool if adapter and adapter.spec else ""
    pool = settings.pool(chosen or settings.default_pool)
    return request.namespace if pool is not None and pool.isolation == "Namespace" else settings.namespace


def pod_of(request: Request, snapshot: Snapshot, settings: Settings) -> Pod | None:
    """The Pod that a request is bound to: where the workers of its pool run, or where it ran before its adapter's pool
    was changed."""
    home = workplace(request, snapshot, settings)
    places = (home, settings.namespace if home != settings.namespace else request.namespace)
    found = (snapshot.pod(place, request.worker) for place in places)
    return next((pod for pod in found if pod is not None and works_for(pod, settings)), None)


def works_for(pod: Pod, settings: Settings) -> bool:
    """Whether a Pod is a worker's and lies where its pool's workers run; one of a pool that is no more may."""
    pool = settings.pool(pod.pool)
    tenants = pool is None or pool.isolation == "Namespace"
    return pod.component == names.COMPONENT_WORKER and (tenants or pod.namespace == settings.namespace)


def survey(snapshot: Snapshot, settings: Settings, now: datetime, wake: Wake) -> Fleet:
    """What every scope has."""
    fleet = Fleet()
    fleet.served = _served(snapshot, settings)
    load: Counter[tuple[str, str]] = Counter()
    given: dict[tuple[str, str], datetime] = {}
    begun = set[tuple[str, str]]()
    for request in snapshot.running.values():
        key = (workplace(request, snapshot, settings), request.worker)
        load[key] += 1
        given[key] = max(request.assigned_at, given.get(key, request.assigned_at))
        if request.claimed:
            begun.add(key)  # it goes on without company: what is bound to it now would wait there for the end
    for action in snapshot.in_flight.values():
        if isinstance(action, (Bind, Lock)) and action.worker:
            load[workplace(action.request, snapshot, settings), action.worker] += 1
    pods_of_job: dict[tuple[str, str], Pod] = {}
    over = set[tuple[str, str]]()  # Jobs that are about to finish
    for pod in snapshot.pods.values():
        if pod.component != names.COMPONENT_WORKER:
            continue
        if pod.over:
            over.add((pod.namespace, pod.job))
            continue
        scope = (pod.pool, pod.namespace)
        pods_of_job[pod.namespace, pod.job] = pod
        if at := given.get((pod.namespace, pod.name)):
            fleet.latest[scope] = max(at, fleet.latest.get(scope, at))
        if pod.trouble:
            fleet.trouble[scope] = min(pod.trouble, fleet.trouble.get(scope, pod.trouble))
        pool, lease = settings.pool(pod.pool), snapshot.lease_of(pod)
        if pool is None or lease is None or lease.state != names.STATE_READY or pod.deleting:
            continue
        if stale(lease, snapshot, settings, now):
            continue
        wake(stale_at(lease, snapshot, settings))
        if not works_for(pod, settings):
            continue
        if pod.namespace != settings.namespace and snapshot.pod(settings.namespace, pod.name) is not None:
            continue  # no accident: what is bound to it could be taken for the Shared worker's
        key = (pod.namespace, pod.name)
        goes = key in begun or lease.told == 0 or _outdated(pod, pool)
        slots = 0 if goes else min(pool.batch - load[key], pool.max_requests - fleet.served[key])
        fleet.ready[scope].append(Worker(pod.name, load[key], slots))
    for job in _unfinished(snapshot):
        scope = (job.pool, job.namespace)
        fleet.alive[scope] += 1
        its_pod = pods_of_job.get((job.namespace, job.name))
        lease = snapshot.lease_of(its_pod) if its_pod else None
        holds = its_pod is not None and load[its_pod.namespace, its_pod.name] > 0
        stint = Stint(job, its_pod, lease, _outdated(job, settings.pool(job.pool)), holds)
        if stint.goes:
            fleet.draining[scope] += 1
        elif stint.starts:
            fleet.starting[scope] += 1
        if its_pod is not None or (job.namespace, job.name) not in over:
            fleet.stints[scope].append(stint)
        if its_pod is None and job.suspended:
            # Kueue holds it back, or has taken its Pod away again; it goes on as the same Job.
            fleet.trouble.setdefault(
                scope, f"Job {job.name} is suspended: it waits for its turn in {job.queue or 'no queue'}"
            )
        elif its_pod is None and now >= job.begun + POD_LATE:
            fleet.trouble.setdefault(scope, f"Job {job.name} has no Pod; its events say why (a quota, an admission?)")
        elif its_pod is None:
            wake(job.begun + POD_LATE)
    for action in snapshot.in_flight.values():
        if not isinstance(action, StartJob) or not action.pool:
            continue
        if why := snapshot.failing.get(action.key):
            fleet.trouble.setdefault((action.pool, action.namespace), refused(action.name, why))
        if snapshot.by_name(Kind.JOB, action.namespace, action.name) is None:
            fleet.alive[action.pool, action.namespace] += 1
            fleet.starting[action.pool, action.namespace] += 1
    return fleet


def _outdated(started: Pod | Job, pool: Pool | None) -> bool:
    """Whether a worker was started with other settings than its pool's; of one that does not say, nobody knows."""
    return bool(started.edition) and (pool is None or pool.edition != started.edition)


def _served(snapshot: Snapshot, settings: Settings) -> Counter[tuple[str, str]]:
    """How many requests were bound to each worker, by namespace and name, as far as they are still there."""
    if all(pool.isolation == "Shared" for pool in settings.pools):
        return Counter({(settings.namespace, worker): len(uids) for worker, uids in snapshot.served.items()})
    return Counter(
        (workplace(request, snapshot, settings), worker)
        for worker, uids in snapshot.served.items()
        for uid in uids
        if (request := snapshot.requests.get(uid)) is not None
    )


def _unfinished(snapshot: Snapshot) -> Iterator[Job]:
    for job in snapshot.jobs.values():
        if job.component == names.COMPONENT_WORKER and job.finished is None and job.deleting is None:
            yield job


@dataclass
class Demand:
    """Requests of a scope that could run now if there were a worker."""

    requests: int = 0
    late: int = 0  # of these, the ones that have waited for `scaleUpSeconds`, in which nothing got a worker
    work_seconds: float = 0.0  # what they and the requests behind them are expected to take one worker


def start_workers(
    snapshot: Snapshot, settings: Settings, fleet: Fleet, demands: Mapping[Scope, Demand], now: datetime, wake: Wake
) -> Iterator[StartJob]:
    """Worker Jobs for requests that no worker has room for, now or soon, up to the pool's maximum."""
    served_jobs = {(namespace, worker.rpartition("-")[0]) for namespace, worker in fleet.served}
    for pool in settings.pools:
        scopes = {scope for scope in (*demands, *fleet.alive) if scope[0] == pool.name}
        if pool.isolation == "Shared":
            scopes = {(pool.name, settings.namespace)}
        for scope in sorted(scopes):
            staying = fleet.alive[scope] - fleet.draining[scope]
            short = _short(pool, demands.get(scope, Demand()), staying, fleet.starting[scope])
            count = min(max(short, pool.min_workers - staying), pool.max_workers - fleet.alive[scope])
            if count <= 0:
                continue
            jobs = [job for job in snapshot.jobs.values() if (job.pool, job.namespace) == scope]
            jobs = [job for job in jobs if job.component == names.COMPONENT_WORKER]
            failures = _failures_at_start(jobs, served_jobs)
            if failures:
                fleet.trouble.setdefault(scope, f"worker Job {failures[0].name} failed: {failures[0].message}")
                ended = max(job.finished for job in failures if job.finished)
                retry_at = ended + backoff(settings, len(failures))
                if now < retry_at:
                    wake(retry_at)
                    continue
            stem = worker_stem(settings, pool)
            highest = max([snapshot.taken_counters.get((scope[1], stem), 0), *(job.counter for job in jobs)])
            # Nor a name of which a Pod is left: it would be taken for the new Job's.
            left = (pod.job for pod in snapshot.pods.values() if (pod.pool, pod.namespace) == scope)
            highest = max([highest, *map(counter_of, left)])
            for i in range(count):
                stays = staying + i < pool.min_workers
                manifest = build_worker_job(settings, pool, scope[1], highest + 1 + i, snapshot.owner_uid, stays=stays)
                start = StartJob(manifest=manifest, pool=pool.name)
                if why := snapshot.failing.get(start.key):
                    fleet.trouble.setdefault(scope, refused(start.name, why))
                yield start


def let_go(settings: Settings, fleet: Fleet) -> Iterator[Tell | StopJob]:
    """Workers that the pools do not keep any more.

    As many as `minWorkers` stay for good; what was kept beyond that stays as long as others do, `lingerSeconds`. What
    a pool has no room for, or was started with other settings, leaves as soon as it has nothing to do. The worker
    itself does so, when told: it shows that it drains, and runs what was bound to it before that was seen. One that
    was never Ready has nothing, and is stopped.
    """
    for scope, stints in sorted(fleet.stints.items()):
        pool = settings.pool(scope[0])
        if scope[1] != settings.namespace and (pool is None or pool.isolation == "Shared"):
            continue  # another release's, if anybody's
        stints = [stint for stint in stints if stint.job.edition]  # others come from elsewhere
        # Who goes first: what is not Ready, then what leaves soonest anyway, then what has nothing to do.
        stints.sort(key=lambda s: (s.ready, s.linger_seconds, s.holds, -s.job.counter))
        current = [stint for stint in stints if not stint.goes]
        excess = len(current) - pool.max_workers if pool else 0
        going = [stint for stint in stints if stint.outdated] + current[: max(0, excess)]
        for stint in going:
            if stint.starts and not stint.holds and not (stint.pod and stint.pod.deleting):
                yield StopJob(job=stint.job, pod=stint.pod)
            else:
                yield from _tell(stint, 0)
        if pool is None:
            continue
        kept = [s for s in current if s.ready and s not in going and s.linger_seconds > pool.linger_seconds]
        for stint in kept[: max(0, len(kept) - pool.min_workers)]:
            yield from _tell(stint, pool.linger_seconds)


def _tell(stint: Stint, linger_seconds: float) -> Iterator[Tell]:
    if stint.ready and stint.pod and stint.lease and stint.linger_seconds > linger_seconds:
        yield Tell(pod=stint.pod, lease=stint.lease, linger_seconds=linger_seconds)


def refused(job: str, why: str) -> str:
    """What people are told about a Job that the API server does not take."""
    return f"Job {job} cannot be created: {why} (a quota, an admission?)"


def _short(pool: Pool, demand: Demand, staying: int, starting: int) -> int:
    """How many workers are missing, of which the first start at once.

    Beside workers that are alive, another starts only where these would take longer than `scaleUpSeconds` for what
    waits; or, whatever was expected, where the queue has not moved for so long and no worker is on its way. A moment's
    crowd is served sooner than a new worker is ready: counted alone, each would start one, which then idles.
    """
    each = min(pool.batch, pool.max_requests)
    missing = math.ceil(demand.requests / each) - starting
    if staying == 0 or missing <= 0 or pool.scale_up_seconds == 0:
        return missing
    by_work = math.ceil(demand.work_seconds / pool.scale_up_seconds) - staying
    return min(missing, max(by_work, 0 if starting else math.ceil(demand.late / each)))


def _failures_at_start(jobs: Iterable[Job], served_jobs: set[tuple[str, str]]) -> list[Job]:
    """The latest Jobs, newest first, that failed before anything was bound to them: starting more would not help.

    Jobs that are still on their way say nothing yet and are passed over.
    """
    failures = []
    for job in sorted(jobs, key=lambda job: job.counter, reverse=True):
        if job.finished is None:
            continue
        if not job.failed or (job.namespace, job.name) in served_jobs:
            break
        failures.append(job)
    return failures


def backoff(settings: Settings, failures: int) -> timedelta:
    """The wait after so many failures in a row."""
    timings = settings.timings
    return timedelta(seconds=doubled(timings.retry_base_seconds, timings.retry_cap_seconds, failures))


def doubled(base_seconds: float, cap_seconds: float, failures: int) -> float:
    """The wait in seconds after so many failures in a row: twice as long each time, up to a cap."""
    return min(cap_seconds, base_seconds * 2.0 ** min(failures - 1, 64))  # beyond 1023 there is no float


def fences(snapshot: Snapshot, settings: Settings, now: datetime, wake: Wake) -> Iterator[Fence]:
    """Worker Pods that must go: wedged, silent, never Ready, or told to go long ago and still there."""
    grace = timedelta(seconds=settings.timings.fence_grace_seconds)
    for pod in snapshot.pods.values():
        if pod.component != names.COMPONENT_WORKER or pod.over:
            continue
        lease = snapshot.lease_of(pod)
        if pod.deleting:
            # deletionTimestamp already includes the Pod's own grace period. A kubelet that is alive has removed it by
            # then; one that is not (its node is gone) never will, and the requests would wait for ever.
            if lease is None or stale(lease, snapshot, settings, now):
                if now >= pod.deleting + grace:
                    yield _fence(pod, lease, Fault.STUCK)
                else:
                    wake(pod.deleting + grace)
            continue
        pool = settings.pool(pod.pool)
        limit = timedelta(seconds=pool.start_limit_seconds) if pool else DEFAULT_START_LIMIT
        if lease is None or lease.state == names.STATE_STARTING:
            # From the moment a kubelet took the Pod: before, it waits for a node and runs nothing.
            if pod.started and now >= pod.started + limit:
                yield _fence(pod, lease, Fault.SLOW_START if lease else Fault.NO_LEASE)
                continue
            if pod.started:
                wake(pod.started + limit)
        if lease is None:
            continue
        if stale(lease, snapshot, settings, now):
            yield _fence(pod, lease, Fault.STALE)
            continue
        wake(stale_at(lease, snapshot, settings))
        for uid in sorted(lease.running):
            request = snapshot.requests.get(uid)
            over_since = request.ended_at if request else snapshot.strangers.get(uid)
            if over_since is None:
                continue
            if now >= over_since + grace:
                yield _fence(pod, lease, Fault.OVERRUN, uid)
                break
            wake(over_since + grace)


def _fence(pod: Pod, lease: Lease | None, fault: Fault, overrun: str = "") -> Fence:
    note = Note(pod, "Fenced", f"worker {pod.name} loses its Pod: {fault.value}")
    return Fence(pod=pod, lease=lease, fault=fault, overrun=overrun, note=note)
