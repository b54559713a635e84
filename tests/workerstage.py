"""A stage for the real worker process: the real API server, with the operator and the kubelet played by the test.

`WorkerStage` writes what the operator writes when it binds a request, and sends the signals that a kubelet sends. The
process is `python -m claas_worker` itself, or `instant_worker.py`: the same agent with a step that obeys the prompt.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import forks
from claas_crds import names
from cluster.controlplane import ControlPlane
from cluster.process import kill, spawn, wait_for

ROOT = Path(__file__).resolve().parents[1]
GROUP = f"/apis/{names.API_VERSION}"
WAIT_SECONDS = 20.0
INSTANT = [sys.executable, str(ROOT / "tests" / "instant_worker.py")]  # the same as `forks.worker` makes of it
REAL = [sys.executable, "-m", "claas_worker"]
MODEL = "tests/tiny"

Raw = dict[str, Any]


class WorkerStage:
    """One namespace with one worker Pod (an object only) in it."""

    def __init__(self, control_plane: ControlPlane, folder: Path, name: str) -> None:
        self.control_plane, self.api, self.folder = control_plane, control_plane.api, folder
        word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:24].strip("-")
        self.namespace = f"{word}-{secrets.token_hex(2)}"
        self.pod = f"worker-{secrets.token_hex(2)}"
        self.log = folder / "worker.log"
        self.processes: list[forks.Forked | subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.api("POST", "/api/v1/namespaces", {"metadata": {"name": self.namespace}})
        account = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/default"
        wait_for("the service account", lambda: self.api.get(account) is not None, WAIT_SECONDS)
        pod = {"metadata": {"name": self.pod}, "spec": {"containers": [{"name": "worker", "image": "none"}]}}
        self.pod_uid = self.api("POST", f"/api/v1/namespaces/{self.namespace}/pods", pod)["metadata"]["uid"]
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.processes)
        self.api("DELETE", f"/api/v1/namespaces/{self.namespace}")

    def start(
        self, command: Sequence[str] = INSTANT, kubeconfig: Path | None = None, **environment: str
    ) -> forks.Forked | subprocess.Popen[bytes]:
        """A worker process, told who it is as the operator tells it; `environment` in capitals without CLAAS_."""
        told = {
            names.ENV_POD_NAME: self.pod,
            names.ENV_POD_NAMESPACE: self.namespace,
            names.ENV_POD_UID: self.pod_uid,
            names.ENV_WATCH_NAMESPACE: self.namespace,
            names.ENV_POOL: "l40s",
            names.ENV_INSTANCE: "claas",
            names.ENV_BASE_MODEL: MODEL,
            "CLAAS_MODEL_PATH": str(self.folder),
            "CLAAS_FILE_ROOTS": str(self.folder),
            "CLAAS_THREADS": "2",
            "KUBECONFIG": str(kubeconfig or self.control_plane.kubeconfig),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        told |= {
            name if "_" in name and name.startswith("AWS") else f"CLAAS_{name}": v for name, v in environment.items()
        }
        self.log.touch()
        process = (
            forks.worker(self.log, told, "instant_worker")
            if command is INSTANT
            else spawn(command, self.log, environment=told)
        )
        self.processes.append(process)
        return process

    # The operator's part

    def request(self, prompt: str = "hello", **spec: Any) -> str:
        """A DistillRequest, not bound; gives its name."""
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.REQUEST_KIND,
            "metadata": {"generateName": "dr-"},
            "spec": {"loraUri": "s3://adapters/somebody/a/", "samples": [{"prompt": prompt, "response": "yes"}]} | spec,
        }
        name: str = self.api("POST", f"{GROUP}/namespaces/{self.namespace}/{names.REQUEST_PLURAL}", body)["metadata"][
            "name"
        ]
        return name

    def status(self, name: str) -> Raw:
        """Its status now."""
        found: Raw = self.api("GET", self._path(name))
        return dict(found.get("status") or {})

    def uid(self, name: str) -> str:
        """Its uid."""
        return str(self.api("GET", self._path(name))["metadata"]["uid"])

    def write_status(self, name: str, **status: Any) -> None:
        """A merge patch of its status."""
        self.api("PATCH", self._path(name) + "/status", {"status": status})

    def bind(self, name: str, attempt: int = 1, worker: str = "", **parent: Any) -> None:
        """As the operator binds: `claim` and `result` of an earlier attempt go."""
        spec = self.api("GET", self._path(name))["spec"]
        self.write_status(
            name,
            worker=worker or self.pod,
            attempt=attempt,
            parent={"uri": spec["loraUri"], "headSeq": 0} | parent,
            claim=None,
            result=None,
        )

    def bound(self, prompt: str = "hello", **spec: Any) -> str:
        """A request that is bound to the worker."""
        name = self.request(prompt, **spec)
        self.bind(name)
        return name

    # What a test looks at

    def lease(self) -> Raw | None:
        """The worker's Lease, or None."""
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/{self.pod}"
        found: Raw | None = self.api.get(path)
        return found

    def state(self) -> str:
        """What the Lease says."""
        return str(
            (self.lease() or {"metadata": {"annotations": {}}})["metadata"]["annotations"].get(names.LEASE_STATE, "")
        )

    def running(self) -> set[str]:
        """Uids in the Lease."""
        listed = (self.lease() or {"metadata": {"annotations": {}}})["metadata"]["annotations"].get(
            names.LEASE_RUNNING, ""
        )
        return set(filter(None, listed.split(",")))

    def lines(self) -> list[Raw]:
        """The worker's log so far."""
        text = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def wait(self, what: str, happened: Callable[[], Any], seconds: float = WAIT_SECONDS) -> None:
        """Returns when it has; while the worker lives."""
        needs = {f"worker {number}": process for number, process in enumerate(self.processes)}
        wait_for(what, lambda: bool(happened()), seconds, needs=needs, logs=[self.log])

    def wait_result(self, name: str, seconds: float = WAIT_SECONDS) -> Raw:
        """The worker's report."""
        self.wait(f"a result of {name}", lambda: "result" in self.status(name), seconds)
        result: Raw = self.status(name)["result"]
        return result

    def wait_state(self, state: str, seconds: float = WAIT_SECONDS) -> None:
        """Returns when the Lease says so."""
        self.wait(f"state {state}", lambda: self.state() == state, seconds)

    def wait_exit(self, process: forks.Forked | subprocess.Popen[bytes], seconds: float = WAIT_SECONDS) -> int:
        """The exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=seconds)
        raise AssertionError(f"the worker did not end within {seconds} s: {self.lines()[-5:]}")

    def _path(self, name: str) -> str:
        return f"{GROUP}/namespaces/{self.namespace}/{names.REQUEST_PLURAL}/{name}"


class Gate:
    """A step that waits in `instant_worker.py` ("hold" in the prompt) waits at this pipe."""

    def __init__(self, folder: Path) -> None:
        self._pipe = folder / "gate"
        if not self._pipe.exists():
            os.mkfifo(self._pipe)

    def open(self) -> None:
        """Lets one waiting step go on."""
        self._pipe.write_bytes(b"go")


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Names of the fields that differ."""
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
