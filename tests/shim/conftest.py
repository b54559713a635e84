"""The shim's process against the real API server, operator and object store; steps take no time."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from cluster.controlplane import ControlPlane
from objectstore import ObjectStore
from operatorstage import apply_crds
from shimstage import Shim, ShimStage, shim_stage


@pytest.fixture(scope="package")
def claas_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server of its own with our two kinds."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as own:
        apply_crds(own)
        yield own


@pytest.fixture(scope="module")
def stage(
    claas_api: ControlPlane,
    object_store: ObjectStore,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[ShimStage]:
    """A release of the module's own, with an operator and a worker."""
    name = request.module.__name__.rpartition("test_")[2]
    with shim_stage(claas_api, tmp_path_factory.mktemp(name), name, object_store) as made:
        yield made


@pytest.fixture(scope="module")
def shim(stage: ShimStage) -> Shim:
    """The module's shim."""
    return stage.start_shim()


@pytest.fixture(scope="module")
def team(shim: Shim) -> Iterator[httpx.Client]:
    """Somebody who may do everything in the namespace `team`."""
    with shim.client() as client:
        yield client
