"""Both clients against the real server, API server, operator and object store; steps take no time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import operations
from claas_client import (
    AsyncClient,
    BadRequest,
    Client,
    Conflict,
    Forbidden,
    NotFound,
    RequestFailed,
    Unauthorized,
    WaitTimeout,
)
from claas_crds import names
from cluster.controlplane import ControlPlane
from objectstore import ObjectStore
from operatorkit import MODEL
from operatorstage import GROUP, apply_crds
from shimstage import Shim, ShimStage, shim_stage

pytestmark = pytest.mark.controlplane

SAMPLE: Any = {"prompt": "SECRET prompt", "response": "SECRET response", "feedback": "SECRET feedback"}


@pytest.fixture(scope="module")
def stage(
    control_plane: ControlPlane, object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ShimStage]:
    apply_crds(control_plane)
    with shim_stage(control_plane, tmp_path_factory.mktemp("client"), "client", object_store) as made:
        yield made


@pytest.fixture(scope="module")
def shim(stage: ShimStage) -> Shim:
    return stage.start_shim()


@pytest.fixture(scope="module")
def client(shim: Shim, stage: ShimStage) -> Iterator[Client]:
    with Client(shim.url, token=stage.token()) as made:
        yield made


def uri(stage: ShimStage, name: str) -> str:
    return f"s3://adapters/{stage.team}/{name}/"


def test_a_bare_version_is_trained_and_the_numbers_come_back(client: Client, stage: ShimStage) -> None:
    made = client.distill(lora_uri=uri(stage, "bare"), training={"learning_rate": 1e-3, "preset": "paper"}, **SAMPLE)
    assert made.lora_uri.startswith(uri(stage, "bare").rstrip("/") + "-")
    assert made.metadata.tokens_processed == 7


async def test_the_same_by_awaiting(shim: Shim, stage: ShimStage) -> None:
    async with AsyncClient(shim.url, token=stage.token()) as client:
        made = await client.distill_lite(lora_uri=uri(stage, "lite"), teacher_logprobs=[-0.1, -0.2], **SAMPLE)
        assert made.metadata.tokens_processed == 7
        assert len([found async for found in client.requests()]) >= 1


def test_an_adapter_by_name_from_its_requests_to_its_versions(client: Client, stage: ShimStage) -> None:
    stage.adapter("named")
    handle = client.submit(adapter="named", **SAMPLE)
    events = list(handle.events())
    assert events[-1].type == "end"
    assert events[-1].request.state == "Complete"
    made = handle.wait(timeout=20)
    head = client.adapter("named")
    assert (head.lora_uri, head.steps, head.base_model) == (made.lora_uri, 1, MODEL)
    assert [version.seq for version in client.versions("named")] == [2, 1]
    assert [version.seq for version in client.lineage("named").items] == [2, 1]
    assert [found.id for found in client.requests(adapter="named")] == [handle.id]
    assert "named" in [found.name for found in client.adapters()]
    assert handle.request().ended


def test_the_same_key_is_the_same_request_and_another_body_a_conflict(client: Client, stage: ShimStage) -> None:
    body: Any = {"lora_uri": uri(stage, "key"), **SAMPLE}
    first, again = (client.submit(idempotency_key="k-1", **body) for _ in range(2))
    assert first.id == again.id
    assert first.wait(timeout=20) == client.distill(idempotency_key="k-1", **body)
    assert client.submit(idempotency_key="k-1", **body).accepted.state == "Complete", "it has ended long ago"
    with pytest.raises(Conflict):
        client.submit(idempotency_key="k-1", lora_uri=uri(stage, "other"), **SAMPLE)


def test_a_request_that_fails_is_an_exception_with_its_reason(client: Client, stage: ShimStage) -> None:
    bad: Any = {"lora_uri": uri(stage, "bad"), "prompt": "bad", "response": "r"}
    with pytest.raises(RequestFailed) as caught:
        client.distill(**bad)
    assert caught.value.reason == "EmptyResponse"
    with pytest.raises(RequestFailed) as caught:
        client.submit(**bad).wait(timeout=20)
    assert caught.value.reason == "EmptyResponse"


def test_who_waits_too_long_goes_and_may_cancel(client: Client, stage: ShimStage) -> None:
    stage.adapter("unready", ready=False)
    handle = client.submit(adapter="unready", **SAMPLE)
    with pytest.raises(WaitTimeout) as caught:
        handle.wait(timeout=0.2)
    assert caught.value.request_id == handle.id
    with pytest.raises(WaitTimeout):
        list(client.events(handle.id, timeout=0.5))
    assert handle.cancel().cancelled
    with pytest.raises(RequestFailed) as failed:
        handle.wait(timeout=20)
    assert failed.value.reason == "Cancelled"


def test_a_mistake_names_its_field_and_never_quotes_it(client: Client, stage: ShimStage) -> None:
    with pytest.raises(BadRequest) as caught:
        client.distill(lora_uri=uri(stage, "x"), prompt="SECRET", response="r", training={"alpha": 7})
    assert caught.value.field == "training.alpha"
    assert caught.value.fix
    assert caught.value.request_id
    assert "SECRET" not in str(caught.value)
    with pytest.raises(BadRequest) as caught:
        client.distill(prompt="p", response="r")
    assert caught.value.field == "lora_uri"


def test_what_is_another_tenant_s_is_not_there(shim: Shim, client: Client, stage: ShimStage) -> None:
    handle = client.submit(lora_uri=uri(stage, "mine"), **SAMPLE)
    with Client(shim.url, token=stage.token("editor", stage.other)) as stranger:
        with pytest.raises(NotFound):
            stranger.request(handle.id)
    with Client(shim.url, token=stage.token("editor", stage.other), namespace=stage.team) as stranger:
        with pytest.raises(Forbidden):
            stranger.request(handle.id)
    with Client(shim.url) as nobody, pytest.raises(Unauthorized):
        nobody.whoami()


def test_health_and_whoami_and_reasons(client: Client, stage: ShimStage) -> None:
    health = client.health()
    assert health.operator.status == "healthy"
    assert health.workers.ready >= 1
    assert client.whoami().namespace == stage.team
    assert "AdapterBusy" in [found.reason for found in client.reasons()]


def test_init_lora_waits_for_the_operation_s_answer(client: Client, stage: ShimStage) -> None:
    kubelet = operations.soon(stage, "fresh")
    made = client.init_lora(uri(stage, "fresh"), name="fresh", lora_r=8, timeout=30)
    kubelet.join(timeout=30)
    assert made.lora_uri == uri(stage, "fresh")
    assert client.init_lora(uri(stage, "fresh"), name="fresh", lora_r=8) == made, "the same again is the same adapter"
    with pytest.raises(Conflict):
        client.init_lora(uri(stage, "fresh"), name="fresh", lora_r=16)


class Service(httpx.BaseTransport):
    """One address for several replicas: a call goes to the one that lives."""

    def __init__(self, *replicas: Shim) -> None:
        self.replicas = list(replicas)
        self._http = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """To the first that has not ended."""
        living = next(shim for shim in self.replicas if shim.process.poll() is None)
        request.url = request.url.copy_with(port=living.port)
        return self._http.handle_request(request)


def test_a_killed_server_costs_a_caller_nothing(stage: ShimStage, shim: Shim) -> None:
    """The next replica answers the same call: the client's own key makes it one request."""
    dying = stage.start_shim()
    stage.adapter("held", ready=False)

    def asked() -> list[dict[str, Any]]:
        items = stage.api("GET", f"{GROUP}/namespaces/{stage.team}/{names.REQUEST_PLURAL}")["items"]
        return [item for item in items if item["spec"].get("adapterRef", {}).get("name") == "held"]

    made: list[Any] = []
    with Client(dying.url, token=stage.token(), transport=Service(dying, shim)) as client:
        call = threading.Thread(target=lambda: made.append(client.distill(adapter="held", timeout=60, **SAMPLE)))
        call.start()
        stage.wait("the request", asked)
        dying.kill()
        operations.make_first_version(stage, "held")
        call.join(timeout=60)
    assert made and made[0].metadata.tokens_processed == 7
    assert len(asked()) == 1
