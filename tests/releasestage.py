"""A release of the chart on the real control plane, with real processes: operator and worker agents.

Identities, rights, admission policies and settings are those that `helm template` renders, and each process shows the
token of its service account (a worker's is bound to its Pod). Only the kubelet is played: `Kubelet` starts a worker's
process where a Job of the operator's gets its Pod, and writes the Pod's phase. No token is mounted, no image pulled.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import yaml

from chart.rendering import CHART, Helm, settings_of
from claas_crds import names
from claas_operator.snapshot import format_time
from cluster import programs
from cluster.api import ApiError
from cluster.controlplane import ControlPlane
from cluster.process import kill, spawn, tails
from operatorstage import GROUP, apply_crds
from workerstage import INSTANT

Raw = dict[str, Any]

RELEASE = "claas"
HOME = "claas-system"
WAIT_SECONDS = 60.0
TOKEN_SECONDS = 7200
# What a helm install would bring besides Pods of ours; the Deployment is there for what belongs to it, without Pods.
KINDS = {
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings",
    "ValidatingAdmissionPolicy": "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings",
    "Deployment": "/apis/apps/v1/namespaces/{namespace}/deployments",
}


class Release:
    """The chart with `values` (arguments of helm), in its own namespace.

    Attributes:
        settings: the operator's, as rendered; a change before `start_operator` is one that a values file could make.
        kubelet: plays the workers' Pods from `__enter__` on.
    """

    def __init__(self, control_plane: ControlPlane, folder: Path, *values: str) -> None:
        self.control_plane, self.api, self.folder = control_plane, control_plane.api, folder
        helm = Helm(programs.ensure_kubectl() / "helm")
        common = ("--set", "crds.install=false", *values)
        rendered = helm.run("template", RELEASE, str(CHART), "--namespace", HOME, *common).stdout
        self.objects: list[Raw] = [found for found in yaml.safe_load_all(rendered) if found]
        self.settings = settings_of(self.objects)
        self.operators: list[subprocess.Popen[bytes]] = []
        self.kubelet = Kubelet(self)

    def __enter__(self) -> Self:
        apply_crds(self.control_plane)
        self.namespace(HOME)
        for made in self.objects:
            if (collection := KINDS.get(made["kind"])) is not None:
                if made["kind"] == "Deployment":
                    made["spec"]["replicas"] = 0
                self.api("POST", collection.format(namespace=HOME), made)
        self.kubelet.start()
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.operators)
        self.kubelet.stop()

    def namespace(self, name: str) -> None:
        """A namespace with its default service account."""
        self.api("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
        self.wait(f"the service account of {name}", lambda: self.api.get(account) is not None)

    def wait(self, what: str, happened: Callable[[], Any], seconds: float = WAIT_SECONDS) -> None:
        """Returns as soon as something holds; the error shows the logs of the operators and workers."""
        end = time.monotonic() + seconds
        while not happened():
            logs = sorted(self.folder.glob("*.log"))
            assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}, in vain{tails(logs)}"
            time.sleep(0.05)

    # Identities

    def token(self, account: str, namespace: str = HOME, pod: Raw | None = None) -> str:
        """A token of a service account, bound to `pod` (its metadata) as a kubelet's is."""
        spec: Raw = {"expirationSeconds": TOKEN_SECONDS}
        if pod is not None:
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": pod["name"], "uid": pod["uid"]}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        token: str = self.api("POST", path, {"spec": spec})["status"]["token"]
        return token

    def kubeconfig(self, token: str, name: str) -> Path:
        """A kubeconfig that shows a token and nothing else."""
        authority = self.control_plane.authority.certificate
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "it",
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "clusters": [
                {"name": "it", "cluster": {"server": self.control_plane.url, "certificate-authority": str(authority)}}
            ],
            "users": [{"name": "it", "user": {"token": token}}],
        }
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(json.dumps(content))
        path.chmod(0o600)
        return path

    # The operator

    def start_operator(self, *arguments: str, command: Sequence[str] = (sys.executable, "-m")) -> int:
        """A real operator process with the release's settings and identity; its index. `command` runs its module."""
        index = len(self.operators)
        config = self.folder / f"operator-{index}.yaml"
        config.write_text(yaml.safe_dump(self.settings))
        kubeconfig = self.kubeconfig(self.token(f"{RELEASE}-operator"), f"operator-{index}")
        environment = {"KUBECONFIG": str(kubeconfig), "PYTHONPATH": os.pathsep.join(sys.path)}
        line = [*command, "claas_operator", "--config", str(config), *arguments]
        self.operators.append(spawn(line, self.log(index), environment=environment))
        return index

    def log(self, index: int = -1) -> Path:
        """Where an operator's log goes."""
        return self.folder / f"operator-{index % max(1, len(self.operators)) if index < 0 else index}.log"

    def wait_to_lead(self, index: int = -1) -> None:
        """Returns when that operator has taken over."""
        self.wait("the operator to lead", lambda: '"message": "synced"' in self.log(index).read_text())

    def stop_operator(self, index: int = -1, number: signal.Signals = signal.SIGTERM) -> None:
        """That operator ends."""
        self.operators[index].send_signal(number)
        self.operators[index].wait(timeout=60)

    # Users

    def adapter(self, namespace: str, name: str, **spec: Any) -> None:
        """A LoraAdapter with its first version, as if its create Job had answered."""
        pool = self.settings["pools"][0]
        uri = f"s3://adapters/{namespace}/{name}/"
        path = f"{GROUP}/namespaces/{namespace}/{names.ADAPTER_PLURAL}"
        storage = {"baseModel": pool["baseModel"], "storage": {"uri": uri}}
        body = {"apiVersion": names.API_VERSION, "kind": names.ADAPTER_KIND, "metadata": {"name": name}}
        self.api("POST", path, body | {"spec": storage | spec})
        entry = {"seq": 1, "version": name, "uri": uri, "requestUid": "", "at": format_time(datetime.now(UTC))}
        status = {"uri": uri, "version": name, "headSeq": 1, "history": [entry]}
        self.api("PATCH", f"{path}/{name}/status", {"status": status})

    # What was said to the API server

    def audit(self, start: int = 0) -> Iterator[Raw]:
        """The audit log from an offset in bytes, parsed; a last line that is not whole yet is left."""
        assert self.control_plane.audit is not None, "the control plane keeps no audit log"
        with self.control_plane.audit.open("rb") as file:
            file.seek(start)
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)


