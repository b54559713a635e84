"""A release that may be killed piece by piece: two namespaces, real operators, real workers, and a kubelet.

Every process reaches the API server, the object store and the teacher through proxies that fail as they are told. A
test kills with signals and with faults at chosen calls; `settle` lets everything end, and judges by the invariants.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import forks
from chaos import invariants, teacher, witness
from chaos.api import PatientApi, Raw, RawApi, identity
from chaos.background import Background
from chaos.kubelet import Kubelet
from chaos.proxy import Call, Fault, Proxy
from chaos.witness import Witness
from claas_crds import names
from cluster.api import ApiError
from cluster.controlplane import ControlPlane
from cluster.process import kill, tails
from objectstore import ObjectStore
from operatorkit import template
from operatorstage import GROUP, OPERATOR, Stage
from store import examples

SETTLE_SECONDS = 90.0
WORKER = "-l40s-"  # in the names of worker Pods, and of nothing else
LORA = {"r": 4, "alpha": 8, "targetModules": ["q_proj", "down_proj"]}
# A worker's Lease lives for two seconds, a leader's for two: what takes a minute in production is seen in four.
TIMINGS: dict[str, float] = {
    "leaseSeconds": 2,
    "leaderLeaseSeconds": 2,
    "claimGraceSeconds": 3,
    "retryBaseSeconds": 0.3,
    "retryCapSeconds": 2,
    "relistSeconds": 4,
    "teacherProbeSeconds": 0.3,
    "fenceGraceSeconds": 2,
    "reasonDelaySeconds": 0.5,
    "collectDelaySeconds": 1,
    "deletionLimitSeconds": 30,
}


class World:
    """What many releases share: one control plane, one object store, one teacher, one event loop."""

    def __init__(self, control_plane: ControlPlane, store: ObjectStore, background: Background, folder: Path) -> None:
        self.control_plane, self.store, self.background = control_plane, store, background
        self.lock = threading.Lock()
        self.model_dir = folder / "model"
        if not self.model_dir.exists():
            examples.model_dir(self.model_dir)

        async def start() -> tuple[RawApi, Any, str]:
            runner, url = await teacher.serve()
            return RawApi(control_plane), runner, url

        self.api, self._teacher, self.teacher_url = background.call(start())
        with suppress(ApiError):  # 409: another world's
            control_plane.api("POST", "/api/v1/nodes", {"metadata": {"name": "node"}})

    def close(self) -> None:
        self.background.call(self.api.close())
        self.background.call(self._teacher.cleanup())


class Release(Stage):
    """A stage whose workers are processes, too.

    Attributes:
        api_proxy, store_proxy, teacher_proxy: what lies between the processes and the servers.
        said: what was done to it, with seconds since its start: the history of a failure.
    """

    def __init__(self, world: World, folder: Path, name: str, *, teams: int = 1, **changes: Any) -> None:
        super().__init__(world.control_plane, folder, name)
        self.world, self._changes, self.api = world, changes, PatientApi(world.control_plane.api)
        self.teams = [self.team, *(f"{self.team}-{i}" for i in range(2, teams + 1))]
        self.started, self.said = time.monotonic(), list[str]()
        self.operators: list[forks.Forked] = []
        self.replicas = 0  # operators that `supervise` keeps alive
        self.go = folder / "go"  # its presence lets steps that "hold" go on

    def __enter__(self) -> Self:
        with self.world.lock:  # rights that all releases share are made once
            super().__enter__()
        for team in self.teams[1:]:
            self.api("POST", "/api/v1/namespaces", {"metadata": {"name": team}})
        self._background = self.world.background
        self._background.call(self._open())
        self.config = self.settings(**self._changes)
        return self

    def __exit__(self, *raised: object) -> None:
        kill(self.operators)  # type: ignore[arg-type]
        self._clear()
        with suppress(Exception):
            self._background.call(self._close())
        for team in self.teams[1:]:
            self.api("DELETE", f"/api/v1/namespaces/{team}")
        super().__exit__(*raised)

    async def _open(self) -> None:
        world = self.world
        self.api_proxy = Proxy(world.control_plane.url)
        self.store_proxy, self.teacher_proxy = Proxy(world.store.endpoint), Proxy(world.teacher_url)
        self._operator_identity = identity(world.control_plane, OPERATOR)
        self._worker_identity = identity(world.control_plane, "worker-under-test", ("system:masters",))
        self.teacher_url = await self.teacher_proxy.door("teacher")
        self.kubelet = Kubelet(world.api, self.home, self.folder, self._environment, self.say)
        self.witness = Witness(world.api)
        for team in self.teams:
            self.witness.watch(["DistillRequest", "LoraAdapter"], team)
        self.witness.watch(["Lease", "Pod", "Job"], self.home)
        self._kubelet = self._background.start(self.kubelet.run())

    def _clear(self) -> None:
        """Nothing of ours is left for the next release's operators, which look at all namespaces."""
        for team in self.teams:
            for plural in (names.REQUEST_PLURAL, names.ADAPTER_PLURAL):
                self.api("DELETE", f"{GROUP}/namespaces/{team}/{plural}")
        for plural, raw in self.listed():
            path = f"{GROUP}/namespaces/{raw['metadata']['namespace']}/{plural}/{raw['metadata']['name']}"
            with suppress(ApiError):  # it has gone in the meantime
                self.api("PATCH", path, {"metadata": {"finalizers": None}})

    async def _close(self) -> None:
        self._kubelet.cancel()
        self.witness.close()
        for proxy in (self.api_proxy, self.store_proxy, self.teacher_proxy):
            await proxy.close()

    # What is what

    def settings(self, *, timings: Raw | None = None, **changes: Any) -> Path:
        """As Stage's, for processes behind the proxies."""
        worker = template("worker")
        worker["spec"]["terminationGracePeriodSeconds"] = 2
        pool = {"template": worker, "startLimitSeconds": 20, "lingerSeconds": 60} | changes.pop("pool", {})
        operations = {"template": template("operation"), "modelDir": str(self.world.model_dir)}
        given = {"teacher": {"url": self.teacher_url}, "operations": operations} | changes
        return super().settings(timings=TIMINGS | (timings or {}), pool=pool, **given)

    async def _environment(self, pod: Raw, variables: Mapping[str, str]) -> Mapping[str, str]:
        """A Pod's process has doors of its own, which are called as the Pod."""
        name = pod["metadata"]["name"]
        url = await self.api_proxy.door(name, self._worker_identity)
        store = self.world.store.environment | {"AWS_ENDPOINT_URL_S3": await self.store_proxy.door(name)}
        return {
            **variables,
            **store,
            "CLAAS_MODEL_PATH": str(self.folder),
            "CLAAS_TEACHER_URL": self.teacher_url,
            "KUBECONFIG": str(self._kubeconfig(name, url)),
        }

    def _kubeconfig(self, who: str, url: str) -> Path:
        path = self.folder / f"{who}.kubeconfig"
        cluster, context = {"server": url}, {"cluster": "proxy", "user": "proxy"}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "proxy",
            "contexts": [{"name": "proxy", "context": context}],
            "clusters": [{"name": "proxy", "cluster": cluster}],
            "users": [{"name": "proxy", "user": {}}],
        }
        if not path.exists():
            path.write_text(json.dumps(content))
        return path

    def start_operator(self, config: Path | None = None, *arguments: str) -> forks.Forked:
        """One more replica, behind a door of its own: operator-0, operator-1 …"""
        who = f"operator-{len(self.operators)}"
        url = self._background.call(self.api_proxy.door(who, self._operator_identity))
        log = self.folder / f"{who}.log"
        log.touch()
        environment = {"KUBECONFIG": str(self._kubeconfig(who, url))}
        given = ["--config", str(config or self.config), *arguments]
        process = forks.operator(log, environment, given)
        self.operators.append(process)
        self.logs.append(log)
        self.say(f"{who} runs as {process.pid}")
        return process

    def supervise(self) -> None:
        """As a Deployment does: as many replicas as there should be."""
        alive = sum(process.poll() is None for process in self.operators)
        for _ in range(alive, self.replicas):
            self.start_operator()

    def say(self, what: str) -> None:
        """For the history."""
        self.said.append(f"{time.monotonic() - self.started:8.3f} {what}")

    # What goes wrong

    def fail(self, where: str, **what: Any) -> Fault:
        """A fault in one of the proxies: `api`, `store` or `teacher`."""
        fault: Fault = getattr(self, f"{where}_proxy").fail(**what)
        self.say(f"fault in {where}: {fault}")
        return fault

    def kill_operator_at(self, when: str, *, who: str = "operator-0", **call: Any) -> Fault:
        """That operator is killed at its next such call, `before` the API server hears it or `after` it has done it."""
        victim = self.operators[int(who.rpartition("-")[2])]
        return self.fail("api", who=f"^{who}$", cut=when, then=lambda _: victim.kill(), **call)

    def kill_worker_at(self, where: str, when: str, **call: Any) -> Fault:
        """The worker that makes the next such call is killed."""

        def die(of: Call) -> None:
            self.say(f"SIGKILL worker {of.who}")
            self.kubelet.processes[of.who].kill()

        return self.fail(where, who=WORKER, cut=when, then=die, **call)

    def kill_operation_at(self, who: str, nth: int, when: str) -> Fault:
        """The operation that is the next to make an `nth` call of the store is killed at it."""

        def die(of: Call) -> None:
            self.say(f"SIGKILL operation {of.who} at call {nth} of the store")
            self.kubelet.processes[of.who].kill()

        return self.fail("store", who=who, nth=nth, cut=when, then=die)

    def wait_fault(self, fault: Fault, seconds: float = 20) -> None:
        """Returns when it has happened."""
        self.wait(f"the fault: {fault}", lambda: fault.hits, seconds)

    def dead(self, index: int = 0) -> None:
        """Returns when that operator has died."""
        self.wait(f"operator-{index} to die", lambda: self.operators[index].poll() is not None)

    def leader(self) -> int | None:
        """Which operator holds the Lease, by its own word and the Lease's."""
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self.home}/leases/{self.instance}-operator"
        holder = ((self.api.get(path) or {}).get("spec") or {}).get("holderIdentity") or "nobody"
        for index, process in enumerate(self.operators):
            if process.poll() is None and any(line.get("identity") == holder for line in self.lines(index)):
                return index
        return None

    def stop_process(self, process: forks.Forked) -> None:
        """SIGSTOP: alive, and deaf."""
        process.send_signal(signal.SIGSTOP)

    def go_on(self, process: forks.Forked) -> None:
        """SIGCONT."""
        process.send_signal(signal.SIGCONT)

    def heal(self) -> None:
        """Nothing fails any more, and whatever was stopped goes on."""
        self.say("all is well")
        for proxy in (self.api_proxy, self.store_proxy, self.teacher_proxy):
            proxy.heal()
        for process in [*self.operators, *list(self.kubelet.processes.values())]:
            process.send_signal(signal.SIGCONT)

    # Users

    def new_adapter(self, name: str = "coder", **spec: Any) -> None:
        """A LoraAdapter that an operation is to make; returns when it has its first version."""
        self.adapter(name, ready=False, lora=LORA, **spec)
        self.wait(f"{name} to be made", lambda: (self.see_adapter(name).get("status") or {}).get("headSeq"), 30)

    # The end

    def settle(self, seconds: float = SETTLE_SECONDS) -> None:
        """Heals, lets everything end, and judges.

        Raises:
            AssertionError: a request does not end, or an invariant is broken; with the history.
        """
        self.heal()
        self.go.touch()
        end = time.monotonic() + seconds
        while self._unfinished() and time.monotonic() < end:
            self.supervise()
            time.sleep(0.1)
        self.wait("the witness", self._witnessed)
        problems = invariants.violations(self.evidence())
        assert not problems, self.tell(problems)

    def listed(self) -> list[tuple[str, Raw]]:
        """Users' objects as they are now, with their plurals."""
        found = []
        for team in self.teams:
            for plural in (names.REQUEST_PLURAL, names.ADAPTER_PLURAL):
                items = (self.api.get(f"{GROUP}/namespaces/{team}/{plural}") or {"items": []})["items"]
                found += [(plural, raw) for raw in items]
        return found

    def _unfinished(self) -> bool:
        for plural, raw in self.listed():
            status = raw.get("status") or {}
            busy = status.get("active") or status.get("collecting")
            ended = witness.ended(status) if plural == names.REQUEST_PLURAL else not busy
            if not ended or raw["metadata"].get("deletionTimestamp"):
                return True
        return False

    def _witnessed(self) -> bool:
        """Whether the witness has seen everything as it is now, and what is gone go."""
        last = {seen.uid: seen for seen in self.witness.history() if seen.kind in ("DistillRequest", "LoraAdapter")}
        here = {raw["metadata"]["uid"]: int(raw["metadata"]["resourceVersion"]) for _, raw in self.listed()}
        left = {
            uid
            for uid, seen in last.items()
            if seen.type != "DELETED" and seen.raw["metadata"]["namespace"] in self.teams
        }
        return left == here.keys() and all(last[uid].version >= version for uid, version in here.items())

    def evidence(self) -> invariants.Evidence:
        """What the store and the API server show."""
        texts = [
            (str(log), log.read_text(errors="replace")) for log in [*self.logs, *self.kubelet.logs] if log.exists()
        ]
        for namespace in [self.home, *self.teams]:
            for group in ("/api/v1", "/apis/events.k8s.io/v1"):
                events = self.api.get(f"{group}/namespaces/{namespace}/events")
                texts.append((f"Events of {namespace}", json.dumps(events)))
        client = self.world.store.client()
        return invariants.gather(self.witness.history, client, self.world.store.bucket, self.teams, texts)

    def tell(self, problems: list[str]) -> str:
        """The problems, and the history that led there."""
        told = ["", *problems, "--- what was done", *self.said, "--- faults"]
        told += [*self.api_proxy.failed, *self.store_proxy.failed, *self.teacher_proxy.failed]
        told += ["--- what the API server showed", *witness.tell(self.witness.history())]
        told += ["--- logs", tails([*self.logs, *self.kubelet.logs], 12)]
        return "\n".join(told)
