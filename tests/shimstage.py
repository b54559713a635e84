"""A stage for the real shim process: the real API server, the real operator, and a worker whose steps take no time.

`ShimStage` plays the kubelet alone: it starts `instant_worker.py` for the Pods that the Job controller makes. Callers
are service accounts of the namespaces `team` and `other`, by tokens of the API server's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

import forks
from claas_crds import names
from claas_operator.snapshot import format_time
from cluster.controlplane import ControlPlane
from cluster.process import tails
from objectstore import ObjectStore, free_port
from operatorkit import MODEL, Raw
from operatorstage import RBAC, Stage

SHIM = "claas-shim-under-test"
# What the shim may do; the chart grants the same.
SHIM_RULES: list[Raw] = [
    {
        "apiGroups": [names.GROUP],
        "resources": ["distillrequests"],
        "verbs": ["get", "list", "watch", "create", "patch"],
    },
    {
        "apiGroups": [names.GROUP],
        "resources": ["loraadapters"],
        "verbs": ["get", "list", "watch", "create", "patch", "delete"],
    },
    {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["list"]},
    {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
    {"apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"], "verbs": ["create"]},
]
SHIM_HOME_RULES: list[Raw] = [
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "list"]},
    {"apiGroups": [""], "resources": ["secrets"], "verbs": ["list"]},
]
EDITOR_RULES: list[Raw] = [
    {
        "apiGroups": [names.GROUP],
        "resources": ["distillrequests", "loraadapters"],
        "verbs": ["get", "list", "watch", "create", "update", "patch", "delete"],
    }
]
VIEWER_RULES: list[Raw] = [
    {"apiGroups": [names.GROUP], "resources": ["distillrequests", "loraadapters"], "verbs": ["get", "list", "watch"]}
]
# A real worker renews its Lease every 5 s: the times by which it is judged are those of production.
ONE_WORKER: Raw = {
    "pool": {"minWorkers": 1, "maxWorkers": 1, "batch": 16},
    "timings": {"leaseSeconds": 15, "claimGraceSeconds": 30, "fenceGraceSeconds": 30, "relistSeconds": 60},
}
GROUP = "rbac.authorization.k8s.io"


class ShimStage(Stage):
    """One release with shims in front of it, and two tenants."""

    def __init__(self, control_plane: ControlPlane, folder: Path, name: str, store: ObjectStore) -> None:
        super().__init__(control_plane, folder, name)
        self.store = store
        self.other = self.team.replace("team-", "other-")
        self.shims: list[Shim] = []
        self.workers: list[forks.Forked] = []
        self._served: set[str] = set()
        self._tokens: dict[tuple[str, str], str] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        self.api("POST", "/api/v1/namespaces", {"metadata": {"name": self.other}})
        self._grant(SHIM_RULES, "ClusterRole", f"{SHIM}-{self.instance}", SHIM)
        self._grant(SHIM_HOME_RULES, "Role", SHIM, SHIM, self.home)
        return self

    def __exit__(self, *error: object) -> None:
        for shim in self.shims:
            shim.kill()
        for worker in self.workers:
            worker.kill()
            worker.wait(timeout=10)
        super().__exit__(*error)
        self.api("DELETE", f"/api/v1/namespaces/{self.other}")
        for plural in ("clusterrolebindings", "clusterroles"):
            self.api("DELETE", f"{RBAC}/{plural}/{SHIM}-{self.instance}")

    # The kubelet

    def start_worker(self, **environment: str) -> forks.Forked:
        """Waits for a worker Pod that nobody runs yet, and runs it: `instant_worker.py`."""
        fresh: list[Raw] = []

        def appeared() -> bool:
            fresh[:] = [pod for pod in self.pods() if pod["metadata"]["name"] not in self._served]
            return bool(fresh)

        self.wait("a worker Pod", appeared)
        meta = fresh[0]["metadata"]
        self._served.add(meta["name"])
        self.pod_status(meta["name"], {"phase": "Running", "startTime": format_time(datetime.now(UTC))[:19] + "Z"})
        told = {
            names.ENV_POD_NAME: meta["name"],
            names.ENV_POD_NAMESPACE: self.home,
            names.ENV_POD_UID: meta["uid"],
            names.ENV_POOL: "l40s",
            names.ENV_INSTANCE: self.instance,
            names.ENV_BASE_MODEL: MODEL,
            names.ENV_LINGER_SECONDS: "3600",
            names.ENV_MAX_REQUESTS: "1000000",
            "CLAAS_MODEL_PATH": str(self.folder),
            "KUBECONFIG": str(self.control_plane.kubeconfig),
            **self.store.environment,
            **environment,
        }
        log = self.folder / f"worker-{len(self.workers)}.log"
        self.logs.append(log)
        log.touch()
        process = forks.worker(log, told, "instant_worker")
        self.workers.append(process)
        return process

    # The shim

    def start_shim(self, *, kubeconfig: Path | None = None, **changes: Any) -> Shim:
        """A shim process that is ready; `changes` are keys of its settings (camelCase)."""
        number = len(self.shims)
        config = self.folder / f"shim-{number}.yaml"
        content = {
            "instance": self.instance,
            "namespace": self.home,
            "defaultBaseModel": MODEL,
            "pools": {"l40s": MODEL},
            "storage": {"prefixes": [{"uri": "s3://adapters/{namespace}/"}]},
            "limits": {"requestsPerMinute": 0},
            "waitSeconds": 30,
        } | changes
        config.write_text(yaml.safe_dump(content))
        shim = Shim(self, number, config, kubeconfig or self.control_plane.kubeconfig_of(SHIM))
        self.shims.append(shim)
        self.logs.append(shim.log)
        self.wait("the shim to be ready", shim.ready)
        return shim

    # Callers

    def token(self, account: str = "editor", namespace: str = "") -> str:
        """A token of a service account of `namespace` (team): `editor` may do everything there, `viewer` may read,
        `nobody` may do nothing."""
        namespace = namespace or self.team
        if (namespace, account) not in self._tokens:
            base = f"/api/v1/namespaces/{namespace}/serviceaccounts"
            self.api("POST", base, {"metadata": {"name": account}})
            rules = {"editor": EDITOR_RULES, "viewer": VIEWER_RULES, "nobody": []}[account]
            if rules:
                user = f"system:serviceaccount:{namespace}:{account}"
                self._grant(rules, "Role", account, user, namespace)
            spec = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
            answer = self.api("POST", f"{base}/{account}/token", spec)
            self._tokens[namespace, account] = answer["status"]["token"]
        return self._tokens[namespace, account]

    def _grant(self, rules: Sequence[Raw], kind: str, name: str, user: str, namespace: str = "") -> None:
        base = f"{RBAC}/namespaces/{namespace}" if namespace else RBAC
        plural = f"{kind.lower()}s"
        self.api("POST", f"{base}/{plural}", {"metadata": {"name": name}, "rules": list(rules)})
        body = {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": GROUP, "kind": kind, "name": name},
            "subjects": [{"kind": "User", "name": user, "apiGroup": GROUP}],
        }
        self.api("POST", f"{base}/{plural[:-1]}bindings", body)


class Shim:
    """One process of it."""

    def __init__(self, stage: ShimStage, number: int, config: Path, kubeconfig: Path) -> None:
        self.stage, self.number, self.port = stage, number, free_port()
        self.log = stage.folder / f"shim-{number}.log"
        self.url = f"http://127.0.0.1:{self.port}"
        self.log.touch()
        environment = {"KUBECONFIG": str(kubeconfig), **stage.store.environment}
        self.process = forks.shim(self.log, environment, ["--config", str(config), "--port", str(self.port)])

    def ready(self) -> bool:
        """Whether it has seen everything there is."""
        assert self.process.poll() is None, f"the shim ended{tails([self.log])}"
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def client(self, token: str | None = None, **options: Any) -> httpx.Client:
        """Somebody who calls: the editor of `team`, or whoever holds `token`; "" holds none."""
        token = self.stage.token() if token is None else token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=60, **options)

    def kill(self) -> None:
        """At once, as the kernel's out-of-memory killer would."""
        self.process.kill()
        self.process.wait(timeout=10)


@contextmanager
def shim_stage(control_plane: ControlPlane, folder: Path, name: str, store: ObjectStore) -> Iterator[ShimStage]:
    """A stage with an operator that leads, and one worker that is Ready."""
    with ShimStage(control_plane, folder, name, store) as stage:
        stage.start_operator(stage.settings(**ONE_WORKER))
        stage.wait_to_lead()
        stage.start_worker()
        yield stage
