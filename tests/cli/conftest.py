"""A release with an operator, a worker whose steps take no time, and a server; and `claas` by either way to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clikit import Claas
from cluster.controlplane import ControlPlane
from objectstore import ObjectStore
from operatorkit import Raw
from operatorstage import RBAC, apply_crds
from shimstage import EDITOR_RULES, Shim, ShimStage, shim_stage

USER = "somebody"


@pytest.fixture(scope="package")
def claas_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server of its own with our two kinds."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as own:
        apply_crds(own)
        yield own


@pytest.fixture(scope="package")
def stage(
    claas_api: ControlPlane, object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ShimStage]:
    """The release. `somebody` may edit in `team`, and see nothing else."""
    with shim_stage(claas_api, tmp_path_factory.mktemp("cli"), "cli", object_store) as made:
        subject: Raw = {"kind": "User", "name": USER, "apiGroup": "rbac.authorization.k8s.io"}
        reference: Raw = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": USER}
        base = f"{RBAC}/namespaces/{made.team}"
        made.api("POST", f"{base}/roles", {"metadata": {"name": USER}, "rules": EDITOR_RULES})
        made.api(
            "POST",
            f"{base}/rolebindings",
            {"metadata": {"name": USER}, "roleRef": reference, "subjects": [subject]},
        )
        yield made


@pytest.fixture(scope="package")
def shim(stage: ShimStage) -> Shim:
    """The server."""
    return stage.start_shim()


@pytest.fixture(params=["kubeconfig", "url"])
def claas(request: pytest.FixtureRequest, stage: ShimStage, shim: Shim) -> Claas:
    """The command as `somebody` uses it, by either way."""
    if request.param == "url":
        return Claas({"CLAAS_URL": shim.url, "CLAAS_TOKEN": stage.token()})
    return Claas({"KUBECONFIG": str(stage.control_plane.kubeconfig_of(USER)), "CLAAS_NAMESPACE": stage.team})


@pytest.fixture
def admin(stage: ShimStage) -> Claas:
    """The command as the cluster's administrator uses it."""
    return Claas({"KUBECONFIG": str(stage.control_plane.kubeconfig), "CLAAS_NAMESPACE": stage.team})
