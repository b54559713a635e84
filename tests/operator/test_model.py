"""A small model of the whole control plane with the real `plan` and the real `apply` in it.

Hypothesis plays users (who also roll back, delete an adapter with its versions and create it anew, train its versions
by their uris, and clear a lock by hand), the store, two leaders (either may be stale, or die between any two calls;
events come late, twice and in any order, one watch may hang while the others go on, and one call may take long), the
kubelet, and workers that die, wedge, drain, claim what they heard of long ago, report late or twice, or go on after
their Pod was taken away; and the pool may be changed or lowered, which one of the leaders does not know yet.
After each step the invariants of the architecture hold; and from wherever it got, a calm world ends every request.

`model_mutations.py` takes each precondition of the protocol away, in turn, and sees this model find it.
"""

from __future__ import annotations

import random
import subprocess
import sys
import zlib
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kubernetes.aio.client.exceptions import ApiException

from claas_crds import names
from claas_crds.reasons import Reason
from claas_operator.actions import Action, Bind
from claas_operator.apply import Apply, Lost
from claas_operator.plan import plan
from claas_operator.references import beside
from claas_operator.settings import Settings
from claas_operator.snapshot import Kind, Lease, Snapshot
from claas_store.uris import next_version_uri
from operatorkit import (
    HOME,
    NOW,
    NUMBERS,
    PREFIX,
    MemoryApi,
    Raw,
    adapter,
    answer_pod,
    format_time,
    kind_of,
    lease,
    pause,
    pod,
    request,
    settings,
)

TEAM = "team"
ADAPTERS = ("coder", "writer")
# Versions beyond these are collected, and one adapter takes its versions along when it is deleted.
SPECS: dict[str, Raw] = {
    "coder": {"retention": {"keepLast": 1}},
    "writer": {"retention": {"keepLast": 2}, "deletionPolicy": "Delete"},
}
# Of two requests of one second the one with the lesser name goes first: not always the one that was created first.
NAMES = ("r5", "r2", "r8", "r1", "r6", "r3", "r7", "r4")
MAX_REQUESTS = len(NAMES)
CALM_ROUNDS = 400
OUTCOMES = ("Succeeded", "Succeeded", "Succeeded", "NoSignal", "Failed", "Retryable")
HANGING = (Kind.REQUEST, Kind.REQUEST, Kind.REQUEST, Kind.ADAPTER, Kind.LEASE, Kind.POD, Kind.JOB)
BREAKS = ("Failed", "Succeeded", "gone", "wedged", "immortal")


@dataclass
class Leader:
    """A leader's process: its snapshot, how far its watches are, and what it is just doing."""

    snapshot: Snapshot
    settings: Settings
    apply: Apply
    heard: int
    hangs: Kind | None = None  # the watch (each kind has its own) whose events are late
    late: list[tuple[Kind, str, Raw]] = field(default_factory=list)
    waits: str = ""  # for the answer to one call, of the action with that key
    doing: dict[str, tuple[Action, Coroutine[Any, Any, None]]] = field(default_factory=dict)


@dataclass
class WorkerProcess:
    """A worker's process. It may live on after its Pod object is gone."""

    name: str
    job: str
    job_uid: str
    alive: bool = True
    beating: bool = True
    state: str = "Starting"
    running: set[str] = field(default_factory=set)
    training: dict[str, tuple[int, str, str]] = field(default_factory=dict)  # uid -> attempt, parent uri, adapter uid
    reported: dict[str, int] = field(default_factory=dict)  # uid -> attempt
    inbox: dict[str, Raw] = field(default_factory=dict)  # what its watch told it last, which may be long ago


def ended(raw: Raw) -> bool:
    conditions = (raw.get("status") or {}).get("conditions") or []
    return any(c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in conditions)


