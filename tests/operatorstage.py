"""A stage for the real operator process: the real API server, with the kubelet and the workers played by the test.

There is no kubelet behind the control plane alone, so nobody runs Pods: `Stage` writes the Pods' phases, the workers'
Leases, claims and results, exactly as a kubelet and `claas_worker` would. Everything else is real.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import yaml

import forks
from claas_crds import names
from claas_crds.generate import RESOURCES, definition
from claas_operator.snapshot import format_time
from claas_store.uris import next_version_uri
from cluster.api import ApiError
from cluster.controlplane import ControlPlane
from cluster.process import kill, tails, wait_for
from operatorkit import MODEL, NUMBERS, Raw, template

ROOT = Path(__file__).resolve().parents[1]
GROUP = f"/apis/{names.API_VERSION}"
WAIT_SECONDS = 20.0
# Scaled down, so that a test sees in seconds what takes a minute in production.
TIMINGS = {
    "leaseSeconds": 3,
    "claimGraceSeconds": 5,
    "retryBaseSeconds": 0.5,
    "retryCapSeconds": 2,
    "relistSeconds": 5,
    "leaderLeaseSeconds": 3,
    "teacherProbeSeconds": 0.3,
    "fenceGraceSeconds": 2,
    "reasonDelaySeconds": 1,
    "deletionLimitSeconds": 20,
}


# What the operator may do; the chart grants the same. No wildcard, no secrets.
EVERYWHERE: list[Raw] = [
    {"apiGroups": [names.GROUP], "resources": ["distillrequests"], "verbs": ["get", "list", "watch", "delete"]},
    {"apiGroups": [names.GROUP], "resources": ["loraadapters"], "verbs": ["get", "list", "watch", "patch"]},
    {"apiGroups": [names.GROUP], "resources": ["distillrequests/status", "loraadapters/status"], "verbs": ["patch"]},
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "list", "watch"]},
    {
        "apiGroups": ["apiextensions.k8s.io"],
        "resources": ["customresourcedefinitions"],
        "verbs": ["list", "watch"],
    },
    {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]},
    {"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["clusterroles"], "verbs": ["list"]},
]
AT_HOME: list[Raw] = [
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "delete"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["delete"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create", "patch"]},
    {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get"]},
    {"apiGroups": ["apps"], "resources": ["deployments/scale"], "verbs": ["patch"]},
]
RBAC = "/apis/rbac.authorization.k8s.io/v1"
OPERATOR = "claas-operator-under-test"


def grant(control_plane: ControlPlane, namespace: str) -> None:
    """The operator's rights, of which those that write Jobs, Pods and Leases end at `namespace`."""
    api, group = control_plane.api, "rbac.authorization.k8s.io"
    subject = [{"kind": "User", "name": OPERATOR, "apiGroup": group}]
    for kind, base, rules in (
        ("ClusterRole", RBAC, EVERYWHERE),
        ("Role", f"{RBAC}/namespaces/{namespace}", AT_HOME),
    ):
        plural = f"{kind.lower()}s"
        if api.get(f"{base}/{plural}/{OPERATOR}") is None:
            api("POST", f"{base}/{plural}", {"metadata": {"name": OPERATOR}, "rules": rules})
            binding = {"apiGroup": group, "kind": kind, "name": OPERATOR}
            body = {"metadata": {"name": OPERATOR}, "roleRef": binding, "subjects": subject}
            api("POST", f"{base}/{plural[:-1]}bindings", body)


def apply_crds(control_plane: ControlPlane) -> None:
    """Installs our two kinds, straight from the models, and waits until they are served."""
    base = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    for resource in RESOURCES:
        if control_plane.api.get(f"{base}/{resource.name}") is None:
            control_plane.api("POST", base, definition(resource))
    for resource in RESOURCES:
        path = f"{GROUP}/{resource.plural}"
        wait_for(f"{path} to be served", lambda path=path: control_plane.api.get(path) is not None, WAIT_SECONDS)


