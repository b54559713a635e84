"""What and where the cluster of two nodes is: names, addresses and folders, for both sides of its namespaces."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import bootstrap


@dataclass(frozen=True)
class Node:
    """One of the machines that we pretend to have."""

    name: str
    number: int
    product: str  # the label that NVIDIA's feature discovery sets

    @property
    def address(self) -> str:
        return f"172.30.0.1{self.number}"

    @property
    def pods(self) -> str:
        """The addresses of its Pods."""
        return f"10.88.{self.number}.0/24"


NODES = {node.name: node for node in (Node("l40s", 1, "NVIDIA-L40S"), Node("a100", 2, "NVIDIA-A100-SXM4-80GB"))}
GPUS = "2"  # per node; numbers only: no device is behind them
GATEWAY = "172.30.0.1"  # the control plane's address: API server, DNS, the route between the nodes
NETWORK_BITS = 24
PODS = "10.88.0.0/16"
API_PORT = 6443
API_URL = f"https://{GATEWAY}:{API_PORT}"  # inside the cluster's network
ETCD_PORTS = (2379, 2380)
CLUSTER_LOG = "cluster"

MASKED = ("/run", "/var/lib/cni", "/var/lib/kubelet", "/var/log/containers")
"""Folders whose names are fixed in runc, CNI and the kubelet: each node has its own, mounted over the machine's."""


@dataclass(frozen=True)
class Layout:
    """The files of one cluster. ``state`` is wiped at every start; ``data`` outlives it, for the images in it."""

    state: Path
    data: Path
    programs: Path
    cgroup: str

    @classmethod
    def default(cls, program_folder: Path = Path()) -> Self:
        """In ``CLAAS_CLUSTER_DIR``, else the folder for temporary files. Clusters in two folders run side by side.

        Raises:
            ValueError: the folder would be hidden from the nodes.
        """
        state = Path(os.environ.get("CLAAS_CLUSTER_DIR") or Path(tempfile.gettempdir()) / "claas-cluster").resolve()
        for masked in MASKED:
            if state.is_relative_to(masked):
                raise ValueError(
                    f"CLAAS_CLUSTER_DIR={state}: must not lie in {masked}, which every node has its own of"
                )
        name = hashlib.sha256(str(state).encode()).hexdigest()[:8]
        return cls(state, bootstrap.cache_dir() / f"nodes-{name}", program_folder, f"claas-{name}")

    def save(self) -> None:
        self.config.write_text(json.dumps({key: str(value) for key, value in asdict(self).items()}))

    @classmethod
    def load(cls, state: Path) -> Self:
        """Of the cluster that runs, or ran last, in ``state``."""
        saved = json.loads((state / "config.json").read_text())
        return cls(state, Path(saved["data"]), Path(saved["programs"]), saved["cgroup"])

    @property
    def config(self) -> Path:
        return self.state / "config.json"

    @property
    def logs(self) -> Path:
        return self.state / "log"

    @property
    def kubeconfig(self) -> Path:
        """Of a cluster admin, for the host."""
        return self.state / "kubeconfig"

    @property
    def ready(self) -> Path:
        """Exists once the cluster was completely up."""
        return self.state / "ready"

    @property
    def died(self) -> Path:
        """Lists the components that ended since, one per line."""
        return self.state / "died"

    def log(self, component: str) -> Path:
        return self.logs / component