class ControlPlaneModel(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.api = MemoryApi(clock=lambda: self.now, pause=pause)
        self.settings = self.values({"batch": 2, "maxWorkers": 2})
        self.workers: dict[str, WorkerProcess] = {}
        self.made = 0  # requests: the first so many of NAMES
        # Else nothing is left to go wrong.
        self.harm = {"cancel": 2, "delete": 1, "recreate": 1, "break": 4, "rollback": 2, "free": 1, "values": 2}
        self.there = {f"{PREFIX}{name}/" for name in (*ADAPTERS, "bare")}  # versions in the store
        # Those with a tombstone, in which collection they got it, and how many requests there had been by then.
        self.dead: dict[str, tuple[int, int]] = {}
        self.restored: set[tuple[str, int]] = set()  # versions, and the collections in which they were
        self.checked = 0
        self.heads: dict[str, tuple[int, str]] = {}  # adapter uid -> headSeq, uri
        self.moved_by: set[str] = set()
        self.been: dict[str, set[str]] = {}  # adapter uid -> every head that it had
        self.parents: dict[str, str] = {}  # version -> the version that it was trained from
        self.attempts: dict[str, int] = {}  # by request
        self.succeeded: dict[str, Raw] = {}  # request uid -> its status, while it has a success of its attempt
        self.ends: dict[str, str] = {}  # how each request ended
        self.held_by: dict[str, str] = {}  # adapter uid -> the request that holds it
        self.asked: dict[str, tuple[str, bool]] = {}  # adapter uid -> spec.rollbackTo, whether it could be had by then
        self.leaders = [self.leader(), self.leader()]

    # What happens

    def values(self, pool: Raw) -> Settings:
        return settings(pool=pool, operations={"template": OPERATION}, timings=NOW_OR_NEVER)

    def leader(self) -> Leader:
        """A fresh process: everything listed, nothing remembered."""
        snapshot = Snapshot()
        for raw in self.api.objects.values():
            snapshot.put(kind_of(raw), raw, self.now)
        snapshot.contact_since = self.now
        apply = Apply(self.api, snapshot, self.settings, lambda: True, lambda: self.now)  # type: ignore[arg-type]
        return Leader(snapshot, self.settings, apply, len(self.api.log))

    @initialize(
        begun=st.booleans(),
        late=st.sampled_from((None, *HANGING)),
        held=st.booleans(),
        behind=st.booleans(),
        backoff=st.sampled_from([0, 10]),
    )
    def adapters(self, begun: bool, late: Kind | None, held: bool, behind: bool, backoff: int = 10) -> None:
        """An empty world, or one with work on its way: perhaps one watch of a leader lags behind the others, or its
        requests have done so since the first result, or the one that holds an adapter would not be the first now."""
        self.api.add(adapter(ADAPTERS[0], spec=SPECS[ADAPTERS[0]]))
        self.api.add(adapter(ADAPTERS[1], head=0, spec=SPECS[ADAPTERS[1]]))
        if begun:
            if held and late is Kind.REQUEST:  # it knows an adapter as another's whom it has never heard of
                self.leaders[1].hangs = late
            self.user_creates(ADAPTERS[0], backoff)
            self.hears(1, len(self.api.log), again=False)
            if held:
                self.leader_turns(0)
                self.pods_start()
                self.leader_turns(0)
            for on in ADAPTERS:
                self.user_creates(on, backoff)
            self.leader_turns(0)
            self.pods_start()
            self.leader_turns(0)
            if behind:
                self.workers_claim()
                self.workers_succeed()
                self.hears(1, len(self.api.log), again=False)
                self.leaders[1].hangs = Kind.REQUEST
                for _ in range(2):
                    self.all_goes_well(0)
            else:
                self.leaders[1].hangs = late
                self.hears(1, len(self.api.log), again=False)

    @precondition(lambda self: self.made < MAX_REQUESTS)
    @rule(on=st.sampled_from([*ADAPTERS, ADAPTERS[0], ""]), backoff=st.sampled_from([0, 3, 10]), of=st.integers(0, 9))
    def user_creates(self, on: str, backoff: int, of: int = 0) -> None:
        """A request on an adapter, or a bare one: often on a version that some adapter has, or had."""
        spec: Raw = {"backoffLimit": backoff, "activeDeadlineSeconds": 600}
        if not on:
            spec["loraUri"] = [f"{PREFIX}bare/", *sorted(self.there)][of % (1 + len(self.there))]
        self.api.add(request(NAMES[self.made], on, spec=spec, created=self.now))
        self.made += 1

    def may(self, what: str) -> bool:
        """Whether there is some of that harm left to do; then one less."""
        self.harm[what] -= 1
        return self.harm[what] >= 0

    @rule(i=st.integers(0, MAX_REQUESTS))
    def user_cancels(self, i: int) -> None:
        name = NAMES[i % max(1, self.made)]
        if not self.may("cancel"):
            return
        if raw := self.api.objects.get((Kind.REQUEST, TEAM, name)):
            generation = raw["metadata"]["generation"] + 1
            patch = {"spec": {"cancel": True}, "metadata": {"generation": generation}}
            self.api.change(Kind.REQUEST, TEAM, name, patch)

    @rule(runs=st.booleans())
    def user_cancels_late(self, runs: bool) -> None:
        """What is claimed and runs; or too late, what has a result already."""
        for i in range(self.made):
            raw = self.api.objects.get((Kind.REQUEST, TEAM, NAMES[i]))
            if raw is None or ended(raw) or raw["spec"].get("cancel"):
                continue
            if bool(raw["status"].get("claim")) and bool(raw["status"].get("result")) != runs:
                return self.user_cancels(i)

    @rule(i=st.integers(0, MAX_REQUESTS))
    def user_deletes(self, i: int) -> None:
        name = NAMES[i % max(1, self.made)]
        if (Kind.REQUEST, TEAM, name) in self.api.objects and self.may("delete"):
            self.api.drop(Kind.REQUEST, TEAM, name)

    @rule(name=st.sampled_from(ADAPTERS), ready=st.booleans())
    def user_recreates_adapter(self, name: str, ready: bool) -> None:
        if not self.may("recreate"):
            return
        if (Kind.ADAPTER, TEAM, name) in self.api.objects:
            self.api.ask_to_delete(Kind.ADAPTER, TEAM, name)
        self.user_creates_adapter(name, ready)

    @rule(name=st.sampled_from(ADAPTERS))
    def user_has_the_version(self, name: str) -> None:
        """Whoever waited for a version takes it as soon as it is there, and the adapter goes."""
        history = self.api.objects.get((Kind.ADAPTER, TEAM, name), {}).get("status", {}).get("history") or [{}]
        if history[-1].get("requestUid") in {r["metadata"]["uid"] for r in self.requests() if not ended(r)}:
            self.user_recreates_adapter(name, ready=False)

    def user_creates_adapter(self, name: str, ready: bool) -> None:
        """Unless there is one, which may be waiting for its versions to go."""
        if (Kind.ADAPTER, TEAM, name) in self.api.objects:
            return
        # Where versions were kept, the store would refuse another adapter.
        version = name if "deletionPolicy" in SPECS[name] else f"{name}-{self.api.version}"
        uri, uid = f"{PREFIX}{version}/", f"uid-{name}-{self.api.version}"
        raw = adapter(name, head=int(ready), uid=uid, created=self.now, spec=SPECS[name] | {"storage": {"uri": uri}})
        if ready:
            raw["status"] |= {"uri": uri, "version": version}
            raw["status"]["history"][0] |= {"uri": uri, "version": version}
            self.there.add(uri)
        self.api.add(raw)

    @rule(name=st.sampled_from(ADAPTERS), which=st.integers(0, 9))
    def user_rolls_back(self, name: str, which: int) -> None:
        raw = self.api.objects.get((Kind.ADAPTER, TEAM, name))
        history = (raw or {}).get("status", {}).get("history") or []
        if raw is None or not history or not self.may("rollback"):
            return
        patch = {"rollbackTo": history[which % len(history)]["version"]}
        generation = raw["metadata"]["generation"] + 1
        self.api.change(Kind.ADAPTER, TEAM, name, {"spec": patch, "metadata": {"generation": generation}})

    @rule(who=st.integers(0, 1), batch=st.integers(1, 2), most=st.integers(1, 2))
    def values_change(self, who: int, batch: int, most: int) -> None:
        """One leader is replaced by one that knows; the other goes on as before, for as long as it lives."""
        if self.may("values"):
            self.settings = self.values({"batch": batch, "maxWorkers": most})
            self.leader_dies(who)

    @rule(seconds=st.sampled_from([0.5, 5, 20, 40]))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        for worker in self.workers.values():
            self.renew(worker)

    @rule(name=st.sampled_from(ADAPTERS))
    def hand_frees(self, name: str) -> None:
        """Whoever has the right to clears a lock by hand, though its request has not ended. Nobody trains it, nor will:
        its worker has reported success, and the commit is all that is left."""
        status = self.api.objects.get((Kind.ADAPTER, TEAM, name), {}).get("status") or {}
        held = (status.get("active") or {}).get("requestUid")
        holder = next((r for r in self.requests() if r["metadata"]["uid"] == held), None)
        if holder is None or ended(holder) or (holder["status"].get("result") or {}).get("outcome") != "Succeeded":
            return
        if holder["status"]["parent"]["headSeq"] == status.get("headSeq") and self.may("free"):
            self.api.change(Kind.ADAPTER, TEAM, name, {"status": {"active": None}})

    # Leaders

    @rule(who=st.integers(0, 1), count=st.integers(1, 40), again=st.booleans(), order=st.integers(0, 99))
    def hears(self, who: int, count: int, again: bool, order: int = 0) -> None:
        """Events arrive, late; some of them twice, and of several objects in any order."""
        leader = self.leaders[who]
        start = max(0, leader.heard - 5) if again else leader.heard
        events = self.api.log[start : leader.heard + count]
        if order:
            random.Random(order).shuffle(events)
        events, leader.late = [*leader.late, *events], []
        if leader.hangs:
            leader.late = [event for event in events if event[0] is leader.hangs]
            events = [event for event in events if event[0] is not leader.hangs]
        for kind, how, raw in events:
            if how == "DELETED":
                leader.snapshot.remove(kind, raw["metadata"]["uid"], self.now)
            else:
                leader.snapshot.put(kind, raw, self.now)
        leader.heard = min(len(self.api.log), leader.heard + count)

    @rule(who=st.integers(0, 1), kind=st.sampled_from(HANGING))
    def watch_hangs(self, who: int, kind: Kind) -> None:
        """A watch tells nothing any more, though the others do; or what it has kept back."""
        leader = self.leaders[who]
        leader.hangs = None if leader.hangs is kind else kind

    @rule(who=st.integers(0, 1), which=st.integers(0, 10))
    def call_hangs(self, who: int, which: int) -> None:
        """The API server takes long to answer one call, though it answers the others; or answers at last."""
        leader = self.leaders[who]
        leader.waits = "" if leader.waits or not leader.doing else sorted(leader.doing)[which % len(leader.doing)]

    @rule(who=st.integers(0, 1), first=st.integers(0, 3))
    def plans(self, who: int, first: int) -> None:
        """Decides, and begins to act: on everything, or on some of it."""
        leader = self.leaders[who]
        for action in plan(leader.snapshot, leader.settings, self.now).actions[first if first < 3 else 0 :]:
            if isinstance(action, Bind):
                self.takes_requests(leader, action.worker)
            if action.key not in leader.doing:
                leader.doing[action.key] = (action, leader.apply(action))
                leader.snapshot.in_flight[action.key] = action

    @rule(who=st.integers(0, 1), which=st.integers(0, 10), calls=st.integers(1, 4))
    def acts(self, who: int, which: int, calls: int) -> None:
        """One action goes on by some calls to the API server."""
        leader = self.leaders[who]
        if goes_on := sorted(leader.doing.keys() - {leader.waits}):
            key = goes_on[which % len(goes_on)]
            for _ in range(calls):
                if not self.step(leader, key):
                    break

    @rule(who=st.integers(0, 1))
    def acts_on_all(self, who: int) -> None:
        leader = self.leaders[who]
        for key in sorted(leader.doing.keys() - {leader.waits}):
            while self.step(leader, key):
                pass

    @rule(who=st.integers(0, 1))
    def leader_turns(self, who: int) -> None:
        """The usual case: hears everything, decides, acts; twice, for what follows from it."""
        for _ in range(2):
            self.hears(who, len(self.api.log), again=False)
            self.plans(who, 3)
            self.acts_on_all(who)

    @rule(who=st.integers(0, 1))
    def all_goes_well(self, who: int) -> None:
        """The usual case, for a while; the other leader notices nothing."""
        for _ in range(3):
            self.leader_turns(who)
            self.heads_move_once_and_in_a_line()  # before a kubelet runs what deletes the versions of before
            self.pods_start()
            self.workers_claim()
            self.workers_succeed()

    @rule(who=st.integers(0, 1))
    def leader_dies(self, who: int) -> None:
        for _, running in self.leaders[who].doing.values():
            running.close()
        self.leaders[who] = self.leader()

    def step(self, leader: Leader, key: str) -> bool:
        """Whether the action has more to do."""
        action, running = leader.doing[key]
        try:
            running.send(None)
        except (StopIteration, Lost):
            pass
        except ApiException as error:
            if error.status not in (404, 409):
                raise AssertionError(f"{action} was refused: {error.status} {error.reason}") from error
        else:
            return True
        del leader.doing[key]
        leader.snapshot.in_flight.pop(key, None)
        return False

    # Kubelet and Job controller

    @rule()
    def kubelet(self) -> None:
        """Jobs get their Pods, Pods that must go go with their process, Jobs end with their Pods."""
        for (kind, namespace, name), raw in list(self.api.objects.items()):
            if kind is not Kind.JOB or (raw.get("status") or {}).get("conditions"):
                continue
            labels = raw["metadata"]["labels"]
            if labels[names.COMPONENT_LABEL] == names.COMPONENT_OPERATION:
                self.run_operation(namespace, name, raw)
            else:
                self.run_worker(namespace, name, raw)
        for worker in self.workers.values():
            found = self.api.objects.get((Kind.POD, HOME, worker.name))
            owner = self.api.objects.get((Kind.JOB, HOME, worker.job))
            stopped = owner is None or owner["metadata"]["uid"] != worker.job_uid
            if found is not None and (stopped or "deletionTimestamp" in found["metadata"]):
                worker.alive = False
                self.take_pod(worker)

    def run_operation(self, namespace: str, name: str, raw: Raw) -> None:
        arguments = raw["spec"]["template"]["spec"]["containers"][0]["args"]
        if (Kind.POD, namespace, f"{name}-x") not in self.api.objects:
            answer = self.store(arguments)
            done = answer_pod(name, answer, "Succeeded" if answer["ok"] else "Failed")
            done["metadata"]["uid"] += f"-{self.api.version}"
            self.api.add(done)
            self.end_job(namespace, name, "Complete" if answer["ok"] else "Failed")

    def store(self, arguments: list[str]) -> Raw:
        """What `claas_store` does and answers."""
        command, given = arguments[0], dict(zip(arguments[1::2], arguments[2::2], strict=True))
        if command == "create":
            self.there.add(given["--uri"])
            return {"ok": True, "uri": given["--uri"], "version": given["--uri"].split("/")[-2], "sha256": "0"}
        root, kept = (
            given["--root"],
            [
                value
                for option, value in zip(arguments[1::2], arguments[2::2], strict=True)
                if option == "--keep-version"
            ],
        )
        if command == "destroy":
            own = {uri for uri in self.there if uri.startswith(root[:-1]) and uri.split("/")[-2] not in kept}
            self.nobody_needs(own)
            self.there -= own
            self.dead = {uri: stone for uri, stone in self.dead.items() if not uri.startswith(root[:-1])}
            self.restored = {(uri, number) for uri, number in self.restored if not uri.startswith(root[:-1])}
            return {"ok": True}
        versions = [
            value for option, value in zip(arguments[1::2], arguments[2::2], strict=True) if option == "--version"
        ]
        return self.collect(
            command, {beside(root, version): version for version in versions}, int(given["--collection"])
        )

    def collect(self, command: str, versions: dict[str, str], number: int) -> Raw:
        """A restoration ends that collection of a version, and nothing else of it comes into effect any more."""
        restored = {uri for uri in versions if (uri, number) in self.restored}
        uris = versions.keys() - (restored if command != "restore" else set())
        if command == "delete":
            if not uris & self.there <= self.dead.keys():
                return {"ok": False, "reason": "VersionConflict", "message": "not tombstoned", "retryable": False}
            self.nobody_needs(uris)
            self.there -= uris
            self.restored = {one for one in self.restored if one[0] in self.there}
        elif command == "tombstone":
            self.dead |= dict.fromkeys(uris & self.there - self.dead.keys(), (number, self.made))
            self.only_what_is_collected_is_marked()
        else:
            assert command == "restore"
            self.restored |= {(uri, number) for uri in uris & self.there}
            self.dead = {uri: stone for uri, stone in self.dead.items() if uri not in uris or stone[0] > number}
        done = [name for uri, name in versions.items() if uri in uris]
        left = [name for uri, name in versions.items() if uri not in uris]
        return {"ok": True, "done": done, "restored": left, "collection": number}

    def only_what_is_collected_is_marked(self) -> None:
        """Whatever else an adapter's history names, it may be rolled back to: nobody would take its tombstone off."""
        for key, raw in self.api.objects.items():
            if key[0] is Kind.ADAPTER and "deletionTimestamp" not in raw["metadata"]:
                collecting = raw["status"].get("collecting") or []
                kept = {e["uri"] for e in raw["status"].get("history") or [] if e["version"] not in collecting}
                assert not kept & self.dead.keys() & self.there, "a version is marked that nobody collects"

    def nobody_needs(self, versions: set[str]) -> None:
        """Of what is being deleted: no head, nothing that a request which has not ended was bound to, and nothing that
        a bare request asked for before the tombstone lay there (one that came later fails cleanly)."""
        for key, raw in self.api.objects.items():
            if key[0] is Kind.ADAPTER and "deletionTimestamp" not in raw["metadata"]:
                assert raw["status"].get("uri") not in versions, "a head is deleted"
        for raw in self.requests():
            parent = (raw["status"].get("parent") or {}).get("uri")
            on = self.api.objects.get((Kind.ADAPTER, TEAM, (raw["spec"].get("adapterRef") or {}).get("name", "")))
            stays = on is not None and "deletionTimestamp" not in on["metadata"]
            assert ended(raw) or not stays or parent not in versions, "what a request is bound to is deleted"
            asked = raw["spec"].get("loraUri", "")
            late = NAMES.index(raw["metadata"]["name"]) >= self.dead.get(asked, (0, 0))[1]
            assert ended(raw) or late or asked not in versions, "what a bare request asks for is deleted"

    def run_worker(self, namespace: str, name: str, raw: Raw) -> None:
        uid = raw["metadata"]["uid"]
        worker = next((w.name for w in self.workers.values() if w.job_uid == uid), "")
        if not worker:
            worker = f"{name}-p{len(self.workers)}"
            self.workers[worker] = WorkerProcess(worker, name, uid)
            on_pod = pod(worker, job=name, uid=f"uid-{worker}")
            on_pod["metadata"]["annotations"] = raw["spec"]["template"]["metadata"]["annotations"]
            self.api.add(on_pod)
            self.show(self.workers[worker])
        elif (Kind.POD, HOME, worker) not in self.api.objects:
            self.end_job(namespace, name, "Failed")

    def end_job(self, namespace: str, name: str, how: str) -> None:
        if (Kind.JOB, namespace, name) in self.api.objects:
            condition = {"type": how, "status": "True", "lastTransitionTime": format_time(self.now)}
            self.api.change(Kind.JOB, namespace, name, {"status": {"conditions": [condition]}})

    def take_pod(self, worker: WorkerProcess) -> None:
        """The Pod object goes, and with it, later, its Lease (the garbage collector is in no hurry)."""
        self.api.drop(Kind.POD, HOME, worker.name)

    @rule()
    def jobs_expire(self) -> None:
        """The time to live of operations that have ended is over: their names are free, and their answers are gone."""
        for (kind, namespace, name), raw in list(self.api.objects.items()):
            over = kind is Kind.JOB and (raw.get("status") or {}).get("conditions")
            if over and raw["metadata"]["labels"][names.COMPONENT_LABEL] == names.COMPONENT_OPERATION:
                self.api.drop(kind, namespace, name)
                if (Kind.POD, namespace, f"{name}-x") in self.api.objects:
                    self.api.drop(Kind.POD, namespace, f"{name}-x")

    @rule()
    def garbage_collector(self) -> None:
        for kind, namespace, name in list(self.api.objects):
            if kind is Kind.LEASE and (Kind.POD, namespace, name) not in self.api.objects:
                self.api.drop(kind, namespace, name)

    # Workers

    @rule()
    def pods_start(self) -> None:
        """The usual case: the Pods of new Jobs run, and their workers are Ready."""
        self.kubelet()
        for worker in self.workers.values():
            if worker.alive and worker.state == "Starting":
                worker.state = "Ready"
                self.show(worker)

    @rule()
    def workers_claim(self) -> None:
        """The usual case: every worker claims what is bound to it."""
        for i in range(len(self.workers)):
            self.worker_claims(i, 0)

    @rule()
    def workers_succeed(self) -> None:
        """The usual case: what was claimed is done."""
        for worker in self.workers.values():
            for uid in sorted(worker.training) if worker.alive else []:
                self.report(worker, uid, "Succeeded")

    @rule(i=st.integers(0, 5))
    def worker_is_ready(self, i: int) -> None:
        if (worker := self.pick(i)) and worker.state == "Starting":
            worker.state = "Ready"
            self.show(worker)

    @rule(i=st.integers(0, 5))
    def worker_hears(self, i: int) -> None:
        """Its watch tells it what is bound to it now."""
        if worker := self.pick(i):
            bound = [r for r in self.requests() if r["status"].get("worker") == worker.name and not ended(r)]
            bound = [r for r in bound if (r["status"].get("result") or {}).get("attempt") != r["status"]["attempt"]]
            worker.inbox = {r["metadata"]["uid"]: r for r in bound}

    @rule(i=st.integers(0, 5), which=st.integers(0, 5), fresh=st.booleans())
    def worker_claims(self, i: int, which: int, fresh: bool = True) -> None:
        """It claims something that it has heard of, now or long ago."""
        if fresh:
            self.worker_hears(i)
        worker = self.pick(i)
        if worker is None or worker.state == "Starting":
            return
        mine = [raw for uid, raw in worker.inbox.items() if uid not in worker.training]
        if mine:
            self.begin(worker, mine[which % len(mine)])

    def claimable(self, worker: WorkerProcess, uid: str, attempt: int) -> Raw | None:
        """The request, if the claim's JSON Patch holds: worker and attempt, no terminal condition, no result."""
        live = next((r for r in self.requests() if r["metadata"]["uid"] == uid), None)
        if live is None or (live["status"].get("worker"), live["status"].get("attempt")) != (worker.name, attempt):
            return None
        if ended(live):
            return None
        if (live["status"].get("result") or {}).get("attempt") == attempt:
            return None
        return live

    def begin(self, worker: WorkerProcess, seen: Raw) -> None:
        """Announce, then claim; and nothing is trained without a claim."""
        if not worker.beating:
            return  # its Lease cannot be written
        uid = seen["metadata"]["uid"]
        worker.running.add(uid)
        self.show(worker)
        raw = self.claimable(worker, uid, seen["status"]["attempt"])
        if raw is None:
            worker.running.discard(uid)
            worker.inbox.pop(uid, None)
            self.show(worker)
            return
        status = raw["status"]
        on = status["parent"]["adapterUid"]
        if on:
            self.nothing_else_trains(uid, on)
        claim = {"worker": worker.name, "attempt": status["attempt"], "at": format_time(self.now)}
        self.api.change(Kind.REQUEST, TEAM, raw["metadata"]["name"], {"status": {"claim": claim}})
        worker.training[uid] = (status["attempt"], status["parent"]["uri"], on)

    @rule(i=st.integers(0, 5), which=st.integers(0, 5), outcome=st.sampled_from(OUTCOMES))
    def worker_reports(self, i: int, which: int, outcome: str) -> None:
        worker = self.pick(i)
        if worker is not None and worker.training:
            self.report(worker, sorted(worker.training)[which % len(worker.training)], outcome)

    def report(self, worker: WorkerProcess, uid: str, outcome: str) -> None:
        """Tests worker and attempt; where they moved on, the result is dropped. Then the uid leaves the Lease."""
        attempt, parent, on = worker.training.pop(uid)
        if not on and (parent not in self.there or parent in self.dead):
            outcome = "Failed"  # collected before it was read
        raw = next((r for r in self.requests() if r["metadata"]["uid"] == uid), None)
        body: Raw = {"attempt": attempt, "outcome": outcome, "reason": outcome, "at": format_time(self.now)}
        if outcome == "Succeeded":
            created = raw["metadata"]["creationTimestamp"] if raw else format_time(NOW)
            uri = next_version_uri(parent, created, f"{zlib.crc32(uid.encode()):08x}", attempt)
            assert uri not in self.there, "two attempts write to one place"
            self.parents[uri] = parent
            self.there.add(uri)
            body |= {"loraUri": uri, "metadata": NUMBERS}
        self.write_result(worker, raw, body)
        worker.reported[uid] = attempt
        worker.running.discard(uid)
        self.show(worker)

    def write_result(self, worker: WorkerProcess, raw: Raw | None, body: Raw) -> None:
        """If it is bound here, in this attempt, and has no result of it: what was recorded stands."""
        status = raw["status"] if raw else {}
        if raw and (status.get("worker"), status.get("attempt")) == (worker.name, body["attempt"]):
            if (status.get("result") or {}).get("attempt") == body["attempt"]:
                return
            self.api.change(Kind.REQUEST, TEAM, raw["metadata"]["name"], {"status": {"result": body}})

    @rule(i=st.integers(0, 5), which=st.integers(0, 5), outcome=st.sampled_from(("Failed", "Retryable", "NoSignal")))
    def worker_reports_again(self, i: int, which: int, outcome: str) -> None:
        """Of what it has reported it says something else."""
        worker = self.pick(i)
        if worker is None or not worker.reported:
            return
        uid = sorted(worker.reported)[which % len(worker.reported)]
        raw = next((r for r in self.requests() if r["metadata"]["uid"] == uid), None)
        body = {"attempt": worker.reported[uid], "outcome": outcome, "reason": outcome, "at": format_time(self.now)}
        self.write_result(worker, raw, body)

    @rule(i=st.integers(0, 5))
    def worker_drains(self, i: int) -> None:
        """It was idle for long, or told to leave."""
        if (worker := self.pick(i)) and not worker.training:
            worker.state = "Draining"
            self.show(worker)

    @rule(i=st.integers(0, 5), how=st.sampled_from(BREAKS))
    def worker_breaks(self, i: int, how: str) -> None:
        worker = self.pick(i)
        if worker is None or (Kind.POD, HOME, worker.name) not in self.api.objects or not self.may("break"):
            return
        if how == "wedged":
            worker.beating = False
        elif how == "immortal":  # its node is cut off and its Pod was taken away: the process knows nothing of it
            worker.beating = False
            self.take_pod(worker)
        else:
            worker.alive = False
            if how == "gone":
                self.take_pod(worker)
            else:
                self.api.change(Kind.POD, HOME, worker.name, {"status": {"phase": how}})
                self.end_job(HOME, worker.job, "Complete" if how == "Succeeded" else "Failed")

    def told_to_leave(self, worker: WorkerProcess) -> bool:
        said = self.api.objects.get((Kind.LEASE, HOME, worker.name), {}).get("metadata", {}).get("annotations", {})
        return said.get(names.LINGER_SECONDS) == "0"

    def pick(self, i: int) -> WorkerProcess | None:
        alive = [worker for worker in self.workers.values() if worker.alive]
        return alive[i % len(alive)] if alive else None

    def requests(self) -> list[Raw]:
        return [raw for key, raw in self.api.objects.items() if key[0] is Kind.REQUEST]

    def show(self, worker: WorkerProcess) -> None:
        """Writes the worker's Lease, if it can."""
        if not worker.beating or not worker.alive:
            return
        raw = lease(worker.name, worker.state, ",".join(sorted(worker.running)), renewed=self.now)
        if (Kind.LEASE, HOME, worker.name) in self.api.objects:
            patch = {"metadata": {"annotations": raw["metadata"]["annotations"]}, "spec": raw["spec"]}
            self.api.change(Kind.LEASE, HOME, worker.name, patch)
        elif (Kind.POD, HOME, worker.name) in self.api.objects:
            self.api.add(raw)

    def renew(self, worker: WorkerProcess) -> None:
        if worker.alive and worker.beating:
            self.show(worker)

    # What must hold

    def takes_requests(self, leader: Leader, worker: str) -> None:
        """As far as the leader knows, a worker that it gives a request to is Ready: not Starting, not Draining."""
        known = leader.snapshot.by_name(Kind.LEASE, HOME, worker)
        assert isinstance(known, Lease), "bound to a worker without a Lease"
        assert known.state == names.STATE_READY, f"bound to a worker that is {known.state}"

    def nothing_else_trains(self, request_uid: str, adapter_uid: str) -> None:
        for worker in self.workers.values():
            there = self.api.objects.get((Kind.POD, HOME, worker.name))
            if not worker.alive or there is None:
                continue  # dead, or its Pod was taken away: what it trains cannot be reported
            for uid, (_, _, on) in worker.training.items():
                assert on != adapter_uid, f"{uid} and {request_uid} train {adapter_uid} at the same time"

    @invariant()
    def heads_move_once_and_in_a_line(self) -> None:
        for kind, how, raw in self.api.log[self.checked :]:
            status = raw.get("status") or {}
            if kind is Kind.ADAPTER and how != "DELETED":
                self.check_head(raw["metadata"]["uid"], status)
                self.check_lock(raw, status)
                self.check_rollback(raw, status)
            elif kind is Kind.REQUEST and how != "DELETED":
                self.check_request(raw, status)
        self.checked = len(self.api.log)

    def check_lock(self, raw: Raw, status: Raw) -> None:
        """While a deletion or a rollback waits, nothing new gets the adapter."""
        uid, holder = raw["metadata"]["uid"], (status.get("active") or {}).get("requestUid", "")
        asked = raw["spec"].get("rollbackTo") or ""
        waits = "deletionTimestamp" in raw["metadata"] or (asked and asked != status.get("rollbackAnswered", ""))
        if holder and holder != self.held_by.get(uid, ""):
            assert not waits, f"{holder} got an adapter for which a deletion or a rollback waits"
        self.held_by[uid] = holder

    def check_rollback(self, raw: Raw, status: Raw) -> None:
        """What a rollback asks for while it can be had, the head goes back to; and a head is never collected."""
        uid, asked, collecting = raw["metadata"]["uid"], raw["spec"].get("rollbackTo") or "", status.get("collecting")
        assert status.get("version") not in (collecting or []), "the head is being collected"
        known = asked in {entry["version"] for entry in status.get("history") or []} - {*(collecting or [])}
        if asked != self.asked.get(uid, ("", False))[0]:
            self.asked[uid] = (asked, known)
        elif asked and asked == status.get("rollbackAnswered", "") and self.asked[uid][1]:
            refused = [c["reason"] for c in status["conditions"] if c["type"] == "RolledBack" and c["status"] != "True"]
            assert not refused, f"a rollback was refused that could be had when it was asked for: {refused}"
            self.asked[uid] = (asked, False)  # answered

    def check_request(self, raw: Raw, status: Raw) -> None:
        """Attempts only grow; a request ends once, Complete only after its head has moved, and else never moves one."""
        uid, attempt = raw["metadata"]["uid"], status.get("attempt", 0)
        assert attempt >= self.attempts.get(uid, 0), "the attempt fell"
        self.attempts[uid] = attempt
        result = status.get("result")
        assert result is None or result["attempt"] == attempt, "the result of another attempt"
        ends = [c["type"] for c in status.get("conditions") or [] if c["status"] == "True"]
        end = next((kind for kind in ends if kind in ("Complete", "Failed")), "")
        assert self.ends.get(uid, end) == end, f"{uid} ended as {self.ends.get(uid)}, then as {end or 'not at all'}"
        if end:
            self.ends[uid] = end
        if status.get("version") and raw["spec"].get("adapterRef"):
            assert uid in self.moved_by, "Complete before the head moved"
        gone = status.get("reason") == Reason.ADAPTER_GONE  # with the head that it had moved
        assert end != "Failed" or gone or uid not in self.moved_by, f"{uid} has moved a head and failed"
        before = self.succeeded.pop(uid, None)
        if before and not gone and (end == "Failed" or attempt != before["attempt"] or not result):
            head = self.heads.get(before["parent"].get("adapterUid", ""), (0, ""))[0]
            assert head > before["parent"].get("headSeq", 0), f"a success of {uid} was thrown away"
        if not end and (result or {}).get("outcome") in ("Succeeded", "NoSignal"):
            self.succeeded[uid] = status

    def check_head(self, uid: str, status: Raw) -> None:
        seq, uri = status.get("headSeq", 0), status.get("uri", "")
        before = self.heads.get(uid)
        self.heads[uid] = (seq, uri)
        self.been.setdefault(uid, set()).add(uri)
        if before is None or before[0] == seq:
            assert before is None or before[1] == uri, "the head changed without headSeq"
            return
        assert seq == before[0] + 1, f"headSeq went from {before[0]} to {seq}"
        assert uri in self.there - self.dead.keys(), "the head went to what is gone, or going"
        if before[0] == 0:
            return
        if status["history"][-1].get("cause") == "RolledBack":
            assert uri in self.been[uid], "rolled back to what never was the head"
            assert not status.get("active"), "rolled back under a request that holds the adapter"
            return
        by = status["history"][-1]["requestUid"]
        assert by not in self.moved_by, f"{by} moved a head twice"
        assert self.held_by[uid] in ("", by), f"{by} moved a head that {self.held_by[uid]} held"
        assert self.ends.get(by) != "Failed", f"{by} has failed and moved a head"
        self.moved_by.add(by)
        assert self.parents[uri] == before[1], "the new head was not trained from the old one"

    # A calm world

    def teardown(self) -> None:
        """Whatever happened: one leader, workers that work, and time. Every request ends and no lock stays."""
        for leader in self.leaders:
            for _, running in leader.doing.values():
                running.close()
        self.leaders = [self.leader(), self.leader()]
        for worker in self.workers.values():  # the immortal die at last
            worker.alive = worker.alive and (Kind.POD, HOME, worker.name) in self.api.objects
        for _ in range(CALM_ROUNDS):
            if self.at_rest():
                break
            for name in ADAPTERS:
                self.user_creates_adapter(name, ready=False)
            self.kubelet()
            self.garbage_collector()
            self.time_passes(1)
            self.work()
            self.hears(0, len(self.api.log), again=False)
            self.plans(0, 3)
            self.acts_on_all(0)
            self.heads_move_once_and_in_a_line()
        left = [raw for key, raw in self.api.objects.items() if key[0] is Kind.ADAPTER]
        left += [raw for raw in self.requests() if not ended(raw)]
        assert self.at_rest(), "\n".join(str((raw["metadata"], raw["status"])) for raw in left)

    def work(self) -> None:
        for worker in list(self.workers.values()):
            if not worker.alive or not worker.beating:
                continue
            if worker.state == "Starting":
                worker.state = "Ready"
                self.show(worker)
            for uid in list(worker.training):
                self.report(worker, uid, "Succeeded")
            for uid in list(worker.running):  # announced, and lost before the claim
                worker.running.discard(uid)
                self.show(worker)
            for raw in self.requests():
                status = raw["status"]
                done = (status.get("result") or {}).get("attempt") == status.get("attempt")
                if status.get("worker") == worker.name and not ended(raw) and not done:
                    self.begin(worker, raw)
                    self.heads_move_once_and_in_a_line()
            if self.told_to_leave(worker) and not worker.training:
                worker.state = "Draining"
                self.show(worker)
            if worker.state == "Draining" and not worker.training:
                worker.alive = False
                self.api.change(Kind.POD, HOME, worker.name, {"status": {"phase": "Succeeded"}})
                self.end_job(HOME, worker.job, "Complete")

    def at_rest(self) -> bool:
        adapters = [raw for key, raw in self.api.objects.items() if key[0] is Kind.ADAPTER]
        busy = [
            raw
            for raw in adapters
            if raw["status"].get("active")
            or raw["status"].get("collecting")
            or "deletionTimestamp" in raw["metadata"]
            or (raw["spec"].get("rollbackTo") or "") != raw["status"].get("rollbackAnswered", "")
        ]
        return all(ended(raw) for raw in self.requests()) and not busy


NOW_OR_NEVER = {"collectDelaySeconds": 0}  # in a world where much else happens within a minute
OPERATION = {"spec": {"containers": [{"name": "operation", "image": "example/claas:1"}]}}
TestControlPlane = ControlPlaneModel.TestCase
TestControlPlane.settings = hypothesis_settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)

