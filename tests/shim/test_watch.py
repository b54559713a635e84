"""The one watch: it goes on over a restart of the API server, and whoever waits meanwhile hears of the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from kubernetes.aio import client, config

from claas_operator.shim import spec
from claas_operator.shim.cluster import Cluster, Gone, Object
from claas_operator.shim.informer import Informer
from claas_operator.snapshot import Kind
from cluster.controlplane import ControlPlane
from operatorstage import Stage, apply_crds

pytestmark = pytest.mark.controlplane

WAIT_SECONDS = 30


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One that the tests may stop."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane"), controllers=False) as own:
        apply_crds(own)
        yield own


@pytest.fixture
def stage(control_plane: ControlPlane, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    with Stage(control_plane, tmp_path, request.node.name) as made:
        yield made


@pytest.fixture
async def configuration(control_plane: ControlPlane) -> client.Configuration:
    """How to reach the API server."""
    made = client.Configuration()
    await config.load_kube_config(str(control_plane.kubeconfig), client_configuration=made)
    return made


@pytest.fixture
async def cluster(configuration: client.Configuration) -> AsyncIterator[Cluster]:
    made = Cluster(configuration)
    yield made
    await made.close()


@pytest.fixture
async def informer(cluster: Cluster) -> AsyncIterator[Informer]:
    """Of requests, as the shim has it."""
    made = Informer(cluster, Kind.REQUEST, spec.trim_request, keep=lambda raw: spec.ended(raw) is None)
    task = asyncio.create_task(made.run())
    await asyncio.wait_for(made.synced.wait(), WAIT_SECONDS)
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def finish(stage: Stage, name: str) -> None:
    """The request ends well."""
    at = "2026-01-01T00:00:00.000000Z"
    end = {"type": "Complete", "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": at}
    stage.api("PATCH", f"{stage.request_path(name)}/status", {"status": {"state": "Complete", "conditions": [end]}})


async def test_news_arrive_once_they_are_there(stage: Stage, informer: Informer) -> None:
    raw = stage.request("r")
    uid = raw["metadata"]["uid"]
    with informer.subscribe(uid) as early:
        await asyncio.wait_for(early.news(), WAIT_SECONDS)
        assert early.latest is not None and spec.ended(early.latest) is None
        with informer.subscribe(uid) as late:
            await asyncio.wait_for(late.news(), WAIT_SECONDS)  # told at once what is known
            finish(stage, "r")
            for subscription in (early, late):
                await asyncio.wait_for(subscription.news(), WAIT_SECONDS)
                assert subscription.latest is not None and spec.ended(subscription.latest) is not None
    assert informer.over(raw) and informer.waiting == 0
    with informer.subscribe(uid) as after:
        assert after.latest is None, "an ended request is not kept"
        stage.api("DELETE", stage.request_path("r"))
        await asyncio.wait_for(after.news(), WAIT_SECONDS)
        assert after.gone


async def test_who_comes_after_an_object_was_deleted_need_not_wait(stage: Stage, informer: Informer) -> None:
    """It was read, and went before anybody subscribed to it: nothing more is ever heard of it."""
    raw, other = stage.request("r"), stage.request("s")
    with informer.subscribe(raw["metadata"]["uid"]) as before, informer.subscribe(other["metadata"]["uid"]) as beside:
        for subscription in (before, beside):
            await asyncio.wait_for(subscription.news(), WAIT_SECONDS)
        stage.api("DELETE", stage.request_path("r"))
        await asyncio.wait_for(before.news(), WAIT_SECONDS)
    with informer.subscribe(raw["metadata"]["uid"]) as late:
        assert late.latest is None and informer.over(raw)
        assert not informer.over(other)
        younger = other["metadata"] | {"uid": "not-heard-of-yet", "resourceVersion": str(2**62)}
        assert not informer.over({"metadata": younger})


async def test_an_api_server_that_restarts(stage: Stage, control_plane: ControlPlane, informer: Informer) -> None:
    uids = [stage.request(name)["metadata"]["uid"] for name in ("kept", "ended", "deleted")]
    with informer.subscribe(uids[1]) as ended, informer.subscribe(uids[2]) as deleted:
        for subscription in (ended, deleted):
            await asyncio.wait_for(subscription.news(), WAIT_SECONDS)
        control_plane.stop()
        control_plane.start()  # from this thread, with which its processes end
        finish(stage, "ended")
        stage.api("DELETE", stage.request_path("deleted"))
        while ended.latest is None or spec.ended(ended.latest) is None:
            await asyncio.wait_for(ended.news(), WAIT_SECONDS)
        while not deleted.gone:
            await asyncio.wait_for(deleted.news(), WAIT_SECONDS)
        assert informer.connected


async def test_a_watch_that_is_too_old_lists_again(
    stage: Stage, configuration: client.Configuration, cluster: Cluster
) -> None:
    with pytest.raises(Gone):
        async for _ in cluster.watch(Kind.REQUEST, "1"):
            pass

    class Forgetful(Cluster):
        """An API server that has forgotten what the first watch asks for, and tells when it is asked."""

        asked = 0
        again = asyncio.Event()

        async def watch(self, kind: Kind, version: str) -> AsyncIterator[tuple[str, Object]]:
            self.asked += 1
            if self.asked == 1:
                await asyncio.to_thread(stage.request, "meanwhile")
                raise Gone
            self.again.set()
            async for event in super().watch(kind, version):
                yield event

    forgetful = Forgetful(configuration)
    informer = Informer(forgetful, Kind.REQUEST, spec.trim_request, keep=lambda raw: spec.ended(raw) is None)
    task = asyncio.create_task(informer.run())
    async with asyncio.timeout(WAIT_SECONDS):
        await informer.synced.wait()
        await forgetful.again.wait()
        uid = stage.api("GET", stage.request_path("meanwhile"))["metadata"]["uid"]
        with informer.subscribe(uid) as subscription:
            await subscription.news()
            assert subscription.latest is not None and subscription.latest["metadata"]["name"] == "meanwhile"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await forgetful.close()