class Kubelet:
    """Starts a process for every worker's Pod, ends it with the Pod, and writes the Pod's phase.

    Attributes:
        processes: by the Pod's namespace and name.
    """

    def __init__(self, release: Release, command: Sequence[str] = INSTANT) -> None:
        self._release, self._command = release, command
        self.processes: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
        self._told: set[tuple[str, str]] = set()  # to end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kubelet", daemon=True)
        self._failure: BaseException | None = None

    def start(self) -> None:
        """From now on Pods run."""
        self._thread.start()

    def stop(self) -> None:
        """Kills every worker."""
        self._over.set()
        self._thread.join(timeout=30)
        kill(list(self.processes.values()))
        if self._failure is not None:
            raise self._failure

    def log(self, name: str) -> Path:
        """Where the log of a Pod's worker goes."""
        return self._release.folder / f"worker-{name}.log"

    def _run(self) -> None:
        try:
            while not self._over.wait(0.1):
                self._look()
        except BaseException as error:  # shown by stop(): a thread's error would be nobody's
            self._failure = error
            raise

    def _look(self) -> None:
        selector = f"labelSelector={names.COMPONENT_LABEL}={names.COMPONENT_WORKER}"
        pods = {
            (pod["metadata"]["namespace"], pod["metadata"]["name"]): pod
            for pod in (self._release.api.get(f"/api/v1/pods?{selector}") or {"items": []})["items"]
        }
        for key, pod in pods.items():
            process, path = self.processes.get(key), f"/api/v1/namespaces/{key[0]}/pods/{key[1]}"
            if process is None and "deletionTimestamp" not in pod["metadata"]:
                self.processes[key] = self._start(pod)
                running = {"phase": "Running", "startTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
                self._release.api("PATCH", f"{path}/status", {"status": running})
            elif process is not None and process.poll() is not None and pod["status"].get("phase") == "Running":
                phase = "Failed" if process.returncode else "Succeeded"
                self._release.api("PATCH", f"{path}/status", {"status": {"phase": phase}})
            if "deletionTimestamp" in pod["metadata"]:
                if process is not None and process.poll() is None and key not in self._told:
                    self._told.add(key)
                    process.terminate()
                elif process is None or process.poll() is not None:
                    with contextlib.suppress(ApiError):  # it may be gone
                        self._release.api("DELETE", path, {"gracePeriodSeconds": 0})
        for key in self.processes.keys() - pods.keys():
            self.processes[key].kill()  # a Pod that is gone runs nothing

    def _start(self, pod: Raw) -> subprocess.Popen[bytes]:
        metadata, spec = pod["metadata"], pod["spec"]
        (container,) = [c for c in spec["containers"] if c["name"] == "worker"]
        told = {variable["name"]: _value(variable, metadata) for variable in container["env"]}
        token = self._release.token(spec["serviceAccountName"], metadata["namespace"], metadata)
        folder = self._release.folder
        told |= {
            "KUBECONFIG": str(self._release.kubeconfig(token, metadata["name"])),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "CLAAS_MODEL_PATH": str(folder),
        }
        return spawn(self._command, self.log(metadata["name"]), environment=told)


def _value(variable: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    if "value" in variable:
        return str(variable["value"])
    field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
    return str(metadata[field.removeprefix("metadata.")]) if field.startswith("metadata.") else ""
