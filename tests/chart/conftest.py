"""Helm, and the chart with each of its values files."""

from __future__ import annotations

import pytest

from chart.rendering import VARIANTS, Helm, Object
from cluster import programs


@pytest.fixture(scope="session")
def helm() -> Helm:
    """The helm of the tests' own programs."""
    return Helm(programs.ensure_kubectl() / "helm")


@pytest.fixture(scope="session", params=list(VARIANTS))
def rendered(request: pytest.FixtureRequest, helm: Helm) -> list[Object]:
    """The chart's objects, for each of `VARIANTS`."""
    return helm.render(*VARIANTS[request.param])
