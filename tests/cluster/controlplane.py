"""etcd, the API server and the controller manager alone, on loopback: a real Kubernetes API in about 3 seconds.

Needs no root, no namespaces and no node, so Pods stay Pending. For contract and operator tests::

    with ControlPlane(tmp_path) as control_plane:
        kubernetes.config.load_kube_config(str(control_plane.kubeconfig))
"""

import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster import programs
from cluster.api import Api, write_kubeconfig
from cluster.pki import Authority
from cluster.process import ClusterError, kill, spawn, wait_for

START_SECONDS = 60
ETCD_BYTES = 8 * 2**30  # etcd's own advice for the most; its default of 2 GiB is full after 10,000 large requests
# Heaps are of 100 MB here, where a third of an API server's time goes into collecting them; of gigabytes in a real one.
GARBAGE = {"GOGC": "400"}
# Who wrote and read what, one JSON object a line; with the bodies of writes to status, which hold no text of a sample.
AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
omitManagedFields: true
rules:
- level: Request
  verbs: [patch]
  resources: [{group: claas.dev, resources: [distillrequests/status, loraadapters/status]}]
- level: Metadata
"""
API_SERVER_NAMES = (
    "DNS:localhost",
    "DNS:kubernetes",
    "DNS:kubernetes.default",
    "DNS:kubernetes.default.svc",
    "IP:127.0.0.1",
)
SERVICES = "10.0.0.0/24"
FIRST_SERVICE = "10.0.0.1"  # of `kubernetes.default`


def etcd_command(kube: Path, data: Path, client_port: int, peer_port: int) -> list[str | Path]:
    """etcd on loopback that never waits for the disk: its data outlives its process, not a power cut."""
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return [
        *(kube, "etcd", "--data-dir", data, "--unsafe-no-fsync", "--log-level", "warn"),
        *("--quota-backend-bytes", str(ETCD_BYTES)),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"),
    ]


def api_server_command(
    kube: Path, authority: Authority, etcd_port: int, port: int, hosts: Sequence[str]
) -> list[str | Path]:
    """An API server with RBAC, Pod Security and service-account tokens, whose certificate is good for ``hosts``."""
    own = authority.issue("apiserver", "kube-apiserver", hosts=[*API_SERVER_NAMES, f"IP:{FIRST_SERVICE}", *hosts])
    return [
        *(kube, "kube-apiserver", "--etcd-servers", f"http://127.0.0.1:{etcd_port}", "--secure-port", str(port)),
        *("--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction", "--allow-privileged"),
        *(
            "--client-ca-file",
            authority.certificate,
            "--tls-cert-file",
            own.certificate,
            "--tls-private-key-file",
            own.key,
        ),
        *("--service-account-issuer", "https://kubernetes.default.svc.cluster.local"),
        *("--service-account-signing-key-file", authority.service_account_key),
        *("--service-account-key-file", authority.service_account_key),
        *("--service-cluster-ip-range", SERVICES),
    ]


def controller_manager_command(kube: Path, authority: Authority, kubeconfig: Path) -> list[str | Path]:
    """The controllers behind Jobs, Deployments, garbage collection, namespaces … ; it listens nowhere."""
    return [
        *(kube, "kube-controller-manager", "--kubeconfig", kubeconfig, "--leader-elect=false", "--secure-port", "0"),
        *("--use-service-account-credentials", "--root-ca-file", authority.certificate),
        *("--kube-api-qps", "500", "--kube-api-burst", "1000"),  # the default 20 a second makes the start 4 s longer
        *("--service-account-private-key-file", authority.service_account_key),
    ]


class ControlPlane:
    """A control plane whose state lies in ``folder``; ``stop`` and ``start`` keep data, certificates and port.

    Its processes die with the thread that started them, however that ends.

    Attributes:
        kubeconfig: of a cluster admin.
        api: the same identity, for the few calls without a client library.
        processes: by name (``etcd``, ``kube-apiserver``, ``kube-controller-manager``), for tests that kill one.
        logs: the folder of their logs.
        audit: the API server's audit log, with ``audit``.
    """

    def __init__(self, folder: Path, *, controllers: bool = True, audit: bool = False) -> None:
        self.folder, self.logs, self._controllers = folder, folder / "log", controllers
        self.audit = folder / "audit.log" if audit else None
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: list[int] = []

    def start(self) -> None:
        """Returns when the API server is ready, with the ``default`` service account where there are controllers.

        Raises:
            ClusterError: it is not, after a minute; with the last log lines.
        """
        programs.ensure_packages(programs.CONTROL_PLANE_PACKAGES)
        kube = programs.ensure_kube() / "kube"
        self.logs.mkdir(parents=True, exist_ok=True)
        for attempt in range(3):
            self._ports = self._ports or _free_ports(3)
            try:
                return self._start(kube)
            except ClusterError as error:
                self.stop()
                if "address already in use" not in str(error) or attempt == 2:
                    raise
                self._ports = []  # somebody took one between our look and our use

    def _start(self, kube: Path) -> None:
        etcd_port, peer_port, port = self._ports
        authority = Authority(self.folder / "pki")
        self.url, self.authority = f"https://127.0.0.1:{port}", authority
        self._spawn("etcd", etcd_command(kube, self.folder / "etcd", etcd_port, peer_port))
        loopback = [
            "--bind-address",
            "127.0.0.1",
            "--advertise-address",
            "127.0.0.1",
            "--endpoint-reconciler-type",
            "none",
        ]
        command = [*api_server_command(kube, authority, etcd_port, port, []), *loopback, *self._audit_flags()]
        self._spawn("kube-apiserver", command)
        self.kubeconfig = self.kubeconfig_of("admin", ["system:masters"])
        self.api = Api(self.url, authority.certificate, authority.issue("admin", "admin", groups=["system:masters"]))
        logs = [self.logs / name for name in self.processes]
        wait_for("the API server", self.api.ready, START_SECONDS, needs=self.processes, logs=logs)
        if self._controllers:  # which give up on an API server that takes ten seconds to answer
            kubeconfig = self.kubeconfig_of("system:kube-controller-manager")
            self._spawn("kube-controller-manager", controller_manager_command(kube, authority, kubeconfig))
            logs.append(self.logs / "kube-controller-manager")
            account = "/api/v1/namespaces/default/serviceaccounts/default"
            what = "the controller manager (service account `default`)"
            wait_for(what, lambda: bool(self.api.get(account)), START_SECONDS, needs=self.processes, logs=logs)

    def _audit_flags(self) -> list[str]:
        if self.audit is None:
            return []
        policy = self.folder / "audit-policy.yaml"
        policy.write_text(AUDIT_POLICY)
        whole = ["--audit-log-maxsize", "100000"]  # megabytes; by default a file ends at 100
        return ["--audit-policy-file", str(policy), "--audit-log-path", str(self.audit), *whole]

    def _spawn(self, name: str, command: Sequence[str | Path]) -> None:
        self.processes[name] = spawn(command, self.logs / name, environment=GARBAGE)

    def stop(self) -> None:
        """Kills every process; the folder stays."""
        kill(list(self.processes.values()))
        self.processes.clear()

    def kubeconfig_of(self, user: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig with which the API server sees ``user`` in ``groups``, to try what RBAC lets them do."""
        name = user.replace(":", "-")
        identity = self.authority.issue(name, user, groups=groups)
        return write_kubeconfig(self.folder / f"{name}.kubeconfig", self.url, self.authority.certificate, identity)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