class Stage:
    """One release in two namespaces of its own: `home` for workers, `team` for users."""

    def __init__(self, control_plane: ControlPlane, folder: Path, name: str) -> None:
        self.control_plane, self.api, self.folder = control_plane, control_plane.api, folder
        word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:24].strip("-")
        suffix = secrets.token_hex(2)
        self.home, self.team = f"home-{word}-{suffix}", f"team-{word}-{suffix}"
        self.instance = f"c{suffix}"
        self.operators: list[forks.Forked] = []
        self.logs: list[Path] = []
        self._beating: dict[str, Raw] = {}
        self._stop = threading.Event()
        self._beater = threading.Thread(target=self._beat, daemon=True)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        for namespace in (self.home, self.team):
            self.api("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        grant(self.control_plane, self.home)
        self._beater.start()
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.operators)
        self._stop.set()
        self._beater.join(timeout=10)
        self.nothing_secret_was_written()
        for namespace in (self.home, self.team):
            self.api("DELETE", f"/api/v1/namespaces/{namespace}")

    def nothing_secret_was_written(self) -> None:
        """No text of a sample in a log or an Event, whatever the test did."""
        for log in self.logs:
            assert "SECRET" not in log.read_text(), f"{log} holds text of a sample"
        for namespace in (self.home, self.team):
            assert "SECRET" not in json.dumps(self.api.get(f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"))

    # The operator

    def settings(self, *, timings: Raw | None = None, **changes: Any) -> Path:
        """A settings file; `changes` are keys of it, `pool` is merged into the one pool."""
        pool = {
            "name": "l40s",
            "baseModel": MODEL,
            "maxWorkers": 2,
            "startLimitSeconds": 30,
            "template": template("worker"),
        } | changes.pop("pool", {})
        content = {
            "instance": self.instance,
            "namespace": self.home,
            "defaultPool": "l40s",
            "defaultBaseModel": MODEL,
            "storage": {"prefixes": [{"uri": "s3://adapters/{namespace}/"}]},
            "pools": [pool],
            "operations": {"template": template("operation")},
            "timings": TIMINGS | (timings or {}),
        } | changes
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def start_operator(self, config: Path | None = None, *arguments: str) -> forks.Forked:
        """A real operator process; it acts as soon as it leads."""
        log = self.folder / f"operator-{len(self.operators)}.log"
        config = config or self.settings()
        log.touch()
        environment = {"KUBECONFIG": str(self.control_plane.kubeconfig_of(OPERATOR))}
        process = forks.operator(log, environment, ["--config", str(config), *arguments])
        self.operators.append(process)
        self.logs.append(log)
        return process

    def lines(self, index: int = -1) -> list[Raw]:
        """An operator's log so far."""
        text = self.logs[index].read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def wait_to_lead(self, index: int = -1) -> None:
        """Returns when that operator has taken over."""
        self.wait("the operator to lead", lambda: any(line["message"] == "synced" for line in self.lines(index)))

    def wait_to_stand_by(self, index: int = -1) -> None:
        """Returns when that operator has looked at the leader's Lease."""
        self.wait("the operator to start", lambda: any(line["message"] == "leadership" for line in self.lines(index)))

    def wait(
        self, what: str, happened: Callable[[], Any], seconds: float = WAIT_SECONDS, *, every: float = 0.05
    ) -> None:
        """Returns as soon as something holds, looking `every` so many seconds; the error shows the operators' logs."""
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}, in vain{tails(self.logs)}"
            time.sleep(every)

    # Users

    def adapter(self, name: str = "coder", *, ready: bool = True, **spec: Any) -> Raw:
        """A LoraAdapter, with its first version unless that is what the test is about."""
        uri = f"s3://adapters/{self.team}/{name}/"
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.ADAPTER_KIND,
            "metadata": {"name": name},
            "spec": {"baseModel": MODEL, "storage": {"uri": uri}} | spec,
        }
        path = f"{GROUP}/namespaces/{self.team}/{names.ADAPTER_PLURAL}"
        self.api("POST", path, body)
        if ready:
            entry = {"seq": 1, "version": name, "uri": uri, "requestUid": "", "at": format_time(datetime.now(UTC))}
            status = {"uri": uri, "version": name, "headSeq": 1, "history": [entry]}
            self.api("PATCH", f"{path}/{name}/status", {"status": status})
        return self.see_adapter(name)

    def request(self, name: str, adapter: str = "coder", **spec: Any) -> Raw:
        """A DistillRequest; without an adapter, on the bare `loraUri` that `spec` gives."""
        samples = [{"prompt": "SECRET-prompt", "response": "SECRET-response", "feedback": "SECRET-feedback"}]
        on = {"adapterRef": {"name": adapter}} if adapter else {}
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.REQUEST_KIND,
            "metadata": {"name": name},
            "spec": on | {"samples": samples} | spec,
        }
        created: Raw = self.api("POST", f"{GROUP}/namespaces/{self.team}/{names.REQUEST_PLURAL}", body)
        return created

    def change_adapter(self, name: str = "coder", **spec: Any) -> None:
        """`kubectl patch la`: None removes a field."""
        self.api("PATCH", self.adapter_path(name), {"spec": spec})

    def delete_adapter(self, name: str = "coder") -> None:
        """`kubectl delete la --wait=false`."""
        self.api("DELETE", self.adapter_path(name))

    def adapter_path(self, name: str = "coder") -> str:
        """An adapter's path; without a name, that of all."""
        return f"{GROUP}/namespaces/{self.team}/{names.ADAPTER_PLURAL}/{name}".rstrip("/")

    def condition(self, kind: str, name: str = "coder") -> Raw:
        """A condition of an adapter; empty when it has none of the type."""
        conditions = (self.see_adapter(name).get("status") or {}).get("conditions") or []
        return next((c for c in conditions if c["type"] == kind), {})

    def events(self, namespace: str = "") -> list[Raw]:
        """The operator's Events."""
        found = self.api.get(f"/apis/events.k8s.io/v1/namespaces/{namespace or self.team}/events") or {}
        return [event for event in found.get("items", []) if event.get("reportingController") == "claas.dev/operator"]

    def operation(self, name: str, answer: Raw, seconds: float = WAIT_SECONDS) -> list[str]:
        """Waits for the Pod of an operation Job, has it answer, and gives the arguments that it was called with."""
        fresh: list[Raw] = []

        def appeared() -> bool:
            pods = [p for p in self.pods("operation") if p["metadata"]["labels"][names.OPERATION_LABEL] == name]
            fresh[:] = [pod for pod in pods if pod["status"].get("phase") == "Pending"]
            return bool(fresh)

        self.wait(f"a Pod for {name}", appeared, seconds)
        self.run_pod(fresh[0]["metadata"]["name"], answer)
        arguments: list[str] = fresh[0]["spec"]["containers"][0]["args"]
        return arguments

    def run_pod(self, name: str, answer: Raw) -> None:
        """The Pod of an operation ends with this answer."""
        self.end_pod(name, "operation", json.dumps(answer), "Succeeded" if answer["ok"] else "Failed")

    @contextlib.contextmanager
    def store(self, environment: Mapping[str, str]) -> Iterator[None]:
        """Operation Pods run what they should, the real `claas_store`, with `environment`; one after the other."""
        over, taken = threading.Event(), set[str]()

        def serve() -> None:
            while not over.wait(0.1):
                for pod in self.pods("operation"):
                    name, arguments = pod["metadata"]["name"], pod["spec"]["containers"][0]["args"]
                    if name not in taken:
                        taken.add(name)
                        answer = self.folder / f"{name}.json"
                        variables = {**environment, "CLAAS_TERMINATION_LOG": str(answer)}
                        code = forks.store(self.folder / f"{name}.log", variables, arguments).wait(timeout=60)
                        with contextlib.suppress(ApiError):  # the test may have ended
                            phase = "Failed" if code else "Succeeded"
                            self.end_pod(name, "operation", answer.read_text() if answer.exists() else "", phase)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=60)

    def see_adapter(self, name: str = "coder") -> Raw:
        found: Raw = self.api.get(self.adapter_path(name)) or {}
        return found

    def see(self, name: str) -> Raw:
        """A request's status now."""
        found = self.api.get(self.request_path(name)) or {}
        status: Raw = found.get("status") or {}
        return status

    def request_path(self, name: str) -> str:
        return f"{GROUP}/namespaces/{self.team}/{names.REQUEST_PLURAL}/{name}"

    # The kubelet and the Job controller (which is real, and makes the Pods of a Job)

    def jobs(self) -> list[str]:
        selector = f"labelSelector={names.INSTANCE_LABEL}={self.instance}"
        items = self.api("GET", f"/apis/batch/v1/namespaces/{self.home}/jobs?{selector}")["items"]
        return sorted(item["metadata"]["name"] for item in items)

    def pods(self, component: str = "worker") -> list[Raw]:
        """Pods that the Job controller has made."""
        labels = f"{names.INSTANCE_LABEL}={self.instance},{names.COMPONENT_LABEL}={component}"
        items: list[Raw] = self.api("GET", f"/api/v1/namespaces/{self.home}/pods?labelSelector={labels}")["items"]
        return [item for item in items if "deletionTimestamp" not in item["metadata"]]

    def worker(self, seconds: float = WAIT_SECONDS) -> str:
        """Waits for a worker Pod that nobody has started yet, starts it, and has it Ready. Its name."""
        fresh: list[Raw] = []

        def appeared() -> bool:
            fresh[:] = [pod for pod in self.pods() if pod["metadata"]["name"] not in self._beating]
            return bool(fresh)

        self.wait("a worker Pod", appeared, seconds)
        name = str(fresh[0]["metadata"]["name"])
        self.pod_status(name, {"phase": "Running", "startTime": format_time(datetime.now(UTC))[:19] + "Z"})
        self.lease(name, "Ready")
        return name

    def pod_status(self, name: str, status: Raw) -> None:
        self.api("PATCH", f"/api/v1/namespaces/{self.home}/pods/{name}/status", {"status": status})

    def end_pod(self, name: str, container: str, message: str, phase: str = "Succeeded") -> None:
        """The Pod's one container has ended, with a termination message."""
        now = format_time(datetime.now(UTC))[:19] + "Z"
        terminated = {"exitCode": int(phase == "Failed"), "message": message, "startedAt": now, "finishedAt": now}
        state = {"name": container, "ready": False, "restartCount": 0, "image": "x", "imageID": "x"}
        self.pod_status(name, {"phase": phase, "containerStatuses": [state | {"state": {"terminated": terminated}}]})

    def lease(self, pod: str, state: str, running: str = "") -> None:
        """The worker's Lease says so now, and is renewed from now on."""
        with self._lock:
            self._beating[pod] = {names.LEASE_STATE: state, names.LEASE_RUNNING: running}
            self._renew(pod)

    def kill_worker(self, pod: str) -> None:
        """The Pod goes without a trace, as with kubectl delete --force."""
        with self._lock:
            self._beating.pop(pod, None)
        options = {"gracePeriodSeconds": 0}
        self.api("DELETE", f"/api/v1/namespaces/{self.home}/pods/{pod}", options)

    def wedge(self, pod: str) -> None:
        """The worker stops renewing; its Pod stays."""
        with self._lock:
            self._beating[pod] = {}

    def _beat(self) -> None:
        while not self._stop.wait(0.7):
            with self._lock:
                for pod in self._beating:
                    with contextlib.suppress(ApiError):  # its Pod, and so its Lease, may be gone
                        self._renew(pod)

    def _renew(self, pod: str) -> None:
        annotations = self._beating[pod]
        if not annotations:
            return
        found = self.api.get(f"/api/v1/namespaces/{self.home}/pods/{pod}")
        if found is None:
            return
        uid, now = found["metadata"]["uid"], format_time(datetime.now(UTC))
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self.home}/leases"
        spec = {"holderIdentity": uid, "renewTime": now, "leaseDurationSeconds": 3}
        if self.api.get(f"{path}/{pod}") is not None:
            self.api("PATCH", f"{path}/{pod}", {"metadata": {"annotations": annotations}, "spec": spec})
            return
        labels = {
            names.INSTANCE_LABEL: self.instance,
            names.COMPONENT_LABEL: names.COMPONENT_WORKER,
            names.POOL_LABEL: "l40s",
        }
        owner = {"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid}
        metadata = {"name": pod, "labels": labels, "annotations": annotations, "ownerReferences": [owner]}
        self.api("POST", path, {"metadata": metadata, "spec": spec})

    # The worker's agent

    def bound(self, name: str, seconds: float = WAIT_SECONDS) -> Raw:
        """Waits until the request is bound to a worker that lives. Its status."""
        self.wait(f"{name} to be bound", lambda: self.see(name).get("worker") in self._beating, seconds)
        return self.see(name)

    def claim(self, name: str) -> None:
        """Announce, then claim."""
        raw = self.api("GET", self.request_path(name))
        status = raw["status"]
        self.lease(status["worker"], "Ready", raw["metadata"]["uid"])
        claimed = {"worker": status["worker"], "attempt": status["attempt"], "at": format_time(datetime.now(UTC))}
        self.api("PATCH", f"{self.request_path(name)}/status", {"status": {"claim": claimed}})

    def report(self, name: str, outcome: str = "Succeeded", reason: str = "", *, leave: bool = True) -> str:
        """Report, then leave. The uri of the new version."""
        status, uri = self.see(name), self.next_uri(name)
        body: Raw = {
            "attempt": status["attempt"],
            "outcome": outcome,
            "reason": reason or outcome,
            "at": format_time(datetime.now(UTC)),
        }
        if outcome == "Succeeded":
            body |= {"loraUri": uri, "metadata": NUMBERS, "timings": {"stepMs": 7}}
        self.api("PATCH", f"{self.request_path(name)}/status", {"status": {"result": body}})
        if leave:
            self.lease(status["worker"], "Ready")
        return uri

    def next_uri(self, name: str) -> str:
        """Where the current attempt of a request writes its version."""
        raw = self.api("GET", self.request_path(name))
        meta, status = raw["metadata"], raw["status"]
        return next_version_uri(status["parent"]["uri"], meta["creationTimestamp"], meta["uid"], status["attempt"])

    def run(self, name: str) -> str:
        """Bound, claimed, reported."""
        self.bound(name)
        self.claim(name)
        return self.report(name)

    def complete(self, name: str) -> Raw:
        """Waits until it is Complete. Its status."""
        self.wait(f"{name} to complete", lambda: self.see(name).get("state") == "Complete")
        return self.see(name)

    def sigkill(self, index: int = -1) -> None:
        """That operator dies at once."""
        self.operators[index].send_signal(signal.SIGKILL)
        self.operators[index].wait(timeout=10)

    def writes(self) -> int:
        """Writes to requests and adapters, and new-style Events (ours; Kubernetes' controllers write the old ones), so
        far, as the API server itself counts them. No deletions: those of an earlier test's namespaces may go on."""
        total = 0
        for line in self.api("GET", "/metrics").splitlines():
            counts = line.startswith("apiserver_request_total{")
            verb = re.search(r'verb="(POST|PUT|PATCH|APPLY)"', line)
            group = re.search(rf'group="({names.GROUP}|events.k8s.io)"', line)
            if counts and verb and group:
                total += int(float(line.rpartition(" ")[2]))
        return total


class TeacherServer:
    """A real HTTP server in the teacher's place: /claas/v1/ready answers what `ready` says."""

    def __init__(self) -> None:
        self.ready = False
        self.asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                good = outer.ready and self.path == "/claas/v1/ready"
                self.send_response(200 if good else 503)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
