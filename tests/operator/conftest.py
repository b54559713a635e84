"""The operator's process against the real API server; Pods, Leases and workers are played by `Stage`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.controlplane import ControlPlane
from operatorstage import Stage, apply_crds


@pytest.fixture(scope="package")
def claas_api(control_plane: ControlPlane) -> ControlPlane:
    """The API server with our two kinds."""
    apply_crds(control_plane)
    return control_plane


@pytest.fixture
def stage(claas_api: ControlPlane, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """A release of its own: namespaces, settings and processes that end with the test."""
    with Stage(claas_api, tmp_path, request.node.name) as made:
        yield made


@pytest.fixture
def unused_port() -> int:
    """A port of the loopback that was free just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.fixture(scope="package")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server of its own: the operator's tests play every Pod and read every event."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as own:
        yield own
