"""Helm, and the chart with each of its values files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chart.rendering import VARIANTS, Helm, Object
from cluster import programs
from cluster.controlplane import ControlPlane


@pytest.fixture(scope="package")
def helm() -> Helm:
    """The helm of the tests' own programs."""
    return Helm(programs.ensure_kubectl() / "helm")


@pytest.fixture(scope="package", params=list(VARIANTS))
def rendered(request: pytest.FixtureRequest, helm: Helm) -> list[Object]:
    """The chart's objects, for each of `VARIANTS`."""
    return helm.render(*VARIANTS[request.param])


@pytest.fixture(scope="package")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server of its own: the release's policies and kept CRDs would meet the other tests."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as own:
        yield own
