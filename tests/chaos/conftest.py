"""One control plane, one object store and one teacher for the kill matrix; a release of its own for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chaos.background import Background
from chaos.release import Release, World
from cluster.controlplane import ControlPlane
from objectstore import ObjectStore
from operatorstage import apply_crds


@pytest.fixture(scope="package")
def world(object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A control plane of its own, for the tests that kill it."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as control_plane, Background() as background:
        apply_crds(control_plane)
        made = World(control_plane, object_store, background, tmp_path_factory.mktemp("world"))
        yield made
        made.close()


@pytest.fixture
def releases(world: World, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Release]]:
    """Starts releases with changed settings."""
    with ExitStack() as stack:

        def start(**changes: Any) -> Release:
            return stack.enter_context(Release(world, tmp_path, request.node.name, **changes))

        yield start


@pytest.fixture
def release(releases: Callable[..., Release]) -> Release:
    """A release with nobody running in it yet."""
    return releases()
