"""How the operator reaches the API server, and what it leaves there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from aiohttp import web
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from claas_crds.reasons import Reason
from claas_operator.actions import Describe, Note
from claas_operator.api import Api
from claas_operator.apply import Apply, Lost
from claas_operator.relist import relist
from claas_operator.settings import load
from claas_operator.snapshot import Adapter, Kind, Snapshot
from claas_operator.status import collection_waits, rollback_waits
from cluster.controlplane import ControlPlane
from operatorkit import Raw, request, snapshot
from operatorstage import OPERATOR, Stage


@pytest.mark.parametrize(
    ("excepted", "proxy"), [("", "http://proxy.example.com:3128"), ("10.0.0.1", None), ("api.example.com", None)]
)
async def test_the_proxy_of_the_environment_is_used_where_it_is_meant(
    monkeypatch: pytest.MonkeyPatch, excepted: str, proxy: str | None
) -> None:
    """It is looked up once: at every call it would cost as much as the call."""
    monkeypatch.setenv("https_proxy", "http://proxy.example.com:3128")
    monkeypatch.setenv("no_proxy", excepted)
    host = excepted or "10.0.0.1"
    configuration = client.Configuration(host=f"https://{host}:6443")
    api = Api(configuration)
    try:
        assert configuration.proxy == proxy
        assert api._client.rest_client.proxy == proxy
        assert not api._client.rest_client.pool_manager.trust_env
    finally:
        await api.close()


@pytest.mark.controlplane
async def test_an_event_said_twice_is_one_and_nobody_complains(
    stage: Stage, control_plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    """Another leader, or the same one after a restart, decides the same again: its words name the Event."""
    stage.adapter()
    configuration = client.Configuration()
    kubeconfig = str(control_plane.kubeconfig_of(OPERATOR))
    await config.load_kube_config(kubeconfig, client_configuration=configuration)
    api = Api(configuration)

    async def say(message: str) -> None:
        now, snapshot = datetime.now(UTC), Snapshot()
        found = snapshot.put(Kind.ADAPTER, stage.see_adapter(), now)
        assert isinstance(found, Adapter)
        note = Note(found, Reason.COLLECTING, message)
        told = Describe(adapter=found, status=collection_waits(found, message, now), note=note)
        await Apply(api, snapshot, load(stage.settings()), lambda: True)(told)

    try:
        with caplog.at_level(logging.DEBUG, "claas_operator"):
            for message in ("the store is away", "the store is away", "the store is full", "the store is away"):
                await say(message)
    finally:
        await api.close()
    told = sorted(event["note"] for event in stage.events())
    assert told == ["the store is away", "the store is full"]
    assert not caplog.records, "a repetition is no failure"
    assert stage.condition("Collected")["message"] == "the store is away", "the write itself went through"


@pytest.mark.controlplane
async def test_a_condition_that_is_written_loses_no_other(stage: Stage, control_plane: ControlPlane) -> None:
    """A merge patch replaces the list: it is computed whole, from the object whose version the patch names. Of two
    that began with the same object one is refused, instead of taking the other's condition away."""
    stage.adapter()
    configuration = client.Configuration()
    kubeconfig = str(control_plane.kubeconfig_of(OPERATOR))
    await config.load_kube_config(kubeconfig, client_configuration=configuration)
    api = Api(configuration)
    seen, using, now = stage.see_adapter(), load(stage.settings()), datetime.now(UTC)

    async def write(raw: Raw, made: Callable[[Adapter], Raw]) -> None:
        snapshot = Snapshot()
        found = snapshot.put(Kind.ADAPTER, raw, now)
        assert isinstance(found, Adapter)
        await Apply(api, snapshot, using, lambda: True)(Describe(adapter=found, status=made(found)))

    try:
        await write(seen, lambda adapter: collection_waits(adapter, "one", now))
        with pytest.raises(Lost):
            await write(seen, lambda adapter: rollback_waits(adapter, "two", now))
        await write(stage.see_adapter(), lambda adapter: rollback_waits(adapter, "two", now))
    finally:
        await api.close()
    after = {c["type"]: c for c in stage.see_adapter()["status"]["conditions"]}
    assert after.keys() == {"Collected", "RolledBack"}
    assert (after["Collected"]["message"], after["RolledBack"]["message"]) == ("one", "two")


@pytest.mark.parametrize("answer", ["<html>back soon</html>", "", "[]", '{"kind": "Status"}'])
async def test_an_answer_that_is_none_is_a_failure_and_no_empty_cluster(answer: str) -> None:
    """A load balancer may answer 200 with a page of its own; nothing is forgotten, freed or ended by that."""

    async def say(_: web.Request) -> web.Response:
        return web.Response(text=answer, content_type="application/json")

    application = web.Application()
    application.router.add_get("/{path:.*}", say)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    api = Api(client.Configuration(host=f"http://{host}:{port}"))
    seen = snapshot(request("r"))
    try:
        with pytest.raises(ApiException):
            await relist(api, seen, {})
        if "Status" not in answer:
            with pytest.raises(ApiException):
                await api.get(Kind.REQUEST, "team", "r")
    finally:
        await api.close()
        await runner.cleanup()
    assert seen.requests
