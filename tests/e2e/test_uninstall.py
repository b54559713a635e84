"""`helm uninstall` takes everything of the release and nothing of the user's."""

from __future__ import annotations

import pytest

import deployment
from claas_store.version import read_version
from cluster.nodes import Cluster
from deployment import NAMESPACE, USER, Deployment
from e2e import story

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_user_uninstalls_and_finds_the_adapters_untouched(installed: Deployment, cluster: Cluster) -> None:
    name = story.unique("kept")
    story.create_adapter(installed, name)
    story.request(installed, f"{name}-1", adapterRef={"name": name}, samples=[story.sample("Paris.")])
    before = story.complete(installed, f"{name}-1")["status"]

    deployment.uninstall(installed)
    assert installed.kubectl("get", "job,pod,deploy,lease", "-n", NAMESPACE, "-o", "name").split() == []
    left = installed.kubectl.get("la,dr", "-n", USER)
    assert left, "the user's objects stay"
    assert [found["metadata"]["name"] for found in left if found["metadata"].get("finalizers")] == []

    again = deployment.install(cluster, given=installed.given)
    with again.store():
        assert read_version(before["loraUri"]).manifest.base_model == deployment.BASE_MODEL
    story.request(again, f"{name}-2", adapterRef={"name": name}, samples=[story.sample("Paris again.")])
    assert story.complete(again, f"{name}-2")["status"]["parent"]["uri"] == before["loraUri"]