# Hypothesis finds short histories and makes them shorter; races need long ones, with the usual cases often among them.
STEPS = 120
WALKS = 150
WEIGHTS: dict[str, float] = {
    "leader_turns": 6,
    "all_goes_well": 0.3,
    "hears": 8,
    "watch_hangs": 4,
    "call_hangs": 2,
    "plans": 10,
    "acts": 16,
    "acts_on_all": 4,
    "leader_dies": 1,
    "kubelet": 4,
    "pods_start": 4,
    "garbage_collector": 2,
    "jobs_expire": 0.5,
    "worker_is_ready": 2,
    "worker_hears": 3,
    "worker_claims": 6,
    "workers_claim": 4,
    "worker_reports": 6,
    "worker_reports_again": 2,
    "workers_succeed": 3,
    "worker_drains": 1,
    "worker_breaks": 3,
    "values_change": 1,
    "time_passes": 6,
    "user_creates": 4,
    "user_cancels": 2,
    "user_cancels_late": 2,
    "user_deletes": 2,
    "user_recreates_adapter": 1,
    "user_has_the_version": 2,
    "user_rolls_back": 2,
    "hand_frees": 6,
}


def walk(seed: int) -> list[str]:
    """A random history of STEPS steps. What was done, for the error message."""
    dice = random.Random(seed)
    model = ControlPlaneModel()
    model.adapters(
        begun=dice.random() < 0.8,
        late=dice.choice(HANGING) if dice.random() < 0.5 else None,
        held=dice.random() < 0.3,
        behind=dice.random() < 0.1,
        backoff=dice.choice([0, 10, 10]),
    )
    one = ADAPTERS[0]
    targets = dice.choice([[one], [one], [one, one, ""], [*ADAPTERS, ""]])  # on one adapter, more goes wrong
    history: list[str] = []
    arguments = {
        "leader_turns": lambda: {"who": dice.randrange(2)},
        "all_goes_well": lambda: {"who": dice.randrange(2)},
        "hears": lambda: {
            "who": dice.randrange(2),
            "count": dice.choice([1, 2, 5, 40]),
            "again": dice.random() < 0.3,
            "order": dice.choice([0, 0, 7, 8]),
        },
        "watch_hangs": lambda: {"who": dice.randrange(2), "kind": dice.choice(HANGING)},
        "call_hangs": lambda: {"who": dice.randrange(2), "which": dice.randrange(10)},
        "plans": lambda: {"who": dice.randrange(2), "first": dice.choice([0, 0, 1, 2, 3])},
        "acts": lambda: {"who": dice.randrange(2), "which": dice.randrange(10), "calls": dice.randint(1, 4)},
        "acts_on_all": lambda: {"who": dice.randrange(2)},
        "leader_dies": lambda: {"who": dice.randrange(2)},
        "worker_is_ready": lambda: {"i": dice.randrange(6)},
        "worker_hears": lambda: {"i": dice.randrange(6)},
        "worker_claims": lambda: {
            "i": dice.randrange(6),
            "which": dice.randrange(6),
            "fresh": dice.random() < 0.6,
        },
        "worker_reports": lambda: {
            "i": dice.randrange(6),
            "which": dice.randrange(6),
            "outcome": dice.choice(OUTCOMES),
        },
        "worker_reports_again": lambda: {
            "i": dice.randrange(6),
            "which": dice.randrange(6),
            "outcome": dice.choice(["Failed", "Retryable", "NoSignal"]),
        },
        "worker_drains": lambda: {"i": dice.randrange(6)},
        "worker_breaks": lambda: {"i": dice.randrange(6), "how": dice.choice(BREAKS)},
        "values_change": lambda: {
            "who": dice.randrange(2),
            "batch": dice.randint(1, 2),
            "most": dice.randint(1, 2),
        },
        "time_passes": lambda: {"seconds": dice.choice([0.5, 0.5, 5, 20, 40])},
        "user_creates": lambda: {
            "on": dice.choice(targets),
            "backoff": dice.choice([0, 3, 10]),
            "of": dice.randrange(10),
        },
        "user_cancels": lambda: {"i": dice.randrange(MAX_REQUESTS)},
        "user_cancels_late": lambda: {"runs": dice.random() < 0.5},
        "user_deletes": lambda: {"i": dice.randrange(MAX_REQUESTS)},
        "user_recreates_adapter": lambda: {"name": dice.choice(ADAPTERS), "ready": dice.random() < 0.5},
        "user_has_the_version": lambda: {"name": dice.choice(ADAPTERS)},
        "user_rolls_back": lambda: {"name": dice.choice(ADAPTERS), "which": dice.randrange(10)},
        "hand_frees": lambda: {"name": dice.choice(ADAPTERS)},
    }
    names_, weights = list(WEIGHTS), list(WEIGHTS.values())
    try:
        for name in dice.choices(names_, weights, k=STEPS):
            if name == "user_creates" and model.made >= MAX_REQUESTS:
                continue
            given = arguments.get(name, dict)()
            history.append(f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})")
            getattr(model, name)(**given)
            model.heads_move_once_and_in_a_line()
        history.append("teardown()")
        model.teardown()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}\n" + "\n".join(history)) from error
    return list(model.moved_by)


