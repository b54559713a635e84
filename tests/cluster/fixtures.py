"""pytest fixtures: a real API server alone, and a real cluster of two nodes (or the one that KUBECONFIG names)."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import nodes, programs
from cluster.controlplane import ControlPlane
from cluster.nodes import Cluster


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd, the API server and the controller manager alone; ends with the session."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as control_plane:
        yield control_plane


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster of ``KUBECONFIG`` where that is set; else the two nodes, started or reused, which stay up."""
    if given := os.environ.get("KUBECONFIG"):
        kubectl = shutil.which("kubectl")
        tools = Path(kubectl).parent if kubectl and shutil.which("helm") else programs.ensure_kubectl()
        return Cluster(Path(given), tools, tmp_path_factory.mktemp("given-cluster"))
    if os.geteuid() != 0:
        pytest.skip("the two-node cluster needs root; or set KUBECONFIG to a cluster of yours")
    return nodes.up()
