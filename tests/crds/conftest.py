"""The resources in a real API server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import kubernetes
import pytest

from cluster import programs
from cluster.controlplane import ControlPlane
from kubectl import Kubectl

CRDS = Path(__file__).resolve().parents[2] / "crds"


@pytest.fixture(scope="package")
def kubectl(control_plane: ControlPlane) -> Kubectl:
    """kubectl of the API server's own version, with our definitions established."""
    kubectl = Kubectl(control_plane.kubeconfig, programs.ensure_kubectl())
    for definition in sorted(CRDS.glob("*.yaml")):
        kubectl("apply", "--server-side", "-f", str(definition))
        kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(definition))
    return kubectl


@pytest.fixture(scope="package")
def api(kubectl: Kubectl) -> Iterator[kubernetes.client.CustomObjectsApi]:
    """The same API server through the client library: faster than a process for each of many objects."""
    with kubernetes.config.new_client_from_config(str(kubectl.kubeconfig)) as client:
        yield kubernetes.client.CustomObjectsApi(client)


@pytest.fixture
def namespace(kubectl: Kubectl) -> str:
    """A namespace of the test's own."""
    name = f"crds-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    return name
