"""A cluster in simulated time: the real `plan` and `apply` on an API server in memory, and workers whose steps take as
long as they are told. Seconds are counted from NOW; nothing here looks at a clock."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from claas_crds import names
from claas_operator.apply import Apply, Lost
from claas_operator.plan import plan
from claas_operator.settings import Settings
from claas_operator.snapshot import Kind, Snapshot
from claas_store.uris import next_version_uri
from operatorkit import HOME, NUMBERS, MemoryApi, Raw, format_time, kind_of, later, lease, pod, request


@dataclass
class Worker:
    """A worker's process: Ready at `ready_at`, idle since `idle_since`, with the uids that it runs and until when."""

    name: str
    job: str
    ready_at: float
    linger: float
    idle_since: float = 0.0
    running: dict[str, float] = field(default_factory=dict)


class World:
    """One release and its users.

    Args:
        step: seconds that a request takes on a worker.
        start: seconds from a Job to its worker being Ready.
        tick: seconds between two looks at everything.
    """

    def __init__(self, using: Settings, *, step: Callable[[Raw], float], start: float = 0.0, tick: float = 0.5) -> None:
        self.now = 0.0
        self.settings, self.step, self.start, self.tick = using, step, start, tick
        self.api = MemoryApi(clock=lambda: later(self.now))
        self.workers: dict[str, Worker] = {}
        self.jobs: list[float] = []  # when each worker Job was created
        self.bound: dict[str, float] = {}  # by name: when a worker had it first
        self.done: dict[str, float] = {}
        self._heard = 0
        self._begin()

    def _begin(self) -> None:
        self.snapshot = Snapshot()
        for raw in self.api.objects.values():
            self.snapshot.put(kind_of(raw), raw, later(self.now))
        self._heard = len(self.api.log)
        self._apply = Apply(self.api, self.snapshot, self.settings, lambda: True, lambda: later(self.now))  # type: ignore[arg-type]

    def restart(self, using: Settings | None = None) -> None:
        """The operator is another process, that has listed everything; with other settings, if any are given."""
        self.settings = using or self.settings
        self._begin()

    def create(self, name: str, namespace: str, **spec: Any) -> None:
        """A bare request, on a version of its own."""
        uri = f"s3://adapters/{namespace}/{name}/"
        raw = request(name, "", namespace=namespace, uid=f"uid-{namespace}-{name}", created=later(self.now))
        self.api.add(raw | {"spec": raw["spec"] | {"loraUri": uri} | spec})

    def run(self, until: float) -> None:
        """Time passes."""
        while self.now < until:
            self.turn()
            self.now += self.tick

    def turn(self) -> None:
        """Everybody looks at what there is now, and acts."""
        self._workers()
        for _ in range(3):  # a lock, what follows from it, and what follows from that
            self._operator()
        self._workers()

    def _hear(self) -> None:
        for kind, how, raw in self.api.log[self._heard :]:
            if how == "DELETED":
                self.snapshot.remove(kind, raw["metadata"]["uid"], later(self.now))
            else:
                self.snapshot.put(kind, raw, later(self.now))
        self._heard = len(self.api.log)

    def _operator(self) -> None:
        self._hear()
        seen = set[str]()
        for action in plan(self.snapshot, self.settings, later(self.now)).actions:
            if action.key not in seen:
                seen.add(action.key)
                try:
                    self._apply(action).send(None)
                except (StopIteration, Lost):
                    continue

    def _workers(self) -> None:
        for (kind, namespace, name), raw in list(self.api.objects.items()):
            is_worker = kind is Kind.JOB and raw["metadata"]["labels"][names.COMPONENT_LABEL] == names.COMPONENT_WORKER
            if is_worker and not (raw.get("status") or {}).get("conditions") and f"{name}-p" not in self.workers:
                if (raw.get("spec") or {}).get("suspend"):
                    continue
                variables = raw["spec"]["template"]["spec"]["containers"][0]["env"]
                linger = float(next(v["value"] for v in variables if v["name"] == names.ENV_LINGER_SECONDS))
                worker = Worker(f"{name}-p", name, self.now + self.start, linger)
                self.workers[worker.name] = worker
                self.jobs.append(self.now)
                taken = {"startTime": format_time(later(self.now))}
                made = pod(worker.name, job=name, uid=f"uid-{worker.name}", namespace=namespace, status=taken)
                made["metadata"]["annotations"] = raw["spec"]["template"]["metadata"]["annotations"]
                self.api.add(made)
        for worker in list(self.workers.values()):
            self._work(worker)

    def _work(self, worker: Worker) -> None:
        key = (Kind.POD, HOME, worker.name)
        if key not in self.api.objects or self.api.objects[key]["status"]["phase"] == "Succeeded":
            return
        if self.now < worker.ready_at:
            return
        mine = [raw for raw in self.snapshot.running.values() if raw.worker == worker.name]
        for entry in mine:
            raw = self.api.objects[Kind.REQUEST, entry.namespace, entry.name]
            if "claim" not in raw["status"] and entry.uid not in worker.running:
                claim = {"worker": worker.name, "attempt": entry.status.attempt, "at": format_time(later(self.now))}
                self.api.change(Kind.REQUEST, entry.namespace, entry.name, {"status": {"claim": claim}})
                worker.running[entry.uid] = self.now + self.step(raw)
                self.bound.setdefault(entry.name, self.now)
        for uid, ends in list(worker.running.items()):
            if self.now >= ends:
                del worker.running[uid]
                self._report(uid)
        if worker.running or mine:
            worker.idle_since = self.now
        elif self.now - max(worker.idle_since, worker.ready_at) >= self._linger(worker):
            self.api.change(*key, {"status": {"phase": "Succeeded"}})
            end = {"type": "Complete", "status": "True", "lastTransitionTime": format_time(later(self.now))}
            self.api.change(Kind.JOB, HOME, worker.job, {"status": {"conditions": [end]}})
            self.api.drop(Kind.LEASE, HOME, worker.name)
            return
        beat = lease(worker.name, "Ready", ",".join(sorted(worker.running)), renewed=later(self.now))
        if (Kind.LEASE, HOME, worker.name) in self.api.objects:
            self.api.change(
                Kind.LEASE,
                HOME,
                worker.name,
                {"metadata": {"annotations": beat["metadata"]["annotations"]}, "spec": beat["spec"]},
            )
        else:
            self.api.add(beat)

    def _linger(self, worker: Worker) -> float:
        """As it was started, or as its Lease has told it since."""
        told = self.api.objects.get((Kind.LEASE, HOME, worker.name), {}).get("metadata", {}).get("annotations", {})
        return float(told.get(names.LINGER_SECONDS, worker.linger))

    def _report(self, uid: str) -> None:
        entry = self.snapshot.requests[uid]
        raw = self.api.objects[Kind.REQUEST, entry.namespace, entry.name]
        status, at = raw["status"], format_time(later(self.now))
        uri = next_version_uri(status["parent"]["uri"], at, f"{zlib.crc32(uid.encode()):08x}", status["attempt"])
        body = {"attempt": status["attempt"], "outcome": "Succeeded", "reason": "Succeeded", "at": at}
        body |= {"loraUri": uri, "metadata": NUMBERS}
        self.api.change(Kind.REQUEST, entry.namespace, entry.name, {"status": {"result": body}})
        self.done[entry.name] = self.now