def test_long_random_histories_keep_the_invariants_and_let_every_request_end() -> None:
    moves = [len(walk(seed)) for seed in range(WALKS)]
    assert sum(moves) > WALKS, "the walks must get somewhere, or they prove nothing"


@pytest.mark.parametrize("expired", [False, True], ids=["", "the-jobs-have-expired"])
def test_a_tombstone_that_a_slow_leader_starts_after_its_version_was_given_back_marks_nothing(expired: bool) -> None:
    model = ControlPlaneModel()
    raw = adapter("coder", spec=SPECS["coder"])
    (first,) = raw["status"]["history"]
    later = first | {"seq": 2, "version": "coder-v2", "uri": f"{PREFIX}coder-v2/", "requestUid": "uid-gone"}
    raw["status"] |= {"headSeq": 2, "uri": later["uri"], "version": later["version"], "history": [first, later]}
    model.api.add(raw)
    model.there |= {first["uri"], later["uri"]}
    model.leader_turns(0)
    status = model.api.objects[Kind.ADAPTER, TEAM, "coder"]["status"]
    assert (status["collecting"], status["version"]) == (["coder"], "coder-v2")
    model.leader_dies(1)
    (mark,) = [name for kind, _, name in model.api.objects if kind is Kind.JOB]
    model.api.drop(Kind.JOB, HOME, mark)  # as if its creation were still on its way
    model.hears(0, len(model.api.log), again=False)
    model.hears(1, len(model.api.log), again=False)
    model.plans(0, 3)

    model.user_creates("", 10, of=1 + sorted(model.there).index(first["uri"]))
    for _ in range(4):
        model.leader_turns(1)
        model.kubelet()
    status = model.api.objects[Kind.ADAPTER, TEAM, "coder"]["status"]
    assert not status["collecting"], "given back"
    if expired:
        model.jobs_expire()
    model.acts_on_all(0)
    assert (Kind.JOB, HOME, mark) in model.api.objects, "the slow leader's call has come"
    model.kubelet()
    model.user_rolls_back("coder", 0)
    model.leader_turns(1)
    model.heads_move_once_and_in_a_line()
    assert model.api.objects[Kind.ADAPTER, TEAM, "coder"]["status"]["version"] == "coder"
    assert first["uri"] not in model.dead, "readers take it"
    model.teardown()


def test_every_mutation_still_has_its_place() -> None:
    """What is taken away must be there, or `make model-mutations` would show nothing."""
    command = [sys.executable, str(Path(__file__).with_name("model_mutations.py")), "--places"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
