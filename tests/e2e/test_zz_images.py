"""The images that users build: everything inside, nothing mounted. Last, and as often as their dependencies change."""

from __future__ import annotations

import pytest

import deployment
import images
from cluster.nodes import Cluster
from deployment import NAMESPACE, Deployment
from e2e import story
from kubectl import condition

pytestmark = [pytest.mark.images, pytest.mark.e2e, pytest.mark.timeout(3600)]


@pytest.fixture(scope="session")
def room() -> None:
    """Said before anything is built: a full disk fails somewhere else, with somebody else's words."""
    if why := images.no_room():
        pytest.skip(why)


@pytest.mark.usefixtures("room")
def test_user_runs_a_request_on_the_full_images(installed: Deployment, cluster: Cluster) -> None:
    deployment.uninstall(installed)
    where = deployment.install(cluster, given=installed.given, full=True)
    name = story.unique("full")
    story.create_adapter(where, name)
    story.request(where, f"{name}-1", adapterRef={"name": name}, samples=[story.sample("Paris, in full.")])
    done = story.complete(where, f"{name}-1", seconds=600)
    assert condition(done, "Complete")["reason"] == "Succeeded"
    for pod in where.kubectl.get("pod", "-n", NAMESPACE):
        claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["spec"]["volumes"]]
        assert "claas-deps" not in claims or "seaweedfs" in pod["metadata"]["name"]
    images.verified().touch()
